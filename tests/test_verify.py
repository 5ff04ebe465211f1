"""`verify` on a small study: passes where all is as it was written, and names the file and the value that is not."""
import hashlib
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from bnrcam.affinity import pseudo_label
from bnrcam.crf import map_images
from bnrcam.data import DataError, VOCFolder, write_mask
from bnrcam.evaluate import evaluate_labels, evaluate_seeds, evaluate_trivial
from bnrcam.scenes import SCENE_CLASSES, voc_palette
from bnrcam.cams import CAMs, write_cams
from bnrcam.study import batch
from bnrcam.study.figures import curve_figure, curves, write_figure
from bnrcam.study.profile import ProfileError, read_profile
from bnrcam.study.records import (load_timm_backbones, load_results, load_segmentation, provenance, write_json, write_result,
                                  write_text)
from bnrcam.study.statistics import by_seed, embolden, paired_difference
from bnrcam.study.submit import read_scores, write_submission
from bnrcam.study.tables import class_table, noise_table, seed_table, segmentation_table, write_table
from bnrcam.study.verify import verify
from bnrcam.engine.checkpoints import load_tensors, save_tensors, write_record
from bnrcam.engine.provenance import state_digest

pytestmark = pytest.mark.slow

matplotlib.use('Agg')
MINI = read_profile(Path(__file__).parent.parent / 'nbs/profiles/mini.yaml')
SETTINGS = {**MINI, 'profile': 'small', 'variants': ['baseline', 'noise1'], 'random_seeds': [0, 1], 'label_seeds': [0, 1],
            'sweep': [],
            'dataset': {**MINI['dataset'], 'test': 'val'},
            **{network: {**MINI[network], 'weights': None} for network in ('affinity', 'segment')}}
RUNS = [f'{variant}-s{seed}' for variant in SETTINGS['variants'] for seed in SETTINGS['random_seeds']]


def made_up_cams(path, truth, labels, rng):
    truth = np.asarray(truth)
    classes = labels.nonzero().flatten()
    planes = torch.from_numpy(truth == classes.numpy()[:, None, None] + 1).float()
    maps = torch.nn.functional.avg_pool2d(planes[None], 16)[0]
    write_cams(path, CAMs(classes, truth.shape, [maps + .2 * torch.from_numpy(rng.random(maps.shape)).float()]), 'a test')


def made_up_labels(dataset, folder, rng):
    folder.mkdir(parents=True)
    for name in dataset.names:
        truth = dataset.mask(name)
        truth[truth == 255] = 0
        write_mask(folder / f'{name}.png', np.where(rng.random(truth.shape) < .2, 0, truth), voc_palette())


def made_up_walk(dataset, folder, walk, rng):
    "Scores after a walk, and their labels."
    for name, labels in zip(dataset.names, dataset.labels):
        classes, (height, width) = labels.nonzero().flatten(), dataset.mask(name).shape
        scores = torch.from_numpy(rng.random((1 + len(classes), 6, 6)).astype(np.float32))
        save_tensors(folder / f'{walk}_scores/{name}.safetensors', {'classes': classes, 'scores': scores},
                     walk={'size': (height, width), 'covers': (height, width)})
    label = partial(pseudo_label, dataset.root, 1 + len(dataset.classes), folder / f'{walk}_scores',
                    SETTINGS['pseudo']['background'], False)
    map_images(label, dataset.names, folder / walk, workers=1)


def made_up_notebook(base, name, *sources):
    "An executed notebook of `base`, with the record that the batch keeps."
    product = f'reports/small/{name}.ipynb'
    record = lambda *step: subprocess.run([sys.executable, batch.__file__, *step], cwd=base, check=True)
    (base / product).with_suffix('.failed.ipynb').write_text(f'{name}, executed')
    record('begin', product, *sources)
    record('end', product)


