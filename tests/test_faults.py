"""What goes wrong around a batch: two at once, kills, edits in mid-run, clocks, damage, full disks. Nothing wrong is reported.

The first part runs make with a papermill that writes little, so that a study of all stages takes seconds."""
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from bnrcam.crf import map_images, write_result
from bnrcam.data import DataError, VOCFolder, read_mask, write_mask
from bnrcam.engine.provenance import code_digest
from bnrcam.engine.weights import WeightsError, load_weights
from bnrcam.scenes import SCENE_CLASSES, voc_palette, write_scenes
from bnrcam.cams import CAMs, infer_cams, read_cams, write_cams
from bnrcam.study import batch
from bnrcam.study.figures import save_figure
from bnrcam.study.graph import jobs
from bnrcam.study.page import notebook_page, write_index, write_slider
from bnrcam.study.profile import read_profile
from bnrcam.study.records import load_results, write_json
from bnrcam.study.submit import write_submission
from bnrcam.study.tables import write_table
from bnrcam.study.verify import check_settings, check_weights, read_study
from bnrcam.engine.checkpoints import read_record, reset_if_stale, save_tensors
from bnrcam.train import fit
from test_batch import TINY, environment, new_repo

pytestmark = pytest.mark.slow

matplotlib.use('Agg')
# writes what a stage writes: a notebook that tells its profile, a result; a stage named in PAUSE waits for the file `go`
PAPERMILL = f'''#!{sys.executable} -IS
import os, sys, time
from pathlib import Path
notebook, output, _, profile = sys.argv[1:5]
product = Path(output.replace('.failed', ''))
text = Path(profile).read_text()
Path(output).write_text(text)
if str(product).endswith(os.environ.get('PAUSE', 'nothing')):
    Path('paused').touch()
    while not Path('go').exists(): time.sleep(.01)
def write(ending, text):  # as the stages do, in one step and never through a link
    partial = product.with_suffix(ending + '.partial')
    partial.write_text(text)
    os.replace(partial, product.with_suffix(ending))
write('.json', text)
if product.stem == 'index': write('.html', 'page')
if 'table' in product.stem: write('.csv', '1')
'''
SOME = ('table1', 'table3', 'table5', 'figure4')
# without what takes seconds to import
PYTHON = f'''#!/bin/sh
case "$1" in -c) exit 0;; esac
exec {sys.executable} "$@"
'''


def command(*arguments):
    return ['make', 'VENV=mock', '-o', 'mock/ready', 'PROFILE=tiny', 'DATA=scenes', 'JOBS=2', f'RESULTS={" ".join(SOME)}',
            *arguments]


def make(repo, *arguments):
    return subprocess.run(command(*arguments), cwd=repo, capture_output=True, text=True, timeout=300, env=environment())


def start(repo, pause):
    "A batch that waits in the stage `pause`, and leads a process group of its own."
    process = subprocess.Popen(command('reproduce'), cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**environment(), 'PAUSE': f'{pause}.ipynb'}, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it
    wait_for(repo / 'paused', process)
    return process


def go_on(repo, process):
    "What a paused batch says once it goes on to its end."
    (repo / 'go').touch()
    output, _ = process.communicate(timeout=300)
    for name in ('go', 'paused'):
        (repo / name).unlink()
    return output


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, f'ended before {path}: {process.stdout.read()}'
        time.sleep(.005)


def ran(output):
    "The stages that make began."
    return set(re.findall(r"^(?:echo ')?\[tiny/(.*?)\]'?$", output, re.M))


def would_run(repo, *arguments): return ran(make(repo, 'reproduce', '-n', *arguments).stdout)


def up_to_date(repo):
    result = make(repo, 'reproduce')
    return 'Nothing to do' in result.stdout and not ran(result.stdout)


