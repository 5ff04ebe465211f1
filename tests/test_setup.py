"""Set-up looks for what it needs before it fetches anything."""
import shutil
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from bnrcam.study import prerequisites

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TOOLS = ('bash', 'env', 'make', 'sed', 'grep', 'cat', 'tr', 'nproc', 'git', 'chromium', 'mkdir', 'touch', 'head', 'sort')


@pytest.fixture
def tools(tmp_path):
    "A folder for PATH that holds what make needs, and no compiler."
    folder = tmp_path / 'tools'
    folder.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


@pytest.fixture
def clone(tmp_path):
    "A copy of what set-up reads."
    shutil.copytree(ROOT / 'bnrcam', tmp_path / 'clone/bnrcam', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('Makefile', 'settings.ini', 'setup.py', 'constraints.txt', 'nbs/profiles/mini.yaml'):
        (tmp_path / 'clone' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / 'clone' / name)
    return tmp_path / 'clone'


def set_up(clone, tools, python, goal='.venv/ready', **environment):
    "What `make GOAL` says that fails before it has made an environment."
    result = subprocess.run([tools / 'make', goal, f'PYTHON={python}'], cwd=clone, capture_output=True, text=True,
                            timeout=300, env={'PATH': str(tools), **environment})
    assert result.returncode and not (clone / '.venv').exists()
    assert 'Setting up' not in result.stdout and 'Traceback' not in result.stderr
    return [line for line in result.stderr.splitlines() if not line.lower().startswith('make')]


def test_names_a_missing_compiler(clone, tools):
    cc, cxx = set_up(clone, tools, sys.executable)
    assert 'Debian' in cc and 'Fedora' in cc and 'macOS' in cc and 'gcc-c++' in cxx


def test_names_the_compiler_that_was_asked_for(clone, tools):
    (tools / 'gcc').symlink_to(shutil.which('true'))
    (tools / 'g++').symlink_to(shutil.which('true'))
    line, = set_up(clone, tools, sys.executable, CC='icc -O2', CXX=str(tools / 'g++'))
    assert line.startswith('no icc, the compiler')


def fake_python(folder, version):
    "A python3 that says it is of another version."
    path = folder / 'python3-of-today'
    path.write_text(f'''#!/bin/bash
exec {sys.executable} -I -S -c "
import runpy, sys, sysconfig
sysconfig.get_paths(), sysconfig.get_config_var('CC')
sys.version_info = {version}
runpy.run_path('bnrcam/study/prerequisites.py', run_name='__main__')"
''')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize('version', [(3, 10, 4), (3, 15, 0)])
def test_names_a_python_that_does_not_fit(clone, tools, version):
    for name in ('CC', 'CXX'):
        (tools / name.lower()).symlink_to(shutil.which('true'))
    line, = set_up(clone, tools, fake_python(tools, version), CC='cc', CXX='cxx')
    assert 'bnrcam runs on 3.11 to 3.14' in line and 'make PYTHON=python3.11' in line


@pytest.mark.parametrize('goal', ['.venv/ready', 'reproduce'])
def test_names_a_python_that_is_not_there(clone, tools, goal):
    line, = set_up(clone, tools, 'python3.99', goal)
    assert line.startswith('no python3.99') and 'python3-venv (Debian)' in line


def test_batch_of_an_old_python_names_it(clone, tools):
    "Before batch.py, which such a Python cannot read."
    for name in ('CC', 'CXX'):
        (tools / name.lower()).symlink_to(shutil.which('true'))
    line, = set_up(clone, tools, fake_python(tools, (3, 8, 18)), 'reproduce', CC='cc', CXX='cxx')
    assert 'is Python 3.8; bnrcam runs on 3.11 to 3.14' in line


def make(clone, tools, *arguments):
    "The errors of a make that stops while it reads its Makefile."
    result = subprocess.run([tools / 'make', *arguments], cwd=clone, capture_output=True, text=True, timeout=60,
                            env={'PATH': str(tools)})
    assert result.returncode and not result.stdout
    return result.stderr.splitlines()[-1]


def test_names_a_make_that_is_too_old(clone, tools):
    line = make(clone, tools, 'help', 'MAKE_VERSION=3.81')
    assert 'GNU make 3.81' in line and 'brew install make' in line


def test_names_a_missing_bash(clone, tools):
    (tools / 'bash').unlink()
    assert 'install bash (Debian, Fedora, Homebrew)' in make(clone, tools, 'help')


def test_names_missing_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(prerequisites.sysconfig, 'get_paths', lambda: {'include': str(tmp_path)})
    line, = prerequisites.missing_compiler()
    assert line.startswith(f'no {tmp_path}/Python.h') and 'python3-dev ' in line and 'python3-devel' in line


def test_names_a_missing_ensurepip(monkeypatch):
    "Debian has it in a package of its own."
    monkeypatch.setattr(prerequisites, 'find_spec', lambda name: None)
    line, = prerequisites.missing_python()
    assert line.startswith('no ensurepip') and 'python3-venv' in line


def test_names_a_full_disk_unless_the_environment_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(prerequisites.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=3.2e9))
    line, = prerequisites.missing_room(tmp_path / 'not/there')
    assert line.startswith(f'3.2 GB are free on the disk of {tmp_path};') and 'make VENV=' in line
    assert not [*prerequisites.missing_room(sys.prefix)]


def test_tests_go_on_without_git_and_chromium(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    chromium, git = prerequisites.wanted()
    assert 'will be skipped' in chromium and git.startswith('no git')


def test_pythons_are_the_same_everywhere():
    (_, low), (_, high) = prerequisites.PYTHONS
    every = [f'3.{minor}' for minor in range(low, high + 1)]
    assert f'min_python = 3.{low}\n' in (ROOT / 'settings.ini').read_text()
    assert f'range({low}, {high + 1})' in (ROOT / 'setup.py').read_text()
    assert f'Python {every[0]} to {every[-1]}' in (ROOT / 'README.md').read_text()
    assert ', '.join(f'"{version}"' for version in every) in (ROOT / '.github/workflows/ci.yml').read_text()


def test_constraints_serve_the_first_release_of_each_python():
    "Debian 12 has 3.11.2: a version that asks for a later one cannot be installed there."
    pinned = dict(line.split('==') for line in (ROOT / 'constraints.txt').read_text().splitlines() if '==' in line)
    for dist in distributions():
        needed = dist.metadata['Requires-Python']
        if needed and pinned.get(canonicalize_name(dist.name)) == dist.version:
            assert SpecifierSet(needed).contains('3.11.0'), f'{dist.name} {dist.version}: {needed}'


def test_constraints_are_one_set_for_all_pythons():
    lines = (ROOT / 'constraints.txt').read_text().splitlines()
    pins = [line for line in lines if not line.startswith('#')]
    assert all(line.count('==') == 1 and ';' not in line for line in pins) and len(pins) > 150
    assert len({line.split('==')[0].lower() for line in pins}) == len(pins)