@pytest.fixture(scope='module')
def finished(scenes, tmp_path_factory):
    base, rng = tmp_path_factory.mktemp('study'), np.random.default_rng(0)
    shutil.copytree(scenes, base / 'scenes')
    (base / 'small.yaml').write_text(yaml.safe_dump(SETTINGS))
    reports, runs = base / 'reports/small', base / 'data/runs/small'
    train, val = (VOCFolder(base / 'scenes', split, SCENE_CLASSES, masks=True) for split in ('train', 'val'))
    for run in [*RUNS, 'supervised-s0', 'supervised-s1']:
        variant, seed = run.split('-s')
        common = {'variant': variant, 'seed': int(seed)}
        if variant != 'supervised':
            for name, labels in zip(train.names, train.labels):
                made_up_cams(runs / run / f'cams/{name}.safetensors', train.mask(name), labels, rng)
            write_json(reports / run / 'cams.json', {**common, **evaluate_seeds(train, runs / run / 'cams'),
                                                      'provenance': provenance(data=train.fingerprint())})
            folders = {'crf': 'conf_bg', 'walk_crf': 'walk_crf', 'attention_crf': 'attention_crf'}
            for folder in folders.values():
                made_up_labels(train, runs / run / folder, rng)
            for walk in ('walk', 'attention'):
                made_up_walk(train, runs / run, walk, rng)
                folders[walk] = walk
            write_json(reports / run / 'pseudo.json', {
                **common, **{key: evaluate_labels(train, runs / run / folder) for key, folder in folders.items()},
                'provenance': provenance(data=VOCFolder(train.root, 'train', SCENE_CLASSES).fingerprint())})
        for name in ('segment', 'segment-resnet18') if run == 'noise1-s0' else ('segment',):
            for kind in ('plain', 'crf'):
                made_up_labels(val, runs / run / name / kind, rng)
            made_up_labels(val, runs / run / f'{name}-test/crf', rng)
            write_submission(runs / run / f'{name}-test/crf', val.names, val.root, runs / run / f'{name}.tar', 7)
            write_json(reports / run / f'{name}.json', {
                **common, 'backbone': name, 'split': 'val', 'provenance': provenance(data=val.fingerprint()),
                **{kind: evaluate_labels(val, runs / run / name / kind) for kind in ('plain', 'crf')}})
    results, pseudo = load_results(reports, RUNS), load_results(reports, RUNS, 'pseudo')
    networks = load_segmentation(reports, SETTINGS['pseudo_labels'], [0, 1])
    modern, test = load_timm_backbones(reports, [0, 1], ['resnet18']), read_scores(base / 'none', SCENE_CLASSES)
    frames = {'table1': (seed_table(results, pseudo, evaluate_trivial(train)), results, pseudo),
              'table2': (class_table(networks, test, 'small', None), networks),
              'table3': (segmentation_table(3, networks, modern, 'small', None, test), networks, modern),
              'table4': (segmentation_table(4, networks, modern, 'small', None), networks, modern),
              'table5': (noise_table(results), results)}
    for name, (frame, *sources) in frames.items():
        write_table(frame, reports, name, f'{name}.', provenance(*sources, profile='small', random_seeds=[0, 1]))
    write_figure(curve_figure(curves(results)), reports, 'figure4', 'Figure 4.', provenance(results, profile='small'))
    weights = {'weight': torch.arange(6.)}
    save_tensors(runs / 'noise1-s0/model.safetensors', weights)
    write_record(runs / 'noise1-s0/cams', {'network': {'weights': state_digest(weights)}})
    made_up_notebook(base, 'noise1-s0/train', 'small.yaml')
    for page in ('noise1-s0/train.html', 'index.html'):
        (reports / page).write_text('a page')
    made_up_notebook(base, 'index', 'reports/small/noise1-s0/train.ipynb')
    return base


@pytest.fixture
def study(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / 'study')


def check(study): return verify(study / 'small.yaml', study / 'scenes', study)


def wrong(study, capsys):
    "The lines of a verification that must fail."
    with pytest.raises(DataError, match='checks failed; the first: ') as error:
        check(study)
    assert '\n' not in str(error.value)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith('WRONG')]


