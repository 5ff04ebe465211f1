"""Never an old result given as a new one: what is stored knows what it was made from, and a change in that is seen.

Most tests run a function twice in one folder, with one thing changed, and compare with what an empty folder gets."""
import importlib
import inspect
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bnrcam.affinity import walk_by_attention, AffinityData, AffinityNet, crf_seed, infer_walks, pseudo_label, walk_by_affinity
from bnrcam.crf import crf_folder, map_images
from bnrcam.data import DataError, VOCFolder, read_mask, write_mask
from bnrcam.engine import provenance as module
from bnrcam.engine.provenance import code, content_digest, describe, first_difference, provenance
from bnrcam.evaluate import evaluate_labels, evaluate_seeds
from bnrcam.losses import bnr_loss
from bnrcam.models import create_classifier
from bnrcam.resnet38 import ResNet38Classifier, train_trunk
from bnrcam.scenes import SCENE_CLASSES, voc_palette, write_scenes
from bnrcam.cams import CAMs, infer_cams, write_cams
from bnrcam.segment import SegmentData, deeplab, infer_segments, train_segmenter
from bnrcam.engine.checkpoints import save_tensors
from bnrcam.train import TrainingError, train_classifier, warmup_cosine
from bnrcam.datasets.transforms import train_transform
from bnrcam.conformer import CAMOutput

pytestmark = pytest.mark.slow

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes') / 'mini', sizes={'train': 8, 'val': 2})


@pytest.fixture
def root(scenes, tmp_path):
    return shutil.copytree(scenes, tmp_path / 'scenes')


def crops(root, **options):
    return VOCFolder(root, 'train', SCENE_CLASSES, train_transform((64, 96), 64), **options)


def conformer(drop_path_rate=0., num_classes=7):
    torch.manual_seed(0)
    return create_classifier({'name': 'conformer_mini_patch16', 'depth': 3, 'embed_dim': 48, 'drop_path_rate': drop_path_rate},
                             num_classes)


def train(folder, root, net=None, **options):
    "Three steps; returns the network and its history."
    net = net or conformer()
    settings = {'epochs': 3, 'lr': 1e-3, 'batch_size': 8, 'seed': 0, **options}
    return net, train_classifier(net, crops(root), 'noise1', folder, **settings)


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def contents(folder): return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob('*.*'))
                              if path.suffix in ('.png', '.safetensors')}


def exchange_picture(path):
    "Another picture of the same size in pixels and bytes, at the same date."
    old = path.stat()
    with Image.open(path) as image: pixels = np.array(image)
    for quality in range(90, 5, -5):
        Image.fromarray(pixels[::-1, ::-1].copy()).save(path, quality=quality)
        if path.stat().st_size <= old.st_size: break
    path.write_bytes(path.read_bytes().ljust(old.st_size, b'\0'))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert path.stat().st_size == old.st_size and path.stat().st_mtime_ns == old.st_mtime_ns


# training

def test_drop_path_rate(root, tmp_path, capsys):
    train(tmp_path / 'run', root, conformer(0.))
    net, _ = train(tmp_path / 'run', root, conformer(.6))
    alone, _ = train(tmp_path / 'own', root, conformer(.6))
    assert same(net, alone)
    line = next(line for line in capsys.readouterr().out.splitlines() if 'begins anew' in line)
    assert line.startswith(f'{tmp_path / "run"}: epoch 3 of 3 is there') and 'drop_prob' in line


@pytest.mark.parametrize('name, options', [('resnet38', {'width': 1 / 32}), ('resnet18', {})])
def test_batch_norm_momentum(root, tmp_path, name, options):
    learned = []
    for folder, momentum in (('run', 3e-4), ('run', .5), ('own', .5)):
        torch.manual_seed(0)
        net = deeplab(name, 7, momentum, **options)
        train_segmenter(net, SegmentData(crops(root, masks=True), None, crop=64), tmp_path / folder, iterations=2, batch_size=4,
                        seed=0)
        learned.append(net)
    assert same(*learned[1:]) and not same(*learned[:2])


