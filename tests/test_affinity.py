"""AffinityNet and random walk: the reference's numbers, the textbook form, weights files, training, bad input."""
import struct
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bnrcam import affinity
from bnrcam.affinity import HEADS, AffinityData, AffinityNet, affinity_labels, affinity_losses, attention_walk, \
    combine_labels, crf_seed, infer_walks, pad_to_cells, pair_affinities, pair_radius, pair_views, pseudo_label, \
    random_walk, read_seed, read_propagated, seed_labels, seen_image, train_affinity, transition_matrix, \
    walk_by_affinity, walk_by_attention, propagated_labels
from bnrcam.cam import attention_map, block_attention
from bnrcam.engine.weights import WeightsError
from bnrcam.crf import crf_labels, map_images
from bnrcam.data import DataError, VOCFolder, to_input
from bnrcam.models import create_classifier
from bnrcam.resnet38 import ResNet38, load_resnet38, parameter_groups, read_params, torch_name
from bnrcam.scenes import SCENE_CLASSES, write_scenes
from bnrcam.cams import CAMs, seed_scores, write_cams
from bnrcam.train import poly
from golden.recipe import fill_state_dict, image
from references import close, golden, names


# parity with the reference

@pytest.fixture(scope='module')
def net():
    model = AffinityNet().eval()
    weights = fill_state_dict({name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()})
    return model


@pytest.mark.slow
def test_names_and_shapes(net):
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == names('state_resnet38_aff')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['psa_aff_64x96', 'psa_aff_96x128'])
def test_affinities(net, name):
    z = golden(name)
    images = torch.from_numpy(image(int(z['seed']), *z['hw']))[None]
    with torch.inference_mode():
        for key, value in ResNet38.forward(net, images)._asdict().items():
            close(value.mean((2, 3))[0], z[f'{key}_mean_hw'], 2e-5)
        features = net(images)
        pairs = pair_affinities(features)
        close(pairs, z['aff_pairs'], 2e-5)
        size = features.shape[-2:]
        weights = transition_matrix(pairs, size, beta=1).to_dense()
    close(weights / weights.diagonal()[:, None], z['aff_dense'], 2e-5)  # the diagonal is 1 / row sum


@pytest.mark.slow
def test_labels_and_losses(net):
    z = golden('psa_labels_192')
    labels = combine_labels(torch.from_numpy(z['la']), torch.from_numpy(z['ha']))[::8, ::8]
    assert (labels.numpy() == z['label']).all()
    for ours, theirs in zip(affinity_labels(labels[None]), (z['bg'], z['fg'], z['neg'])):
        assert (ours[0].numpy() == theirs).all()
    with torch.inference_mode():
        pairs = pair_affinities(net(torch.from_numpy(image(int(z['image_seed']), 192, 192))[None]))
    close(pairs, z['aff'], 2e-5)
    losses = affinity_losses(pairs, labels[None])
    for ours, theirs in {'loss': 'loss', 'loss_bg': 'bg_loss', 'loss_fg': 'fg_loss', 'loss_neg': 'neg_loss'}.items():
        np.testing.assert_allclose(losses[ours], z[theirs], rtol=1e-4)


