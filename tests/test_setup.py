"""Set-up looks for what it needs before it fetches anything."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def set_up(clone, tools, python, **environment):
    "What `make .venv/ready` says that fails before it has made an environment."
    result = subprocess.run(['make', '.venv/ready', f'PYTHON={python}'], cwd=clone, capture_output=True, text=True,
                            timeout=300, env={'PATH': str(tools), **environment})
    assert result.returncode and not (clone / '.venv').exists()
    assert 'Setting up' not in result.stdout and 'Traceback' not in result.stderr
    return [line for line in result.stderr.splitlines() if not line.startswith("make")]


def test_names_a_missing_compiler(clone, tools):
    cc, cxx = set_up(clone, tools, sys.executable)
    assert 'Debian' in cc and 'Fedora' in cc and 'macOS' in cc and 'gcc-c++' in cxx


def test_names_the_compiler_that_was_asked_for(clone, tools):
    (tools / 'gcc').symlink_to('/bin/true')
    (tools / 'g++').symlink_to('/bin/true')
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
runpy.run_path('bnrcam/prerequisites.py', run_name='__main__')"
''')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize('version', [(3, 10, 4), (3, 15, 0)])
def test_names_a_python_that_does_not_fit(clone, tools, version):
    for name in ('CC', 'CXX'):
        (tools / name.lower()).symlink_to('/bin/true')
    line, = set_up(clone, tools, fake_python(tools, version), CC='cc', CXX='cxx')
    assert 'bnrcam runs on 3.11 to 3.14' in line and 'make PYTHON=python3.11' in line


def test_pythons_are_the_same_everywhere():
    from bnrcam.prerequisites import PYTHONS
    (_, low), (_, high) = PYTHONS
    every = [f'3.{minor}' for minor in range(low, high + 1)]
    assert f'min_python = 3.{low}\n' in (ROOT / 'settings.ini').read_text()
    assert f'range({low}, {high + 1})' in (ROOT / 'setup.py').read_text()
    assert f'Python {every[0]} to {every[-1]}' in (ROOT / 'README.md').read_text()
    assert ', '.join(f'"{version}"' for version in every) in (ROOT / '.github/workflows/ci.yml').read_text()


def test_constraints_are_one_set_for_all_pythons():
    lines = (ROOT / 'constraints.txt').read_text().splitlines()
    pins = [line for line in lines if not line.startswith('#')]
    assert all(line.count('==') == 1 and ';' not in line for line in pins) and len(pins) > 150
    assert len({line.split('==')[0].lower() for line in pins}) == len(pins)
