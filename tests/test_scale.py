"""Two processes are one: the same weights but for rounding, and the same seeds, pseudo-labels and scores to the last bit.

This file is also the program that each process runs: `work` trains, and makes and scores seeds and pseudo-labels."""
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bnrcam.affinity import AffinityData, AffinityNet, crf_seed, infer_walks, pseudo_label, train_affinity, \
    walk_by_affinity, walk_by_attention
from bnrcam.crf import map_images
from bnrcam.data import VOCFolder
from bnrcam.evaluate import evaluate_labels, evaluate_seeds
from bnrcam.engine.launch import GlobalBatchNorm, processes, sync_over_batch
from bnrcam.models import create_classifier
from bnrcam.scenes import SCENE_CLASSES, write_scenes
from bnrcam.cams import infer_cams
from bnrcam.train import TrainingError, train_classifier
from bnrcam.datasets.transforms import train_transform

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[1]
SCALES = (64, 96)


class Crops:
    "Training crops in float64, for a training whose rounding is far below what is compared."
    def __init__(self): self.crop = train_transform((64, 144), 64)
    def __call__(self, item): return {key: value.double() if torch.is_tensor(value) else value
                                      for key, value in self.crop(item).items()}
    def __repr__(self): return repr(self.crop)


class Double:
    "AffinityData whose images are float64."
    def __init__(self, data): self.data, self.fingerprint = data, data.fingerprint
    def __len__(self): return len(self.data)
    def __getitem__(self, index): return {**self.data[index], 'image': self.data[index]['image'].double()}


class Unplugged(VOCFolder):
    "Cut off after a number of reads."
    reads = 20
    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0: raise KeyboardInterrupt
        return super().__getitem__(index)


def classifier(data, folder):
    "Three epochs of three batches with every random layer on."
    torch.manual_seed(0)
    net = create_classifier({'name': 'conformer_mini_patch16', 'depth': 3, 'drop_path_rate': .5}, 7).double()
    return train_classifier(net, data, 'noise1', folder, epochs=2.67, lr=1e-4, batch_size=4, seed=0)


def work(root, out):
    "Everything, in this process or in its share; `out/cut` may hold a checkpoint to go on from."
    torch.set_num_threads(1)
    data = VOCFolder(root, 'train', SCENE_CLASSES, Crops())
    classifier(data, out / 'whole')
    if processes().num_processes == 1:
        with pytest.raises(KeyboardInterrupt):
            classifier(Unplugged(root, 'train', SCENE_CLASSES, Crops()), out / 'cut')
    else:
        classifier(data, out / 'cut')
        with pytest.raises(TrainingError, match='share a batch of 3'):
            train_classifier(torch.nn.Linear(2, 2), data, 'noise1', out / 'odd', epochs=1, lr=1, batch_size=3, seed=0)

    torch.manual_seed(1)
    images = VOCFolder(root, 'val', SCENE_CLASSES, masks=True)
    net = create_classifier({'name': 'conformer_mini_patch16', 'depth': 3}, 7)
    seeds = infer_cams(net, VOCFolder(root, 'val', SCENE_CLASSES), out / 'cams', scales=SCALES, batch_size=2)
    scores = {'cams': evaluate_seeds(images, seeds)}

    def label_maps(name, function, workers):
        map_images(function, images.names, folder := out / name, workers)
        scores[name] = evaluate_labels(images, folder)
        return folder

    low, high = (label_maps(f'crf{background}', partial(crf_seed, root, SCENE_CLASSES, seeds, background), 1)
                 for background in (.6, .3))
    torch.manual_seed(2)
    affinity = AffinityNet(.0625, frozen=False).double()
    train_affinity(affinity, Double(AffinityData(images, low, high, 64, 255)), out / 'affinity', epochs=2, batch_size=4,
                   seed=0, lr=.05)
    torch.manual_seed(3)
    affinity = AffinityNet(.0625, frozen=False)  # the trained ones differ in the last digits, and so would the labels
    for walk, model, workers in ((walk_by_affinity, affinity, 1), (walk_by_attention, net, 2)):
        store = infer_walks(walk, model, images, seeds, out / walk.__name__)
        label_maps(f'{walk.__name__}_labels', partial(pseudo_label, root, 7, store, .42, True), workers)
    if processes().is_main_process:
        (out / 'scores.json').write_text(json.dumps(scores))