def test_output_stride(root, tmp_path, capsys):
    learned = []
    for folder, stride in (('run', 8), ('run', 32), ('own', 32)):
        torch.manual_seed(0)
        net = deeplab('resnet18', 7, .1, output_stride=stride)
        train_segmenter(net, SegmentData(crops(root, masks=True), None, crop=64), tmp_path / folder, iterations=1,
                        batch_size=4, seed=0)
        infer_segments(net, root, ['train_00000'], tmp_path / f'{folder}-maps', scales=[1.], workers=1)
        learned.append(net)
    assert same(*learned[1:]) and not same(*learned[:2])
    assert contents(tmp_path / 'run-maps') == contents(tmp_path / 'own-maps')
    assert 'all are made again' in capsys.readouterr().out


def test_schedules(root, tmp_path):
    train(tmp_path / 'run', root, schedule=lambda progress: 1.)
    still, _ = train(tmp_path / 'run', root, schedule=lambda progress: 0.)
    assert torch.equal(still.cls_token, conformer().cls_token)
    outcomes = [train(tmp_path / 'run', root, schedule=partial(warmup_cosine, warmup=warmup))[1] for warmup in (.05, .05, .5)]
    assert outcomes[0].equals(outcomes[1]) and not outcomes[1].equals(outcomes[2])


def test_own_transform_is_known_again(root, tmp_path, capsys):
    crop, fill = train_transform((64, 96), 64), 1.
    def mine(item): return {**crop(item), 'image': crop(item)['image'] * fill}
    runs = []
    for fill in (1., 1., .5):
        data = VOCFolder(root, 'train', SCENE_CLASSES, mine)
        runs.append(train_classifier(conformer(), data, 'noise1', tmp_path, epochs=2, lr=1e-3, batch_size=8, seed=0))
    said = capsys.readouterr().out
    assert said.count('goes on after epoch 2 of 2') == 1 and said.count('begins anew') == 1 and 'fill (1.0, now 0.5)' in said
    assert runs[0].equals(runs[1]) and not runs[1].equals(runs[2])


@pytest.mark.parametrize('change', [{'lr': 5e-4}, {'weight_decay': 0.}, {'seed': 1}, {'batch_size': 4}, {'epochs': 2},
                                    {'precision': 'bf16'}, {'schedule': warmup_cosine}], ids=lambda change: [*change][0])
def test_settings_of_a_training(root, tmp_path, capsys, change):
    train(tmp_path / 'run', root)
    capsys.readouterr()
    net, _ = train(tmp_path / 'run', root, **change)
    said = capsys.readouterr().out
    assert 'begins anew' in said and [*change][0] in said
    assert same(net, train(tmp_path / 'own', root, **change)[0])


def test_start_and_photographs(root, tmp_path, capsys):
    train(tmp_path / 'run', root)
    other = conformer()
    torch.nn.init.ones_(other.cls_token)
    train(tmp_path / 'run', root, other)
    assert 'network weights' in capsys.readouterr().out
    exchange_picture(root / 'JPEGImages/train_00000.jpg')
    train(tmp_path / 'run', root, other)
    assert 'begins anew' in capsys.readouterr().out


def test_no_step(root, tmp_path):
    for folder in (tmp_path / 'new', tmp_path):
        with pytest.raises(TrainingError, match='0.2 epochs of 8 images in batches of 8 are no step'):
            train(folder, root, epochs=.2)
    assert not (tmp_path / 'new').exists() and not (tmp_path / 'history.csv').exists()


@pytest.mark.parametrize('value', [2., -1., .5])
def test_labels_that_are_neither_0_nor_1(root, tmp_path, value):
    data = VOCFolder(root, 'train', SCENE_CLASSES)
    data.labels[2, 1] = value
    with pytest.raises(ValueError, match=f'a label is {value:g}: 1 where the class is in the image, else 0'):
        train_classifier(conformer(), data, 'noise1', tmp_path / 'run', epochs=1, lr=1e-3, batch_size=8, seed=0)
    assert not (tmp_path / 'run').exists()