def change(path, edit):
    "Apply `edit` to the value of a JSON file."
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def test_an_honest_study_passes(finished, capsys):
    count = check(finished)
    output = capsys.readouterr().out
    # three a result file, the walks of each pseudo.json, the archive of each network, one a table, one for the evidence of
    # each table and figure, one for the record of each notebook, one for the network of the stage that ran
    assert count == 3 * (4 + 4 + 6 + 1) + 4 + 7 + 5 + 6 + 2 + 1 and f'All {count} checks passed' in output
    assert 'WRONG' not in output and 'Not looked at: history.csv' in output


@pytest.mark.parametrize('damage, words', [
    (lambda path: path.unlink(), 'gone'), (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'damaged'),
    (lambda path: save_tensors(path, {'weight': torch.ones(6)}), 'was made by another network')])
def test_weights_are_those_of_the_run(study, capsys, damage, words):
    damage(study / 'data/runs/small/noise1-s0/model.safetensors')
    line, = wrong(study, capsys)
    assert 'noise1-s0/model.safetensors: the weights: ' in line and words in line and 'make reproduce' in line


def test_one_bit_of_a_photograph(study, capsys):
    path = study / 'scenes/JPEGImages/train_00000.jpg'
    content = bytearray(path.read_bytes())
    content[-60] ^= 1
    path.write_bytes(content)
    lines = wrong(study, capsys)
    assert lines and all('the data fingerprint is ' in line for line in lines)


def test_a_number_that_no_float_holds(study, capsys):
    "One line, and the rest is looked at all the same."
    change(study / 'reports/small/noise1-s0/cams.json', lambda result: result.update(best_miou=10**400))
    lines = wrong(study, capsys)
    assert any('noise1-s0/cams.json' in line and 'too large' in line for line in lines) and all(len(line) < 1000 for line in lines)


def test_number_in_a_table(study, capsys):
    path = study / 'reports/small/table5.csv'
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    old = frame.loc[2, 'here, mIoU (%)']
    frame.loc[2, 'here, mIoU (%)'] = '99.9 ± 0.1 (n=2)'
    frame.to_csv(path, index=False)
    cell, digest = wrong(study, capsys)
    assert "table5.csv: every cell: row 'noise x 1 (ours)', column 'here, mIoU (%)' is '99.9 ± 0.1 (n=2)'" in cell
    assert f"recomputed '{old}'" in cell
    assert 'table5.json' in digest and 'table5.csv is not the file that was written' in digest


def test_bold_in_the_text_and_a_figure(study, capsys):
    for name, kind in (('table1', 'md'), ('table3', 'tex'), ('figure4', 'png')):
        path = study / f'reports/small/{name}.{kind}'
        path.write_bytes(path.read_bytes() + b' ')
    assert [line.split()[-8] for line in wrong(study, capsys)] == ['figure4.png', 'table1.md', 'table3.tex']


@pytest.mark.parametrize('file, edit, message', [
    ('noise1-s1/cams.json', lambda v: v['iou'].update(apple=99.), 'iou/apple is 99.0, recomputed'),
    ('noise1-s1/cams.json', lambda v: v.update(best_miou=99.), 'best_miou is 99.0'),
    ('noise1-s1/cams.json', lambda v: v.update(background_share=1.), 'background_share is 1.0'),
    ('noise1-s1/cams.json', lambda v: v['miou'].__setitem__(7, 1.), 'miou/7 is 1.0'),
    ('noise1-s1/cams.json', lambda v: v['confusion'][0].__setitem__(0, v['confusion'][0][0] + 1), 'confusion/0/0 is'),
    ('noise1-s1/pseudo.json', lambda v: v['walk_crf']['iou'].update(leaf=1.), 'walk_crf/iou/leaf is 1.0'),
    ('noise1-s1/pseudo.json', lambda v: v['crf']['confusion'][2].__setitem__(2, 0), 'crf/confusion/2/2 is 0'),
    ('noise1-s1/segment.json', lambda v: v['plain'].update(miou=88.), 'plain/miou is 88.0'),
    ('noise1-s0/segment-resnet18.json', lambda v: v['crf'].update(miou=88.), 'crf/miou is 88.0'),
    ('supervised-s0/segment.json', lambda v: v['crf'].update(miou=88.), 'crf/miou is 88.0'),
    ('noise1-s1/cams.json', lambda v: v['provenance'].update(data='another'), 'the data fingerprint is another'),
    ('noise1-s1/cams.json', lambda v: v.pop('iou'), "no 'iou'"),
])
def test_number_in_a_result(study, capsys, file, edit, message):
    change(study / 'reports/small' / file, edit)
    lines = wrong(study, capsys)
    assert any(f'{file}: ' in line and message in line for line in lines), lines
    assert any(f'was made from another {file}' in line for line in lines)