def start(count, *arguments, **options):
    "Run Python with `arguments` in `count` processes, on the CPU."
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}'] if count > 1 else []
    return subprocess.run([sys.executable, *launcher, *map(str, arguments)], capture_output=True, text=True, check=False,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(REPO)},
                          timeout=300, **options)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scale') / 'mini', sizes={'train': 14, 'val': 5})


@pytest.fixture(scope='module')
def one_and_two(root, tmp_path_factory):
    "What one process left, and what two."
    one, two = (tmp_path_factory.mktemp(name) for name in ('one', 'two'))
    for count, out in ((1, one), (2, two)):
        if count == 2:
            (two / 'cut').mkdir()
            (two / 'cut' / 'checkpoint.safetensors').write_bytes((one / 'cut' / 'checkpoint.safetensors').read_bytes())
        done = start(count, __file__, root, out)
        assert done.returncode == 0, done.stdout + done.stderr
    assert 'goes on after epoch 1' in done.stdout and done.stdout.count('goes on') == 1
    return one, two


def far(a, b):
    "Largest difference of two files of weights."
    a, b = load_file(a / 'model.safetensors'), load_file(b / 'model.safetensors')
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def test_same_weights(one_and_two):
    one, two = one_and_two
    print('classifier', far(one / 'whole', two / 'whole'))
    assert far(one / 'whole', two / 'whole') < 1e-10
    assert not (two / 'whole' / 'checkpoint.safetensors').exists()


def test_two_go_on_where_one_was_cut_off(one_and_two):
    one, two = one_and_two
    assert far(one / 'whole', two / 'cut') < 1e-10


def test_same_history(one_and_two):
    for name in ('whole', 'affinity'):
        one, two = ([[float(value) for value in line.split(',')]
                     for line in (folder / name / 'history.csv').read_text().splitlines()[1:]] for folder in one_and_two)
        assert len(one) == len(two) > 1
        assert all(a == pytest.approx(b, rel=1e-5) for a, b in zip(one, two))  # affinities are float32


def test_affinity_means_over_pairs(one_and_two):
    one, two = one_and_two
    print('affinity', far(one / 'affinity', two / 'affinity'))
    assert far(one / 'affinity', two / 'affinity') < 1e-6


@pytest.mark.parametrize('folder', ['cams', 'crf0.6', 'crf0.3', 'walk_by_affinity', 'walk_by_affinity_labels',
                                    'walk_by_attention', 'walk_by_attention_labels'])
def test_same_files(one_and_two, folder):
    one, two = ({path.name: path.read_bytes() for path in (out / folder).iterdir()} for out in one_and_two)
    assert len(one) >= 5 and one == two


def test_same_scores(one_and_two):
    one, two = (json.loads((out / 'scores.json').read_text()) for out in one_and_two)
    assert len(one) == 5 and one == two


def test_one_process_keeps_its_layers():
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    sync_over_batch(net)
    assert not isinstance(net[0], GlobalBatchNorm)


def test_stage_in_two_processes(root, tmp_path):
    "The notebook of the first process is left, and its weights are those of both."
    done = start(2, '-m', 'bnrcam.engine.launch', 'papermill', REPO / 'nbs/stages/pretrain.ipynb', 'out.ipynb', '-p', 'root', root,
                 '-y', 'dataset: {pretrain: train, classes: [%s]}' % ', '.join(SCENE_CLASSES),
                 '-y', 'pretrain: {epochs: 1, lr: 0.001, weight_decay: 0.1, batch_size: 4}', '--log-output', cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'out.ipynb']
    assert 'image/png' in (tmp_path / 'out.ipynb').read_text()
    assert sorted(path.name for path in tmp_path.glob('data/runs/scratch/pretrain-s0/*')) == ['history.csv', 'model.safetensors']


if __name__ == '__main__':
    work(*map(Path, sys.argv[1:]))
