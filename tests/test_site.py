"""Pages: those of an executed notebook, and those of the API, made from the docstrings."""
import base64
import importlib
import inspect
import io
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

import bnrcam
from bnrcam.study.page import notebook_page
from browsing import check_page, resize

ROOT = Path(__file__).parent.parent
MODULES = [info.name.removeprefix('bnrcam.') for info in pkgutil.walk_packages(bnrcam.__path__, 'bnrcam.')
           if not info.ispkg and not info.name.split('.')[-1].startswith('_')]
page_of = lambda name: f"bnrcam/{name.replace('.', '/')}.html"


# executed notebooks

@pytest.fixture
def notebook(tmp_path):
    "Page of a notebook as papermill leaves it: parameters twice, a progress bar in three steps, a table, a picture, a long line."
    stream = lambda text: nbformat.v4.new_output('stream', name='stderr', text=text)
    bars = [stream(f'walk: {bar}') for bar in ('  0%|      | 0/9\n', ' 55%|###   | 5/9\n', '100%|######| 9/9\n')]
    table = nbformat.v4.new_output('display_data', data={'text/html': f'<table><tr>{"<td>a wide cell</td>" * 40}</tr></table>'})
    Image.new('RGB', (1300, 400)).save(file := io.BytesIO(), 'PNG')
    picture = nbformat.v4.new_output('display_data', data={'image/png': base64.b64encode(file.getvalue()).decode()})
    cells = [nbformat.v4.new_code_cell('seed = 0', metadata={'tags': ['parameters']}),
             nbformat.v4.new_code_cell('seed = 1', metadata={'tags': ['injected-parameters']}),
             nbformat.v4.new_code_cell('walk(' + 'seed, ' * 60 + ')', outputs=[*bars, stream('a warning\n'), table, picture])]
    (tmp_path / 'noise1-s0').mkdir()
    (tmp_path / 'index.html').write_text('<title>index</title>')
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / 'noise1-s0/pseudo.ipynb')
    return notebook_page(tmp_path / 'noise1-s0/pseudo.ipynb', '../index.html')


def test_notebook_page_is_brief(notebook):
    text = notebook.read_text()
    assert text.count('<details>') == 2 and '100%|' in text and 'a warning' in text
    assert not re.search(r'\b\d{1,2}%\|', text)
    assert 'noise1-s0, pseudo</p>' in text  # which run it is


def test_notebook_page_in_a_browser(notebook, browser):
    check_page(browser, notebook)
    check_sizes(browser)


def check_sizes(browser):
    "On a phone, pictures and the text in them are as large as they were drawn, and scroll in boxes that fit."
    resize(browser, 'phone')
    sizes = browser.execute_script("""return [...document.images].map(i => {
      const box = i.closest('.wide'); return [i.naturalWidth, i.width, box.clientWidth, box.scrollWidth]; })""")
    assert sizes
    for natural, width, box, scroll in sizes:
        assert width == natural and box <= 390 and scroll == max(box, natural)
    resize(browser, 'desk')
    assert browser.execute_script('return [...document.images].every(i => i.width <= i.closest(".wide").clientWidth)')


BATCH = sorted(path for folder in ('results', 'stages') for path in (ROOT / 'nbs' / folder).glob('*.ipynb'))


@pytest.mark.parametrize('path', BATCH, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_batch_notebooks_write_formulas_without_tex(path):
    "Their pages have no MathJax, which would come from the network."
    cells = nbformat.read(path, as_version=4).cells
    assert not [cell.source for cell in cells if cell.cell_type == 'markdown' and '$' in cell.source]


# the API

def public(module):
    "Functions and classes that a module exports, and the methods that its classes add."
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name, value
        for method in vars(value) if inspect.isclass(value) else ():
            if not method.startswith('_') and callable(getattr(value, method)):
                yield f'{name}.{method}', getattr(value, method)


@pytest.mark.parametrize('name', MODULES)
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(f'bnrcam.{name}')
    assert module.__doc__ and not [member for member, value in public(module) if not inspect.getdoc(value)]


@pytest.fixture(scope='module')
def api(tmp_path_factory):
    "`make docs` in a copy of the project."
    copy = tmp_path_factory.mktemp('api')
    for name in ('bnrcam', 'nbs/api'):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'Makefile', copy)
    result = subprocess.run(['make', 'docs', f'VENV={sys.prefix}', '-o', f'{sys.prefix}/ready'], cwd=copy, capture_output=True,
                            text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return copy / 'reports/api'


def test_api_pages(api, browser):
    "One page a module, listed on the first page, with all that it exports and the equations as they stand in the docstrings."
    pages = {str(path.relative_to(api)) for path in (api / 'bnrcam').rglob('*.html')}
    packages = {page_of(name.split('.')[0]) for name in MODULES if '.' in name}
    assert packages and pages == {*map(page_of, MODULES)} | packages
    for path in (api / 'bnrcam.html', *(api / 'bnrcam').rglob('*.html')):
        check_page(browser, path)
    first = (api / 'bnrcam.html').read_text()
    assert all(page_of(name) in first for name in MODULES)
    for module in MODULES:
        text = (api / page_of(module)).read_text()
        assert not [name for name, _ in public(importlib.import_module(f'bnrcam.{module}')) if f'id="{name}"' not in text]
    browser.get((api / 'bnrcam/cam.html').as_uri())
    assert 'M** = (A*/B)^order M*' in browser.execute_script('return document.body.innerText')