@pytest.mark.slow
def test_walk(net, monkeypatch, tmp_path):
    z = golden('psa_walk_cat')
    photo = Image.fromarray(z['image'])
    monkeypatch.setattr(affinity, 'seed_scores', lambda cams: z['cam'].astype(np.float32))
    with torch.inference_mode():
        inputs = pad_to_cells(to_input(photo))
        pairs = pair_affinities(net(inputs[None]))
        propagated = walk_by_affinity(net, photo, CAMs(torch.from_numpy(z['cam_keys']), (100, 150), []))
    close(transition_matrix(pairs, (13, 19)).to_dense().T, z['trans_mat'], 1e-4)
    scores = propagated.scores * torch.tensor([0.42, 1, 1])[:, None, None]
    theirs = z['cam_rw'][[0, *z['cam_keys'] + 1]]
    close(scores, theirs, 1e-4)
    assert not np.delete(z['cam_rw'], [0, *z['cam_keys'] + 1], 0).any()  # nothing is lost with the other channels
    labels = propagated_labels(propagated)
    assert propagated.covers == labels.shape == (104, 152)
    # where the two best scores are further apart than both may be off, the label is theirs
    second, best = F.interpolate(scores[None], propagated.covers, mode='bilinear')[0].sort(0).values[-2:]
    clear = (best - second > 2e-4 * theirs.max()).numpy()
    inside = np.s_[:100, :150]
    assert clear.mean() > .99 and (labels[inside] == z['pred'])[clear[inside]].all()
    refined = crf_labels(seen_image(photo, propagated.covers), labels, 21)[inside]
    labels[inside] = np.where(clear[inside], labels[inside], z['pred'])
    assert (crf_labels(seen_image(photo, propagated.covers), labels, 21)[inside] == z['pred_crf']).all()
    monkeypatch.setattr(affinity, 'read_propagated', lambda path, size: propagated)
    (tmp_path / 'JPEGImages').mkdir()
    photo.save(tmp_path / 'JPEGImages/cat.png')
    assert (pseudo_label(tmp_path, 21, tmp_path, 0.42, True, 'cat') == refined).all()


def test_rates_and_momentum(net):
    z = golden('poly_lr')
    optimizer = torch.optim.SGD(parameter_groups(net.named_parameters(), HEADS, 0.01, 5e-4), 0.01, 5e-4)
    assert [group['momentum'] for group in optimizer.param_groups] == z['aff_momentum'].tolist()
    assert [group['weight_decay'] for group in optimizer.param_groups] == [5e-4, 0, 5e-4, 0]
    base = np.array([group['lr'] for group in optimizer.param_groups])
    inside = z['aff_step'] < z['aff_max_step']
    rates = [base * poly(step / int(z['aff_max_step'])) for step in z['aff_step'][inside].tolist()]
    np.testing.assert_allclose(rates, z['aff_lr'][inside], rtol=1e-12)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    trunk, biases, heads, head_biases = ([names[id(p)] for p in group['params']] for group in optimizer.param_groups)
    assert sorted(heads) == ['f8_3.weight', 'f8_4.weight', 'f8_5.weight', 'f9.weight'] and not biases + head_biases
    assert all('conv_branch' in name and not name.startswith('b2') for name in trunk) and len(trunk) == 35


# the sparse walk is the textbook walk

def textbook(pairs, size, scores, beta, steps):
    n = size[0] * size[1]
    start, ends = pair_views(torch.arange(n).view(*size))
    start, ends = start.flatten(), torch.stack([end.flatten() for end in ends])
    dense = torch.eye(n, dtype=torch.float64)
    dense[start.expand_as(ends), ends] = dense[ends, start.expand_as(ends)] = pairs.double()
    transition = dense**beta / (dense**beta).sum(0)
    return (scores.double().flatten(1) @ torch.linalg.matrix_power(transition, steps)).view_as(scores)


@pytest.mark.parametrize('size', [(5, 5), (5, 40), (9, 11), (21, 17)])
@pytest.mark.parametrize('beta, steps', [(14, 128), (1, 128), (8, 0), (3.5, 5)])
def test_sparse_is_dense(size, beta, steps):
    generator = torch.Generator().manual_seed(0)
    pairs = pair_affinities(20 * torch.rand(2, 7, *size, generator=generator))  # far apart: affinities of 0.001 to 1
    scores = torch.rand(2, 3, *size, generator=generator)
    transition = transition_matrix(pairs, size, beta)
    propagated = random_walk(transition, scores, steps)
    assert propagated.shape == scores.shape and transition.layout == torch.sparse_csr
    for each, theirs, ours in zip(pairs, scores, propagated):
        close(ours, textbook(each, size, theirs, beta, steps), 1e-4)
    assert torch.allclose(random_walk(transition, torch.ones(2, 1, *size), 128), torch.ones(2, 1, *size), atol=1e-4)