def test_store_of_another_order_of_classes(root, tmp_path):
    "Maps have the numbers of classes only: the apples of one order are the bananas of the other."
    data = VOCFolder(root, 'train', SCENE_CLASSES, masks=True)
    infer_cams(conformer(), data, tmp_path / 'cams', scales=[32])
    other = VOCFolder(root, 'train', SCENE_CLASSES[::-1], masks=True)
    for look in (lambda: evaluate_seeds(other, tmp_path / 'cams'),
                 lambda: infer_walks(walk_by_attention, conformer(), other, tmp_path / 'cams', tmp_path / 'walks', scale=32)):
        with pytest.raises(DataError, match='cams: CAMs of the classes apple, .* in this order: run the cams stage again'):
            look()


def test_outputs_that_do_not_fit_the_labels(root, tmp_path):
    one = VOCFolder(root, 'train', SCENE_CLASSES)
    one.classes, one.labels, one.transform = one.classes[:1], one.labels[:, :1], train_transform((64, 96), 64)
    with pytest.raises(ValueError, match=r'\(8, 20\).*\(8, 1\)'):
        train_classifier(conformer(num_classes=21), one, 'noise1', tmp_path, epochs=1, lr=1e-3, batch_size=8, seed=0)
    with pytest.raises(ValueError, match=r'\(8, 6\).*\(8, 1\)'):
        train_trunk(ResNet38Classifier(6, 1 / 32), one, tmp_path, epochs=1, lr=1e-3, batch_size=8, seed=0)
    for outputs, labels in (((4, 21), (4, 1)), ((4, 2), (4, 20))):
        output = CAMOutput(torch.zeros(*outputs, 2, 2), torch.zeros(*outputs), [], [])
        with pytest.raises(ValueError, match='do not fit'): bnr_loss(output, torch.zeros(*labels))


def test_weights_that_end_not_finite(root, tmp_path):
    for _ in range(2):
        with pytest.raises(TrainingError, match='is not finite after epoch 1'):
            train(tmp_path, root, epochs=1, lr=1e38)
    assert not (tmp_path / 'model.safetensors').exists()


def test_precision_is_that_of_the_training_alone(root, tmp_path):
    torch.manual_seed(0)
    net = ResNet38Classifier(6, 1 / 32)
    train_trunk(net, crops(root), tmp_path, epochs=1, lr=1e-3, batch_size=8, seed=0, precision='bf16')
    again = ResNet38Classifier(6, 1 / 32)
    again.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(net.eval()(x), again.eval()(x)) and 'forward' not in vars(net)


def test_unlabelled_image_is_named(root, tmp_path, capsys):
    (root / 'Annotations/train_00003.xml').write_text('<annotation/>')
    train(tmp_path / 'run', root, epochs=1)
    infer_cams(conformer(), VOCFolder(root, 'train', SCENE_CLASSES), tmp_path / 'cams', scales=[32])
    said = capsys.readouterr().out
    assert said.count('1 of 8 images have no label') == 2 and 'first train_00003' in said


@pytest.mark.parametrize('text', ['<annotation><objects><object><name>fish</name></object></objects></annotation>',
                                  '<annotation xmlns="http://voc"><object><name>fish</name></object></annotation>',
                                  '<annotation><Object><Name>fish</Name></Object></annotation>'])
def test_objects_that_stand_elsewhere(root, text):
    (root / 'Annotations/train_00003.xml').write_text(text)
    with pytest.raises(DataError, match='train_00003.xml.*as in VOC'): VOCFolder(root, 'train', SCENE_CLASSES)


# CAMs

def seeds(folder, root, net=None, **options):
    return infer_cams(net or conformer(), VOCFolder(root, 'train', SCENE_CLASSES), folder, **{'scales': [32], **options})


