"""The library notebooks in JupyterLab: opened in a browser, all cells run from its menu, no error in their outputs.

Three of them, for time; BNRCAM_LAB=all runs all, BNRCAM_LAB=04_cam,09_crf these two."""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from browsing import resize

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ALL = sorted(path.stem for path in (ROOT / 'nbs').glob('[0-9]*.ipynb'))
ASKED = os.environ.get('BNRCAM_LAB', '00_paper,01_scenes,08_evaluate')
TOKEN = secrets.token_hex(16)

# of the notebook in front: whether its kernel waits, how many code cells have not run, and the errors in outputs
STATE = '''
const panel = window.jupyterapp?.shell.currentWidget, kernel = panel?.sessionContext?.session?.kernel;
if (!panel?.content?.model || !kernel) return null;
const cells = panel.content.widgets.map(widget => widget.model.toJSON()).filter(c => c.cell_type === 'code' && c.source.length);
const errors = cells.flatMap(c => c.outputs).filter(o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`);
const waiting = cells.filter(c => c.execution_count === null).length;
return {path: panel.context.path, idle: kernel.status === 'idle', cells: cells.length, waiting, errors};
'''


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of a JupyterLab on a copy of the notebooks, with settings and workspaces of its own."
    home = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT / 'nbs', home / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    own = {f'JUPYTER{name}': str(home / name) for name in ('_CONFIG_DIR', '_DATA_DIR', '_RUNTIME_DIR', 'LAB_SETTINGS_DIR',
                                                             'LAB_WORKSPACES_DIR')}
    command = [Path(sys.executable).parent / 'jupyter', 'lab', '--no-browser', '--allow-root', '--notebook-dir', home / 'nbs',
               f'--ServerApp.port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={TOKEN}',
               '--LabApp.expose_app_in_browser=True', '--LabApp.news_url=None',
               '--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate']
    with (home / 'log').open('w') as log:
        server = subprocess.Popen(command, cwd=home, env=os.environ | own | {'PYTHONPATH': str(ROOT)}, stdout=log, stderr=log)
    address = f'http://127.0.0.1:{port}'
    try:
        wait(lambda: server.poll() is not None or ask(address, 'status'), 'JupyterLab to start')
        assert server.poll() is None, (home / 'log').read_text()
        yield address
    finally:
        server.terminate()  # and its kernels
        server.wait(30)


HANG = 600  # seconds, of which JupyterLab takes ten to start and the longest notebook a minute


def wait(condition, what):
    "The first true value of `condition`."
    end = time.monotonic() + HANG
    while not (value := condition()):
        assert time.monotonic() < end, f'waited {HANG} s for {what}'
        time.sleep(.2)
    return value


def ask(address, what, method='GET'):
    "What the server answers, None where that is nothing or it is not there."
    try:
        request = Request(f'{address}/api/{what}', method=method, headers={'Authorization': f'token {TOKEN}'})
        text = urlopen(request, timeout=30).read()
    except OSError:
        return None
    return json.loads(text or 'null')


def choose(browser, menu, command):
    "A command of the menu bar, by the mouse."
    from selenium.webdriver.common.by import By
    entries = lambda: [entry for entry in browser.find_elements(By.CSS_SELECTOR, '.lm-MenuBar-itemLabel') if entry.text == menu]
    wait(entries, f'the menu {menu}')[0].click()
    item = lambda: browser.find_elements(By.CSS_SELECTOR, f'.lm-Menu-item[data-command="{command}"]')
    wait(item, command)[0].click()


@pytest.mark.parametrize('name', ALL if ASKED == 'all' else ASKED.split(','))
def test_all_cells_run(lab, browser, name):
    resize(browser, 'desk')
    browser.get(f'{lab}/lab/tree/{name}.ipynb?reset&token={TOKEN}')
    state = lambda: browser.execute_script(STATE) or {}
    try:
        ready = wait(lambda: state().get('idle') and state(), f'the kernel of {name}')
        assert ready['path'] == f'{name}.ipynb' and ready['cells'] == ready['waiting'] > 1
        choose(browser, 'Run', 'runmenu:run-all')
        ended = lambda: (now := state()) and now['idle'] and (not now['waiting'] or now['errors']) and now
        assert wait(ended, f'{name} to end')['errors'] == []
    finally:
        for session in ask(lab, 'sessions'):
            ask(lab, f"sessions/{session['id']}", 'DELETE')  # ends the kernel
        browser.get('about:blank')
        browser.get_log('browser')  # what JupyterLab says there is not ours
