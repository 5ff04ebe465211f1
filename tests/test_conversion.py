"""mmpretrain's Conformers under the published names: the same network, name by name and number by number.

`golden/state_mmpretrain_conformer.json` lists the names and shapes of mmpretrain 1.2's own `Conformer` backbone (built on
a CPU, `state_dict()` after `backbone.`) and of its `ConformerHead` (two linear layers, after `head.`);
`golden/mmpretrain_conformer_small_224.npz` holds the outputs of that code with the weights and images of `recipe.py`,
drawn by the published names."""
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from bnrcam.models import create_classifier
from bnrcam.conformer import WeightsError, load_weights, published_names, read_weights
from golden.recipe import fill_state_dict, image

GOLDEN = Path(__file__).parent / 'golden'
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
        listed = json.loads((GOLDEN / 'state_conformer_small_patch16_1000.json').read_text())
        assert published == {name: tuple(shape) for name, shape in listed.items()}


def test_outputs_are_mmpretrain_s(tmp_path):
    file = np.load(GOLDEN / 'mmpretrain_conformer_small_224.npz')
    state, _ = filled('small')
    net = timm.create_model('conformer_small_patch16').eval()
    assert load_weights(net, checkpoint(tmp_path / 'small.pth', state)) == []
    with torch.no_grad():
        images = torch.from_numpy(np.stack([image(int(seed), *file['hw']) for seed in file['seeds']]))
        features, token, *_ = net.branches(images)
        logits = net.forward_head(features), net.trans_cls_head(token)
    for ours, theirs in zip(logits, (file['conv'], file['trans']), strict=True):
        assert np.abs(ours.numpy() - theirs).max() <= 2e-5 * np.abs(theirs).max()


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
