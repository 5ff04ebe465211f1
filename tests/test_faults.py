"""What goes wrong around a batch: two at once, kills, edits in mid-run, clocks, damage, full disks. Nothing wrong is reported.

The first part runs make with a papermill that writes little, so that a study of all stages takes seconds."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bnrcam import batch
from test_batch import RESULTS, TINY, environment, new_repo

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
product.with_suffix('.json').write_text(text)
if product.stem == 'index': product.with_suffix('.html').write_text('page')
if 'table' in product.stem: product.with_suffix('.csv').write_text('1')
'''


def command(*arguments):
    return ['make', 'VENV=mock', '-o', 'mock/ready', 'PROFILE=tiny', 'DATA=scenes', 'JOBS=2', *arguments]


def make(repo, *arguments):
    return subprocess.run(command(*arguments), cwd=repo, capture_output=True, text=True, timeout=300, env=environment())


def start(repo, pause):
    "A batch that waits in the stage `pause`, and leads a process group of its own."
    process = subprocess.Popen(command('reproduce'), cwd=repo, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**environment(), 'PAUSE': f'{pause}.ipynb'}, start_new_session=True)
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


def profiles(repo):
    "What the products say of the profile that they were made with."
    return {path.read_text() for path in (repo / 'reports/tiny').rglob('*.ipynb')}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    repo = new_repo(tmp_path_factory.mktemp('mock'))
    (repo / 'mock/bin').mkdir(parents=True)
    (repo / 'mock/bin/python').symlink_to(sys.executable)
    (repo / 'mock/bin/papermill').write_text(PAPERMILL)
    (repo / 'mock/bin/papermill').chmod(0o755)
    result = make(repo, 'reproduce')
    assert result.returncode == 0, result.stdout + result.stderr
    assert RESULTS | {'index', 'trunk/trunk', 'noise1-s0/segment'} < ran(result.stdout)
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
    assert result.returncode and 'reports/.tiny.lock' in line and f'process {process.pid};' in line and 'wait' in line
    return not ran(result.stdout)


def test_second_batch_is_refused(fresh):
    first = start(fresh, 'noise1-s0/train')
    before = time.perf_counter()
    assert refused(make(fresh, 'reproduce'), first)
    assert time.perf_counter() - before < 5
    for target in ('verify', 'readme', 'clean', 'reports/tiny/pretrain/pretrain.ipynb'):
        assert refused(make(fresh, target), first)
    assert 'noise1-s0/seeds' in would_run(fresh) and make(fresh, 'help').returncode == 0
    output = go_on(fresh, first)
    assert first.returncode == 0 and 'Done.' in output and up_to_date(fresh)


def test_another_profile_runs_beside_it(fresh):
    (fresh / 'nbs/profiles/other.yaml').write_text(TINY.replace('tiny', 'other'))
    first = start(fresh, 'noise1-s0/train')
    assert make(fresh, 'reproduce', 'PROFILE=other').returncode == 0
    go_on(fresh, first)
    assert first.returncode == 0 and up_to_date(fresh)


def test_killed_batch_leaves_no_lock(fresh):
    for stage in ('pretrain/pretrain', 'noise1-s0/train', 'table1'):
        first = start(fresh, stage)
        os.killpg(first.pid, signal.SIGKILL)  # nobody has asked about it when the next one starts: a zombie
        (fresh / 'paused').unlink()
    result = make(fresh, 'reproduce')
    assert result.returncode == 0, result.stderr
    assert not {'pretrain/pretrain', 'noise1-s0/train'} & ran(result.stdout) and up_to_date(fresh)


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
    first.wait(20)
    (fresh / 'paused').unlink()
    assert make(fresh, 'reproduce').returncode == 0 and up_to_date(fresh)


# edits while the batch runs

@pytest.mark.parametrize('file, stage', [('nbs/profiles/tiny.yaml', 'noise1-s0/train'), ('nbs/stages/seeds.ipynb', 'noise1-s0/seeds'),
                                         ('bnrcam/affinity.py', 'noise1-s0/pseudo'), ('nbs/results/table1.ipynb', 'table1')])
def test_edited_in_mid_run(fresh, file, stage):
    first = start(fresh, stage)
    path = fresh / file
    path.write_text(path.read_text() + ' ')
    output = go_on(fresh, first)
    assert first.returncode and not (fresh / 'reports/tiny/index.html').exists()
    line = next(line for line in output.splitlines() if 'another file' in line)
    assert file in line and 'run `make reproduce` again' in line and 'Traceback' not in output
    result = make(fresh, 'reproduce')
    assert result.returncode == 0 and stage in ran(result.stdout) and f'again, because {file}' in result.stdout
    assert up_to_date(fresh) and profiles(fresh) == {(fresh / 'nbs/profiles/tiny.yaml').read_text()}


def test_older_copy_put_back(repo):
    "An edit that is older than the products."
    profile = repo / 'nbs/profiles/tiny.yaml'
    profile.write_text(TINY.replace('epochs: 3', 'epochs: 2'))
    os.utime(profile, (1e9, 1e9))
    result = make(repo, 'reproduce')
    assert result.returncode == 0 and profiles(repo) == {profile.read_text()} and up_to_date(repo)


def test_another_data_and_back(repo):
    assert len(would_run(repo, 'DATA=elsewhere')) > 20
    assert up_to_date(repo)
    assert make(repo, 'reports/tiny/pretrain/pretrain.ipynb', 'DATA=elsewhere').returncode == 0
    assert 'pretrain/pretrain' in ran(make(repo, 'reproduce').stdout)


def test_dry_run_changes_nothing(fresh):
    state = lambda: {path: path.stat().st_mtime_ns for path in fresh.rglob('*')}
    before = state()
    os.utime(fresh / 'nbs/profiles/tiny.yaml', (time.time() + 9e4,) * 2)
    before[fresh / 'nbs/profiles/tiny.yaml'] = (fresh / 'nbs/profiles/tiny.yaml').stat().st_mtime_ns
    assert len(would_run(fresh)) > 20 and state() == before


# clocks

def test_product_from_the_future(repo):
    for name in ('noise1-s0/train', 'table5'):
        os.utime(repo / f'reports/tiny/{name}.ipynb', (time.time() + 9e4,) * 2)
    result = make(repo, 'reproduce')
    assert {'noise1-s0/train', 'table5', 'index'} < ran(result.stdout) and 'baseline-s0/train' not in ran(result.stdout)
    assert result.stdout.count('in the future') == 2 and 'dated' in result.stdout
    assert up_to_date(repo)


@pytest.mark.parametrize('file', ['nbs/profiles/tiny.yaml', 'bnrcam/seeds.py', 'reports/tiny/.data'])
def test_source_from_the_future(repo, file):
    os.utime(repo / file, (time.time() + 9e4,) * 2)
    result = make(repo, 'reproduce')
    assert f'{file}: dated' in result.stderr and 'noise1-s0/seeds' in ran(result.stdout)
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
    assert result.returncode == 0 and profiles(fresh) == {profile.read_text()} and up_to_date(fresh)


# damage

def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = [flip, lambda path: path.write_bytes(b''), lambda path: os.truncate(path, 3), Path.unlink,
           lambda path: path.write_bytes(os.urandom(300))]
# an executed notebook, results, a table, the page, a record; and the stage that makes it
PRODUCTS = {'noise1-s0/train.ipynb': 'noise1-s0/train', 'noise1-s0/seeds.json': 'noise1-s0/seeds', 'index.html': 'index',
            'table1.csv': 'table1', 'table5.ipynb': 'table5', 'figure4.made': 'figure4'}


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
    assert {*PRODUCTS.values()} < ran(result.stdout) and not {'pretrain/pretrain', 'trunk/trunk'} & ran(result.stdout)
    for file, stage in PRODUCTS.items():
        why, = re.findall(rf'reports/tiny/{stage}.ipynb again, because (.*)', result.stdout)
        assert file in why or file.endswith('.made')
    assert result.returncode == 0 and up_to_date(repo)


@pytest.mark.parametrize('damage', DAMAGES, ids='flip empty truncate remove random'.split())
def test_every_damage_is_seen(repo, damage, monkeypatch, capsys):
    monkeypatch.chdir(repo)
    for file, stage in PRODUCTS.items():
        path = Path('reports/tiny', file)
        kept = path.read_bytes()
        damaged(path, damage)
        batch.stale('reports/tiny')
        # a notebook that is gone is no product: what was made from it is stale
        assert {'train.ipynb': 'seeds', 'table5.ipynb': 'index'}.get(path.name if not path.exists() else '', stage) \
            in capsys.readouterr().out
        path.write_bytes(kept)


def test_removed_notebooks(repo):
    for name in ('noise1-s0/train', 'table5'):
        (repo / f'reports/tiny/{name}.ipynb').unlink()
    assert {'noise1-s0/train', 'noise1-s0/seeds', 'table5', 'index'} < would_run(repo)
