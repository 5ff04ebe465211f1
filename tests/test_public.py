"""`make data` and `make reproduce` on miniatures of VOC with SBD and of COCO, with their profiles made small."""
import csv
import tarfile
from dataclasses import replace
from importlib import import_module

import pandas as pd
import pytest
import timm
import torch
import yaml

from bnrcam.data import VOC_CLASSES, image_size, read_mask, read_split
from bnrcam.datasets.coco import COCO_CLASSES
from bnrcam.paper import VOC_LABELS
from miniature import coco_archives, serve, voc_archives, write_sources
from test_affinity import params_bytes, random_trunk, trunk_arrays
from test_batch import FIGURES, ROOT, TABLES, make, new_repo

import_module('bnrcam.models')  # registers them with timm

pytestmark = pytest.mark.slow

ARCHIVES = {'voc': voc_archives, 'coco': coco_archives}
CLASSES = {'voc': VOC_CLASSES, 'coco': COCO_CLASSES}
# all for VOC; for COCO those that differ: its own table, the other benchmark's, and the networks
RESULTS = {'voc': TABLES | FIGURES | {'threshold'}, 'coco': {'table2', 'table3', 'table4', 'figure3'}}
PTH, PARAMS = (f'data/weights/{name}' for name in (
    'conformer-small-p16_3rdparty_8xb128_in1k_20211206-3065dcf5.pth', 'ilsvrc-cls_rna-a1_cls1000_ep-0001.params'))
# what both profiles take instead of their own values; everything else stays as it is committed
SMALL = {
    'variants': ['baseline', 'noise1'], 'random_seeds': [0], 'pseudo_labels': ['noise1'], 'timm_backbones': [],
    'model': {'name': 'conformer_mini_patch16'}, 'augment': {'long_side': [64, 80], 'crop': 64},
    'train': {'epochs': 1, 'batch_size': 4}, 'inference': {'scales': [64]}, 'pseudo': {'walk': {'steps': 8}},
    'affinity': {'width': 1 / 32, 'crop': 64, 'epochs': 1, 'batch_size': 4},
    'segment': {'width': 1 / 32, 'iterations': 3, 'batch_size': 3, 'crop': 64, 'scales': [0.75, 1.0]},
    'compute': {'threads': 1, 'workers': 0}}


def merged(values, changes):
    "`values` with those of `changes`, which may have no other keys, at every depth."
    assert changes.keys() <= values.keys(), changes.keys() - values.keys()
    return values | {key: merged(values[key], change) if isinstance(change, dict) else change
                     for key, change in changes.items()}


def committed_profile(name):
    return yaml.safe_load((ROOT / f'nbs/profiles/{name}.yaml').read_text(encoding='utf-8'))


def small_profile(name):
    "The committed profile with other values; for VOC, its val images are also those of the server."
    return merged(committed_profile(name), SMALL | ({'dataset': {'test': 'val'}} if name == 'voc' else {}))


def keys(value):
    return {key: keys(item) for key, item in value.items()} if isinstance(value, dict) else type(value)


def public_repo(folder, name):
    "A copy of the project with the small profile and both files of weights."
    repo = new_repo(folder)
    (repo / f'nbs/profiles/{name}.yaml').write_text(yaml.safe_dump(small_profile(name)), encoding='utf-8')
    (repo / PTH).parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save({'state_dict': timm.create_model('conformer_mini_patch16', num_classes=1000).state_dict()}, repo / PTH)
    (repo / PARAMS).write_bytes(params_bytes(trunk_arrays(random_trunk(width=1 / 32), 'float32')))
    return repo


def make_public(repo, name, *arguments):
    return make(repo, *arguments, f'PROFILE={name}', f'DATA=downloaded/{name}')


def messages(result):
    "What make and its recipes say, without make's own last words and without progress bars."
    lines = (result.stdout + result.stderr).splitlines()
    return [line for line in lines if line.strip() and not line.startswith('make') and '/s]' not in line]


