"""The plan of a study: which runs, how many images, and what happens when memory or a split is missing."""
import math

import pytest
import torch

from bnrcam.study import plan
from bnrcam.data import DataError
from bnrcam.study.profile import ProfileError, completed

TINY = completed({
    'profile': 'tiny', 'about': 'A test.', 'root': 'none', 'variants': ['baseline', 'noise1'], 'ours': 'noise1', 'random_seeds': [0, 1], 'pseudo_labels': ['noise1'],
    'timm_backbones': ['test_resnet'], 'timm_options': {'test_resnet': {'output_stride': 8}}, 'benchmark': None, 'sweep': [],
    'dataset': {'classes': ['apple', 'banana', 'leaf', 'fish', 'flower', 'starfish'], 'pretrain': 'train', 'train': 'train',
                'eval': 'train', 'val': 'val', 'test': 'val', 'scored': None},
    'model': {'name': 'conformer_mini_patch16', 'drop_path_rate': 0.6}, 'augment': {'long_side': [64, 80], 'crop': 64},
    'pretrain': {'epochs': 1, 'lr': 0.001, 'weight_decay': 0.1, 'batch_size': 3},
    'train': {'epochs': 3, 'lr': 5e-5, 'weight_decay': 5e-4, 'batch_size': 4},
    'inference': {'scales': [32, 64], 'batch_size': 2},
    'pseudo': {'conf_fg': 0.6, 'conf_bg': 0.3, 'background': 0.42, 'walk': {'beta': 14, 'steps': 8},
               'attention': {'beta': 2, 'steps': 1}},
    'trunk': {'width': 0.03125, 'epochs': 2, 'lr': 0.001, 'weight_decay': 0.05, 'batch_size': 4},
    'affinity': {'width': 0.03125, 'frozen': True, 'weights': 'data/weights/none.safetensors', 'crop': 64, 'padding_label': 255,
                 'epochs': 1, 'lr': 0.1, 'batch_size': 4},
    'segment': {'weights': 'data/weights/none.safetensors', 'width': 0.03125, 'iterations': 9, 'batch_size': 4, 'crop': 64,
                'scale': [0.75, 1.25], 'lr': 0.003, 'timm_lr': 1e-4, 'bn_momentum': 0.1, 'scales': [0.75, 1.0]},
    'compute': {'threads': 1, 'workers': 0, 'precision': 'no'}})


@pytest.fixture
def sample(scenes, tmp_path): return plan.make_sample(TINY, scenes, tmp_path)


def test_runs_are_those_of_the_makefile():
    assert plan.stage_runs(TINY) == {
        'pretrain': ['pretrain-s0', 'pretrain-s1'], 'train': ['baseline-s0', 'baseline-s1', 'noise1-s0', 'noise1-s1'],
        'cams': ['baseline-s0', 'baseline-s1', 'noise1-s0', 'noise1-s1'], 'trunk': ['trunk'],
        'pseudo': ['noise1-s0', 'noise1-s1'],
        'segment': ['noise1-s0/segment', 'noise1-s1/segment', 'supervised-s0/segment', 'supervised-s1/segment',
                    'noise1-s0/segment-test_resnet']}


def test_runs_of_a_sweep_and_of_published_weights():
    profile = {**TINY, 'weights': 'data/weights/none.pth', 'pretrain': None, 'trunk': None}
    runs = plan.stage_runs({**profile, 'pseudo_labels': []})
    assert {stage: len(names) for stage, names in runs.items()} == {
        'pretrain': 0, 'train': 4, 'cams': 4, 'trunk': 0, 'pseudo': 0, 'segment': 0}
    runs = plan.stage_runs({**TINY, 'sweep': [0.001, 0.01]})
    assert len(runs['pretrain']) == 5 and len(runs['train']) == 6 and len(runs['cams']) == 10
    assert runs['train'][-1] == 'noise1-s0-lr0.01'


def test_images_of_each_stage():
    table = plan.stages(TINY, {'train': 10, 'val': 5}).set_index(['stage', 'of'])[['runs', 'images']]
    assert {key: tuple(row) for key, row in table.iterrows()} == {
        ('pretrain', 'baseline'): (2, 9), ('train', 'baseline'): (2, 24), ('train', 'noise1'): (2, 24),
        ('cams', ''): (4, 10), ('score seeds', ''): (4, 10), ('trunk', ''): (1, 16),
        ('CRF of seeds', 'sure, generous'): (2, 20), ('AffinityNet', ''): (2, 8), ('walk', 'affinity'): (2, 10),
        ('walk', 'attention'): (2, 10), ('labels of walks', ''): (2, 20), ('CRF of walks', ''): (2, 20),
        ('score labels', '5 maps'): (2, 50), ('segment', 'resnet38'): (4, 36), ('predict', 'resnet38'): (4, 10),
        ('segment', 'test_resnet'): (1, 36), ('predict', 'test_resnet'): (1, 10),
        ('score labels', 'with, without CRF'): (5, 10)}