def test_photograph_behind_cams(root, tmp_path, capsys):
    seeds(tmp_path / 'run', root)
    exchange_picture(root / 'JPEGImages/train_00000.jpg')
    before = contents(tmp_path / 'run')
    after, own = contents(seeds(tmp_path / 'run', root)), contents(seeds(tmp_path / 'own', root))
    assert after == own and sum(after[name] != before[name] for name in before) == 1
    assert '1 files were made from other images' in capsys.readouterr().out


@pytest.mark.parametrize('change', [{'scales': [48]}, {'precision': 'bf16'}, {'net': conformer(.1)}], ids=['scales', 'precision', 'net'])
def test_settings_of_cams(root, tmp_path, change, capsys):
    seeds(tmp_path / 'run', root)
    assert contents(seeds(tmp_path / 'run', root, **change)) == contents(seeds(tmp_path / 'own', root, **change))
    assert '8 files are there' in capsys.readouterr().out


def test_outputs_that_do_not_fit_the_classes(root, tmp_path):
    for outputs in (2, 21):
        with pytest.raises(ValueError, match=f'has {outputs} outputs.*6 classes need 7'):
            seeds(tmp_path, root, conformer(num_classes=outputs))
    assert not contents(tmp_path / 'cams')


def test_data_set_stays_as_it_is(root, tmp_path):
    data = crops(root)
    infer_cams(conformer(), data, tmp_path / 'cams', scales=[32])
    train_classifier(conformer(), data, 'noise1', tmp_path / 'run', epochs=1, lr=1e-3, batch_size=8, seed=0)


# walks, label maps, predictions

@pytest.fixture
def store(root, tmp_path):
    return seeds(tmp_path / 'cams', root)


def affinity(seed=0):
    torch.manual_seed(seed)
    return AffinityNet(1 / 32, frozen=False)


def labels(root, store, place, net, beta=4, background=.42):
    "Walks by `net`, and the label maps of them."
    data = VOCFolder(root, 'train', SCENE_CLASSES)
    walks = infer_walks(walk_by_affinity, net, data, store, place / 'walks', beta=beta, steps=2)
    map_images(partial(pseudo_label, root, 7, walks, background, True), data.names, place / 'maps', workers=1)
    return contents(place / 'maps')


def test_network_behind_label_maps(root, store, tmp_path):
    for change in ({}, {'net': affinity(1)}, {'net': affinity(1), 'beta': 2}, {'net': affinity(1), 'background': .3}):
        arguments = {'net': affinity(), **change}
        shutil.rmtree(tmp_path / 'own', ignore_errors=True)
        in_place, own = (labels(root, store, tmp_path / place, **arguments) for place in ('run', 'own'))
        assert in_place == own


def test_photograph_behind_crf_maps(root, store, tmp_path, capsys):
    function = partial(crf_seed, root, SCENE_CLASSES, store, .4)
    names = ['train_00000', 'train_00001']
    assert map_images(function, names, tmp_path / 'run', workers=1) == 2
    assert map_images(function, names, tmp_path / 'run', workers=1) == 0
    exchange_picture(root / 'JPEGImages/train_00000.jpg')
    assert map_images(function, names, tmp_path / 'run', workers=1) == 1
    map_images(function, names, tmp_path / 'own', workers=1)
    assert contents(tmp_path / 'run') == contents(tmp_path / 'own')
    assert map_images(partial(crf_seed, root, SCENE_CLASSES, store, .3), names, tmp_path / 'run', workers=1) == 2
    assert 'arguments' in capsys.readouterr().out


