"""Fetching and unpacking, with everything going wrong that can: one clear line, and the next run goes on."""
import errno
import gzip
import hashlib
import io
import os
import shutil
import stat
import tarfile
import time
import tracemalloc
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest

from bnrcam.datasets import download
from bnrcam.data import DataError
from bnrcam.datasets.download import (BY_HAND, COCO_FILES, CONFORMER_S, VOC_FILES, Download, by_hand, fetch, needed_space,
                             read_sources, unpack)
from miniature import described, serve, write_sources, write_tar, write_zip

CONTENT = os.urandom(3_000_000)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, 'sleep', pauses.append)
    return pauses


@pytest.fixture
def server(tmp_path):
    (tmp_path / 'web').mkdir()
    (tmp_path / 'web' / 'file.bin').write_bytes(CONTENT)
    with serve(tmp_path / 'web') as state:
        state.file = tmp_path / 'web' / 'file.bin'
        state.download = described(state.file, state.url)
        yield state


def one_line(error):
    assert '\n' not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# fetching

def test_fetch_and_skip(server, tmp_path):
    path = fetch(server.download, tmp_path / 'to')
    assert path.read_bytes() == CONTENT and names(tmp_path / 'to') == ['file.bin']
    fetch(server.download, tmp_path / 'to')
    assert len(server.log) == 1


def test_broken_connections_fetch_no_byte_twice(server, tmp_path, no_pause):
    server.patience = 700_000
    assert fetch(server.download, tmp_path, tries=1).read_bytes() == CONTENT
    assert [start for _, start, _ in server.log] == [0, 700_000, 1_400_000, 2_100_000, 2_800_000]
    assert sum(length for *_, length in server.log) == len(CONTENT)
    assert no_pause == [1, 1, 1, 1]  # each brought something


def test_the_next_run_fetches_only_the_rest(server, tmp_path):
    server.patience = 1_000_000
    with pytest.raises(ConnectionError):
        download.transfer(server.download, tmp_path / 'file.bin.partial')
    server.status = 503
    with pytest.raises(DataError) as error:
        fetch(server.download, tmp_path, tries=2)
    assert '503' in one_line(error) and '1 MB are in' in str(error.value) and 'run again' in str(error.value)
    assert names(tmp_path) == ['file.bin.partial', 'file.bin.partial.tag', 'web']
    server.status = server.patience = None
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT
    assert server.log[-1] == ('file.bin', 1_000_000, len(CONTENT) - 1_000_000)
    assert names(tmp_path) == ['file.bin', 'web']


@pytest.mark.parametrize('switches', [{'ranges': False}, {'tags': False}, {'ranges': False, 'tags': False}])
def test_servers_without_ranges_or_tags(server, tmp_path, switches):
    (tmp_path / 'file.bin.partial').write_bytes(CONTENT[:1000])
    vars(server).update(switches)
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT
    assert server.log[0][1] == (1000 if switches.get('ranges', True) else 0)


def test_a_file_that_changed_on_the_server_begins_anew(server, tmp_path):
    server.patience = 1_000_000
    with pytest.raises(ConnectionError):
        download.transfer(server.download, tmp_path / 'file.bin.partial')
    server.patience = None
    server.file.write_bytes(CONTENT[::-1])
    path = fetch(Download(server.download.url), tmp_path)
    assert path.read_bytes() == CONTENT[::-1] and server.log[-1][1] == 0


def test_killed_before_the_last_rename(server, tmp_path):
    (tmp_path / 'file.bin.partial').write_bytes(CONTENT)
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT and not server.log
    (tmp_path / 'file.bin').rename(tmp_path / 'file.bin.partial')
    # without a known size the server has to say that nothing is missing (416)
    assert fetch(Download(server.download.url), tmp_path).read_bytes() == CONTENT and not server.log


def test_partial_longer_than_the_file(server, tmp_path):
    (tmp_path / 'file.bin.partial').write_bytes(CONTENT + b'more')
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT


def test_wrong_hash_is_named_and_the_next_run_begins_anew(server, tmp_path):
    server.file.write_bytes(CONTENT[::-1])
    with pytest.raises(DataError) as error:
        fetch(server.download, tmp_path)
    assert 'md5' in one_line(error) and 'it was deleted; run again' in str(error.value)
    assert names(tmp_path) in (['file.bin.partial.tag', 'web'], ['web'])
    server.file.write_bytes(CONTENT)
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT


def test_a_wrong_file_of_the_user_is_kept(server, tmp_path):
    (tmp_path / 'file.bin').write_bytes(CONTENT[::-1])
    with pytest.raises(DataError, match='delete it and run again'):
        fetch(server.download, tmp_path)
    assert (tmp_path / 'file.bin').exists() and not server.log
    (tmp_path / 'file.bin').write_bytes(b'short')
    with pytest.raises(DataError, match=f'5 bytes, but .* has {len(CONTENT)}'):
        fetch(server.download, tmp_path)


def test_first_digits_of_a_sha256(server, tmp_path):
    digits = hashlib.sha256(CONTENT).hexdigest()[:8]
    fetch(Download(server.download.url, digest=f'sha256:{digits}'), tmp_path / 'a')
    with pytest.raises(DataError, match='sha256'):
        fetch(Download(server.download.url, digest='sha256:00000000'), tmp_path / 'b')


def test_another_size_on_the_server_stops_before_the_bytes(server, tmp_path):
    server.file.write_bytes(CONTENT + b'new')
    with pytest.raises(DataError, match='the file has changed') as error:
        fetch(server.download, tmp_path)
    assert one_line(error) and not (tmp_path / 'file.bin').exists()


def test_dead_address(server, tmp_path):
    with pytest.raises(DataError, match='404') as error:
        fetch(Download(server.url + '/gone.bin'), tmp_path)
    assert 'gone.bin' in one_line(error) and str(tmp_path) in str(error.value)


def test_no_server(tmp_path, no_pause):
    with pytest.raises(DataError, match='run again') as error:
        fetch(Download('http://127.0.0.1:9/file.bin'), tmp_path, tries=3)
    assert one_line(error) and no_pause == [2, 4]


def full_disk(monkeypatch, free):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(10**12, 10**12 - free, free))


def test_no_room_is_said_before_the_first_byte(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, 1_000_000)
        with pytest.raises(DataError, match='needs 3 MB, but 1 MB are free') as error:
            fetch(server.download, tmp_path)
        assert one_line(error)
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT


class FullFile(io.BytesIO):
    def write(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_full_in_the_middle(server, tmp_path, monkeypatch):
    server.patience = 1_000_000
    with pytest.raises(ConnectionError):
        download.transfer(server.download, tmp_path / 'file.bin.partial')
    server.patience = None
    with monkeypatch.context() as patch:
        patch.setattr(download, 'open', lambda *_: FullFile(), raising=False)
        with pytest.raises(DataError, match='No space left on device.*run again') as error:
            fetch(server.download, tmp_path)
        assert one_line(error)
    assert fetch(server.download, tmp_path).read_bytes() == CONTENT
    assert server.log[-1][1] == 1_000_000


@pytest.mark.parametrize('url', ['http://example.org/x.zip', 'ftp://example.org/x.zip', 'file:///etc/passwd'])
def test_only_https(url):
    with pytest.raises(DataError, match='only https'):
        Download(url)


def test_the_built_in_files():
    for file in (*VOC_FILES.values(), *COCO_FILES.values()):
        assert file.url.startswith('https://') and file.size > 1e8 and len(file.digest) == len('md5:') + 32
    assert CONFORMER_S.name.endswith(CONFORMER_S.digest.removeprefix('sha256:') + '.pth')
    assert needed_space(COCO_FILES)['download'] == 252_872_794 + 13_510_573_713 + 6_645_013_297


def test_sources(tmp_path, server):
    given = read_sources(write_sources(tmp_path / 'sources.json', {'sbd': server.download}), VOC_FILES)
    assert given == {'voc': VOC_FILES['voc'], 'sbd': server.download}
    for text in ('{"coco": {}}', '{"sbd": {"address": "x"}}', '{"sbd"', '[1]', '{"sbd": {"url": "http://a.org/x"}}'):
        (tmp_path / 'bad.json').write_text(text)
        with pytest.raises(DataError) as error:
            read_sources(tmp_path / 'bad.json', VOC_FILES)
        one_line(error)


def test_by_hand(tmp_path):
    for what in BY_HAND:
        with pytest.raises(DataError, match='README') as error:
            by_hand(what, tmp_path / 'weights')
        one_line(error)
    (tmp_path / 'weights').touch()
    assert by_hand('resnet38', tmp_path / 'weights') == tmp_path / 'weights'


# unpacking

FILES = {'data/a.txt': b'a' * 100, 'data/deep/b.txt': b'b' * 5000, 'other/c.txt': b'c'}


@pytest.mark.parametrize('write, name', [(write_tar, 'x.tar'), (write_tar, 'x.tgz'), (write_zip, 'x.zip')])
def test_unpack(tmp_path, write, name):
    archive = write(tmp_path / name, FILES)
    folder = unpack(archive, tmp_path / 'to', ['data/*'])
    assert (folder / 'data/a.txt').read_bytes() == FILES['data/a.txt']
    assert (folder / 'data/deep/b.txt').read_bytes() == FILES['data/deep/b.txt'] and not (folder / 'other').exists()
    archive.unlink()
    assert unpack(archive, tmp_path / 'to') == folder  # not needed any more


def tar_entry(name, kind=tarfile.REGTYPE, target='', content=b''):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(content)
    return info, content


TAR_ATTACKS = {
    'parent': [tar_entry('../evil', content=b'x')],
    'deep parent': [tar_entry('data/../../evil', content=b'x')],
    'absolute': [tar_entry('/tmp/bnrcam_evil', content=b'x')],
    'symlink': [tar_entry('data', tarfile.SYMTYPE, '..'), tar_entry('data/evil', content=b'x')],
    'hard link': [tar_entry('data', tarfile.LNKTYPE, '/etc/passwd')],
    'device': [tar_entry('zero', tarfile.CHRTYPE)],
    'pipe': [tar_entry('pipe', tarfile.FIFOTYPE)],
    'backslash': [tar_entry('..\\evil', content=b'x')],
    'bomb': [tar_entry(f'zeros{i}', content=bytes(1 << 20)) for i in range(8)],
}


def refused(archive, tmp_path, match='do not use this archive'):
    before = set(os.listdir(tmp_path))
    with pytest.raises(DataError, match=match) as error:
        unpack(archive, tmp_path / 'to')
    assert str(archive) in one_line(error) or match != 'do not use this archive'
    assert set(os.listdir(tmp_path)) == before and not (tmp_path.parent / 'evil').exists()
    assert not os.path.exists('/tmp/bnrcam_evil')


@pytest.mark.parametrize('attack', TAR_ATTACKS)
def test_hostile_tar(tmp_path, attack):
    with tarfile.open(tmp_path / 'x.tgz', 'w:gz') as tar:
        for info, content in [tar_entry('good', content=b'good'), *TAR_ATTACKS[attack]]:
            tar.addfile(info, io.BytesIO(content))
    refused(tmp_path / 'x.tgz', tmp_path)


@pytest.mark.parametrize('name', ['../evil', 'data/../../evil', '/tmp/bnrcam_evil', '..\\evil'])
def test_hostile_zip(tmp_path, name):
    refused(write_zip(tmp_path / 'x.zip', {'good': b'good', name: b'x'}), tmp_path)


def test_zip_with_a_link(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
        info = zipfile.ZipInfo('data')
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, '/etc')
        archive.writestr('data/evil', 'x')
    refused(tmp_path / 'x.zip', tmp_path)


def test_zip_bomb(tmp_path):
    refused(write_zip(tmp_path / 'x.zip', {f'{i}': bytes(1 << 22) for i in range(4)}), tmp_path)


def test_zip_that_lies_about_a_size(tmp_path):
    archive = write_zip(tmp_path / 'x.zip', {'zeros': bytes(1 << 20)})
    archive.write_bytes(archive.read_bytes().replace((1 << 20).to_bytes(4, 'little'), (10).to_bytes(4, 'little')))
    refused(archive, tmp_path, 'damaged archive')


def test_nothing_outside_for_unwanted_entries(tmp_path):
    "What is not wanted is never written, whatever its name is."
    unpack(write_zip(tmp_path / 'x.zip', {'data/a': b'a', '../evil': b'x'}), tmp_path / 'to', ['data/*'])
    assert not (tmp_path / 'evil').exists()


@pytest.mark.parametrize('write, name', [(write_tar, 'x.tar'), (write_tar, 'x.tgz'), (write_zip, 'x.zip')])
@pytest.mark.parametrize('cut', [0.02, 0.3, 0.6, 0.85])
def test_cut_archives(tmp_path, write, name, cut):
    archive = write(tmp_path / name, {f'data/{i}': os.urandom(3000) for i in range(20)})
    content = archive.read_bytes()
    archive.write_bytes(content[:int(len(content) * cut)])
    refused(archive, tmp_path, 'damaged archive')


@pytest.mark.parametrize('name', ['x.tgz', 'x.zip'])
def test_flipped_bytes(tmp_path, name):
    write = write_zip if name == 'x.zip' else write_tar
    archive = write(tmp_path / name, {f'data/{i}': os.urandom(3000) for i in range(20)})
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 0xff
    archive.write_bytes(content)
    refused(archive, tmp_path, 'damaged archive')
    archive.write_bytes(b'<html>Sorry, try again</html>')
    refused(archive, tmp_path, 'damaged archive')


def test_half_unpacked_folder_is_done_again(tmp_path):
    archive = write_zip(tmp_path / 'x.zip', FILES)
    (tmp_path / 'to.partial/data').mkdir(parents=True)
    (tmp_path / 'to.partial/data/a.txt').write_bytes(b'a')  # a killed run was here
    folder = unpack(archive, tmp_path / 'to')
    assert (folder / 'data/a.txt').read_bytes() == FILES['data/a.txt'] and not (tmp_path / 'to.partial').exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / 'to').mkdir()
    (tmp_path / 'to/mine').touch()
    with pytest.raises(DataError, match='move it away'):
        unpack(write_zip(tmp_path / 'x.zip', FILES), tmp_path / 'to')
    assert (tmp_path / 'to/mine').exists()