def made_with_settings_of_today(repo):
    "Whether every product says that it was made with the settings that the profile gives it now."
    out = repo / 'reports/tiny'
    found = jobs(read_profile(repo / 'nbs/profiles/tiny.yaml'), 'scenes', repo)
    products = {str(path.relative_to(out).with_suffix('')): yaml.safe_load(path.read_text()) for path in out.rglob('*.ipynb')}
    return len(products) > 12 and all(found[name].parameters == settings for name, settings in products.items())


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    repo = new_repo(tmp_path_factory.mktemp('mock'))
    (repo / 'mock/bin').mkdir(parents=True)
    for name, text in (('papermill', PAPERMILL), ('python', PYTHON)):
        (repo / 'mock/bin' / name).write_text(text)
        (repo / 'mock/bin' / name).chmod(0o755)
    (repo / 'mock/ready').touch()
    result = make(repo, 'reproduce')
    assert result.returncode == 0, result.stdout + result.stderr
    assert {*SOME, 'index', 'trunk/trunk', 'noise1-s0/segment'} < ran(result.stdout)
    assert up_to_date(repo)
    return repo


@pytest.fixture
def repo(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / 'repo', symlinks=True)


@pytest.fixture
def fresh(repo):
    shutil.rmtree(repo / 'reports')
    return repo


# two batches

def refused(result, process):
    "The one line of a batch that was refused because of `process`."
    line, = result.stderr.splitlines()
    who = f'process {process.pid}' + ', which has ended' * (process.poll() is not None)
    assert result.returncode and 'reports/.tiny.lock' in line and f'{who};' in line and 'wait' in line
    return not ran(result.stdout)


def test_second_batch_is_refused(fresh):
    first = start(fresh, 'noise1-s0/train')
    # it does not wait: the first batch ends when it is told to, below
    for target in ('reproduce', 'clean', 'reports/tiny/pretrain-s0/pretrain.ipynb'):
        assert refused(make(fresh, target), first)
    assert 'noise1-s0/cams' in would_run(fresh) and make(fresh, 'help').returncode == 0
    output = go_on(fresh, first)
    assert first.returncode == 0 and 'Done.' in output and up_to_date(fresh)


def test_a_stranger_with_the_number_of_make(tmp_path, capsys):
    "The number of a make that was killed may be that of another process today."
    lock, hand = str(tmp_path / 'lock'), os.getpid()
    for said, words in ((f'{hand} {batch.started(hand)}', f'process {hand};'), (f'{hand} 1', f'a stage of process {hand}, which has ended;')):
        file = batch.locked(lock)
        os.ftruncate(file, 0)
        os.pwrite(file, said.encode(), 0)
        with pytest.raises(SystemExit, match=re.escape(words)):
            batch.locked(lock)
        os.close(file)


def test_another_profile_runs_beside_it(fresh):
    (fresh / 'nbs/profiles/other.yaml').write_text(TINY.replace('tiny', 'other'))
    first = start(fresh, 'noise1-s0/train')
    assert make(fresh, 'reproduce', 'PROFILE=other').returncode == 0
    go_on(fresh, first)
    assert first.returncode == 0 and up_to_date(fresh)


def test_killed_batch_leaves_no_lock(fresh):
    for stage in ('pretrain-s0/pretrain', 'noise1-s0/train', 'table1'):
        first = start(fresh, stage)
        os.killpg(first.pid, signal.SIGKILL)  # nobody has asked about it when the next one starts: a zombie
        (fresh / 'paused').unlink()
    result = make(fresh, 'reproduce')
    assert result.returncode == 0, result.stderr
    assert not {'pretrain-s0/pretrain', 'noise1-s0/train'} & ran(result.stdout) and up_to_date(fresh)


def test_lock_lasts_as_long_as_a_stage(fresh):
    "make alone was killed; the stage that it had started goes on."
    first = start(fresh, 'noise1-s0/train')
    first.kill()
    first.wait()
    assert refused(make(fresh, 'reproduce'), first)
    go_on(fresh, first)
    result = make(fresh, 'reproduce')
    assert result.returncode == 0 and up_to_date(fresh)


def test_interrupted(fresh):
    "Ctrl-C reaches make, its stages and the lock's holder."
    first = start(fresh, 'noise1-s0/train')
    os.killpg(first.pid, signal.SIGINT)
    first.wait(300)
    (fresh / 'paused').unlink()
    assert make(fresh, 'reproduce').returncode == 0 and up_to_date(fresh)


# edits while the batch runs

@pytest.mark.parametrize('file, stage', [('nbs/profiles/tiny.yaml', 'noise1-s0/train'), ('nbs/stages/cams.ipynb', 'noise1-s0/cams'),
                                         ('bnrcam/affinity.py', 'noise1-s0/pseudo'), ('nbs/results/table1.ipynb', 'table1')])