def test_files_of_crf_folder(root, tmp_path):
    maps = tmp_path / 'labels'
    maps.mkdir()
    for name in ('train_00000', 'train_00001'): shutil.copy(root / f'SegmentationClass/{name}.png', maps)
    for path in maps.iterdir(): write_mask(path, read_mask(path, 7) % 255, voc_palette())
    run = lambda place: crf_folder(root / 'JPEGImages', maps, tmp_path / place, 7, workers=1)
    assert (run('run'), run('run')) == (2, 0)
    exchange_picture(root / 'JPEGImages/train_00000.jpg')
    write_mask(maps / 'train_00001.png', 0 * read_mask(maps / 'train_00001.png', 7), voc_palette())
    assert (run('run'), run('own')) == (2, 2) and contents(tmp_path / 'run') == contents(tmp_path / 'own')
    with pytest.raises(DataError, match='would be overwritten'): crf_folder(root / 'JPEGImages', maps, maps, 7)


def test_photograph_behind_predictions(root, tmp_path):
    torch.manual_seed(0)
    net = deeplab('resnet38', 7, width=1 / 32)
    run = lambda place, **options: contents(infer_segments(net, root, ['train_00000', 'train_00001'], tmp_path / place,
                                                           **{'scales': [1.], 'workers': 1, **options}))
    before = run('run')
    exchange_picture(root / 'JPEGImages/train_00000.jpg')
    after = run('run')
    assert after == run('own') and sum(after[name] != before[name] for name in before) == 2
    assert run('run', scales=[.5]) == run('half', scales=[.5])


def test_networks_that_are_not_finite(root, store, tmp_path):
    net = affinity()
    net.f9.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match='not finite'): labels(root, store, tmp_path, net)
    segmenter = deeplab('resnet38', 7, width=1 / 32)
    segmenter.cls_conv.weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match='train_00000: a logit is not finite'): infer_segments(segmenter, root, ['train_00000'], tmp_path, scales=[1.], workers=1)
    assert not contents(tmp_path / 'plain') and not contents(tmp_path / 'crf')


# stages: the notebooks that papermill runs

REPO = Path(__file__).parents[1]


def run_stage(name, root, place, **parameters):
    "Run a stage in an empty project folder."
    import papermill
    place.mkdir(exist_ok=True)
    defaults = {'profile': 'small', 'root': str(root), 'compute': {'threads': 1, 'workers': 0, 'precision': 'no',
                                                                       'checkpointing': False}}
    papermill.execute_notebook(REPO / f'nbs/stages/{name}.ipynb', place / f'{name}.ipynb', {**defaults, **parameters}, cwd=place,
                               progress_bar=False, start_timeout=600, kernel_name='warm')


def test_stage_with_another_drop_path_rate(root, tmp_path):
    losses = []
    for rate, place in ((0., 'run'), (.6, 'run'), (.6, 'own')):
        run_stage('pretrain', root, tmp_path / place, dataset={'pretrain': 'train', 'classes': list(SCENE_CLASSES)},
                  model={'name': 'conformer_mini_patch16', 'drop_path_rate': rate}, augment={'long_side': [64, 96], 'crop': 64},
                  pretrain={'epochs': 2, 'lr': 1e-3, 'weight_decay': .1, 'batch_size': 8})
        losses.append((tmp_path / place / 'data/runs/small/pretrain-s0/history.csv').read_text())
    assert losses[1] == losses[2] != losses[0]


def test_stage_with_other_trunk_weights(root, tmp_path):
    "Under the same path: walks and maps are those of the new ones."
    settings = {'dataset': {'train': 'train', 'eval': 'train', 'scored': None, 'masks': True, 'classes': list(SCENE_CLASSES)},
                'model': {'name': 'conformer_mini_patch16'}, 'inference': {'scales': [32, 64]},
                'affinity': {'width': 1 / 32, 'frozen': False, 'weights': 'trunk.safetensors', 'crop': 64, 'padding_label': 255,
                             'epochs': 1, 'lr': .05, 'batch_size': 4}}
    torch.manual_seed(0)
    net = create_classifier('conformer_mini_patch16', 7)
    for seed, place in ((0, 'run'), (1, 'run'), (1, 'own')):
        folder = tmp_path / place / 'data/runs/small/noise1-s0'
        torch.manual_seed(seed)
        trunk = ResNet38Classifier(6, 1 / 32)
        save_tensors(tmp_path / place / 'trunk.safetensors', trunk.state_dict())
        if not folder.exists():
            save_tensors(folder / 'model.safetensors', net.state_dict())
            infer_cams(net, VOCFolder(root, 'train', SCENE_CLASSES), folder / 'cams', scales=[32, 64])
        run_stage('pseudo', root, tmp_path / place, **settings)
    results = [json.loads((tmp_path / place / 'reports/small/noise1-s0/pseudo.json').read_text()) for place in ('run', 'own')]
    for result in results: result.pop('provenance')
    assert results[0] == results[1]
    maps = [contents(tmp_path / place / 'data/runs/small/noise1-s0') for place in ('run', 'own')]
    assert maps[0] == maps[1]