class Study:
    "A profile after `make data` and `make reproduce`."
    def __init__(self, name, folder):
        self.name, self.repo = name, public_repo(folder / 'repo', name)
        self.out, self.root = self.repo / f'reports/{name}', self.repo / f'downloaded/{name}'
        (folder / 'web').mkdir()
        with serve(folder / 'web') as state:
            self.files = ARCHIVES[name](folder / 'web', state.url)
            write_sources(self.repo / 'sources.json', self.files)
            self.data = [self.make('data', 'SOURCES=sources.json')]
            self.fetched = [*state.log]
            self.data.append(self.make('data', 'SOURCES=sources.json'))
            self.again = state.log[len(self.fetched):]
        if name == 'voc':
            with open(self.repo / 'data/test_scores_voc.csv', 'w', newline='') as file:
                csv.writer(file).writerows([['run', *VOC_LABELS], ['noise1-s0', *range(50, 71)]])
        self.result = self.reproduce()

    def make(self, *arguments): return make_public(self.repo, self.name, *arguments)

    def reproduce(self): return self.make('reproduce', f"RESULTS={' '.join(sorted(RESULTS[self.name]))}")

    def table(self, n): return pd.read_csv(self.out / f'table{n}.csv', dtype=str, keep_default_na=False)


@pytest.fixture(scope='module', params=['voc', 'coco'])
def study(request, tmp_path_factory):
    return Study(request.param, tmp_path_factory.mktemp(request.param))


def test_small_profile_is_the_committed_one(study):
    full, small = committed_profile(study.name), small_profile(study.name)
    for profile in (full, small): profile['dataset'].pop('test')
    assert keys(full) == keys(small)
    for key in ('profile', 'about', 'benchmark', 'root', 'weights', 'dataset', 'sweep', 'timm_options'):
        assert full[key] == small[key]
    assert tuple(small['dataset']['classes']) == CLASSES[study.name]
    assert full['affinity']['weights'] == full['segment']['weights'] == PARAMS and full['weights'] == PTH


def test_data_comes_once(study):
    assert [result.returncode for result in study.data] == [0, 0], messages(study.data[0])
    assert sorted(study.fetched) == sorted((file.name, 0, file.size) for file in study.files.values())
    assert study.again == []
    splits = {'voc': {'train': 6, 'val': 4, 'train_aug': 11}, 'coco': {'train': 7, 'val': 4}}[study.name]
    folder = study.root / 'ImageSets/Segmentation'
    assert {path.stem: len(path.read_text().split()) for path in folder.iterdir()} == splits


def test_every_product_is_there(study):
    assert study.result.returncode == 0, study.result.stdout + study.result.stderr
    runs = {'baseline-s0': {'train', 'cams'}, 'noise1-s0': {'train', 'cams', 'pseudo', 'segment'},
            'supervised-s0': {'segment'}}
    folders = [path for path in study.out.iterdir() if path.is_dir()]
    assert {folder.name: {path.stem for path in folder.glob('*.ipynb')} for folder in folders} == runs
    for names, kinds in ((TABLES, ('csv', 'md', 'tex', 'json')), (FIGURES, ('png', 'svg'))):
        assert all((study.out / f'{name}.{kind}').stat().st_size for name in names & RESULTS[study.name] for kind in kinds)
    page = (study.out / 'index.html').read_text(encoding='utf-8')
    assert all(f'id="{name}"' in page for name in RESULTS[study.name])


def test_published_weights_are_the_start(study):
    assert not any(study.out.glob('pretrain*')) and not (study.out / 'trunk').exists()
    train = (study.out / 'noise1-s0/train.ipynb').read_text(encoding='utf-8')
    assert f"start: {PTH}, left out: ['conv_cls_head" in train
    assert 'left out: []' in (study.out / 'noise1-s0/segment.ipynb').read_text(encoding='utf-8')


def test_labels_cover_the_training_split(study):
    names = read_split(study.root, 'train_aug' if study.name == 'voc' else 'train')
    folder = study.repo / f'data/runs/{study.name}/noise1-s0/walk_crf'
    assert sorted(path.stem for path in folder.glob('*.png')) == names
    for name in names:
        size = image_size(study.root / f'JPEGImages/{name}.jpg')
        read_mask(folder / f'{name}.png', 1 + len(CLASSES[study.name]), size)