def test_edited_in_mid_run(fresh, file, stage):
    first = start(fresh, stage)
    path = fresh / file
    text = path.read_text()
    path.write_text(text.replace('train: {epochs: 3', 'train: {epochs: 2') if file.endswith('yaml') else text + ' ')
    assert path.read_text() != text
    output = go_on(fresh, first)
    assert first.returncode and not (fresh / 'reports/tiny/index.html').exists()
    line = next(line for line in output.splitlines() if 'run `make reproduce` again' in line)
    assert ('train.epochs is 2, was 3' if file.endswith('yaml') else 'another file') in line
    assert file in line and 'run `make reproduce` again' in line and 'Traceback' not in output
    result = make(fresh, 'reproduce')
    assert result.returncode == 0 and stage in ran(result.stdout) and f'again, because {file}' in result.stdout
    assert up_to_date(fresh) and made_with_settings_of_today(fresh)


def test_older_copy_put_back(repo):
    "An edit that is older than the products."
    profile = repo / 'nbs/profiles/tiny.yaml'
    profile.write_text(TINY.replace('epochs: 3', 'epochs: 2'))
    os.utime(profile, (1e9, 1e9))
    result = make(repo, 'reproduce')
    assert result.returncode == 0 and made_with_settings_of_today(repo) and up_to_date(repo)


def test_another_data_and_back(repo):
    assert len(would_run(repo, 'DATA=elsewhere')) > 12
    assert up_to_date(repo)
    assert make(repo, 'reports/tiny/pretrain-s0/pretrain.ipynb', 'DATA=elsewhere').returncode == 0
    assert 'pretrain-s0/pretrain' in ran(make(repo, 'reproduce').stdout)


def test_dry_run_changes_nothing(fresh):
    state = lambda: {path: path.stat().st_mtime_ns for path in fresh.rglob('*')}
    before = state()
    os.utime(fresh / 'nbs/profiles/tiny.yaml', (time.time() + 9e4,) * 2)
    before[fresh / 'nbs/profiles/tiny.yaml'] = (fresh / 'nbs/profiles/tiny.yaml').stat().st_mtime_ns
    assert len(would_run(fresh)) > 12 and state() == before


# clocks

def test_product_from_the_future(repo):
    for name in ('noise1-s0/train', 'table5'):
        os.utime(repo / f'reports/tiny/{name}.ipynb', (time.time() + 9e4,) * 2)
    result = make(repo, 'reproduce')
    assert {'noise1-s0/train', 'table5', 'index'} < ran(result.stdout) and 'baseline-s0/train' not in ran(result.stdout)
    assert result.stdout.count('in the future') == 2 and 'dated' in result.stdout
    assert up_to_date(repo)


@pytest.mark.parametrize('file', ['reports/tiny/noise1-s0/train.yaml', 'bnrcam/cams.py', 'nbs/stages/cams.ipynb'])
def test_source_from_the_future(repo, file):
    os.utime(repo / file, (time.time() + 9e4,) * 2)
    result = make(repo, 'reproduce')
    assert f'{file}: dated' in result.stderr and 'noise1-s0/cams' in ran(result.stdout)
    assert up_to_date(repo)


def test_clock_set_back_in_mid_run(fresh):
    "What came before is dated after all that follows; the profile is edited in between."
    first = start(fresh, 'noise1-s0/train')
    for path in (fresh / 'reports/tiny').rglob('*.*'):
        os.utime(path, (time.time() + 9e4,) * 2)
    profile = fresh / 'nbs/profiles/tiny.yaml'
    profile.write_text(TINY.replace('epochs: 3', 'epochs: 2'))
    output = go_on(fresh, first)
    assert first.returncode and not (fresh / 'reports/tiny/index.html').exists(), output
    result = make(fresh, 'reproduce')
    assert result.returncode == 0 and made_with_settings_of_today(fresh) and up_to_date(fresh)


# damage

def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = [flip, lambda path: path.write_bytes(b''), lambda path: os.truncate(path, 3), Path.unlink,
           lambda path: path.write_bytes(os.urandom(300))]
