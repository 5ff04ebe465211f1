"The benchmark of the pseudo-labels: it runs, its forms agree, and `make bench` says what is wrong with a folder."
import json
from pathlib import Path

import papermill
import pytest
from test_batch import make, new_repo

from bnrcam.scenes import write_scenes

NOTEBOOK = Path(__file__).parent.parent / 'nbs/bench/pseudo_labels.ipynb'


@pytest.fixture(scope='module')
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bench')
    root = write_scenes(folder / 'scenes', sizes={'train': 2})
    papermill.execute_notebook(NOTEBOOK, folder / 'out.ipynb', cwd=folder, progress_bar=False, start_timeout=600, parameters={
        'root': str(root), 'images': 1, 'repeats': 1, 'side': 256, 'cells': [[16, 16], [32, 32]]})
    return json.loads((folder / 'reports/bench/pseudo_labels.json').read_text())


def test_crf(result):
    assert [(row['on'], row['labels']) for row in result['crf']] == [
        (on, labels) for on in ('label map', 'probabilities') for labels in (21, 81)]
    assert all(row['argmax_equal'] and row['largest_difference'] < 1e-5 for row in result['crf'])
    assert all(0 < row['ratio']['min'] <= row['ratio']['median'] <= row['ratio']['max'] for row in result['crf'])
    assert all(row['ratio']['median'] > 1 for row in result['crf'] if row['on'] == 'label map')


def test_walk(result):
    assert result['walk']['ratio']['min'] > 1 and result['walk']['largest_difference'] < 1e-4
    mib = result['walk']['memory_mib']
    assert mib['cells'] == [256, 1024] and mib['textbook'][1] > 12 * mib['textbook'][0] and mib['ours'][1] < mib['textbook'][1]


def test_stage(result):
    assert all(rate > 0 for rate in result['stage']['images_per_second'].values())
    assert all(seconds > 0 for steps in result['stage']['seconds'].values() for seconds in steps.values())
    assert result['made_by']['images'] == ['train_00000'] and result['made_by']['threads'] == 1


def test_make_names_a_folder_that_is_not_there(tmp_path):
    repo = new_repo(tmp_path)
    run = make(repo, 'bench', 'DATA=nowhere')
    assert run.returncode != 0 and 'DataError: nowhere/ImageSets' in run.stdout
    assert [path.name for path in sorted((repo / 'reports/bench').iterdir())] == [
        'pseudo_labels.failed.ipynb', 'pseudo_labels.log', 'pseudo_labels.made']