def test_scores_and_confusion_improved_together(study, capsys):
    "Consistent in itself, but not with the pixels."
    other = json.loads((study / 'reports/small/noise1-s0/pseudo.json').read_text())
    change(study / 'reports/small/noise1-s1/pseudo.json', lambda v: v.update(walk_crf=other['walk_crf']))
    lines = wrong(study, capsys)
    assert not any('pseudo.json: scores of its confusion' in line for line in lines)
    assert any('noise1-s1/pseudo.json: scores of the stored maps: walk_crf/' in line for line in lines)


@pytest.mark.parametrize('file, message', [
    ('noise1-s0/walk_crf/train_00002.png', 'pseudo.json: scores of the stored maps: walk_crf/'),
    ('noise1-s0/segment/crf/val_00001.png', 'segment.json: scores of the stored maps: crf/')])
def test_changed_label_map(study, capsys, file, message):
    path = study / 'data/runs/small' / file
    with Image.open(path) as image:
        size = image.size
    write_mask(path, np.ones(size[::-1], np.uint8), voc_palette())
    line, = wrong(study, capsys)
    assert message in line and 'noise1-s0/' in line


def test_changed_cams(study, capsys):
    path = study / 'data/runs/small/baseline-s1/cams/train_00001.safetensors'
    tensors, metadata = load_tensors(path)
    save_tensors(path, {**tensors, 'map_0': -tensors['map_0']}, **metadata)
    line, = wrong(study, capsys)
    assert 'baseline-s1/cams.json: scores of the stored maps: ' in line and ', recomputed ' in line


@pytest.mark.parametrize('file', ['noise1-s0/walk_crf/train_00002.png', 'baseline-s1/cams/train_00001.safetensors'])
@pytest.mark.parametrize('damage', [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:60])])
def test_missing_or_damaged_map(study, capsys, file, damage):
    damage(study / 'data/runs/small' / file)
    line, = wrong(study, capsys)
    assert file in line


def test_missing_and_damaged_results(study, capsys):
    (study / 'reports/small/noise1-s0/pseudo.json').unlink()
    (study / 'reports/small/noise1-s1/cams.json').write_text('{"variant"')
    (study / 'reports/small/table2.csv').unlink()
    lines = '\n'.join(wrong(study, capsys))
    assert 'noise1-s0/pseudo.json' in lines and 'noise1-s1/cams.json: damaged' in lines and 'table2.csv' in lines


@pytest.mark.parametrize('file, message', [
    ('noise1-s1/walk_scores/train_00002.safetensors', 'its labels are not those in walk/train_00002.png'),
    ('baseline-s0/attention_scores/train_00000.safetensors', 'its labels are not those in attention/train_00000.png')])
def test_changed_walk(study, capsys, file, message):
    path = study / 'data/runs/small' / file
    tensors, metadata = load_tensors(path)
    save_tensors(path, {**tensors, 'scores': tensors['scores'].flip(0)}, **metadata)
    line, = wrong(study, capsys)
    assert f'{file}: {message}' in line and 'pseudo.json: labels of the stored walks: ' in line
    for damage in (lambda: path.write_bytes(path.read_bytes()[:60]), path.unlink):
        damage()
        line, = wrong(study, capsys)
        assert f'{file}: no propagated scores' in line


def test_archive_for_the_server(study, capsys):
    run = study / 'data/runs/small/noise1-s0'
    content = (run / 'segment.tar').read_bytes()
    (run / 'segment.tar').write_bytes(content.replace(b'IDAT', b'IDAX', 1))
    write_mask(run / 'segment-resnet18-test/crf/val_00001.png', np.zeros_like(
        np.array(Image.open(run / 'segment-resnet18-test/crf/val_00001.png'))), voc_palette())
    modern, ours = wrong(study, capsys)
    assert 'segment.json: archive for the server: ' in ours and 'noise1-s0/segment.tar is not the archive' in ours
    assert 'segment-resnet18.tar is not the archive of the predictions in' in modern
    (run / 'segment.tar').unlink()
    assert 'noise1-s0/segment.tar' in wrong(study, capsys)[1]