# an executed notebook, results, a table, the page, a record; and the stage that makes it
PRODUCTS = {'noise1-s0/train.ipynb': 'noise1-s0/train', 'noise1-s0/cams.json': 'noise1-s0/cams', 'index.html': 'index',
            'table1.csv': 'table1', 'table5.ipynb': 'table5', 'figure4.provenance': 'figure4'}


def damaged(path, damage):
    "Damage a file behind the back of its date."
    date = path.stat()
    damage(path)
    if path.exists():
        os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))


def test_damaged_products_are_named_and_made_again(repo):
    for damage, file in zip(DAMAGES * 2, PRODUCTS):
        damaged(repo / 'reports/tiny' / file, damage)
    result = make(repo, 'reproduce')
    assert {*PRODUCTS.values()} < ran(result.stdout) and not {'pretrain-s0/pretrain', 'trunk/trunk'} & ran(result.stdout)
    for file, stage in PRODUCTS.items():
        why, = re.findall(rf'reports/tiny/{stage}.ipynb again, because (.*)', result.stdout)
        assert file in why or file.endswith('.provenance')
    assert result.returncode == 0 and up_to_date(repo)


INSTEAD = {'link': lambda path, mine: path.symlink_to(mine), 'device': lambda path, mine: path.symlink_to('/dev/zero'),
           'pipe': lambda path, mine: os.mkfifo(path), 'folder': lambda path, mine: path.mkdir()}


@pytest.mark.parametrize('kind', INSTEAD)
def test_something_else_in_place_of_each_product(repo, kind, tmp_path, monkeypatch, capsys):
    "Each is seen at once; make makes it again, or stops with its name; what a link leads to stays as it is."
    mine = tmp_path / 'mine'
    mine.write_text('mine')
    paths = [path for path in sorted((repo / 'reports/tiny').rglob('*')) if path.is_file() and path.suffix in ('.ipynb', '.json', '.csv', '.provenance')]
    monkeypatch.chdir(repo)
    for path in paths:
        kept = path.rename(tmp_path / 'kept')
        INSTEAD[kind](path, mine)
        batch.stale('reports/tiny')
        # what was made from it is stale where it is no product any more
        assert capsys.readouterr().out, path
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        kept.rename(path)
    for file in PRODUCTS:
        path = repo / 'reports/tiny' / file
        path.unlink()
        INSTEAD[kind](path, mine)
    result = make(repo, 'reproduce')
    said = result.stdout + result.stderr
    assert mine.read_text() == 'mine'
    if result.returncode:
        assert any(Path(file).name in said for file in PRODUCTS) and 'Traceback' not in said, said
    else:
        assert up_to_date(repo) and not any((repo / 'reports/tiny' / file).is_symlink() for file in PRODUCTS)


@pytest.mark.parametrize('damage', DAMAGES, ids='flip empty truncate remove random'.split())
def test_every_damage_is_seen(repo, damage, monkeypatch, capsys):
    monkeypatch.chdir(repo)
    for file, stage in PRODUCTS.items():
        path = Path('reports/tiny', file)
        kept = path.read_bytes()
        damaged(path, damage)
        batch.stale('reports/tiny')
        # a notebook that is gone is no product: what was made from it is stale
        assert {'train.ipynb': 'cams', 'table5.ipynb': 'index'}.get(path.name if not path.exists() else '', stage) \
            in capsys.readouterr().out
        path.write_bytes(kept)


def test_damage_is_seen_whatever_the_name(tmp_path, monkeypatch, capsys):
    "Networks of timm have a point in their names."
    monkeypatch.chdir(tmp_path)
    product = Path('reports/noise1-s0/segment-convnext_small.fb_in22k_ft_in1k.ipynb')
    product.parent.mkdir(parents=True)
    batch.begin(str(product))
    product.with_suffix('.failed.ipynb').write_text('executed')
    batch.end(str(product))
    product.with_suffix('.failed.ipynb').write_text('one that failed')
    batch.stale('reports')
    assert capsys.readouterr().out == ''
    product.write_text('cut')
    batch.stale('reports')
    assert capsys.readouterr().out == f'{product}\n'


