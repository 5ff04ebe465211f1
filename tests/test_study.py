"""The study graph: what a profile says, which jobs it makes, and that profile and data are seen by their content."""
import copy
import os
import shutil
import sys
import time
from functools import cache, reduce

import pytest
import yaml

import test_faults
from bnrcam.study import graph
from bnrcam.study.graph import cells, jobs, parameters
from bnrcam.study.profile import Profile, ProfileError, read_profile
from test_batch import ROOT, TINY
from test_faults import go_on, make, ran, start, up_to_date, would_run

finished, repo, fresh = test_faults.finished, test_faults.repo, test_faults.fresh  # fixtures

MINI = (ROOT / 'nbs/profiles/mini.yaml').read_text()
STAGES = sorted([*(ROOT / 'nbs/stages').glob('*.ipynb'), *(ROOT / 'nbs/results').glob('*.ipynb')])


def profile(folder, *edits, text=MINI):
    "mini.yaml with edits (old, new), read."
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new, 1)
    (folder / 'mini.yaml').write_text(text)
    return read_profile(folder / 'mini.yaml')


# the profile

def test_lists_of_several_lines_and_blocks(tmp_path):
    one = profile(tmp_path)
    several = profile(tmp_path, ('variants: [baseline, noise0,', 'variants: [baseline,\n  noise0,'),
                      ('\nrandom_seeds: [0, 1, 2, 3, 4]', '\nrandom_seeds:\n  - 0\n  - 1\n  - 2\n  - 3\n  - 4'), ('lr: 0.00005,', 'lr: 5e-5,'))
    assert several == one


def test_a_comment_is_a_comment(tmp_path):
    found = jobs(profile(tmp_path, ('model: {', '# weights: x.safetensors\nmodel: {')), base=ROOT)
    assert {file for job in found.values() for file in job.files} == {
        'data/start/conformer_mini.safetensors', 'data/start/resnet38_eighth.safetensors'}


def test_words_in_a_text_are_no_settings(tmp_path):
    found = jobs(profile(tmp_path, ('about: >-', 'about: >-\n  Published weights: none; weights: data/x.safetensors.')), base=ROOT)
    assert {job.name for job in found.values()} == {job.name for job in jobs(read_profile(ROOT / 'nbs/profiles/mini.yaml'), base=ROOT).values()}


def test_a_folder_named_by_a_number_is_text(tmp_path):
    "DATA=2012, which papermill's command line would read as a number."
    job = jobs(profile(tmp_path), '2012', base=ROOT)['noise1-s0/cams']
    assert yaml.safe_load(graph.text(job, 'mini.yaml', lambda *_: {}))['root'] == '2012'


def test_conflict_marks_in_a_notebook(repo):
    path = repo / 'nbs/05_losses.ipynb'
    path.write_text(path.read_text().replace('"cells": [', '<<<<<<< HEAD\n "cells": [\n=======\n "cells": [', 1))
    result = make(repo, 'notebooks', f'VENV={sys.prefix}', '-o', f'{sys.prefix}/ready')
    assert result.returncode and 'nbs/05_losses.ipynb: no notebook' in result.stderr and 'Traceback' not in result.stderr


