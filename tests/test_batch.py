"""`make reproduce` from end to end on a tiny profile: products, staleness, failure, resume, and the page in a browser."""
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bnrcam.data import read_image, read_mask
from bnrcam.predict import load_model, predict
from bnrcam.scenes import write_scenes
from browsing import check_page

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = '''
profile: tiny
about: A test.
variants: [baseline, noise1]
ours: noise1
random_seeds: [0]
pseudo_labels: [noise1]
timm_backbones: [test_resnet]
timm_options: {test_resnet: {output_stride: 8}}
benchmark: null
root: none
dataset: {classes: [apple, banana, leaf, fish, flower, starfish], pretrain: train, train: train, eval: train, val: val, test: val, scored: null}
model: {name: conformer_mini_patch16, drop_path_rate: 0.6}
augment: {long_side: [64, 80], crop: 64}
pretrain: {epochs: 1, lr: 0.001, weight_decay: 0.1, batch_size: 8}
train: {epochs: 3, lr: 0.00005, weight_decay: 0.0005, batch_size: 4}
inference: {scales: [64], batch_size: 4}
pseudo: {conf_fg: 0.6, conf_bg: 0.3, background: 0.42, walk: {beta: 14, steps: 8}, attention: {beta: 2, steps: 1}}
trunk: {width: 0.03125, epochs: 1, lr: 0.001, weight_decay: 0.05, batch_size: 8}
affinity: {width: 0.03125, frozen: true, weights: data/runs/tiny/trunk/model.safetensors, crop: 64, padding_label: 255, epochs: 1, lr: 0.1, batch_size: 4}
segment: {weights: data/runs/tiny/trunk/model.safetensors, width: 0.03125, iterations: 9, batch_size: 4, crop: 64, scale: [0.75, 1.25], lr: 0.003, timm_lr: 0.0001, bn_momentum: 0.1, scales: [0.75, 1.0]}
compute: {threads: 1, workers: 0, precision: "no"}
'''


def command(*arguments):
    "`make` with this environment instead of a new one."
    return ['make', f'VENV={sys.prefix}', '-o', f'{sys.prefix}/ready', 'PROFILE=tiny', 'DATA=scenes', 'JOBS=2', *arguments]


def environment(): return {key: value for key, value in os.environ.items() if key not in ('MAKEFLAGS', 'MAKELEVEL')}


def make(repo, *arguments):
    return subprocess.run(command(*arguments), cwd=repo, capture_output=True, text=True, timeout=900, env=environment())