# scores

def perfect(root, folder):
    "CAMs whose scores are 1 on the objects, and rise from 0 to 0.995 over the background."
    data = VOCFolder(root, 'train', SCENE_CLASSES, masks=True)
    for name, present in zip(data.names, data.labels):
        mask, classes = data.mask(name), present.nonzero().flatten()
        maps = torch.stack([torch.from_numpy(np.where(mask == k + 1, 1., np.linspace(0, .995, mask.size).reshape(mask.shape))) for k in classes]).float()
        write_cams(folder / f'{name}.safetensors', CAMs(classes, mask.shape, [maps]), 'a test')
    return data


def test_best_threshold_at_the_border(root, tmp_path, capsys):
    scores = evaluate_seeds(perfect(root, tmp_path), tmp_path)
    assert scores['best_threshold'] == scores['thresholds'][-1]
    assert 'is at the end of the curve' in capsys.readouterr().out


def test_scored_classes(root, tmp_path):
    data = perfect(root, tmp_path / 'cams')
    for evaluate in (evaluate_seeds, evaluate_labels):
        with pytest.raises(DataError, match="scored class 'kat'.*background, apple"): evaluate(data, tmp_path, ['background', 'kat'])
    for name in data.names: write_mask(data.mask_path(name), np.full_like(data.mask(name), 255), voc_palette())
    with pytest.raises(DataError, match='255 alone'): evaluate_seeds(data, tmp_path / 'cams')


# whatever is stored, whatever changes: the functions and parameters come from the signatures

def in_package():
    "Functions of the package that store what they compute, by name."
    names = (name.removeprefix('bnrcam.') for name in code('bnrcam.segment'))
    modules = [importlib.import_module(f'bnrcam.{name}') for name in names]
    return {name: function for m in modules for name, function in vars(m).items()
            if re.fullmatch('train_(?!transform).*|infer_.*|fit|map_images|crf_folder', name) and function.__module__ == m.__name__}


def trunk(seed=0):
    torch.manual_seed(seed)
    return ResNet38Classifier(6, 1 / 64)


def segmenter(momentum=.1):
    torch.manual_seed(0)
    return deeplab('resnet38', 7, momentum, width=1 / 64)


def own_loss(net, batch, weight=1.): return {'loss': weight * net(batch['image']).square().mean()}
def heavy_loss(net, batch): return own_loss(net, batch, 2.)


class Place:
    "What the calls below share: scenes, CAMs of two networks, label maps."
    def __init__(self, root, folder):
        self.root, self.names = root, ['train_00000', 'train_00001']
        self.plain = VOCFolder(root, 'train', SCENE_CLASSES, masks=True)
        self.crops, self.fewer = crops(root), VOCFolder(root, 'val', SCENE_CLASSES, train_transform((64, 96), 64))
        self.stores = [seeds(folder / f'cams{i}', root, conformer(), scales=[s]) for i, s in enumerate((32, 48))]
        self.maps = [folder / 'low', folder / 'high']
        for maps, b in zip(self.maps, (.6, .3)):
            map_images(partial(crf_seed, root, SCENE_CLASSES, self.stores[0], b), self.plain.names, maps, workers=1)
        self.pairs = [AffinityData(self.plain, *self.maps, crop=64, padding_label=label) for label in (255, 0)]
        self.learned = [SegmentData(self.plain, maps, crop=64) for maps in self.maps]


