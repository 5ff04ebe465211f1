"""mmpretrain's Conformers under the published names: the same network, name by name and number by number.

`golden/state_mmpretrain_conformer.json` lists the names and shapes of mmpretrain 1.2's own `Conformer` backbone (built on
a CPU, `state_dict()` after `backbone.`) and of its `ConformerHead` (two linear layers, after `head.`);
`golden/mmpretrain_conformer_small_224.npz` holds the outputs of that code with the weights and images of `recipe.py`,
drawn by the published names."""
import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from bnrcam.engine.weights import WeightsError, load_weights, published_names, read_weights
from bnrcam.models import create_classifier
from golden.recipe import fill_state_dict, image
from references import GOLDEN, close, golden, names

pytestmark = pytest.mark.slow

LISTED = json.loads((GOLDEN / 'state_mmpretrain_conformer.json').read_text())


def empty(size):
    "A state dict under mmpretrain's names, without values."
    return {name: torch.empty(shape, device='meta') for name, shape in zip(LISTED['names'], LISTED[size], strict=True)}


def filled(size):
    "A state dict under mmpretrain's names with the recipe's values, and the same under the published names."
    published = published_names(empty(size))
    values = fill_state_dict({name: tuple(value.shape) for name, value in published.items()})
    values = {name: torch.from_numpy(np.asarray(value)) for name, value in values.items()}
    return dict(zip(LISTED['names'], values.values(), strict=True)), values


def checkpoint(path, state):
    torch.save({'meta': {'mmcls_version': '0.18.0', 'epoch': 300}, 'state_dict': state}, path)
    return path


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_names_and_shapes(size):
    published = {name: tuple(value.shape) for name, value in published_names(empty(size)).items()}
    assert len(published) == len(LISTED['names']) == 718  # no two become one
    ours = timm.create_model(f'conformer_{size}_patch16').state_dict()
    assert published == {name: tuple(value.shape) for name, value in ours.items()}
    if size == 'small':  # and the heads as in the authors' own file
        assert published == names('state_conformer_small_patch16_1000')


def test_outputs_are_mmpretrain_s(tmp_path):
    file = golden('mmpretrain_conformer_small_224')
    state, _ = filled('small')
    net = timm.create_model('conformer_small_patch16').eval()
    assert load_weights(net, checkpoint(tmp_path / 'small.pth', state)) == []
    with torch.no_grad():
        images = torch.from_numpy(np.stack([image(int(seed), *file['hw']) for seed in file['seeds']]))
        features, token, *_ = net.branches(images)
        logits = net.forward_head(features), net.trans_cls_head(token)
    for ours, theirs in zip(logits, (file['conv'], file['trans']), strict=True):
        close(ours, theirs, 2e-5)


@pytest.mark.parametrize('wrap', ['module.', ''])
def test_same_as_the_published_file(tmp_path, wrap):
    state, values = filled('tiny')
    theirs = checkpoint(tmp_path / 'theirs.pth', {wrap + name: value for name, value in state.items()})
    torch.save({'model': values}, ours := tmp_path / 'ours.pth')
    left, right = read_weights(theirs), read_weights(ours)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    nets = [create_classifier('conformer_tiny_patch16', 21).eval() for _ in range(2)]
    torch.nn.Module.load_state_dict(nets[1], nets[0].state_dict())  # the heads, which no file has
    for net, path in zip(nets, (theirs, ours)):
        assert len(load_weights(net, path)) == 4
    with torch.no_grad():
        x = torch.from_numpy(image(0, 64, 96))[None]
        assert all(torch.equal(a, b) for a, b in zip(nets[0](x)[:2], nets[1](x)[:2]))


@pytest.mark.parametrize('spoil', [
    lambda state: state.pop('backbone.conv_trans_5.trans_block.ffn.layers.1.bias'),
    lambda state: state.update({'backbone.pos_embed': torch.zeros(1)}),
    lambda state: state.update({'neck.weight': torch.zeros(1)}),
    lambda state: state.update({'backbone.trans_1.ln2.weight': torch.ones(385)}),
    lambda state: state.update({'backbone.trans_1.ln1.bias': torch.full((384,), torch.nan)})])
def test_anything_else_is_refused(tmp_path, spoil):
    state, _ = filled('tiny')
    spoil(state)
    net = create_classifier('conformer_tiny_patch16', 21)
    with pytest.raises(WeightsError, match='theirs.pth'):
        load_weights(net, checkpoint(tmp_path / 'theirs.pth', state))


def test_other_sizes_and_networks_are_refused(tmp_path):
    path = checkpoint(tmp_path / 'tiny.pth', filled('tiny')[0])
    with pytest.raises(WeightsError, match='another network'):
        load_weights(create_classifier('conformer_small_patch16', 21), path)
    path = checkpoint(tmp_path / 'vit.pth', {'backbone.ln1.weight': torch.ones(384), 'head.fc.weight': torch.ones(2, 384)})
    with pytest.raises(WeightsError, match='another network'):
        load_weights(create_classifier('conformer_tiny_patch16', 21), path)


# what programs wrap around weights

WEIGHTS = {'conv1.weight': torch.arange(6.).reshape(2, 3), 'conv1.bias': torch.ones(2)}
AVERAGE = {name: value + 1 for name, value in WEIGHTS.items()}