def test_no_warning_and_no_dense_matrix(recwarn):
    size = (150, 200)  # dense, this would be 3.6 GB
    pairs = torch.ones(1, 34, 146 * 192)
    random_walk(transition_matrix(pairs, size), torch.ones(1, 2, *size), 2)
    assert not recwarn.list


def test_radius():
    assert [pair_radius(size) for size in ((5, 9), (8, 12), (10, 10), (11, 30), (56, 56))] == [2, 3, 4, 5, 5]


@pytest.mark.parametrize('steps, beta', [(1, 1.), (3, 1.), (2, 4.)])
def test_attention_walk(steps, beta):
    generator = torch.Generator().manual_seed(1)
    queries, keys = ([torch.randn(2, 3, 1 + 4 * 5, 8, generator=generator) for _ in range(4)] for _ in 'qk')
    scores = torch.rand(2, 3, 4, 5, generator=generator)
    dense = attention_map([beta * query for query in queries], keys)
    dense = dense / dense.sum(-1, keepdim=True)
    theirs = scores.flatten(2) @ torch.linalg.matrix_power(dense, steps).transpose(1, 2)
    torch.testing.assert_close(attention_walk(scores, queries, keys, steps, beta).flatten(2), theirs)
    head = block_attention(queries[0][:, :1], keys[0][:, :1])
    powered = head**beta / (head**beta).sum(-1, keepdim=True)
    torch.testing.assert_close(block_attention(beta * queries[0][:, :1], keys[0][:, :1]), powered)


# weights files

def mxnet_name(name):
    "The name of one of our entries in `ilsvrc-cls_rna-a1`."
    layer, entry = name.rsplit('.', 1)
    stage, _, part = layer.partition('.')
    if part:
        number = stage[3:]
        kind, branch = part.split('_')
        stage = f"{'res' if kind == 'conv' else 'bn'}{stage[1]}{f'b{number}' if number else 'a'}_{branch}"
    if 'conv' in layer:
        return f'arg:{stage}_weight'
    entry = {'weight': 'gamma', 'bias': 'beta', 'running_mean': 'moving_mean', 'running_var': 'moving_var'}[entry]
    return f"{'aux' if 'moving' in entry else 'arg'}:{stage}_{entry}"


KINDS = {'float32': 0, 'float64': 1, 'float16': 2, 'uint8': 3, 'int32': 4}
MAGIC = {2: 0xF993FAC9, 1: 0xF993FAC8}


def params_bytes(arrays, form=2):
    "An MXNet file of the given form: 2 (1.x), 1 (0.9 to 0.11), 0 (before)."
    parts = [struct.pack('<QQQ', 0x112, 0, len(arrays))]
    for array in arrays.values():
        head = struct.pack('<I', MAGIC[form]) if form else b''
        head += struct.pack('<i', 0) if form == 2 else b''
        parts += [head, struct.pack(f"<I{array.ndim}{'q' if form else 'I'}", array.ndim, *array.shape)]
        parts += [struct.pack('<iii', 2, 0, KINDS[str(array.dtype)]), array.tobytes()]
    parts.append(struct.pack('<Q', len(arrays)))
    parts += [struct.pack('<Q', len(name)) + name.encode() for name in arrays]
    return b''.join(parts)


def trunk_arrays(model, dtype):
    arrays = {mxnet_name(name): value.numpy().astype(dtype) for name, value in model.state_dict().items()
              if not name.endswith('num_batches_tracked')}
    return arrays | {'arg:linear1000_weight': np.zeros((1000, 8), dtype), 'arg:linear1000_bias': np.zeros(1000, dtype)}


def random_trunk(seed=0, width=1 / 16):
    torch.manual_seed(seed)
    model = ResNet38(width)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.ndim == 1: value.uniform_(.5, 1.5)
    return model