def test_table_2(study):
    table = study.table(2)
    assert table['class'].tolist() == ['background', *CLASSES[study.name], 'mIoU']
    paper = [name for name in table if name.startswith('paper')]
    here = {'voc': 'here, PASCAL VOC 2012', 'coco': 'here, MS COCO 2014'}[study.name]
    assert float(table[f'{here} val: noise x 1 (ours)'].iloc[-1]) >= 0
    assert float(table[f'{here} val: fully supervised'].iloc[-1]) >= 0
    if study.name == 'voc':
        assert len(paper) > 2 and {name.split(':')[0] for name in paper} == {'paper, VOC val', 'paper, VOC test'}
        assert [float(value) for value in table[f'{here} test: noise x 1 (ours)']] == [*range(50, 71), 60]
        assert 'data/runs/voc/supervised-s0/segment.tar' in table[f'{here} test: fully supervised'].iloc[-1]
    else:
        assert paper == [] and not any('test' in name for name in table)


def test_our_rows_stand_in_the_table_of_the_benchmark(study):
    ours = {n: study.table(n).query('method.str.startswith("here")') for n in (3, 4)}
    n, data, other = {'voc': (3, 'PASCAL VOC 2012', 'coco'), 'coco': (4, 'MS COCO 2014', 'voc')}[study.name]
    assert set(ours[n]['data']) == {data}
    assert {'here: noise x 1 (ours)', 'here: fully supervised'} < set(ours[n]['method'])
    assert ours[7 - n]['val'].tolist() == [f'not run: `make reproduce PROFILE={other}`']
    if study.name == 'voc':
        assert ours[3].set_index('method').loc['here: noise x 1 (ours)', 'test'] == '60.0'


def test_archive_for_the_server(study):
    archives = {path.parent.name: path for path in (study.repo / f'data/runs/{study.name}').glob('*/segment.tar')}
    assert set(archives) == ({'noise1-s0', 'supervised-s0'} if study.name == 'voc' else set())
    for path in archives.values():
        with tarfile.open(path) as archive:
            assert [name.rpartition('/')[2] for name in archive.getnames()] == [f'2008_{i:06d}.png' for i in range(4)]


def test_second_time_nothing_runs(study):
    result = study.reproduce()
    assert result.returncode == 0 and 'Nothing to do' in result.stdout and '[' not in result.stdout


# what may go wrong, in one line each

def test_reproduce_without_data(tmp_path):
    repo = public_repo(tmp_path, 'voc')
    result = make_public(repo, 'voc', 'reproduce')
    assert result.returncode != 0
    assert messages(result) == ['downloaded/voc: no data there yet; make data PROFILE=voc fetches it']


def test_reproduce_without_resnet38(tmp_path):
    repo = public_repo(tmp_path, 'voc')
    (repo / 'downloaded/voc/ImageSets').mkdir(parents=True)
    (repo / PARAMS).unlink()
    result = make_public(repo, 'voc', 'reproduce')
    lines = messages(result)
    assert result.returncode != 0 and len(lines) == 1, lines
    assert PARAMS in lines[0] and 'github.com/YudeWang/SEAM' in lines[0] and 'run again' in lines[0]


def test_wrong_hash_and_then_the_right_one(web, tmp_path):
    repo = public_repo(tmp_path / 'repo', 'voc')
    files = voc_archives(web.folder, web.url)
    write_sources(repo / 'sources.json', files | {'sbd': replace(files['sbd'], digest=f"md5:{'0' * 32}")})
    result = make_public(repo, 'voc', 'data', 'SOURCES=sources.json')
    lines = messages(result)
    assert result.returncode != 0 and len(lines) == 1, lines
    assert 'benchmark.tgz' in lines[0] and 'damaged or another file; it was deleted; run again' in lines[0]
    assert not (repo / 'downloaded/voc/ImageSets').exists()
    write_sources(repo / 'sources.json', files)
    requests = len(web.log)
    assert make_public(repo, 'voc', 'data', 'SOURCES=sources.json').returncode == 0
    assert web.log[requests:] == [('benchmark.tgz', 0, files['sbd'].size)]


def test_no_room_to_write(web, tmp_path):
    "A folder that cannot be made ends in one line too, though the reason is another error."
    repo = public_repo(tmp_path / 'repo', 'voc')
    write_sources(repo / 'sources.json', voc_archives(web.folder, web.url))
    (repo / 'downloaded').write_text('a file where a folder should be')
    result = make_public(repo, 'voc', 'data', 'SOURCES=sources.json')
    lines = messages(result)
    assert result.returncode != 0 and len(lines) == 1 and 'cannot be written' in lines[0], lines