def new_repo(folder):
    for name in ('nbs', 'bnrcam'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('Makefile', 'settings.ini', 'setup.py', 'constraints.txt'):
        shutil.copy2(ROOT / name, folder)
    (folder / 'nbs/profiles/tiny.yaml').write_text(TINY)
    write_scenes(folder / 'scenes', sizes={'train': 16, 'val': 6})
    return folder


@pytest.fixture(scope='module')
def repo(tmp_path_factory):
    folder = new_repo(tmp_path_factory.mktemp('repo'))
    result = make(folder, 'reproduce')
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def ran(repo, *arguments):
    "The notebooks that make would run now."
    lines = make(repo, 'reproduce', '--dry-run', *arguments).stdout.splitlines()
    return {line.split("'[")[1].split(']')[0].removeprefix('tiny/') for line in lines if line.startswith("echo '[")}


def digest(path): return hashlib.sha256(path.read_bytes()).hexdigest()


TABLES = {'table1', 'table2', 'table3', 'table4', 'table5'}
FIGURES = {'figure1', 'figure2', 'figure3', 'figure4', 'figure5', 'pseudo', 'years'}
RESULTS = TABLES | FIGURES | {'threshold'}
NETWORK = {'table2', 'table3', 'table4', 'figure3', 'years'}
SEGMENT = {'noise1-s0/segment', 'noise1-s0/segment-test_resnet', 'supervised-s0/segment'}


def test_every_product_is_there(repo):
    out = repo / 'reports/tiny'
    runs = {'trunk': {'trunk'}, 'baseline-s0': {'train', 'cams'}, 'supervised-s0': {'segment'},
            'noise1-s0': {'train', 'cams', 'pseudo', 'segment', 'segment-test_resnet'}}
    for run, stages in runs.items():
        assert {path.stem for path in (out / run).glob('*.ipynb')} == stages
    for name in TABLES:
        assert all((out / f'{name}.{kind}').stat().st_size for kind in ('csv', 'md', 'tex', 'json'))
    for name in FIGURES:
        assert all((out / f'{name}.{kind}').stat().st_size for kind in ('png', 'svg', 'json'))
    assert (out / 'threshold.json').stat().st_size and (out / 'threshold_slider.html').stat().st_size


def test_tables_say_what_was_not_run(repo):
    frame = pd.read_csv(repo / 'reports/tiny/table5.csv', index_col='variant')
    assert float(frame.loc['noise x 1 (ours)', 'here, mIoU (%)']) > 0
    assert 'noise2' in frame.loc['noise x 2 (applied twice)', 'here, mIoU (%)']
    assert frame['paper, VOC train'].tolist()[:-1] == [64.9, 62.4, 66.2, 65.3, 65.3]
    assert pd.isna(frame['paper, VOC train'].iloc[-1])


def test_verify(repo):
    result = make(repo, 'verify')
    assert result.returncode == 0, result.stdout + result.stderr
    path = repo / 'data/runs/tiny/noise1-s0/segment/crf/val_00001.png'
    page, archive = repo / 'reports/tiny/index.html', repo / 'data/runs/tiny/noise1-s0/segment.tar'
    kept = {file: file.read_bytes() for file in (path, page, archive)}
    Image.fromarray(np.ones_like(np.array(Image.open(path)))).save(path)  # all of the first class
    page.write_text('another')
    archive.write_bytes(b'')
    try:
        result = make(repo, 'verify')
        wrong = [line for line in result.stdout.splitlines() if line.startswith('WRONG')]
        assert result.returncode != 0 and len(wrong) == 3, result.stdout + result.stderr
        for file, line in zip(('noise1-s0/segment', 'noise1-s0/segment.tar', 'index.html'), wrong):
            assert file in line
    finally:
        for file, content in kept.items():
            file.write_bytes(content)


def test_export_and_a_new_photograph(repo):
    "The mask of an exported network is that of its stage, bit for bit."
    run = repo / 'data/runs/tiny/noise1-s0/segment'
    result = make(repo, 'export', f'RUN={run.relative_to(repo)}')
    assert result.returncode == 0 and 'Done: data/runs/tiny/noise1-s0/segment.safetensors' in result.stdout
    mask = predict(load_model(run.with_suffix('.safetensors')), read_image(repo / 'scenes/JPEGImages/val_00001.jpg'))
    assert (mask == read_mask(run / 'crf/val_00001.png', 7)).all()
    run.with_suffix('.safetensors').unlink()


def test_second_time_nothing_runs(repo):
    result = make(repo, 'reproduce')
    assert 'Nothing to do' in result.stdout and '[' not in result.stdout


def test_archive_for_the_server(repo):
    with tarfile.open(repo / 'data/runs/tiny/noise1-s0/segment.tar') as archive:
        names = archive.getnames()
    assert len(names) == 6 and all(name.startswith('results/VOC2012/Segmentation/comp6_test_cls/val_') for name in names)


def test_only_what_changed_is_stale(repo):
    stages = {f'{run}/cams' for run in ('baseline-s0', 'noise1-s0')}
    assert ran(repo, '-W', 'nbs/results/table5.ipynb') == {'table5', 'index'}
    assert ran(repo, '-W', 'bnrcam/study/figures.py') == RESULTS | {'index'}
    assert ran(repo, '-W', 'bnrcam/evaluate.py') == stages | {'noise1-s0/pseudo'} | SEGMENT | RESULTS | {'index'}
    assert ran(repo, '-W', 'bnrcam/crf.py') == {'noise1-s0/pseudo', 'table1', 'pseudo', 'index'} | SEGMENT | NETWORK
    assert ran(repo, '-W', 'bnrcam/segment.py') == SEGMENT | NETWORK | {'index'}
    assert ran(repo, '-W', 'reports/tiny/noise1-s0/train.ipynb') == (
        {'noise1-s0/cams', 'noise1-s0/pseudo'} | SEGMENT - {'supervised-s0/segment'} | RESULTS | {'index'})
    assert len(ran(repo, 'DATA=elsewhere')) == 7 + len(SEGMENT) + len(RESULTS) + 1


def test_failure_leaves_the_notebook_and_no_product(tmp_path):
    repo = new_repo(tmp_path)
    victim = repo / 'scenes/JPEGImages/train_00003.jpg'
    victim.write_bytes(b'')
    result = make(repo, 'reproduce')
    folder = repo / 'reports/tiny/pretrain-s0'
    assert result.returncode != 0
    assert 'DataError' in result.stdout and 'train_00003.jpg' in result.stdout and 'pretrain.failed.ipynb' in result.stdout
    assert 'train_00003.jpg' in (folder / 'pretrain.failed.ipynb').read_text()
    assert not (folder / 'pretrain.ipynb').exists() and not (repo / 'data/runs/tiny/pretrain-s0/model.safetensors').exists()


# a file whose appearance says how far a stage is, below reports/tiny or data/runs/tiny
MOMENTS = '''
pretrain-s0/model.safetensors  trunk/trunk.failed.ipynb  noise1-s0/checkpoint.safetensors  noise1-s0/cams/train_00002.safetensors
noise1-s0/conf_bg/train_00002.png  noise1-s0/segment/checkpoint.safetensors  table1.csv  index.html'''.split()
SOME = ('table1', 'table3', 'threshold')  # results whose notebooks the killed study makes


def kill_at(repo, moments, *arguments):
    """`make` in `repo`, killed with its process group once the first of `moments` appears that was not there. Returns that
    moment, and the stages that were running; None and its output if it came to its end."""
    found = lambda: {name for name in moments for top in ('reports/tiny', 'data/runs/tiny') if (repo / top / name).exists()}
    before = found()
    with open(repo / 'output', 'w+') as output:
        process = subprocess.Popen(command(*arguments), cwd=repo, stdout=output, stderr=subprocess.STDOUT,
                                   start_new_session=True, env=environment())
        while not (new := found() - before):
            if process.poll() is not None:
                return None, (repo / 'output').read_text()
            time.sleep(.002)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    began = {line[6:-1] for line in (repo / 'output').read_text().splitlines() if line.startswith('[tiny/')}
    return min(new), {name for name in began if not (repo / f'reports/tiny/{name}.ipynb').exists()}


def results(repo):
    "The bytes of everything in which two runs of a study agree: all but the clock, and pictures of progress."
    runs, reports = repo / 'data/runs/tiny', repo / 'reports/tiny'
    timeless = lambda path: re.sub(r'"(finished|sha256)": ".*"', '', path.read_text())
    return {**{path.relative_to(repo): digest(path) for path in runs.rglob('*') if path.is_file()},
            **{path.name: digest(path) for name in SOME for path in reports.glob(f'{name}[._]*')
               if path.suffix in ('.csv', '.md', '.tex', '.png', '.svg') or path.stem == 'threshold_slider'},
            **{path.relative_to(repo): timeless(path) for path in reports.rglob('*.json')
               if path.parent != reports or path.stem in SOME}}


def test_killed_in_every_stage_and_started_again(repo, tmp_path):
    "Killed with -9 and started again at once, `make` goes on where it was, and ends with the same files, byte for byte."
    other = shutil.copytree(repo, tmp_path / 'other', ignore=shutil.ignore_patterns('reports', 'data'))
    kills = []
    arguments = ['reproduce', f"RESULTS={' '.join(SOME)}"]
    while (kill := kill_at(other, MOMENTS, *arguments))[0]:
        print(f'{len(kills) + 1}. {kill[0]}, in', ', '.join(sorted(kill[1])))
        kills.append(kill)
    assert 'Done.' in kill[1], kill[1]
    assert len(kills) >= len(MOMENTS) - 1  # two may have come at once
    hit = {name for _, running in kills for name in running}
    assert {name.split('/')[-1] for name in hit} >= {'pretrain', 'trunk', 'train', 'cams', 'pseudo', 'segment', 'table1', 'index'}
    ours, theirs = results(other), results(repo)
    assert len(ours) > 150 and ours == theirs
    assert 'Nothing to do' in make(other, *arguments).stdout


def test_launched_stage_equals_the_warm_kernel(repo, tmp_path):
    "LAUNCH goes before a stage, whose kernel then begins cold; the weights are the same, byte for byte."
    other = shutil.copytree(repo, tmp_path / 'other')
    model, product = 'data/runs/tiny/baseline-s0/model.safetensors', 'reports/tiny/baseline-s0/train.ipynb'
    for path in (model, product):
        (other / path).unlink()
    (other / 'launch').write_text('#!/bin/sh\necho "$@" > launched; exec "$@"\n')
    (other / 'launch').chmod(0o755)
    result = make(other, product, 'LAUNCH=./launch')
    assert result.returncode == 0, result.stdout
    assert 'stages/train.ipynb' in (other / 'launched').read_text() and '-k warm' not in (other / 'launched').read_text()
    assert digest(other / model) == digest(repo / model)


def test_help_lists_the_targets():
    output = subprocess.run(['make', 'help'], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f'  {target}\t' in output for target in ('reproduce', 'test', 'lab', 'data', 'notebooks', 'clean'))


def test_pages(repo, browser):
    out = repo / 'reports/tiny'
    pages = [*out.glob('*.html'), *out.glob('*/*.html')]
    assert len(pages) > 10 and out / 'index.html' in pages
    for page in pages:
        check_page(browser, page)
    browser.get((out / 'index.html').as_uri())
    tables = browser.execute_script('return [...document.querySelectorAll("table")].map(t => t.tBodies[0].rows.length)')
    assert len(tables) == 5 and min(tables) >= 4


def test_scores_of_the_server_fill_the_tables(repo):
    "A file with returned scores makes the tables with test columns stale, and fills them."
    path = repo / 'data/test_scores_tiny.csv'
    path.write_text('run,background,apple,banana,leaf,fish,flower,starfish\nnoise1-s0,90,10,20,30,40,50,60\n')
    try:
        assert ran(repo) == NETWORK | {'index'}
        result = make(repo, 'reports/tiny/table2.ipynb', 'reports/tiny/table3.ipynb')
        assert result.returncode == 0, result.stdout
        assert '42.9' in (repo / 'reports/tiny/table2.csv').read_text() and '42.9' in (repo / 'reports/tiny/table3.csv').read_text()
    finally:
        path.unlink()