def test_variants_of_noise_1_are_timed_apart():
    profile = {**TINY, 'variants': ['noise1', 'noise1_through'], 'sweep': [0.01]}
    rows = plan.stages(profile, {'train': 10, 'val': 5}).set_index(['stage', 'of'])['runs']
    assert rows['train'].to_dict() == {'noise1': 3, 'noise1_through': 2}
    assert rows['pretrain'].to_dict() == {'baseline': 3, 'noise1': 2}


def test_sizes_from_the_splits_or_the_benchmark(scenes, tmp_path):
    assert plan.split_sizes(TINY, scenes)['train'][0] == 8
    profile = {**TINY, 'benchmark': 'COCO', 'dataset': {'train': 'train', 'eval': 'train', 'val': 'val', 'test': None}}
    sizes = plan.split_sizes(profile, tmp_path)
    assert sizes['train'] == (82_081, 'the published size of COCO') and sizes['val'][0] == 40_137


@pytest.mark.parametrize('benchmark', [None, 'VOC'])
def test_unknown_size_names_the_file(benchmark, tmp_path):
    profile = {**TINY, 'benchmark': benchmark, 'dataset': {**TINY['dataset'], 'train': 'mine', 'pretrain': None}}
    with pytest.raises(DataError, match=r'ImageSets/Segmentation/mine\.txt: no such split'):
        plan.split_sizes(profile, tmp_path)


def test_missing_profile(tmp_path):
    with pytest.raises(ProfileError, match=r'other\.yaml: no such profile'): plan.plan(tmp_path / 'other.yaml', tmp_path)


def test_batch_that_does_not_fit_is_halved(sample, monkeypatch):
    train, batches = plan.train_classifier, []

    def full(model, dataset, *, batch_size, **options):
        batches.append(batch_size)
        if batch_size > 1: raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return train(model, dataset, batch_size=batch_size, **options)

    monkeypatch.setattr(plan, 'train_classifier', full)
    monkeypatch.setattr(plan, 'MOST', 2)
    measured = plan.measure_classifier('train', TINY, sample, 'noise1', budget=60)
    assert batches == [1, 4, 2] and measured.seconds > 0
    assert measured.note.startswith('a batch of 4 does not fit into memory: measured with 1')


def test_stage_that_does_not_fit_at_all_leaves_a_plan():
    def full(batch): raise torch.OutOfMemoryError('CUDA out of memory.')

    measured = plan.measure_batches(full, 8, 1, copies=4)
    assert math.isnan(measured.seconds) and measured.note == 'not even one image fits into memory'
    with pytest.raises(RuntimeError, match='shapes'):
        plan.measure_batches(lambda batch: (_ for _ in ()).throw(RuntimeError('shapes differ')), 8, 1, copies=4)


def test_a_batch_that_would_end_the_process_is_not_tried(monkeypatch):
    monkeypatch.setattr(plan, 'free_memory', lambda: -1)
    tried = []
    measured = plan.measure_batches(lambda batch: tried.append(batch) or (0.01, 0), 8, 60, copies=1)
    assert tried == [1] and 'may not fit into memory' in measured.note


def test_loading_is_beside_a_gpu_and_added_on_a_cpu(monkeypatch):
    monkeypatch.setattr(plan, 'cores', lambda: 4)
    device = type('State', (), {'device': torch.device('cuda')})
    monkeypatch.setattr(plan, 'processes', lambda: device)
    assert plan.beside(0.1, 0.8, 8) == 0.2 and plan.beside(0.3, 0.8, 8) == 0.3 and plan.beside(0.1, 0.8, 0) == 0.9
    device.device = torch.device('cpu')
    assert plan.beside(0.1, 0.8, 8) == pytest.approx(0.3)


def test_plan_prints_a_table(scenes, tmp_path, capsys, monkeypatch):
    # the notebook measures the others
    monkeypatch.setattr(plan, 'read_profile', lambda path: {**TINY, 'variants': ['noise1'], 'pseudo_labels': []})
    monkeypatch.setattr(plan, 'MOST', 1)
    plan.plan('tiny.yaml', scenes, budget=0.05)
    text = capsys.readouterr().out
    for words in ('train: 8 images (', 's an image', 'memory GB', 'pretrain baseline', 'train noise1', 'cams', 'CPU',
                  'one run after the other', 'disk, CAMs', 'disk, weights', 'disk, all'):
        assert words in text
    assert 'nan' not in text and not (tmp_path / 'data').exists()


def test_notes_hours_and_columns(scenes, monkeypatch):
    monkeypatch.setattr(plan, 'MEASURES', dict.fromkeys(plan.MEASURES, lambda *_: plan.Measured(3600., 2, 'cpu', 3, 5)))
    table = plan.estimate(TINY, scenes)
    row = table.set_index(['stage', 'of']).loc[('train', 'noise1')]
    assert row.hours == 2 * 24 and row.disk == 2 * (24 * 3 + 5) and row.kind == 'weights'
    assert list(plan.readable(table)) == ['stage', 'runs', 'images a run', 's an image', 'hours', 'memory GB', 'on',
                                          'disk GB', 'note']
    totals = plan.totals(table, {**TINY, 'fetched': 'voc'}, scenes)
    assert totals['disk, still to download'] == '3.419 GB' and totals['memory, CPU'] == '2 bytes'