def test_killed_between_record_and_product(repo, monkeypatch, capsys):
    "The last two steps of a stage: the product before it does not pass as the new one."
    monkeypatch.chdir(repo)
    product = Path('reports/tiny/table5.ipynb')
    batch.begin(str(product), 'nbs/results/table5.ipynb')
    product.with_suffix('.failed.ipynb').write_text('new')
    replace = os.replace
    monkeypatch.setattr(batch.os, 'replace', lambda old, new: replace(old, new) if new != product else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.end(str(product))
    batch.stale('reports/tiny')
    assert str(product) in capsys.readouterr().out


def test_removed_notebooks(repo):
    for name in ('noise1-s0/train', 'table5'):
        (repo / f'reports/tiny/{name}.ipynb').unlink()
    assert {'noise1-s0/train', 'noise1-s0/cams', 'table5', 'index'} < would_run(repo)


# disks: a small or a read-only one for reports

def mounted(repo, script):
    "What a shell script says that may mount, if that is allowed here."
    enter = ['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c']
    if not shutil.which('unshare') or subprocess.run([*enter, 'mount -t tmpfs none .'], cwd=repo, capture_output=True).returncode:
        pytest.skip('needs the right to mount in a namespace of its own')
    script = f'make() {{ command {shlex.join(command())} "$@" 2>&1; }}; {script}'
    return subprocess.run([*enter, script], cwd=repo, capture_output=True, text=True, timeout=300, env=environment()).stdout


def test_disk_of_the_reports_runs_full(fresh):
    output = mounted(fresh, '''mkdir reports; mount -t tmpfs -o size=220k none reports; make reproduce
        echo SECOND; mount -o remount,size=99m reports; make reproduce; make reproduce''')
    first, second = output.split('SECOND')
    assert re.search('^[^\n]*reports/tiny/[^\n]*: No space left on device', first, re.M) and 'Traceback' not in first
    done = ran(first) - set(re.findall(r'\*\*\* .*reports/tiny/(.*)\.ipynb\]', first))
    assert len(done) > 3 and not done & ran(second)
    assert 'Done.' in second and 'Nothing to do' in second


def test_read_only_reports(repo):
    output = mounted(repo, '''mount --bind reports reports; mount -o remount,bind,ro reports; make reproduce
        echo SECOND; umount reports; make reproduce''')
    first, second = output.split('SECOND')
    assert 'reports/.tiny.lock: Read-only file system' in first and len(first.splitlines()) == 1
    assert 'Nothing to do' in second


def test_file_in_place_of_a_folder(fresh):
    (fresh / 'reports/tiny').mkdir(parents=True)
    (fresh / 'reports/tiny/noise1-s0').touch()
    result = make(fresh, 'reproduce')
    assert result.returncode and 'reports/tiny/noise1-s0' in result.stderr and 'Traceback' not in result.stdout + result.stderr
    (fresh / 'reports/tiny/noise1-s0').unlink()
    assert make(fresh, 'reproduce').returncode == 0 and up_to_date(fresh)


# the limit is on the size of a file, whose error is that of a full disk but for its number

@contextmanager
def full_disk(room):
    "No file of this process grows beyond `room` bytes."
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def noise(name): return np.random.default_rng(0).integers(0, 7, (64, 64)).astype(np.uint8)


def submission(path):
    base = path.parent.parent
    with full_disk(10**9):  # which has room for what is there before
        for name in ('JPEGImages', 'made'):
            (base / name).mkdir(exist_ok=True)
        Image.new('RGB', (64, 64)).save(base / 'JPEGImages/a.jpg')
        write_mask(base / 'made/a.png', noise('a'), voc_palette())
    write_submission(base / 'made', ['a'], base, path, 7)


def page(path):
    with full_disk(10**9):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('1')]), path.with_suffix('.ipynb'))
    notebook_page(path.with_suffix('.ipynb'))


def index(path):
    with full_disk(10**9):
        page(path.with_name('table1.html'))
        write_table(FRAME, path.parent, 'table1', 'Table 1.', {})
    with patch('bnrcam.study.page.notebook_page'):  # it would be the first to find no room
        write_index(path.parent, 'x', 'y')


def slider(path):
    root = path.parent.parent / 'scenes'
    with full_disk(10**9):
        root.exists() or write_scenes(root, sizes={'train': 1})
    scene = VOCFolder(root, 'train', SCENE_CLASSES, masks=True)
    no_model = pd.DataFrame({'miou': [[1.]], 'best_miou': [1.], 'best_threshold': [0.]})
    with patch('bnrcam.study.page.slider_image', lambda *_: {'maps': {}, 'size': (1, 1)}):
        write_slider(path, 'x', scene, scene.names, {'ours': 'none'}, no_model)


