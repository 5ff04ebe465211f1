"The golden files, and what it means to be close to them (tests/golden/README.md says which tolerance)."
import json
from pathlib import Path

import numpy as np
import torch

from golden.recipe import fill_state_dict

GOLDEN = Path(__file__).parent / 'golden'


def golden(name):
    "The arrays of tests/golden/NAME.npz."
    return np.load(GOLDEN / f'{name}.npz')


def names(file):
    "Names and shapes of a state dict, of tests/golden/FILE.json."
    return {name: tuple(shape) for name, shape in json.loads((GOLDEN / f'{file}.json').read_text()).items()}


def close(ours, theirs, tolerance):
    "Asserts that the largest difference is at most this share of the largest value."
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def filled(net, dtype=torch.float32):
    "`net` in eval mode, with the recipe's weights."
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    net.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in fill_state_dict(shapes).items()})
    return net.to(dtype).eval()