NOTEBOOK, PAGE, INDEX = 'noise1-s0/train.ipynb', 'noise1-s0/train.html', 'index.html'


@pytest.mark.parametrize('file, damage, message', [
    (NOTEBOOK, lambda path: path.write_text('noise1'), f'{NOTEBOOK} is not the file that was written'),  # cut short
    (NOTEBOOK, lambda path: path.write_text(path.read_text() + ' '), f'{NOTEBOOK} is not the file that was written'),
    (PAGE, lambda path: path.write_text('another'), f'{PAGE} is not the file that was written'),
    (INDEX, lambda path: path.write_text('another'), f'{INDEX} is not the file that was written'),
    (INDEX, lambda path: path.unlink(), f'{INDEX} is gone'),
    ('noise1-s0/train.provenance', lambda path: path.write_text('{"made": {}, "from": {}}'), f'{NOTEBOOK} is not the file'),
    ('noise1-s0/train.provenance', lambda path: path.unlink(), 'train.provenance'),
    ('noise1-s0/train.provenance', lambda path: path.write_text('{"ma'), 'train.provenance: damaged'),
    ('index.ipynb', lambda path: path.unlink(), 'index.ipynb is gone'),
    ('figure1.ipynb', lambda path: path.write_text('made by hand'), 'figure1.provenance')])
def test_notebooks_and_pages(study, capsys, file, damage, message):
    damage(study / 'reports/small' / file)
    line = wrong(study, capsys)[-1]
    assert '.ipynb: the files in its record: ' in line and message in line


def test_notebook_made_again_without_what_was_made_from_it(study, capsys):
    path = study / 'reports/small' / NOTEBOOK
    path.write_text('another run')
    change(path.with_suffix('.provenance'), lambda record: record['made'].update(
        {f'reports/small/{NOTEBOOK}': hashlib.sha256(b'another run').hexdigest()}))
    line, = wrong(study, capsys)
    assert 'index.ipynb: the files in its record: was made from another' in line and NOTEBOOK in line


def test_code_may_change_and_copies_do_not_count(study):
    (study / 'small.yaml').write_text(yaml.safe_dump(SETTINGS) + '\n')
    copies = study / 'reports/small/noise1-s0/.ipynb_checkpoints'
    copies.mkdir()
    for path in (copies / 'train-checkpoint.ipynb', copies.parent / 'cams.failed.ipynb'):
        path.write_text('no product')
    check(study)


def test_another_data_set(study, capsys):
    mask = study / 'scenes/SegmentationClass/train_00000.png'
    write_mask(mask, np.zeros_like(np.array(Image.open(mask))), voc_palette())
    lines = wrong(study, capsys)
    assert sum('the data fingerprint' in line for line in lines) == 4  # of the seeds, which are scored on masks alone
    assert sum('pseudo.json: scores of the stored maps' in line for line in lines) == 4


def test_a_table_that_nothing_makes_again(study, capsys):
    "It has a record and a csv, so it is on the page: verify says that it cannot look."
    reports = study / 'reports/small'
    write_text(reports / 'mine.csv', 'a\n1\n')
    write_result(reports, 'mine', 'Mine.', {}, ['mine.csv'])
    line, = wrong(study, capsys)
    assert 'mine.csv: every cell: nothing makes it again' in line and 'TABLES' in line


def test_no_profile(tmp_path):
    for text, why in (('random_seeds: [0]', 'profile is missing'), ('[', 'no profile'), ('', 'no profile')):
        (tmp_path / 'x.yaml').write_text(text)
        with pytest.raises(ProfileError, match=f'x.yaml: {why}'):
            verify(tmp_path / 'x.yaml', tmp_path)
    with pytest.raises(ProfileError, match='none.yaml: no such profile'):
        verify(tmp_path / 'none.yaml', tmp_path)


