"""What a stranger adds in one place stands everywhere: a form of the loss, a data set, a figure."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from bnrcam.data import DataError
from bnrcam.datasets.registry import FETCHED, Fetched, prepare
from bnrcam.scenes import write_scenes
from bnrcam.study.graph import jobs, write_graph
from bnrcam.study.page import write_index
from bnrcam.study.profile import read_profile
from bnrcam.study.records import write_json
from test_batch import TINY

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# as make, and then Table 5 and Figure 4, would ask for it, in a copy of the package with one more entry
ASK = '''
import json
import pandas as pd
from bnrcam.study.figures import curve_figure, curves
from bnrcam.study.graph import check_variants, jobs
from bnrcam.study.profile import read_profile
from bnrcam.study.records import Study
from bnrcam.study.tables import seed_table, table5
profile = read_profile('nbs/profiles/tiny.yaml')
check_variants(profile, 'nbs/profiles/tiny.yaml')
study = Study(profile)
frame, record = table5(study)
table1 = seed_table(study.results(), pd.DataFrame(), {}, profile['ours']).set_index('method')
legend = curve_figure(curves(study.results())).axes[0].get_legend()
print(json.dumps({'jobs': {name: job.needs for name, job in jobs(profile).items()}, 'rows': frame.to_dict('records'),
                  'ours': table1.loc['Ours', 'here, mIoU (%)'],
                  'results': [*record['results']], 'legend': [text.get_text() for text in legend.get_texts()]}))
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A copy of notebooks and package with the profile `tiny`, as working folder."
    for name in ('nbs', 'bnrcam'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    (tmp_path / 'nbs/profiles/tiny.yaml').write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made_up_result(run, level):
    "What the stage `cams` writes of a run, but for its CAMs."
    variant, seed = run.split('-s')
    scores = {'best_miou': level, 'background_share': 5., 'fp_share': 4., 'fn_share': 3., 'best_threshold': .4}
    write_json(f'reports/tiny/{run}/cams.json', {
        'variant': variant, 'seed': int(seed), **scores, 'thresholds': [0., .2, .4], 'miou': [10., level - 5, level],
        'scored': ['background', 'apple'], 'provenance': {'data': 'made up'}})


def test_a_loss_is_one_entry_and_a_name_in_the_profile(project):
    losses = project / 'bnrcam/losses.py'
    entry = "VARIANTS = {\n    'half': Variant('half the noise', partial(noise_logits, scale=.5)),"
    losses.write_text(losses.read_text().replace('VARIANTS = {', entry, 1))
    (project / 'nbs/profiles/tiny.yaml').write_text(
        TINY.replace('[baseline, noise1]', '[baseline, noise1, half]').replace('ours: noise1', 'ours: half'))
    for run, level in {'baseline-s0': 30., 'noise1-s0': 33., 'half-s0': 31.5}.items():
        made_up_result(run, level)
    run = subprocess.run([sys.executable, '-c', ASK], cwd=project, capture_output=True, text=True, timeout=300,
                         env={'PYTHONPATH': str(project), 'PATH': '/usr/bin:/bin', 'HOME': str(project), 'MPLBACKEND': 'Agg'})
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    row, = (row for row in found['rows'] if row['variant'] == 'half the noise')
    assert row['here, mIoU (%)'].startswith('31.5') and row['paper, VOC train'] == ''
    assert 'half the noise' in found['legend'] and 'half-s0/cams.json' in found['results']
    assert found['ours'].startswith('31.5')
    backbone = found['jobs']['half-s0/segment-test_resnet']
    assert backbone == ['half-s0/pseudo'] and 'noise1-s0/pseudo' in found['jobs']
    assert found['jobs']['half-s0/cams'] == ['half-s0/train']
    assert all('half-s0/cams' in found['jobs'][name] for name in ('table5', 'figure4'))


def test_a_data_set_is_one_entry_and_a_name_in_the_profile(project, monkeypatch):
    made = []
    monkeypatch.setitem(FETCHED, 'flowers', Fetched({}, lambda folder: made.append(folder)))
    (project / 'nbs/profiles/tiny.yaml').write_text(f'{TINY}fetched: flowers\n')
    write_scenes('scenes', sizes={'train': 2, 'val': 2})
    write_graph('nbs/profiles/tiny.yaml', 'scenes', 'graph.mk', dry=True)
    assert 'FETCHED := flowers' in (project / 'graph.mk').read_text().splitlines()
    prepare('flowers', 'here')
    assert made == ['here']
    with pytest.raises(DataError, match="there is no 'trees', but voc, coco, flowers"):
        prepare('trees', 'here')


FIGURE = '''
import matplotlib.pyplot as plt
from bnrcam.study.figures import write_figure
from bnrcam.study.records import load_results, provenance
results = load_results(f'reports/{profile}', [f'{variant}-s0' for variant in variants])
figure, ax = plt.subplots()
ax.bar(results['variant'], results['fp_share'])
write_figure(figure, f'reports/{profile}', 'positives', 'False positives. Lower is better.', provenance(results, profile=profile))
'''


def test_a_figure_is_one_notebook(project):
    cells = [nbformat.v4.new_code_cell("profile = 'mini'\nvariants = ['baseline']", metadata={'tags': ['parameters']}),
             nbformat.v4.new_code_cell(FIGURE)]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={'bnrcam': {'needs': ['cams'], 'order': 5}})
    nbformat.write(notebook, project / 'nbs/results/positives.ipynb')
    found = jobs(read_profile('nbs/profiles/tiny.yaml'))
    job = found['positives']
    assert job.parameters == {'profile': 'tiny', 'variants': ['baseline', 'noise1']} and 'positives' in found['index'].needs
    assert job.needs == ['baseline-s0/cams', 'noise1-s0/cams'] and Path('bnrcam/study/figures.py') in job.code
    for run in ('baseline-s0', 'noise1-s0'):
        made_up_result(run, 30.)
    exec(FIGURE, dict(job.parameters))  # as papermill does
    nbformat.write(notebook, project / 'reports/tiny/positives.ipynb')
    page = write_index(project / 'reports/tiny', 'tiny', 'A test.').read_text()
    assert 'id="positives"' in page and 'positives.html' in page and 'positives.png' in page and 'positives.json' in page
    assert all(f'{run}/cams.json' in page for run in ('baseline-s0', 'noise1-s0'))