FRAME = pd.DataFrame({'a': ['b' * 3000]})
WRITERS = {'model.safetensors': lambda path: save_tensors(path, {'a': torch.ones(999)}),
           'cam.safetensors': lambda path: write_cams(path, CAMs(torch.tensor([0]), (64, 64), [torch.ones(1, 40, 40)]), 'a test'),
           'a.png': lambda path: write_result(noise, path.parent, 'a'),
           'cams.json': lambda path: write_json(path, {'a': [*range(999)]}),
           'table1.csv': lambda path: write_table(FRAME, path.parent, 'table1', 'Table 1.', {}),
           'figure1.png': lambda path: save_figure(curve(), path.parent, 'figure1'),
           'segment.tar': submission, 'table1.html': page, 'index.html': index, 'threshold_slider.html': slider}


def curve():
    figure, ax = plt.subplots()
    ax.plot([0, 1])
    return figure


@pytest.mark.parametrize('name', WRITERS)
def test_full_disk(tmp_path, name):
    "One line with the path, nothing under the name of what could not be written, and no trace once there is room."
    path = tmp_path / 'out' / name
    path.parent.mkdir()
    with pytest.raises(DataError, match=f'{re.escape(str(path))}: cannot be written .*make room and run again') as error:
        with full_disk(500):
            WRITERS[name](path)
    assert '\n' not in str(error.value)
    assert not path.exists() or path.suffix == '.png'  # figures have their record last, which is not there
    assert not path.with_suffix('.json').exists()
    WRITERS[name](path)
    assert path.stat().st_size > 500 and not [*tmp_path.rglob('*part*')]


@pytest.mark.parametrize('name', [name for name in WRITERS if name not in ('table1.html', 'index.html')])
def test_no_folder_to_write_to(tmp_path, name):
    "A file lies where the folder should be, as for one of another owner or read-only."
    blocked = tmp_path / 'out'
    blocked.touch()
    with pytest.raises(DataError, match=f'{re.escape(str(blocked))}.*: cannot be written'):
        WRITERS[name](blocked / name)


class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return torch.rand(4)