@pytest.mark.parametrize('old, new, key, right', [
    ('profile: mini', 'profile: 010', "profile is '010'", 'must be mini'),
    ('profile: mini', 'profile: other', "profile is 'other'", 'must be mini'),
    ('profile: mini', 'profile: mini\n"profile": voc', 'profile', 'stands twice'),
    ('train: {epochs: 2,', 'train: {epochs: 2, epochs: 4,', 'epochs', 'stands twice'),
    ('lr: 0.00005', 'lr: "5e-5"', "train.lr is '5e-5'", 'number'), ('lr: 0.00005', 'lr: .nan', 'train.lr is', 'number'),
    ('precision: "no"', 'precision: no', 'compute.precision is False', "'no', 'tf32', 'bf16' or 'fp16'"),
    ('classes: [apple, banana', 'classes: [no, banana', 'dataset.classes.0 is False', 'quotes'),
    ('classes: [apple, banana', 'classes: [1, banana', 'dataset.classes.0 is 1', 'quotes'),
    ('classes: [apple, banana', 'classes: [apple, apple', 'dataset.classes is', "'apple' stands twice"),
    ('train: {epochs: 2', 'train: {epochs: 0', 'train.epochs is 0', 'greater than 0'),
    ('train: {epochs: 2', 'train: {epoch: 1, epochs: 3', 'train.epoch', 'no such setting, but epochs'),
    ('weight_decay: 0.0005, batch_size: 8', 'weight_decay: 0.0005, batch_size: 0', 'train.batch_size is 0', 'equal to 1'),
    ('\nrandom_seeds: [0, 1, 2, 3, 4]', '\nrandom_seeds: [0, 0]', 'random_seeds is [0, 0]', '0 stands twice'),
    ('\nrandom_seeds: [0, 1, 2, 3, 4]', '\nrandom_seeds: [0, 1.5]', 'random_seeds.1 is 1.5', 'integer'),
    ('\naugment:', '\n# augment:', 'augment', 'missing'), ('about: >-', 'note: none\nabout: >-', 'note', 'no such setting'),
    ('scored: null', 'scored: [background, kat]', 'dataset.scored', "'kat' is neither background nor"),
    *(('variants: [baseline', f'variants: [{name}', 'variants.0', 'letters') for name in ('../../../outside', "'noise1-s0'")),
    ('pseudo_labels: [baseline', 'pseudo_labels: [../tiny/noise1', 'pseudo_labels.0', 'letters'),
    ('timm_backbones: [resnet18', 'timm_backbones: [../resnet18', 'timm_backbones.0', 'letters'),
    ('timm_backbones: [resnet18', 'timm_backbones: [.hidden', 'timm_backbones.0', 'letters'),
    *(('classes: [apple', f'classes: [{label}', 'dataset.classes.0', 'printable text') for label in (
        "'a|99.9'", "'=HYPERLINK(1)'", "'+1+1'", "'@SUM(1)'", "'-1'", '"a\\e[31m"', '"a\\0"', '"a\\v"', '"a\\nb"', "' a'")),
    ('segment: {weights: data/start', 'segment: {weights: data/runs/voc', 'segment.weights', 'of this study'),
    ('ours: noise1', 'ours: noise9', 'ours', "'noise9' is none of variants"),
    ('label_seeds: [0, 1, 2]', 'label_seeds: [0, 7]', 'label_seeds', '7 is none of random_seeds')])
def test_one_line_for_a_mistake(tmp_path, old, new, key, right):
    with pytest.raises(ProfileError) as error:
        profile(tmp_path, (old, new))
    line = str(error.value)
    assert line.startswith(f'{tmp_path}/mini.yaml: ') and line.isprintable() and key in line and right in line, line


def test_all_mistakes_at_once(tmp_path):
    with pytest.raises(ProfileError) as error:
        profile(tmp_path, ('train: {epochs: 2', 'train: {epochs: no'), ('\nrandom_seeds: [0, 1, 2, 3, 4]', '\nrandom_seeds: []'),
                ('width: 0.125', 'width: -1'))
    assert len(error.value.lines) == 3


# the jobs

@pytest.mark.parametrize('path', STAGES, ids=lambda path: path.stem)
def test_parameters_of_a_notebook_are_those_of_its_profile(path):
    "Who runs one in JupyterLab runs the study of mini; a stage that mini has not, that of the profile it names."
    found = parameters(path)
    profile = read_profile(ROOT / f"nbs/profiles/{found['profile']}.yaml")
    others = {'pretrain': 'scratch', 'collapse': 'scratch', 'trunk': 'animals', 'masks': 'photos', 'coverage': 'photos',
              'levels': 'photos', **dict.fromkeys(['start', 'trial', 'when_starts', 'when_settings', 'when_best'], 'when')}
    assert found['profile'] == others.get(path.stem, 'mini')
    for name, value in found.items():
        if name in profile and value != {}:
            whole = profile[name]
            assert value == ({key: whole[key] for key in value} if isinstance(value, dict) else whole), name


@pytest.mark.parametrize('path', STAGES, ids=lambda path: path.stem)
def test_a_notebook_reads_only_its_parameters(path):
    "No section.get(...), and no key of a section that its cell of parameters does not name."
    import ast
    source = '\n'.join(''.join(cell['source']) for cell in cells(path) if cell['cell_type'] == 'code')
    known = parameters(path)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and known.get(node.value.id):
            if isinstance(node.slice, ast.Constant) and isinstance(known[node.value.id], dict):
                assert node.slice.value in known[node.value.id], ast.unparse(node)