def test_params_with_one_name_twice(tmp_path):
    "The last one would win, unsaid."
    arrays = trunk_arrays(random_trunk(), 'float32')
    content, name, other = params_bytes(arrays), *[*arrays][:2]
    (tmp_path / 'a.params').write_bytes(content.replace(struct.pack('<Q', len(other)) + other.encode(),
                                                        struct.pack('<Q', len(name)) + name.encode()))
    with pytest.raises(WeightsError, match='1 of them|of them different'): load_resnet38(ResNet38(1 / 16), tmp_path / 'a.params')


@pytest.mark.parametrize('form', [0, 1, 2])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_params_file(tmp_path, form, dtype):
    source, path = random_trunk(), tmp_path / 'trunk.params'
    path.write_bytes(params_bytes(trunk_arrays(source, dtype), form))
    model = AffinityNet(1 / 16)
    left_out = load_resnet38(model, path, affinity.HEADS)
    assert left_out == ['f8_3.weight', 'f8_4.weight', 'f8_5.weight', 'f9.weight']
    for name, value in source.state_dict().items():
        expected = value.to(getattr(torch, dtype)).float() if value.is_floating_point() else value
        assert torch.equal(model.state_dict()[name], expected), name
    assert load_resnet38(ResNet38(1 / 16), path) == []


def test_every_name_of_the_trunk():
    with torch.device('meta'): names = [name for name in ResNet38().state_dict() if not name.endswith('tracked')]
    mapped = [mxnet_name(name).removeprefix('arg:').removeprefix('aux:') for name in names]
    assert [torch_name(name) for name in mapped] == names and len(set(mapped)) == len(names) == 191
    assert {'res2a_branch2a_weight', 'res5b2_branch2b1_weight', 'bn7_moving_var', 'bn6a_branch2b2_beta'} <= set(mapped)


def test_scalars_types_and_order(tmp_path):
    arrays = {'arg:b': np.arange(6, dtype=np.float64).reshape(1, 2, 3), 'a': np.array([3], np.uint8),
              'aux:c': np.zeros((0, 4), np.int32)}
    (tmp_path / 'x.params').write_bytes(params_bytes(arrays))
    read = read_params(tmp_path / 'x.params')
    assert list(read) == ['b', 'a', 'c'] and read['c'].shape == (0, 4)
    assert read['b'].tolist() == arrays['arg:b'].tolist() and read['a'].dtype == torch.uint8


SMALL = {'arg:conv1a_weight': np.ones((4, 3, 3, 3), np.float32), 'aux:bn7_moving_mean': np.ones(4, np.float16)}


@pytest.mark.slow
@pytest.mark.parametrize('form', [0, 1, 2])
def test_truncated_anywhere(tmp_path, form):
    whole, path = params_bytes(SMALL, form), tmp_path / 'cut.params'
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match='cut.params') as caught: read_params(path)
        assert '\n' not in str(caught.value)


def spoil(at, code, value):
    whole = bytearray(params_bytes(SMALL))
    struct.pack_into(code, whole, at, value)
    return bytes(whole)


@pytest.mark.parametrize('content, message', [
    (b'', 'no MXNet'), (b'PK\x03\x04' * 99, 'no MXNet'), (b'\x80\x04' * 99, 'no MXNet'), (b'<html>' * 99, 'no MXNet'),
    (spoil(8, '<Q', 5), 'no MXNet'), (spoil(16, '<Q', 2**60), 'damaged|truncated'),
    (spoil(24, '<I', 0xF993FACA), 'damaged'),
    (spoil(28, '<i', 1), 'sparse'), (spoil(32, '<I', 0), 'damaged'), (spoil(36, '<q', -1), 'damaged'),
    (spoil(36, '<q', 2**60), 'truncated'), (spoil(76, '<i', 99), 'damaged'),
    (params_bytes(SMALL) + b'x', 'left over'), (params_bytes({}), 'another network')])
