"The benchmarks: they run, their forms agree, and `make bench` says what is wrong with a folder."
import json
from pathlib import Path

import papermill
import pytest
from test_batch import make, new_repo

from bnrcam.scenes import write_scenes

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).parent.parent / 'nbs/bench'


def measured(folder, name, **parameters):
    "The numbers that a benchmark leaves."
    root = write_scenes(folder / 'scenes', sizes={'train': 2})
    papermill.execute_notebook(NOTEBOOKS / f'{name}.ipynb', folder / 'out.ipynb', cwd=folder, progress_bar=False,
                               start_timeout=600, parameters={'root': str(root), 'repeats': 1, 'threads': 1, **parameters})
    return json.loads((folder / f'reports/bench/{name}.json').read_text())


@pytest.fixture(scope='module')
def result(tmp_path_factory):
    return measured(tmp_path_factory.mktemp('bench'), 'pseudo_labels', images=1, side=256, cells=[[16, 16], [32, 32]])


def test_network(tmp_path):
    result = measured(tmp_path, 'network', images=1, model='conformer_mini_patch16', training=[[128, 1]], inference=[[128, 1]],
                      options=[64, 2], growth=[64], scales=[64, 128])
    assert result['differences']['ours, double']['gradient'] < 1e-9
    for part in ('training', 'inference'):
        assert result[part][0]['memory_mib']['ours'] > 0
    assert result['photo']['bytes']['median'] > 10 and result['curve'][0]['ratio']['median'] > 0
    assert [row['form'] for row in result['options']['rows'] if row['what'] == 'inference'] == ['ours', 'ours, bf16']
    assert {row['form'] for row in result['growth']} == {'textbook', 'ours'} and result['provenance']['threads'] == 1


def test_roofline(tmp_path):
    result = measured(tmp_path, 'roofline', model='conformer_mini_patch16', training=[64, 1], scales=[64], width=1 / 32, side=96)
    shares = {row['stage']: row['share of the limit'] for row in result['stages']}
    assert len(shares) == 8 and all(share > 0 for share in shares.values()), shares
    assert result['peak_gflops'] > 0 and result['copy_gb_per_second'] > 0


def test_card(tmp_path):
    "On a processor it runs to its end, says what only a card can tell, and double precision leaves no difference."
    result = measured(tmp_path, 'card', model='conformer_mini_patch16', side=64, batch=2, width=1 / 32)
    if 'no GPU' in result['found']['device']:
        assert {'TF32', 'memory at the peak', 'two processes'} < {*result['skipped']} and result['two trainings'] == 0
    assert len(result['differences']['loss, float64']) == 5 and max(result['differences']['gradient, float64'].values()) < 1e-9
    assert len(result['steps']) >= 4 and {'precision', 'workers', 'checkpointing'} == {*result['advice']}


def test_notebooks(tmp_path):
    result = measured(tmp_path, 'notebooks', notebooks=str(NOTEBOOKS.parent / 'datasets/00_transforms.ipynb'), promised=0)
    row, = result['notebooks']
    assert row['notebook'] == 'datasets/00_transforms' and row['seconds'] > 0 and row['processor seconds'] > 0
    assert result['longer'] == ['datasets/00_transforms'] and result['provenance']['threads'] == 1


def test_crf(result):
    assert [(row['on'], row['labels']) for row in result['crf']] == [
        (on, labels) for on in ('label map', 'probabilities') for labels in (21, 81)]
    assert all(row['argmax_equal'] and row['largest_difference'] < 1e-5 for row in result['crf'])
    assert all(0 < row['ratio']['min'] <= row['ratio']['median'] <= row['ratio']['max'] for row in result['crf'])


def test_walk(result):
    assert result['walk']['ratio']['min'] > 0 and result['walk']['largest_difference'] < 1e-4
    mib = result['walk']['memory_mib']
    assert mib['cells'] == [256, 1024] and mib['textbook'][1] > 12 * mib['textbook'][0] and mib['ours'][1] < mib['textbook'][1]


def test_stage(result):
    assert all(rate > 0 for rate in result['stage']['images_per_second'].values())
    assert all(seconds > 0 for steps in result['stage']['seconds'].values() for seconds in steps.values())
    assert result['provenance']['images'] == ['train_00000'] and result['provenance']['threads'] == 1


def test_make_names_a_folder_that_is_not_there(tmp_path):
    repo = new_repo(tmp_path)
    run = make(repo, 'bench', 'DATA=nowhere')
    assert run.returncode != 0 and 'DataError: nowhere/ImageSets' in run.stdout
    assert [path.name for path in sorted((repo / 'reports/bench').iterdir())] == [
        'network.failed.ipynb', 'network.log', 'network.provenance']