def test_a_variant_that_is_none(repo):
    path = repo / 'nbs/profiles/tiny.yaml'
    path.write_text(TINY.replace('variants: [baseline, noise1]', 'variants: [baseline, noise1, noise7]'))
    result = make(repo, 'reproduce')
    assert result.returncode == 2 and "there is no 'noise7', but baseline" in result.stderr and not ran(result.stdout)


def test_only_what_reads_a_setting_is_stale(repo):
    path = repo / 'nbs/profiles/tiny.yaml'
    path.write_text(TINY + '# a comment\n')
    os.utime(path, (time.time() + 9e4,) * 2)
    assert not would_run(repo)
    path.write_text(TINY.replace('about: A test.', 'about: Another.'))
    assert would_run(repo) == {'index'}
    path.write_text(TINY.replace('conf_fg: 0.6', 'conf_fg: 0.7'))
    assert 'noise1-s0/pseudo' in would_run(repo) and not {'noise1-s0/train', 'noise1-s0/cams'} & would_run(repo)
    path.write_text(TINY.replace('random_seeds: [0]', 'random_seeds: [0, 1]', 1))
    assert {'baseline-s1/train', 'pretrain-s1/pretrain'} < would_run(repo) and 'baseline-s0/train' not in would_run(repo)
    path.write_text(TINY.replace('lr: 0.00005', 'lr: 1e-4'))
    result = make(repo, 'reproduce')
    assert 'noise1-s0/train.ipynb again, because nbs/profiles/tiny.yaml: train.lr is 0.0001, was 5.0e-05' in result.stdout
    assert result.returncode == 0 and 'pretrain-s0/pretrain' not in ran(result.stdout) and up_to_date(repo)


READ_BY = {  # settings, by section, and a stage whose jobs each of them changes
    'model': 'train', 'augment': 'train', 'pretrain': 'pretrain', 'train': 'train', 'inference': 'cams',
    'trunk': 'trunk', 'pseudo': 'pseudo', 'affinity': 'pseudo', 'segment': 'segment', 'compute': 'train'}


def leaves(settings, *keys):
    "Paths of the single settings in a section, or in one that a profile may leave out."
    for key, value in settings.items():
        yield from leaves(value, *keys, key) if isinstance(value, dict) and value else [(*keys, key)]


def another(value):
    "A value of the same kind that is not this one."
    if value is None: return 'other'
    if isinstance(value, bool): return not value
    return value[:-1] if isinstance(value, list) else value + ('x' if isinstance(value, str) else 1)


def test_every_setting_of_the_schema_changes_a_job(monkeypatch):
    "Leaves come from the schema through `completed`: a new one that no job reads fails here."
    whole, sweep = ({**read_profile(ROOT / f'nbs/profiles/{name}.yaml'), 'sweep': [1e-3]} for name in ('animals', 'when'))
    assert whole.keys() == Profile.model_fields.keys() and all(whole[name] for name in READ_BY)
    monkeypatch.setattr(graph, 'code', lambda *_: [])
    monkeypatch.setattr(graph, 'cells', cache(cells))  # notebooks are read once
    del whole['fetched']  # what `make data` fetches: the graph's file has it, no job
    sweep |= {'pretrain': whole['pretrain'], 'dataset': {**sweep['dataset'], 'pretrain': 'train'}}  # which the other sweep needs
    check_leaves(whole, [keys for keys in leaves(whole) if keys != ('when',)])
    check_leaves(sweep, leaves({'when': sweep['when']}))


def check_leaves(whole, paths):
    before = jobs(whole, base=ROOT)
    for *sections, key in paths:
        changed = copy.deepcopy(whole)
        inner = reduce(dict.__getitem__, sections, changed)
        inner[key] = another(inner[key])
        after = jobs(changed, base=ROOT)
        stages = {name.split('/')[-1].split('-')[0] for name in before.keys() | after.keys()
                  if before.get(name) != after.get(name)}
        assert stages and (not sections or READ_BY.get(sections[0], '') in {*stages, ''}), (sections, key)


# data and products by content

def flip_bit(path):
    "One bit of the file; its size and its date stay."
    date, content = path.stat(), bytearray(path.read_bytes())
    content[-60] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))


