"""What several tests need: a tiny folder in VOC layout, and a tiny network."""
import os
from pathlib import Path

import pytest
import torch

from bnrcam import cam
from bnrcam.models import create_classifier
from bnrcam.scenes import write_scenes
from browsing import chromium
from miniature import serve

# notebooks that a test runs with the kernel `warm` share the imports of this process's first
os.environ['BNRCAM_MAKE'] = str(os.getpid())
os.environ['JUPYTER_PATH'] = os.pathsep.join([str(Path(__file__).parents[1] / 'nbs'), *filter(None, [os.environ.get('JUPYTER_PATH')])])

# fixtures that are a browser, a server of notebooks, or a copy of the project in which make runs
SLOW = {'browser', 'api', 'copy', 'fresh', 'repo', 'study'}


# fixtures that take a minute: the tests of a module that have one run in one process, so that it is made once
ONCE = {'test_batch.repo', 'test_lab.lab', 'test_photos.study', 'test_public.study', 'test_scale.one_and_two', 'test_wheel.python',
        'test_when.study'}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    "`make test FAST=1` leaves out what is marked slow: what starts kernels, make or a browser, or trains for long."
    for item in items:
        if SLOW & set(item.fixturenames):
            item.add_marker('slow')
        for name in ONCE & {f'{item.module.__name__}.{name}' for name in item.fixturenames}:
            param = item.callspec.params.get(name.rpartition('.')[2], '') if hasattr(item, 'callspec') else ''
            item.add_marker(pytest.mark.xdist_group(f'{name}-{param}'))


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes') / 'mini', sizes={'train': 8, 'val': 4})


@pytest.fixture
def folder(scenes, tmp_path):
    "A copy of the scenes that a test may spoil."
    import shutil
    return shutil.copytree(scenes, tmp_path / 'data')


@pytest.fixture(params=['strips', 'fused'])
def form(request, monkeypatch):
    "How refinement multiplies by attention: the form of a processor, and that of a graphics card, here on a processor."
    monkeypatch.setattr(cam, 'FUSED', {'cpu'} if request.param == 'fused' else set())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return create_classifier('conformer_mini_patch16', 7)


@pytest.fixture
def web(tmp_path):
    "A server of the folder `tmp_path`/web, as `miniature.serve` describes it, with that `folder`."
    (tmp_path / 'web').mkdir()
    with serve(tmp_path / 'web') as state:
        state.folder = tmp_path / 'web'
        yield state


@pytest.fixture(scope='session')
def browser():
    "Chromium without a window, opened once for all tests."
    with chromium() as driver:
        yield driver