def test_unpacking_on_a_full_disk(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / 'x.zip', FILES)
    with monkeypatch.context() as patch:
        full_disk(patch, 1000)
        refused(archive, tmp_path, 'make room and run again')
    with monkeypatch.context() as patch:
        def copy(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(shutil, 'copyfileobj', copy)
        refused(archive, tmp_path, 'No space left on device')
    assert (unpack(archive, tmp_path / 'to') / 'data/a.txt').exists()


@pytest.mark.parametrize('kind, name', [(tarfile.XHDTYPE, 'pax'), (tarfile.GNUTYPE_LONGNAME, 'long name'), (tarfile.XGLTYPE, 'global')])
def test_tar_headers_that_ask_for_the_memory(tmp_path, kind, name):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, 3 * 2**30
    with gzip.open(tmp_path / 'x.tgz', 'wb') as file:
        for info_bytes in (tarfile.TarInfo('good').tobuf(), info.tobuf()): file.write(info_bytes)
        for _ in range(40): file.write(bytes(2**20))
    tracemalloc.start()
    refused(tmp_path / 'x.tgz', tmp_path, 'damaged archive')
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()


@pytest.mark.parametrize('way', [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_zip_compressed_in_another_way(tmp_path, way):
    "Neither read nor blamed on the disk, whole or damaged."
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w', way) as archive:
        archive.writestr('a', os.urandom(3000))
    for damage in (0, 255):
        content = bytearray((tmp_path / 'x.zip').read_bytes())
        content[200] ^= damage
        (tmp_path / 'x.zip').write_bytes(content)
        refused(tmp_path / 'x.zip', tmp_path, 'compressed in another way')


def test_names_in_archives_do_not_speak_to_the_terminal(tmp_path):
    archive = write_zip(tmp_path / 'x.zip', {'../a\x1b[2J\nall is well': b'x'})
    with pytest.raises(DataError) as error:
        unpack(archive, tmp_path / 'to')
    assert one_line(error).isprintable() and r'\x1b[2J\nall' in str(error.value)


def test_every_hop_is_private(server, tmp_path, monkeypatch):
    "Also one in the middle, behind which the way is private again."
    server.redirects = {'/a.bin': f'{server.url}/b.bin', '/b.bin': 'http://example.org/c.bin'}
    with pytest.raises(DataError, match='leads to http://example.org/c.bin, which is not https'):
        fetch(Download(f'{server.url}/a.bin'), tmp_path / 'to')
    server.redirects = {'/a.bin': f'{server.url}/b.bin', '/b.bin': f'{server.url}/file.bin'}
    assert fetch(Download(f'{server.url}/a.bin'), tmp_path / 'to').read_bytes() == CONTENT


def test_a_body_of_unknown_length(server, tmp_path, monkeypatch, capsys):
    "What cannot be checked is said; what goes on for ever is stopped, and removed."
    server.lengths = False
    assert fetch(Download(f'{server.url}/file.bin'), tmp_path / 'to').read_bytes() == CONTENT
    assert 'whether it comes whole is not checked' in capsys.readouterr().out
    monkeypatch.setattr(download, 'MOST', 2_000_000)
    with pytest.raises(DataError, match='more than 2000000 bytes'):
        fetch(Download(f'{server.url}/file.bin'), tmp_path / 'more')
    assert not list((tmp_path / 'more').glob('*.bin*.partial'))


def test_two_at_once(server, tmp_path):
    "One fetches and unpacks, the other waits; each file comes once, and the folder is whole."
    write_zip(server.file.with_name('many.zip'), {f'{i}': os.urandom(100) for i in range(2000)})
    many = {'many': Download(f'{server.url}/many.zip')}
    with ThreadPoolExecutor(2) as pool:  # a lock is of an open file, and so between threads, too
        both = [pool.submit(download.obtain, many, tmp_path / 'to', {'many': ['*']}) for _ in range(2)]
    assert both[0].result() == both[1].result()
    assert len(list((tmp_path / 'to/raw/many').iterdir())) == 2001 and len(server.log) == 1