def test_data_is_seen_by_content(repo):
    names = repo / 'scenes/ImageSets/Segmentation/val.txt'
    for path, edit, what in ((repo / 'scenes/JPEGImages/val_00001.jpg', flip_bit, 'JPEGImages'),
                             (repo / 'scenes/SegmentationClass/val_00001.png', flip_bit, 'SegmentationClass'),
                             (names, lambda path: path.write_text('\n'.join(path.read_text().split()[3:])), 'list')):
        edit(path)
        assert {'noise1-s0/segment', 'table2'} <= would_run(repo, 'RESULTS=table2') and not any(
            name.endswith('train') for name in would_run(repo)), what
        result = make(repo, 'reproduce')
        assert result.returncode == 0 and f'because {what} of split val in scenes are not what they were' in result.stdout
        assert up_to_date(repo)


def test_one_folder_has_one_name(repo):
    for name in ('scenes/', './scenes', f'{repo}/scenes/../scenes'):
        assert not would_run(repo, f'DATA={name}'), name
    assert up_to_date(repo)


def test_what_cannot_be_read_has_changed(repo):
    out = repo / 'reports/tiny'
    (out / 'noise1-s0/pseudo.provenance').write_text('[' * 200_000)
    (out / 'noise1-s0/cams.json').unlink()
    (out / 'noise1-s0/cams.json').mkdir()
    (out / 'figure4.provenance').unlink()
    os.mkfifo(out / 'figure4.provenance')
    (out / 'table5.csv').write_text('damaged')
    assert {'noise1-s0/pseudo', 'noise1-s0/cams', 'figure4', 'table5'} < would_run(repo)
    (out / 'noise1-s0/cams.json').rmdir()
    (out / 'figure4.provenance').unlink()
    result = make(repo, 'reproduce')
    assert result.returncode == 0 and {'noise1-s0/pseudo', 'table5', 'figure4'} < ran(result.stdout) and up_to_date(repo)


def test_a_failed_look_stops_make(repo):
    "What ends the look before its end is no answer."
    path = repo / 'bnrcam/study/batch.py'
    path.write_text(path.read_text().replace('def stale_products(folder: str)', 'def stale_products(folder: str, more)'))
    result = make(repo, 'reproduce')
    assert result.returncode == 2 and 'TypeError' in result.stderr and not ran(result.stdout)


# hostile

@pytest.mark.parametrize('name', ['api', 'bench', 'readme'])
def test_folders_of_the_project(repo, name):
    kept = repo / f'reports/{name}/kept'
    kept.parent.mkdir(exist_ok=True)
    kept.touch()
    (repo / f'nbs/profiles/{name}.yaml').write_text(TINY.replace('tiny', name))
    for target in ('clean', 'reproduce'):
        result = make(repo, target, f'PROFILE={name}')
        assert result.returncode == 2 and f'reports/{name} is a folder of the project' in result.stderr and kept.exists()


def test_a_profile_is_read_every_time(repo):
    "Whatever its date: code in it never runs."
    path = repo / 'nbs/profiles/tiny.yaml'
    path.write_text(TINY + '''"a = __import__('os').system('touch pwned'); b": 1\n''')
    os.utime(path, (1e9, 1e9))
    for target in ('reproduce', 'reports/tiny/trunk/trunk.ipynb'):
        result = make(repo, target)
        assert result.returncode == 2 and 'nbs/profiles/tiny.yaml: ' in result.stderr and not ran(result.stdout)
    assert not list(repo.rglob('pwned'))


def test_links_are_not_written_through(repo):
    for i, name in enumerate(('tiny/table5.log', 'tiny/table5.provenance.partial', '.tiny.lock')):
        (repo / f'victim{i}').write_text('kept')
        (repo / 'reports' / name).unlink(missing_ok=True)
        (repo / 'reports' / name).symlink_to(repo / f'victim{i}')
        (repo / 'reports/tiny/table5.csv').write_text('damaged')
        make(repo, 'reproduce')
        assert (repo / f'victim{i}').read_text() == 'kept', name


def test_two_clones_of_one_data_folder(fresh, tmp_path):
    other = shutil.copytree(fresh, tmp_path / 'other', symlinks=True)
    (fresh / 'data').mkdir(exist_ok=True)
    shutil.rmtree(other / 'data', ignore_errors=True)
    (other / 'data').symlink_to(fresh / 'data')
    first = start(fresh, 'noise1-s0/train')
    result = make(other, 'reproduce')
    assert result.returncode and 'data/runs/.tiny.lock' in result.stderr and f'process {first.pid};' in result.stderr
    go_on(fresh, first)
    assert first.returncode == 0 and make(other, 'reproduce').returncode == 0