def test_foreign_params(tmp_path, content, message):
    (path := tmp_path / 'file.params').write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught: load_resnet38(ResNet38(1 / 16), path)
    assert '\n' not in str(caught.value) and 'file.params' in str(caught.value)


@pytest.mark.slow
def test_weights_of_another_network(tmp_path):
    source, path = random_trunk(), tmp_path / 'net.pth'
    state = source.state_dict()
    # as saved before PyTorch 0.4.1
    torch.save({name: value for name, value in state.items() if not name.endswith('tracked')}, path)
    assert load_resnet38(ResNet38(1 / 16), path) == []
    other = create_classifier('conformer_mini_patch16', 7).state_dict()
    for model, weights in ((ResNet38(1 / 8), state), (AffinityNet(1 / 16), state), (ResNet38(1 / 16), other),
                           (ResNet38(1 / 16), {**state, 'x': torch.ones(1)})):
        torch.save(weights, path)
        with pytest.raises(WeightsError, match='net.pth: weights of another') as caught: load_resnet38(model, path)
        assert '\n' not in str(caught.value)
    torch.save({**state, 'bn7.bias': state['bn7.bias'] / 0}, path)
    with pytest.raises(WeightsError, match='bn7.bias is not finite'): load_resnet38(ResNet38(1 / 16), path)
    with pytest.raises(WeightsError, match='no such'): load_resnet38(ResNet38(1 / 16), tmp_path / 'none.params')


# training

def test_frozen_parts():
    images = torch.randn(2, 3, 48, 48)
    for frozen in (True, False):
        model = AffinityNet(1 / 16, frozen).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(parameter_groups(model.named_parameters(), HEADS, .1, 0.), .1)
        pair_affinities(model(images)).mean().backward()
        optimizer.step()
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {'f9.weight', 'b3.conv_branch2a.weight'} <= moved
        for name in ('bn7.running_mean', 'conv1a.weight', 'b4.bn_branch2a.weight'): assert (name in moved) is not frozen


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    root = write_scenes(tmp_path_factory.mktemp('scenes') / 'mini', {'train': 10}, seed=5)
    return VOCFolder(root, 'train', SCENE_CLASSES)


def of(data):
    return data.root, data.classes


@pytest.fixture(scope='module')
def stages(scenes, tmp_path_factory):
    "Seeds made from the true masks, and their CRF pair."
    folder = tmp_path_factory.mktemp('stages')
    for name, labels in zip(scenes.names, scenes.labels):
        mask, classes = scenes.mask(name), labels.nonzero().flatten()
        maps = torch.stack([torch.from_numpy(mask == k + 1).float()[::8, ::8] for k in classes.tolist()])
        write_cams(folder / 'cams' / f'{name}.safetensors', CAMs(classes, mask.shape, [maps]), 'test')
    for key, background in (('low', .6), ('high', .25)):
        map_images(partial(crf_seed, *of(scenes), folder / 'cams', background), scenes.names, folder / key, workers=1)
    return folder


def small_net(frozen=False):
    torch.manual_seed(0)
    return AffinityNet(1 / 16, frozen)


def train(data, folder):
    model = small_net()
    return model, train_affinity(model, data, folder, epochs=3, batch_size=2, seed=0, lr=.05)


class Unplugged(AffinityData):
    "Cut off after a number of reads."
    reads = 23
    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0: raise KeyboardInterrupt
        return super().__getitem__(index)


class Same(AffinityData):
    "The same crop again and again."
    def __getitem__(self, index):
        torch.manual_seed(0)
        return super().__getitem__(0)


@pytest.mark.slow
def test_a_step_lowers_the_loss(scenes, stages, tmp_path):
    "Of the batch that it was made from, without dropout: true of any network, if the step is small."
    model, data = small_net(), Same(scenes, stages / 'low', stages / 'high', 96)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout2d): layer.p = 0.
    history = train_affinity(model, data, tmp_path, epochs=2, batch_size=len(data), seed=0, lr=1e-3)
    assert history.loss.iloc[1] < history.loss.iloc[0]