def before(prefix, state=WEIGHTS): return {prefix + name: value for name, value in state.items()}


def taken(tmp_path, content, **options):
    torch.save(content, tmp_path / 'any.pth')
    return read_weights(tmp_path / 'any.pth', **options)


def same(left, right): return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize('key', ['model', 'state_dict', 'model_state_dict', 'net', 'network', 'module', 'teacher',
                                 'model_ema', 'state_dict_ema', 'ema', 'weights', None])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'model.', 'net.', 'encoder.', 'backbone.', 'network.',
                                    'module._orig_mod.', '_orig_mod.module.', 'model._orig_mod.', 'module.model.backbone.'])
def test_wrappings_of_the_field(tmp_path, capsys, key, prefix):
    content = {key: before(prefix), 'epoch': 3, 'optimizer': {'state': {0: {'step': torch.ones(())}}}} if key else before(prefix)
    assert same(taken(tmp_path, content), WEIGHTS)
    said = capsys.readouterr().out
    assert said.count('\n') == bool(key or prefix) and (not prefix or repr(prefix) in said)
    assert not key or all(word in said for word in (f'key {key!r}', 'any.pth', "left: 'epoch', 'optimizer'"))


@pytest.mark.parametrize('key, other', [('model', 'model_ema'), ('state_dict', 'state_dict_ema'), ('state_dict', 'ema'),
                                        ('teacher', 'student')])
def test_an_average_beside_the_weights_is_offered_by_name(tmp_path, capsys, key, other):
    content = {other: AVERAGE, key: WEIGHTS}
    assert same(taken(tmp_path, content), WEIGHTS) and f'take it with key={other!r}' in capsys.readouterr().out
    assert same(taken(tmp_path, content, key=other), AVERAGE) and f'key={key!r}' in capsys.readouterr().out


def test_a_key_within_a_key(tmp_path):
    assert same(taken(tmp_path, {'state': {'model': WEIGHTS}, 'epoch': 3}), WEIGHTS)
    assert same(taken(tmp_path, {'run': {'a': WEIGHTS, 'b': AVERAGE}}, key='run.b'), AVERAGE)


@pytest.mark.parametrize('content, options', [
    ({'first': WEIGHTS, 'second': AVERAGE}, {}), ({'model': WEIGHTS, 'model_ema': AVERAGE}, {'key': 'average'})])
def test_a_choice_that_is_not_ours(tmp_path, content, options):
    with pytest.raises(WeightsError, match='any.pth: holds state dicts under .*name one of them'):
        taken(tmp_path, content, **options)


def test_a_prefix_that_the_network_has_too_stays(tmp_path):
    net = torch.nn.ModuleDict({'model': torch.nn.Linear(2, 1)})
    torch.save({'state_dict': before('module.', net.state_dict())}, tmp_path / 'any.pth')
    assert load_weights(net, tmp_path / 'any.pth') == []


def test_a_network_of_an_average(net, tmp_path):
    "`load_weights` hands the key on."
    average = {name: value.clone() if name.endswith('tracked') else value + 1 for name, value in net.state_dict().items()}
    torch.save({'model': before('_orig_mod.', net.state_dict()), 'model_ema': before('module.', average)}, tmp_path / 'any.pth')
    load_weights(net, tmp_path / 'any.pth')
    assert not torch.equal(net.conv1.weight, average['conv1.weight'])
    load_weights(net, tmp_path / 'any.pth', key='model_ema')
    assert torch.equal(net.conv1.weight, average['conv1.weight'])


def test_mmpretrain_without_heads(tmp_path):
    state = {name: value for name, value in filled('tiny')[0].items() if name.startswith('backbone.')}
    assert 'trans_1.norm1.weight' in read_weights(checkpoint(tmp_path / 'theirs.pth', state))


class Other:
    "A class of whoever saved it."


@pytest.mark.parametrize('value', [argparse.Namespace(lr=1e-3, nested=argparse.Namespace(a=[1, 'x'])), np.float64(.5), np.float32(.5),
                                   np.int64(3), np.bool_(True), np.float64('nan'), [np.float64(.5), {'best': np.int32(1)}]])
@pytest.mark.parametrize('options', [{}, {'_use_new_zipfile_serialization': False}])
def test_plain_values_beside_the_weights(tmp_path, value, options):
    torch.save({'model': WEIGHTS, 'args': value, 'best': value}, tmp_path / 'any.pth', **options)
    assert same(read_weights(tmp_path / 'any.pth'), WEIGHTS)


@pytest.mark.parametrize('value', [Other(), np.zeros(3), Path('x'), {1, 2}, bytearray(3)])
def test_other_objects_are_named_and_not_made(tmp_path, value):
    with pytest.raises(WeightsError, match='any.pth: refused, .*it asks for '):
        taken(tmp_path, {'model': WEIGHTS, 'args': value})


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8,
                                  torch.bool, torch.complex64])
@pytest.mark.parametrize('options', [{}, {'_use_new_zipfile_serialization': False}])
def test_kinds_of_numbers(tmp_path, kind, options):
    state = {'a': torch.ones(3, 2).to(kind), 'b': torch.nn.Parameter(torch.ones(2)), 'c': torch.ones(4, 4)[1:, ::2]}
    torch.save(state, tmp_path / 'any.pth', **options)
    assert same(read_weights(tmp_path / 'any.pth'), state)