MADE = {'model', 'dataset', 'store', 'function', 'names', 'images', 'labels', 'root'}  # of a `Place`
ROUNDING = 'no part of it: it changes the order of sums at most'
TRAINING = {'epochs': (1, 2), 'batch_size': (2, 1), 'seed': (0, 1), 'precision': ('no', 'bf16'), 'workers': ROUNDING,
            'folder': 'where it is stored'}
# function: parameter: two values (functions of a `Place` make networks and data), or why it does not count
CASES = {
    'fit': {**TRAINING, 'model': (lambda p: trunk(), lambda p: trunk(1)), 'dataset': (lambda p: p.fewer, lambda p: p.crops),
            'loss': (own_loss, heavy_loss), 'optimizer': 'test_settings_of_a_training has its rates', 'run': ({'a': 1}, {'a': 2}),
            'schedule': (lambda progress: 1., lambda progress: .5)},
    'train_classifier': {**TRAINING, 'model': (lambda p: conformer(), lambda p: conformer(.5)), 'variant': ('noise1', 'baseline'), 'weight': (.5, 2.),
                         'dataset': (lambda p: p.fewer, lambda p: p.crops), 'lr': (1e-3, 1e-4), 'weight_decay': (0., .5),
                         'schedule': (lambda progress: 1., lambda progress: .5)},
    'train_trunk': {**TRAINING, 'model': (lambda p: trunk(), lambda p: trunk(1)), 'lr': (1e-3, 1e-4), 'weight_decay': (0., .5),
                    'dataset': (lambda p: p.fewer, lambda p: p.crops)},
    'train_affinity': {**TRAINING, 'model': (lambda p: affinity(), lambda p: affinity(1)), 'lr': (1e-3, 1e-4),
                       'dataset': (lambda p: p.pairs[0], lambda p: p.pairs[1]), 'weight_decay': (0., .5), 'momentum': (0., .9)},
    'train_segmenter': {**{key: value for key, value in TRAINING.items() if key != 'epochs'}, 'iterations': (1, 2),
                        'model': (lambda p: segmenter(), lambda p: segmenter(.5)), 'lr': (1e-3, 1e-4),
                        'dataset': (lambda p: p.learned[0], lambda p: p.learned[1])},
    'infer_cams': {'model': (lambda p: conformer(), lambda p: conformer(.1)), 'folder': 'where it is stored',
                    'dataset': (lambda p: p.fewer, lambda p: p.crops), 'scales': ([32], [48]), 'batch_size': ROUNDING,
                    'precision': ('no', 'bf16'), 'workers': ROUNDING},
    'infer_walks': {'walk': (walk_by_affinity, lambda *arguments, **more: walk_by_affinity(*arguments, **more)),
                    'model': (lambda p: affinity(), lambda p: affinity(1)), 'dataset': (lambda p: p.plain, lambda p: p.plain),
                    'store': (lambda p: p.stores[0], lambda p: p.stores[1]), 'folder': 'where it is stored',
                    'parameters': ({'steps': 1}, {'steps': 2})},
    'map_images': {'function': (lambda p: partial(crf_seed, p.root, SCENE_CLASSES, p.stores[0], .4),
                                lambda p: partial(crf_seed, p.root, SCENE_CLASSES, p.stores[1], .4)),
                   'names': (lambda p: p.names[:1], lambda p: p.names), 'folder': 'where it is stored', 'workers': (1, 1)},
    'crf_folder': {'images': (lambda p: p.root / 'JPEGImages', lambda p: p.root / 'JPEGImages'), 'num_labels': (7, 8),
                   'labels': (lambda p: p.maps[0], lambda p: p.maps[1]), 'folder': 'where it is stored', 'workers': (1, 1)},
    'infer_segments': {'model': (lambda p: segmenter(), lambda p: segmenter(.5)), 'root': (lambda p: p.root, lambda p: p.root),
                       'names': (lambda p: p.names[:1], lambda p: p.names), 'scales': ([1.], [.5]),
                       'folder': 'where it is stored', 'workers': (1, 1)}}