def train(folder, epochs=3, room=None):
    "A few steps of a little network; from the second epoch on no file grows beyond `room`."
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 400)

    def loss(net, batch):
        loss.calls += 1
        if loss.room is not None and loss.calls == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (loss.room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return {'loss': net(batch).square().mean()}
    loss.calls, loss.room = 0, room  # no variables that it holds: those would be part of its provenance
    with full_disk(10**9):
        fit(net, Numbers(), loss, torch.optim.AdamW(net.parameters()), folder, epochs=epochs, batch_size=2, seed=0)
    return loss.calls


def contents(folder): return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_disk_runs_full_in_training(tmp_path):
    "The finished epoch is kept, and with room again training goes on to the same bytes."
    train(tmp_path / 'whole')
    with pytest.raises(DataError, match='checkpoint.safetensors: cannot be written'):
        train(tmp_path / 'cut', room=500)
    assert [*contents(tmp_path / 'cut')] == ['checkpoint.safetensors']
    assert train(tmp_path / 'cut') == 8
    assert contents(tmp_path / 'cut') == contents(tmp_path / 'whole')


# damaged files below data/runs

def spoilt(content):
    "Truncated, emptied, or with one bit flipped, at places all over."
    yield from (content[:0], content[:9], content[:len(content) // 2], content[:-1])
    for place in np.linspace(0, len(content) - 1, 60).astype(int):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        yield bytes(flipped)


def test_damaged_checkpoint_and_model(tmp_path):
    "Not taken up; the same bytes in the end. Never loaded as weights."
    train(tmp_path / 'whole')
    with pytest.raises(DataError):
        train(tmp_path / 'cut', room=500)
    kept, whole = (tmp_path / 'cut/checkpoint.safetensors').read_bytes(), contents(tmp_path / 'whole')
    model = tmp_path / 'whole/model.safetensors'
    for i, (checkpoint, weights) in enumerate(zip(spoilt(kept), spoilt(whole['model.safetensors']))):
        model.write_bytes(weights)
        with pytest.raises(WeightsError, match=re.escape(str(model))):
            load_weights(torch.nn.Linear(4, 400), model)
        assert check_weights(model, None).startswith('damaged')
        if i % 8 == 0:
            assert train(tmp_path / 'whole') == 12
            assert contents(tmp_path / 'whole') == whole and check_weights(model, None) is None
            again = tmp_path / f'again{i}'
            again.mkdir()
            (again / 'checkpoint.safetensors').write_bytes(checkpoint)
            assert train(again) == 12
            assert contents(again) == whole


def test_damaged_cams(folder, net, tmp_path, capsys):
    data = VOCFolder(folder, 'val', SCENE_CLASSES)
    store = infer_cams(net, data, tmp_path / 'cams', scales=[64], batch_size=2)
    whole, path = contents(store), store / f'{data.names[1]}.safetensors'
    for i, content in enumerate(spoilt(whole[path.name])):
        path.write_bytes(content)
        with pytest.raises(DataError, match=re.escape(str(path))):
            read_cams(path)
        if i % 8 == 0:
            infer_cams(net, data, store, scales=[64], batch_size=2)
            assert contents(store) == whole
    assert f'{path}: damaged, not used' in capsys.readouterr().out


def test_damaged_labels_and_predictions(tmp_path, capsys):
    map_images(noise, ['a', 'b'], tmp_path, 1)
    whole, path = contents(tmp_path), tmp_path / 'a.png'
    for i, content in enumerate(spoilt(whole['a.png'])):
        path.write_bytes(content)
        try:
            same = np.array_equal(read_mask(path, 7), noise('a'))
        except DataError as error:
            same = str(path) in str(error)
        assert same
        if i % 8 == 0:
            assert map_images(noise, ['a', 'b'], tmp_path, 1) <= 1 and contents(tmp_path) == whole
    assert f'{path}: damaged' in capsys.readouterr().out


def test_stamp_of_a_label_folder(tmp_path):
    "What cannot be emptied does not pass as new; a damaged stamp empties."
    out = reset_if_stale(tmp_path / 'labels', {'is': 'one'}, '.png')
    for stamp in (b'', b'{"is', b'\xff\xfe', b'[1]', b'[' * 200_000):
        (out / 'a.png').touch()
        (out / 'provenance.json').write_bytes(stamp)
        assert [path.name for path in reset_if_stale(out, {'is': 'one'}, '.png').iterdir()] == ['provenance.json']
    (out / 'provenance.json').unlink()
    os.mkfifo(out / 'provenance.json')
    assert reset_if_stale(out, {'is': 'one'}, '.png') == out and read_record(out) == {'is': 'one'}


# reports

def test_runs_with_other_parameters_are_not_mixed(tmp_path):
    for run, scales in (('baseline-s0', [64]), ('noise1-s0', [64, 128])):
        write_json(tmp_path / run / 'cams.json', {'variant': run[:-3], 'seed': 0, 'provenance': {'inference': {'scales': scales}}})
    assert len(load_results(tmp_path, ['noise1-s0'])) == 1
    with pytest.raises(DataError, match='noise1-s0/cams.json: its inference is not that of baseline-s0/cams.json'):
        load_results(tmp_path, ['baseline-s0', 'noise1-s0'])


def test_verify_knows_the_profile_of_today(tmp_path):
    (tmp_path / 'x.yaml').write_text(TINY.replace('tiny', 'x'))
    study = read_study(tmp_path / 'x.yaml', tmp_path, tmp_path)
    inference, training = study.settings['inference'], {**study.settings['train'], 'seed': 0}
    provenance = {'inference': inference, 'training': training}
    for edit, message in (({}, None), ({'training': {**training, 'epochs': 2}}, 'training/epochs is 2, in the profile 3'),
                          ({'inference': {**inference, 'scales': [32]}}, 'inference/scales/0 is 32, in the profile 64')):
        write_json(study.reports / 'noise1-s0/cams.json', {'provenance': provenance | edit})
        assert check_settings(study, 'noise1-s0/cams.json') == message


def test_code_of_a_record_is_that_of_the_import(monkeypatch):
    "Whatever was edited since the stage began: it does not run."
    monkeypatch.setattr(Path, 'read_text', None)
    assert len(code_digest()) == 12
