"""A wheel of the project: what it holds, what it says of itself, and that it works where nothing else is installed.

A fresh environment with PyTorch takes minutes and gigabytes. So an empty one is made, with the wheel installed into it,
and on its path stand links to the installed distributions that the wheel requires, and those that these require: what
pip would put there. Nothing else can be imported."""
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_string
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = ('bnrcam', 'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE')
# modules of the study that draw, or need those that draw: they may ask for the extra `study`
STUDY = {'study.figures', 'study.plan', 'study.tables', 'study.verify', 'study.when'}
LIBRARY = sorted({'.'.join(path.relative_to(ROOT / 'bnrcam').with_suffix('').parts)
                  for path in (ROOT / 'bnrcam').rglob('[a-z]*.py')} - STUDY)
FOREIGN = {'nbdev', 'fastcore', 'execnb', 'jupyter', 'jupyterlab', 'IPython', 'ipykernel', 'nbformat', 'nbconvert', 'papermill',
           'matplotlib', 'seaborn', 'pytest', 'pip', 'pydensecrf', 'Cython'}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp('source')
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '.'], cwd=source, check=True, timeout=120,
                   capture_output=True)
    return next((source / 'dist').glob('*.whl'))


@pytest.fixture(scope='module')
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        return message_from_string(archive.read(name).decode())


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if name.split('/')[0].endswith('.dist-info')}
    package = [path for path in (ROOT / 'bnrcam').rglob('*') if path.is_file() and '__pycache__' not in path.parts]
    assert names - info == {str(path.relative_to(ROOT)) for path in package}
    assert 'bnrcam/study/templates/index.html.j2' in names and {path.suffix for path in package} == {
        '.py', '.j2', '.css', '.js'}
    assert any(name.endswith('licenses/LICENSE') for name in info)
    assert wheel.name.endswith('-py3-none-any.whl') and wheel.stat().st_size < 1e6


def test_wheel_says_what_it_is(metadata):
    "What `twine check` looks at, and what an index shows."
    assert metadata['Name'] == 'bnrcam' and re.fullmatch(r'\d+\.\d+\.\d+', metadata['Version'])
    import bnrcam
    assert metadata['Version'] == bnrcam.__version__
    assert f"\nversion: {metadata['Version']}\n" in (ROOT / 'CITATION.cff').read_text()
    assert metadata['Requires-Python'] == '>=3.11'
    assert 'Apache-2.0' in (metadata['License'], metadata['License-Expression'])
    assert metadata['Description-Content-Type'] == 'text/markdown'
    assert metadata.get_payload().strip().startswith('# bnrcam')
    assert set(metadata.get_all('Provides-Extra')) == {'crf', 'study', 'dev'}
    assert metadata['Summary'] and '\n' not in metadata['Summary']
    links = [metadata['Home-page'] or '', *metadata.get_all('Project-URL', [])]
    assert any(re.search(r'https://\S+', link) for link in links)


def needed(metadata):
    "Distributions that pip would install with the wheel alone, without its extras, as this environment has them."
    found, todo = {}, [(Requirement(text), '') for text in metadata.get_all('Requires-Dist')]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({'extra': extra}):
            continue
        dist = distribution(requirement.name)
        assert requirement.specifier.contains(dist.version, prereleases=True), f'{requirement}: {dist.version} is here'
        new = {'', *requirement.extras} - found.setdefault(dist.name, (dist, set()))[1]
        found[dist.name][1].update(new)
        todo += [(Requirement(text), extra) for text in dist.requires or [] for extra in new]
    return [dist for dist, _ in found.values()]


@pytest.fixture(scope='module')
def python(wheel, metadata, tmp_path_factory):
    "The interpreter of an environment that holds the wheel and what it requires."
    home = tmp_path_factory.mktemp('empty')
    venv.create(home, with_pip=False)
    site = next(home.glob('lib/python*/site-packages'))
    tops = {(dist, file.parts[0]) for dist in needed(metadata) for file in dist.files}
    for dist, top in tops:
        if top not in ('..', '__pycache__') and not (site / top).exists():
            (site / top).symlink_to(dist.locate_file(top))
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--no-compile', '--target', site,
                    wheel], check=True, timeout=120, capture_output=True)
    return home / 'bin' / 'python'


def run(python, folder, code):
    result = subprocess.run([python, '-I', '-c', code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_nothing_else_can_be_imported(python, tmp_path):
    "And the package comes from the wheel, not from this folder."
    code = f"""
from importlib.util import find_spec
import sys
assert not [name for name in {FOREIGN} if find_spec(name)]
assert find_spec('bnrcam').origin.startswith(sys.prefix)
"""
    run(python, tmp_path, code)


def test_example_of_the_readme(python, metadata, tmp_path):
    example = re.search(r'```python\n(.*?)```', metadata.get_payload(), re.S)[1]
    assert 'from bnrcam' in example
    assert '(2, 21, 32, 32)' in run(python, tmp_path, example + 'print(tuple(refined.shape))')


def test_library_needs_no_extra(python, tmp_path):
    "And the modules of the study name what they miss."
    code = f"""
import sys
from importlib import import_module
for name in {LIBRARY}:
    import_module(f'bnrcam.{{name}}')
import timm
print(type(timm.create_model('conformer_mini_patch16', num_classes=3)).__name__)
print(*{FOREIGN} & {{name.split('.')[0] for name in sys.modules}})
for name in {sorted(STUDY)}:
    try: import_module(f'bnrcam.{{name}}')
    except ModuleNotFoundError as error: print(error.name)
"""
    model, used, *missed = run(python, tmp_path, code).splitlines()
    assert (model, used) == ('Conformer', '') and len(missed) == len(STUDY) and set(missed) <= FOREIGN


def test_crf_says_what_to_type(python, tmp_path):
    "pydensecrf is compiled where it is installed, which can fail: all else works without it."
    code = """
import numpy as np
from bnrcam import affinity, crf, segment
try: crf.crf_labels(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), int), 3)
except ImportError as error: print(error)
"""
    line, = run(python, tmp_path, code).splitlines()
    assert line.startswith('the CRF needs pydensecrf') and 'pip install --no-build-isolation pydensecrf2' in line


def test_console_script(python, tmp_path):
    "What README's first screen shows: without the CRF one line, with `bnrcam[crf]` the same numbers."
    script, site = python.parent / 'bnrcam-predict', next(python.parent.parent.glob('lib/python*/site-packages'))
    if not script.exists():  # pip puts it beside --target's folder
        shutil.copy(next(site.glob('bin/bnrcam-predict')), script)
    command = [python, '-I', script, ROOT / 'data/start/photo.jpg', '--model', ROOT / 'data/start/conformer_mini.safetensors',
               '--labels', 'apple;leaf;flower']
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith('bnrcam-predict: the CRF needs pydensecrf')
    dist = distribution('pydensecrf2')
    for top in {file.parts[0] for file in dist.files} - {'..', '__pycache__'}:
        (tmp_path / 'crf').mkdir(exist_ok=True)
        (tmp_path / 'crf' / top).symlink_to(dist.locate_file(top))
    code = f"import sys; sys.path.append('crf'); sys.argv = {[*map(str, command[2:])]}; exec(open({str(script)!r}).read())"
    assert ': apple 14.' in run(python, tmp_path, code) and (tmp_path / 'masks/photo.png').is_file()