# differences

def difference(ours, base, **seeds):
    runs = [{'variant': name, 'seed': seed, 'score': score} for name, scores in (('noise1', ours), ('baseline', base))
            for seed, score in enumerate(scores)]
    return paired_difference(by_seed(pd.DataFrame(runs), lambda run: run['score']), 'noise1')


def test_interval_is_that_of_a_paired_t_test():
    from scipy.stats import ttest_rel
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 10):
        ours, base = rng.normal(50, 1, n), rng.normal(48, 1, n)
        interval = ttest_rel(ours, base).confidence_interval(.95)
        assert difference(ours, base) == (f'{(ours - base).mean():+.1f} [{interval.low:+.1f}, {interval.high:+.1f}] (n={n})')


def test_seeds_are_paired():
    runs = [('noise1', 0, 10.), ('noise1', 1, 20.), ('noise1', 2, 30.),
            ('baseline', 2, 29.), ('baseline', 1, 19.), ('baseline', 7, 0.)]
    results = pd.DataFrame(runs, columns=['variant', 'seed', 'score'])
    assert paired_difference(by_seed(results, lambda run: run['score']), 'noise1') == '+1.0 [+1.0, +1.0] (n=2)'


def test_no_interval():
    assert difference([50], [40]) == 'one seed' and difference([], [40]) == ''
    assert paired_difference(pd.DataFrame(), 'noise1') == ''
    apart = pd.DataFrame([('noise1', 0, 1.), ('baseline', 1, 1.)], columns=['variant', 'seed', 'score'])
    assert 'no seed' in paired_difference(by_seed(apart, lambda run: run['score']), 'noise1')


def test_bold_only_where_the_printed_interval_excludes_0():
    mark = partial(embolden, before='<b>', after='</b>')
    for text in ('+1.2 [+0.1, +2.3] (n=3)', '-1.2 [-2.3, -0.1] (n=3)', '+1.2\u00a0[+0.1,\u00a0+2.3]\u00a0(n=10)'):
        assert mark(f'| {text} |') == f'| <b>{text}</b> |'
    for text in ('+1.2 [-0.1, +2.5] (n=3)', '+1.2 [+0.0, +2.4] (n=3)', '-0.1 [-0.2, +0.0] (n=3)', '50.0 ± 1.0 (n=3)',
                 'one seed'):
        assert mark(text) == text
    assert difference([1.04, 1.04, 1.04], [1., 1, 1]) == '+0.0 [+0.0, +0.0] (n=3)'


def test_tables_mark_what_they_say(finished):
    reports = finished / 'reports/small'
    text = (reports / 'table1.csv').read_text() + (reports / 'table5.csv').read_text()
    assert '(n=2)' in text and '*' not in text
    frame = noise_table(load_results(reports, RUNS)).astype(str)
    frame.loc[2, 'here, difference to baseline'] = '-6.0 [-8.1, -3.9] (n=3)'
    write_table(frame, reports.parent, 'marked', 'Marked.', provenance())
    assert '| **-6.0 [-8.1, -3.9] (n=3)** ' in (reports.parent / 'marked.md').read_text()
    assert r'\textbf{-6.0 [-8.1, -3.9] (n=3)}' in (reports.parent / 'marked.tex').read_text()


def test_tables_do_not_depend_on_the_clock(finished, tmp_path, monkeypatch):
    results = load_results(finished / 'reports/small', RUNS)
    contents = []
    for clock in ('2001-01-01', '2030-12-31'):
        monkeypatch.setattr('bnrcam.study.records.time.strftime', lambda *_: clock)
        write_table(noise_table(results), tmp_path, 'table5', 'Table 5.', provenance(results))
        write_figure(curve_figure(curves(results)), tmp_path, 'figure4', 'Figure 4.', provenance(results))
        contents.append([(tmp_path / name).read_bytes() for name in ('table5.csv', 'table5.md', 'table5.tex', 'figure4.png',
                                                                     'figure4.svg', 'table5.json')])
    assert contents[0][:-1] == contents[1][:-1] and contents[0][-1] != contents[1][-1]