@pytest.mark.slow
def test_training_and_resume(scenes, stages, tmp_path):
    parts = (scenes, stages / 'low', stages / 'high', 96)
    model, history = train(AffinityData(*parts), tmp_path / 'whole')
    np.testing.assert_allclose(history.lr, [.05 * poly(step / 15) for step in (4, 9, 14)])
    with pytest.raises(KeyboardInterrupt): train(Unplugged(*parts), tmp_path / 'cut')
    resumed, again = train(AffinityData(*parts), tmp_path / 'cut')
    assert again.equals(history)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values()))


def test_fingerprint_sees_labels_and_crop(scenes, stages):
    high = stages / 'high'
    print_of = lambda low, crop, padding=0: AffinityData(scenes, stages / low, high, crop, padding).fingerprint()
    same = print_of('low', 96)
    assert same == print_of('low', 96)
    assert len({same, print_of('high', 96), print_of('low', 104), print_of('low', 96, 255)}) == 4


def test_padding(scenes, stages):
    for padding in (0, 255):
        torch.manual_seed(0)
        item = AffinityData(scenes, stages / 'low', stages / 'high', padding_label=padding)[0]
        assert item['image'].shape == (3, 448, 448) and item['labels'].shape == (56, 56)
        image, labels = item['image'][:, ::8, ::8], item['labels']
        outside = (image == 0).all(0)
        assert outside.float().mean() > .8 and (labels[outside] == padding).all()


def test_combined_labels():
    low, high = torch.tensor([[0, 0, 3, 3, 255, 0], [0, 3, 3, 0, 255, 255]], dtype=torch.uint8)
    assert combine_labels(low, high).tolist() == [0, 255, 3, 3, 255, 255]


# a whole split

def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != '.json'}


