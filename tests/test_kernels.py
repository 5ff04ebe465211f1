"Warm kernels: what they inherit and what not, and that none outlives whoever started it."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from jupyter_client.manager import start_new_kernel

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != 'linux', reason='warm kernels are for Linux')]


@pytest.fixture
def make():
    "A process that stands for make; the server of its kernels ends with it."
    process = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


class Kernel:
    def __init__(self, monkeypatch, make, **environment):
        monkeypatch.setenv('PYTHONPATH', str(ROOT))
        self.manager, self.client = start_new_kernel(kernel_name='warm', env={**os.environ, 'BNRCAM_MAKE': str(make.pid), **environment})

    def run(self, code):
        said = []
        reply = self.client.execute_interactive(code, timeout=60, output_hook=lambda message: said.append(message['content'].get('text', '')))
        return reply['content']['status'], ''.join(said).strip()

    def value(self, expression): return self.run(f'import os, sys; print({expression})')[1]

    def end(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def ends(pid, seconds=30):
    "Does the process end? It looks every half second whether it shall."
    for _ in range(20 * seconds):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(.05)
    return False


def test_kernel_is_a_copy_with_its_own_environment(make, monkeypatch):
    kernels = [Kernel(monkeypatch, make, WHO=str(number)) for number in range(2)]
    assert [kernel.value('os.environ["WHO"]') for kernel in kernels] == ['0', '1']
    assert [kernel.value('"timm" in sys.modules, any(name.startswith("bnrcam") for name in sys.modules)') for kernel in kernels] \
        == ['True False'] * 2
    parents = {kernel.value('os.getppid()') for kernel in kernels}
    assert len(parents) == 1 and parents != {str(os.getpid())}
    assert kernels[0].value('__import__("numpy").random.rand()') != kernels[1].value('__import__("numpy").random.rand()')
    assert kernels[0].value('__import__("torch").cuda._is_in_bad_fork()') == 'False'  # else no copy could use a GPU
    assert kernels[0].run('import matplotlib.pyplot as plt; print(plt.get_backend())')[1].endswith('inline')
    for kernel in kernels:
        kernel.end()


def test_kernel_ends_with_whoever_started_it(make, monkeypatch):
    "And the server with its make."
    kernel = Kernel(monkeypatch, make)
    pid, server = int(kernel.value('os.getpid()')), int(kernel.value('os.getppid()'))
    os.kill(kernel.manager.provisioner.pid, signal.SIGKILL)
    assert ends(pid) and psutil.pid_exists(server)
    make.kill()
    make.wait()
    assert ends(server)
    kernel.end()


def test_its_end_is_seen(make, monkeypatch):
    kernel = Kernel(monkeypatch, make)
    os.kill(int(kernel.value('os.getpid()')), signal.SIGKILL)
    assert ends(kernel.manager.provisioner.pid) and not kernel.manager.is_alive()
    kernel.end()


def test_interrupt(make, monkeypatch):
    kernel = Kernel(monkeypatch, make)
    kernel.client.execute('import time; print("asleep"); time.sleep(600)')
    while 'asleep' not in kernel.client.get_iopub_msg(timeout=60)['content'].get('text', ''):
        pass
    kernel.manager.interrupt_kernel()
    while kernel.client.get_shell_msg(timeout=60)['content'].get('ename') != 'KeyboardInterrupt':
        pass
    status, said = kernel.run('print("awake")')
    assert status == 'ok' and said.endswith('awake')
    kernel.end()


def test_without_make_or_server_it_is_cold(make, monkeypatch):
    make.kill()
    make.wait()
    for number in ('', str(make.pid)):
        kernel = Kernel(monkeypatch, make, BNRCAM_MAKE=number)
        assert kernel.value('"timm" in sys.modules') == 'False'
        kernel.end()