def test_every_parameter_has_a_case():
    functions = in_package()
    assert functions.keys() == CASES.keys()
    for name, function in functions.items():
        assert [*inspect.signature(function).parameters.keys() ^ CASES[name].keys()] == [], name


@pytest.fixture(scope='module')
def place(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp('place')
    return Place(scenes, folder)


@pytest.mark.parametrize('name, changed', [(name, key) for name, cases in CASES.items() for key, values in cases.items()
                                           if not isinstance(values, str)])
def test_whatever_changes(place, tmp_path, name, changed):
    def run(folder, which):
        values = {key: pair[which if key == changed else 0] for key, pair in CASES[name].items() if not isinstance(pair, str)}
        values = {key: value(place) if key in MADE else value
                  for key, value in values.items()}
        values = {**values.pop('parameters', {}), **values, 'folder': tmp_path / folder}
        if name == 'fit': values['optimizer'] = torch.optim.SGD(values['model'].parameters(), .1)
        in_package()[name](**values)
        return contents(tmp_path / folder)

    run('run', 0)
    again, own = run('run', 1), run('own', 1)
    assert own.items() <= again.items()  # files of images that are asked for no more may stay


# what a record is made of

def test_code_is_the_import_closure_without_docstrings(monkeypatch):
    def digest(edit, name):
        for function in (module.import_closure, module.source_digest): function.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(module._SOURCES, name, edit(module._SOURCES[name]))
            return code('bnrcam.train')
    plain = digest(str, 'bnrcam.cam')
    assert digest(lambda text: f'# a comment\n{text}', 'bnrcam.cam') == plain
    assert digest(lambda text: text.replace('def ', '"""A docstring."""\ndef ', 0), 'bnrcam.cam') == plain
    assert digest(lambda text: f'{text}\nA = 1\n', 'bnrcam.study.figures') == plain
    assert digest(lambda text: f'{text}\nA = 1\n', 'bnrcam.cam') != plain
    for function in (module.import_closure, module.source_digest): function.cache_clear()


def scale(x): return FACTOR * x


FACTOR = 2


def test_functions_count_by_what_they_do(monkeypatch):
    def power(n): return lambda x: x**n
    assert describe(power(2)) == describe(power(2)) != describe(power(3))
    assert describe(lambda x: x + 1) != describe(lambda x: x + 2)
    before = describe(scale)
    monkeypatch.setitem(globals(), 'FACTOR', 3)
    assert describe(scale) != before
    assert first_difference(before, describe(scale)) == 'uses FACTOR (2, now 3)'


def test_what_cannot_be_known_is_said(capsys):
    assert describe(object()) == describe(object())
    assert 'cannot be known' in capsys.readouterr().out


def test_files_count_by_content_whatever_their_date(tmp_path, monkeypatch):
    path = tmp_path / 'a.jpg'
    Image.effect_noise((64, 64), 50).save(path)
    monkeypatch.setattr(module, 'SETTLED', 0)
    before = content_digest(path)
    exchange_picture(path)
    assert content_digest(path) != before


def test_a_digest_is_remembered(tmp_path, monkeypatch):
    path = tmp_path / 'a.jpg'
    path.write_bytes(b'a')
    monkeypatch.setattr(module, 'SETTLED', 0)
    before = content_digest(path)
    monkeypatch.setattr(Path, 'read_bytes', None)
    assert content_digest(path) == before


def test_difference_in_words():
    old, new = (provenance('bnrcam.losses', lr=lr, network=torch.nn.Linear(2, 2)) for lr in (1e-3, 5e-4))
    assert first_difference(old, new) == 'lr (0.001, now 0.0005)' and first_difference(old, old) is None
    assert first_difference({'a': {'b': 1}}, {'a': {}}) == 'a b (1, now nothing)'