@pytest.mark.slow
def test_walk_of_a_split(scenes, stages, tmp_path):
    model = small_net()
    walk = partial(infer_walks, walk_by_affinity, model, scenes, stages / 'cams')
    folder = walk(tmp_path / 'walk', steps=16)
    before, times = files(folder), {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(before) == [f'{name}.safetensors' for name in sorted(scenes.names)]
    (folder / sorted(before)[3]).unlink()
    (folder / sorted(before)[4]).write_bytes(b'cut')
    walk(folder, steps=16)
    assert files(folder) == before == files(walk(tmp_path / 'again', steps=16))
    assert sum(path.stat().st_mtime_ns != times[path.name] for path in folder.iterdir()) == 2
    walk(folder, steps=8)
    assert all(files(folder)[name] != content for name, content in before.items())
    label = partial(pseudo_label, scenes.root, 7, folder, .42, True)
    one, two = (map_images(label, scenes.names, tmp_path / str(n), n) for n in (1, 2))
    assert one == two == 10 and files(tmp_path / '1') == files(tmp_path / '2')


def test_walk_by_attention(scenes, stages, tmp_path):
    torch.manual_seed(0)
    model = create_classifier('conformer_mini_patch16', 7)
    folder = infer_walks(walk_by_attention, model, scenes, stages / 'cams', tmp_path / 'walk', scale=96, steps=2)
    for name in scenes.names:
        propagated = read_propagated(folder / f'{name}.safetensors', scenes.mask(name).shape)
        assert propagated.scores.shape == (1 + len(propagated.classes), 6, 6) and propagated.covers == propagated.size
        torch.testing.assert_close(propagated.scores[0], torch.ones(6, 6))
        assert pseudo_label(scenes.root, 7, folder, .42, False, name).shape == propagated.size


def test_seed_labels():
    z = golden('cam_inference_tiny_cat')
    for background in (.25, .6):
        scores = np.concatenate([np.full((1, 133, 200), background, np.float32), z['norm_cam']])
        cams = CAMs(torch.from_numpy(z['class_ids']), (133, 200), [torch.from_numpy(z['norm_cam'].astype(np.float32))])
        ours, theirs = seed_labels(cams, background), np.append(0, z['class_ids'] + 1)[scores.argmax(0)]
        assert (ours == theirs).mean() > .99 and seed_scores(cams).shape == (2, 133, 200)


# bad input

def one_line(caught):
    assert '\n' not in str(caught.value)


def test_missing_seed(scenes, tmp_path):
    with pytest.raises(DataError, match='run the cams stage') as caught:
        read_seed(*of(scenes), tmp_path, scenes.names[0])
    one_line(caught)
    with pytest.raises(DataError, match=scenes.names[0]) as caught:
        infer_walks(walk_by_affinity, small_net(), scenes, tmp_path, tmp_path / 'out')
    one_line(caught)


def test_seed_of_another_size_or_class(scenes, tmp_path):
    name, size = scenes.names[0], scenes.mask(scenes.names[0]).shape
    classes = scenes.labels[0].nonzero().flatten()
    for cams, message in ((CAMs(classes, (7, 9), [torch.ones(len(classes), 3, 3)]), '9x7 pixels'),
                          (CAMs((classes + 1) % 6, size, [torch.ones(len(classes), 3, 3)]), 'classes')):
        write_cams(tmp_path / f'{name}.safetensors', cams, 'test')
        with pytest.raises(DataError, match=message) as caught: crf_seed(*of(scenes), tmp_path, .6, name)
        one_line(caught)


def one_image(root, size, annotation):
    "A data set of one black image, `a`."
    for part in ('JPEGImages', 'Annotations', 'ImageSets/Segmentation'): (root / part).mkdir(parents=True)
    Image.new('RGB', size).save(root / 'JPEGImages/a.jpg')
    (root / 'Annotations/a.xml').write_text(annotation)
    (root / 'ImageSets/Segmentation/train.txt').write_text('a')
    return VOCFolder(root, 'train', SCENE_CLASSES)


def test_no_foreground_class(tmp_path):
    data = one_image(tmp_path, (48, 48), '<annotation/>')
    write_cams(tmp_path / 'a.safetensors', CAMs(torch.zeros(0).long(), (48, 48), [torch.ones(0, 3, 3)]), 'test')
    for function in (partial(read_seed, *of(data), tmp_path), partial(crf_seed, *of(data), tmp_path, .6)):
        with pytest.raises(DataError, match='a: .*no foreground class') as caught: function('a')
        one_line(caught)


@pytest.mark.parametrize('size', [(1, 1), (32, 100), (100, 8)])
def test_tiny_image(tmp_path, size):
    name, data = 'a', one_image(tmp_path, size, '<annotation><object><name>fish</name></object></annotation>')
    classes = data.labels[0].nonzero().flatten()
    cams = CAMs(classes, size[::-1], [torch.rand(len(classes), 2, 2)])
    write_cams(tmp_path / 'cams' / f'{name}.safetensors', cams, 'test')
    with pytest.raises(DataError, match=f'{name}: .*at least 33 pixels') as caught:
        infer_walks(walk_by_affinity, small_net(), data, tmp_path / 'cams', tmp_path / 'walk')
    one_line(caught)
    assert crf_seed(*of(data), tmp_path / 'cams', .6, name).shape == size[::-1]  # the CRF takes any size


def test_missing_or_wrong_label_maps(scenes, stages, tmp_path):
    with pytest.raises(DataError, match='run the CRF') as caught: AffinityData(scenes, tmp_path, stages / 'high')
    one_line(caught)
    for name in scenes.names: (tmp_path / f'{name}.png').write_bytes((stages / f'low/{name}.png').read_bytes())
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / f'{scenes.names[0]}.png')
    with pytest.raises(DataError, match='3x3') as caught: AffinityData(scenes, tmp_path, stages / 'high')[0]
    one_line(caught)
    with pytest.raises(DataError, match='run the walk') as caught: read_propagated(tmp_path / 'none.safetensors', (3, 3))
    one_line(caught)
