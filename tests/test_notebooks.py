"""The library notebooks run, agree with the package, and carry nothing that does not belong in git."""
import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
LIBRARY = sorted([*(ROOT / 'nbs').glob('[0-9]*.ipynb'), *(ROOT / 'nbs').glob('*/[0-9]*.ipynb')])
BATCH = sorted((ROOT / 'nbs').glob('*/[!0-9]*.ipynb'))
RESULTS = [path for path in BATCH if path.parent.name == 'results' and path.stem != 'index']
STAGES = {'cams', 'pseudo', 'segment', 'start', 'sweep', 'trial'}


def tool(name, cwd):
    subprocess.run([Path(sys.executable).parent / name], cwd=cwd, check=True, capture_output=True, timeout=300)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    target = tmp_path_factory.mktemp('repo')
    for name in ('nbs', 'bnrcam'):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'Makefile', 'constraints.txt'):
        shutil.copy(ROOT / name, target)
    return target


def contents(folder, pattern):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob(pattern))
            if not {'__pycache__', '.ipynb_checkpoints'} & set(path.parts)}


def test_package_is_what_the_notebooks_export(copy):
    tool('nbdev_export', copy)
    assert contents(copy / 'bnrcam', '*.py') == contents(ROOT / 'bnrcam', '*.py'), 'run nbdev_export'


def test_notebooks_are_clean(copy):
    tool('nbdev_clean', copy)
    assert contents(copy / 'nbs', '*.ipynb') == contents(ROOT / 'nbs', '*.ipynb'), 'run nbdev_clean'


def test_readme_is_the_index_notebook(copy):
    command = ['make', '-B', 'README.md', f'VENV={sys.prefix}', '-o', f'{sys.prefix}/ready']
    subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=120)
    assert (copy / 'README.md').read_text() == (ROOT / 'README.md').read_text(), 'run make README.md'


def test_readme_pictures_and_links():
    links = re.findall(r'\]\((?!http)([^)]+)\)', (ROOT / 'README.md').read_text())
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)


def test_readme_examples(tmp_path, monkeypatch):
    import timm
    import torch

    import bnrcam.models
    assert 'conformer_small_patch16' in bnrcam.models.PUBLISHED
    monkeypatch.chdir(tmp_path)
    published = timm.create_model('conformer_small_patch16', num_classes=1000)
    torch.save({'model': published.state_dict()}, 'Conformer_small_patch16.pth')
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    assert len(blocks) >= 2
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace['refined'].shape == (2, 21, 32, 32) and set(namespace['losses']) == {'loss', 'loss_cls', 'loss_noise'}


@pytest.mark.parametrize('path', BATCH, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_batch_notebooks_have_parameters_and_no_outputs(path):
    cells = json.loads(path.read_text())['cells']
    assert sum('parameters' in cell['metadata'].get('tags', []) for cell in cells) == 1
    assert not any(cell.get('outputs') for cell in cells)


@pytest.mark.parametrize('path', RESULTS, ids=lambda path: path.stem)
def test_result_notebooks_say_what_they_need_and_where_they_stand(path):
    metadata = json.loads(path.read_text())['metadata']['bnrcam']
    assert {*metadata['needs'], *metadata.get('uses', [])} <= STAGES and type(metadata['order']) is int


def test_no_result_has_a_name_that_another_begins_with():
    "What a result has made is NAME.* and NAME_*."
    names = [path.stem for path in RESULTS]
    assert not [(one, other) for one in names for other in names if other.startswith(f'{one}_')]


def test_places_on_the_page_differ():
    orders = [json.loads(path.read_text())['metadata']['bnrcam']['order'] for path in RESULTS]
    assert len(set(orders)) == len(orders) > 10


@pytest.mark.slow
def test_papermill_passes_on_what_a_result_notebook_says(tmp_path):
    from papermill import execute_notebook
    notebook = nbformat.v4.new_notebook(metadata={
        'bnrcam': {'needs': ['cams'], 'order': 5}, 'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'x'}}, cells=[
        nbformat.v4.new_code_cell('x = 1', metadata={'tags': ['parameters']})])
    nbformat.write(notebook, tmp_path / 'in.ipynb')
    execute_notebook(tmp_path / 'in.ipynb', tmp_path / 'out.ipynb', {'x': 2}, kernel_name='python3', progress_bar=False)
    assert json.loads((tmp_path / 'out.ipynb').read_text())['metadata']['bnrcam'] == {'needs': ['cams'], 'order': 5}


@pytest.mark.parametrize('path', [ROOT / 'nbs/index.ipynb', *LIBRARY], ids=lambda path: path.stem)
def test_stored_outputs_are_fit_to_be_shown(path):
    "No error, no warning or progress bar, no path of the machine that they were made on, no picture without ink."
    for cell in json.loads(path.read_text())['cells']:
        for output in cell.get('outputs', []):
            assert output['output_type'] != 'error' and output.get('name') != 'stderr', output
            assert '\r' not in ''.join(output.get('text', '')), output  # a progress bar
            assert not re.search(r'/(work|home|root|Users)/|Traceback', json.dumps(output)), output
            if picture := output.get('data', {}).get('image/png'):
                pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(''.join(picture)))).convert('L'))
                assert pixels.min() < 128 < pixels.max(), 'an empty picture'


@pytest.mark.slow
@pytest.mark.parametrize('path', LIBRARY, ids=lambda path: path.stem)
def test_runs(path):
    "To its end. How long it takes is for `make bench` to say: here only what hangs fails, at 5 minutes a cell."
    notebook = nbformat.read(path, as_version=4)
    assert any(cell.get('outputs') for cell in notebook.cells), 'shows nothing'
    NotebookClient(notebook, timeout=300, kernel_name='warm', resources={'metadata': {'path': path.parent}}).execute()


def test_import_needs_no_notebook_tools():
    "Only what settings.ini lists under requirements: neither nbdev nor fastcore, papermill, jupyter or matplotlib."
    code = '''
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"nbdev", "fastcore", "execnb", "papermill", "nbformat", "nbconvert", "jupyterlab",
                                  "IPython", "ipykernel", "matplotlib", "seaborn", "jinja2", "yaml"} - STUDY:
            raise ImportError(name)
STUDY = {"jinja2", "yaml", "matplotlib"}  # torch, huggingface_hub and timm may look for these themselves
sys.meta_path.insert(0, Refuse())
import bnrcam
from bnrcam import affinity, cam, cams, crf, data, evaluate, losses, models, paper, scenes, train
import timm
timm.create_model("conformer_mini_patch16", num_classes=3)
'''
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
