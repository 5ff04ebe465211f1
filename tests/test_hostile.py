"""No code runs from data, nothing is read or written outside the folder, no file takes the memory or waits for ever.

Beside these: weights that run code and XML with entities in test_bad_input; archives with links, devices, paths and
bombs in test_download; paths in a table of labels in test_folder, in a submission in test_submit."""
import ast
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import EpsImagePlugin, Image

from bnrcam.affinity import read_propagated
from bnrcam.engine.weights import WeightsError, load_weights, read_weights
from bnrcam.data import DataError, VOCFolder, image_size, open_picture, read_image, read_labels, read_mask, read_split
from bnrcam.datasets.coco import convert_coco, read_coco
from bnrcam.datasets.voc import read_sbd
from bnrcam.datasets.download import VOC_FILES, read_sources, receive, unpack
from bnrcam.datasets.folder import folder_from_table, label_xml, read_table
from bnrcam.resnet38 import load_resnet38, read_params
from bnrcam.scenes import SCENE_CLASSES
from bnrcam.cams import read_cams
from bnrcam.segment import deeplab
from bnrcam.study.graph import line
from bnrcam.study.page import write_index
from bnrcam.study.profile import ProfileError, read_profile
from bnrcam.study.records import OF_RESULTS, read_json, write_json
from bnrcam.study.submit import read_prediction, read_scores
from bnrcam.study.tables import write_table
from bnrcam.study.verify import read_study
from bnrcam.engine.checkpoints import load_tensors, save_tensors

HANG = 60  # seconds, for what takes one at most and, were it taken in, an hour or all memory

ROOT = Path(__file__).parent.parent
CLASSES = ('cat', 'dog')
BAD = (DataError, WeightsError, ProfileError)


@pytest.fixture
def mark(tmp_path):
    "A file that hostile code would leave; the test fails if it is there at the end."
    path = tmp_path / 'pwned'
    yield path
    assert not path.exists(), 'code from a file was run'


def refused(call, *words, kind=BAD):
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert len(message.splitlines()) == 1 and all(str(word) in message for word in words), message
    return message


# pickles, under the name of anything that is read

class Run:
    "Leaves `path` when it is unpickled."
    def __init__(self, path): self.path = path

    def __reduce__(self): return open, (str(self.path), 'w')


def pickled(bomb): return pickle.dumps({'model': bomb})


def torch_zip(bomb, **options):
    file = io.BytesIO()
    torch.save({'model': bomb}, file, **options)
    return file.getvalue()


def torch_old(bomb): return torch_zip(bomb, _use_new_zipfile_serialization=False)


def torch_tar(bomb):
    "The form of PyTorch 0.1: a tar file of pickles."
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as tar:
        for name in ('sys_info', 'pickle', 'storages', 'tensors'):
            info = tarfile.TarInfo(name)
            info.size = len(pickled(bomb))
            tar.addfile(info, io.BytesIO(pickled(bomb)))
    return file.getvalue()


def npy(bomb):
    file = io.BytesIO()
    np.save(file, np.array([bomb], object), allow_pickle=True)
    return file.getvalue()


def npz(bomb):
    file = io.BytesIO()
    np.savez(file, model=np.array([bomb], object))
    return file.getvalue()


READERS = {
    'weights.pth': read_weights, 'weights.safetensors': read_weights, 'weights.params': read_params,
    'weights.npz': read_weights,
    'trunk.pth': lambda path: load_resnet38(torch.nn.Linear(1, 1), path), 'cams.safetensors': read_cams,
    'propagated.safetensors': lambda path: read_propagated(path, (4, 3)), 'mask.mat': read_sbd, 'image.jpg': read_image,
    'mask.png': lambda path: read_mask(path, 3),
    'prediction.png': lambda path: read_prediction(path, (4, 3)), 'labels.xml': lambda path: read_labels(path, CLASSES),
    'labels.csv': lambda path: read_table(path, path.parent, CLASSES),
    'scores.csv': lambda path: read_scores(path, CLASSES),
    'sources.json': lambda path: read_sources(path, VOC_FILES), 'coco.json': read_coco, 'result.json': read_json,
    'profile.yaml': read_profile, 'study.yaml': lambda path: read_study(path, path.parent),
    'images.tar': lambda path: unpack(path, path.parent / 'to')}


@pytest.mark.parametrize('write', [pickled, torch_zip, torch_old, torch_tar, npy, npz],
                         ids=lambda write: write.__name__)
@pytest.mark.parametrize('name', READERS)
def test_pickle_under_any_name(tmp_path, mark, name, write):
    (tmp_path / name).write_bytes(write(Run(mark)))
    if (name, write) in (('images.tar', torch_tar), ('images.tar', torch_zip), ('images.tar', npz)):
        READERS[name](tmp_path / name)  # an archive in the right form: it is unpacked, and what is in it is not run
    else:
        refused(lambda: READERS[name](tmp_path / name), name)


def test_the_specimens_are_live(tmp_path):
    "They run code where they are trusted, so the tests above prove something."
    for i, load in enumerate((pickle.load, lambda file: torch.load(file, weights_only=False),
                              lambda file: np.load(file, allow_pickle=True)[0])):
        write = (pickled, torch_zip, npy)[i]
        load(io.BytesIO(write(Run(tmp_path / f'{i}'))))
        assert (tmp_path / f'{i}').exists()


@pytest.mark.parametrize('write', [torch_zip, torch_old], ids=lambda write: write.__name__)
def test_weights_that_a_profile_hands_to_timm(tmp_path, mark, write):
    (tmp_path / 'evil.pth').write_bytes(write(Run(mark)))
    with pytest.raises(Exception):
        deeplab('test_resnet', 3, checkpoint_path=str(tmp_path / 'evil.pth'))


def test_a_network_as_code_is_no_weights_file(tmp_path, mark):
    "TorchScript is a program; torch.load would start it."
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / 'script.pth')
    refused(lambda: read_weights(tmp_path / 'script.pth'), 'script.pth')


def rebuilt(numel=2, size=(2,), stride=(1,), view=()):
    "A pickle as `torch.save` writes it, of a tensor that says that its storage and it have these sizes."
    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), 0, size, stride, False, {})

    class Storage: pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ('storage', torch.FloatStorage, '0', 'cpu', numel, *view) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({'weight': Tensor()})
    return file.getvalue()


def archive(content, compression=zipfile.ZIP_STORED, values=bytes(8)):
    "A zip as `torch.save` writes it."
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', compression) as entries:
        for name, part in (('data.pkl', content), ('byteorder', b'little'), ('data/0', values), ('version', b'3\n')):
            entries.writestr(f'x/{name}', part)
    return file.getvalue()


def former(content):
    "The form of PyTorch before 1.6: pickles in a row, then the values."
    head = [pickle.dumps(part, protocol=2) for part in (0x1950a86a20f9469cfc6c, 1001, {'little_endian': True})]
    return b''.join([*head, content, pickle.dumps(['0'], protocol=2), struct.pack('<Q', 2), bytes(8)])


def asks(name, *arguments):
    "A pickle that calls a function by its name."
    values = b''.join(pickle.dumps(argument, protocol=2)[2:-1] for argument in arguments)
    return b'\x80\x02' + b'c' + name.replace(' ', '\n').encode() + b'\n(' + values + b'tR.'


GIGA = 3 * 10**9
# `torch.load(weights_only=True)` takes most of these, and the memory
FLOODS = {'bytearray': archive(asks('builtins bytearray', GIGA)), 'bytearray of Python 2': archive(asks('__builtin__ bytearray', GIGA)),
          'former bytearray': former(asks('builtins bytearray', GIGA)), 'tensor': archive(asks('torch Tensor', GIGA // 4)),
          'storage': archive(asks('torch.storage UntypedStorage', GIGA)), 'FloatTensor': archive(asks('torch FloatTensor', GIGA // 4)),
          'deflated': archive(rebuilt(GIGA // 40, (GIGA // 40,)), zipfile.ZIP_DEFLATED, bytes(GIGA // 10)),
          'deflated pickle': archive(asks('torch Size', [0] * 10**6), zipfile.ZIP_DEFLATED),
          'text': archive(asks('numpy dtype', f'S{GIGA}')), 'number': archive(asks('numpy.core.multiarray scalar', GIGA)),
          'a storage that says more': archive(rebuilt(GIGA // 4, (GIGA // 4,))), 'a tensor that says more': archive(rebuilt(2, (GIGA // 4,))),
          'one number many times': archive(rebuilt(2, (GIGA // 4,), (0,))), 'former storage': former(rebuilt(GIGA // 4, (GIGA // 4,), view=(None,))),
          'a long text': archive(b'\x80\x02X' + struct.pack('<I', GIGA) + b'x'), 'former long text': b'\x80\x02\x8d' + struct.pack('<Q', GIGA) + b'x'}

PEAK = '''
import resource, sys, time
from bnrcam.engine.weights import WeightsError, read_weights
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in sys.argv[1:]:
    before, start = peak(), time.perf_counter()
    try: said = f'read {read_weights(path)}'
    except WeightsError as error: said = f'refused {error}'
    print(peak() - before, f'{time.perf_counter() - start:.1f}', said, sep='|')
'''


def test_weights_that_ask_for_the_memory(tmp_path):
    paths = [tmp_path / f'{i}.pth' for i in range(len(FLOODS))]
    for path, content in zip(paths, FLOODS.values()):
        path.write_bytes(content)
        assert path.stat().st_size < 3_000_000
    result = subprocess.run([sys.executable, '-c', PEAK, *paths], capture_output=True, text=True, timeout=300, check=True)
    for name, path, row in zip(FLOODS, paths, result.stdout.splitlines(), strict=True):
        peak, seconds, said = row.split('|')
        assert said.startswith(f'refused {path}: ') and int(peak) < 300 and float(seconds) < 10, (name, row)


def test_the_harmless_forms_of_these(tmp_path):
    "So it is the flood that is refused, and not the form."
    for i, content in enumerate((archive(rebuilt()), former(rebuilt(view=(None,))))):
        (tmp_path / f'{i}.pth').write_bytes(content)
        assert read_weights(tmp_path / f'{i}.pth')['weight'].tolist() == [0, 0]


def test_checkpoint_that_runs_code(tmp_path, mark, capsys):
    (tmp_path / 'checkpoint.safetensors').write_bytes(torch_zip(Run(mark)))
    assert load_tensors(tmp_path / 'checkpoint.safetensors') == ({}, {})
    assert 'damaged' in capsys.readouterr().out


# safetensors

def with_header(header, length=None, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + data


def entry(dtype='F32', shape=(2,),
          offsets=(0, 8)): return {'weight': {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}}


@pytest.mark.parametrize('content', [
    with_header(b'{}', 2**63), with_header(b'{}', 2**64 - 1), with_header(b'{}', 10**9), with_header(b'[' * 100_000),
    b'', b'\0' * 8,
    with_header(entry(shape=(2**62, 4))), with_header(entry(shape=(-2,))), with_header(entry(offsets=(0, 2**60))),
    with_header(entry(offsets=(8, 0))), with_header(entry(dtype='PICKLE')),
    with_header(entry() | {'x': entry()['weight']}),
    with_header({'__metadata__': {'bnrcam': '[' * 100_000}}, data=b''),
    with_header({'__metadata__': {'bnrcam': '[1]'}}, data=b'')])
def test_safetensors_with_an_absurd_header(tmp_path, content):
    start, path = time.perf_counter(), tmp_path / 'weights.safetensors'
    path.write_bytes(content)
    if b'__metadata__' not in content:
        refused(lambda: load_weights(torch.nn.Linear(2, 1), path), path)
    assert load_tensors(path) == ({}, {})
    refused(lambda: read_cams(path), path)
    assert time.perf_counter() - start < HANG


SIZES = {'cams': [65_535, 65_535], 'wide': [20_000, 20_000], 'covers': [64, 20_000], 'no numbers': ['a', None]}


@pytest.mark.parametrize('name', SIZES)
def test_stores_that_say_a_size_of_their_own(tmp_path, name):
    "They are of the photograph's size, or nothing is made of them: a score for each pixel would fill the memory."
    cams, walk = tmp_path / 'cams.safetensors', tmp_path / 'walk.safetensors'
    save_tensors(cams, {'classes': torch.tensor([0], dtype=torch.uint8), 'means': torch.zeros(1, 1),
                        'map_0': torch.zeros(1, 4, 4, dtype=torch.half)}, size=SIZES[name])
    save_tensors(walk, {'classes': torch.tensor([0]), 'scores': torch.zeros(2, 8, 8)},
                 walk={'size': [64, 64] if name == 'covers' else SIZES[name], 'covers': SIZES[name]})
    refused(lambda: read_cams(cams, (64, 64)), cams)
    refused(lambda: read_propagated(walk, (64, 64)), walk)


# XML

LAUGHS = '<!DOCTYPE a [<!ENTITY e0 "ha">' + ''.join(
    f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(30)) + ']><a><object><name>&e30;</name></object></a>'


@pytest.mark.parametrize('text', [
    LAUGHS, '<!DOCTYPE a [<!ENTITY e SYSTEM "file://SECRET">]><a><object><name>&e;</name></object></a>',
    '<!DOCTYPE a SYSTEM "file://SECRET"><a/>', '<!DOCTYPE a [<!ENTITY % e SYSTEM "file://SECRET"> %e;]><a/>',
    '<a xmlns:xi="http://www.w3.org/2001/XInclude"><object><name><xi:include href="file://SECRET" parse="text"/></name>'
    '</object></a>',
    '<?xml-stylesheet href="file://SECRET"?><a><object><name>cow</name></object></a>'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16'])
def test_hostile_xml(tmp_path, text, encoding):
    (tmp_path / 'secret').write_text('cat')
    start = time.perf_counter()
    (tmp_path / 'labels.xml').write_bytes(text.replace('SECRET', str(tmp_path / 'secret')).encode(encoding))
    refused(lambda: read_labels(tmp_path / 'labels.xml', CLASSES), 'labels.xml')
    assert time.perf_counter() - start < HANG


def test_names_are_no_xml_in_what_is_written(tmp_path):
    name = 'a</name></object><object><name>cat'
    (tmp_path / 'labels.xml').write_text(label_xml('image', (4, 3), [name]))
    assert read_labels(tmp_path / 'labels.xml', [name, 'cat']).tolist() == [1, 0]


# pictures

def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def png(width, height, mode=0, *chunks):
    "A PNG of few bytes that says it has that many pixels."
    header = struct.pack('>IIBBBBB', width, height, 8, mode, 0, 0, 0)
    parts = [chunk(b'IHDR', header), *chunks, chunk(b'IDAT', zlib.compress(bytes(1000))), chunk(b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def jpeg(width, height):
    file = io.BytesIO()
    Image.new('RGB', (8, 8)).save(file, 'JPEG')
    return file.getvalue().replace(struct.pack('>HH', 8, 8), struct.pack('>HH', height, width))


BOMBS = {'png of 10 gigapixels': png(100_000, 100_000), 'png just above the limit': png(10_000, 9_000),
         'jpeg': jpeg(65_500, 65_500),
         'png of 2**31 columns': png(2**31 - 1, 2**31 - 1),
         'text': png(4, 3, 0, chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(10**8)))),
         'palette': png(10_000, 9_000, 3, chunk(b'PLTE', bytes(768)))}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', BOMBS)
def test_picture_bombs(tmp_path, folder, name):
    for path, read in ((tmp_path / 'x.png', read_image), (tmp_path / 'x.png', lambda path: read_mask(path, 3)),
                       (tmp_path / 'x.png', lambda path: read_prediction(path, (4, 3))),
                       (folder / 'JPEGImages/train_00000.jpg', image_size),
                       (folder / 'JPEGImages/train_00000.jpg',
                        lambda path: VOCFolder(folder, 'train', SCENE_CLASSES, masks=True).mask('train_00000')),
                       (folder / 'JPEGImages/train_00000.jpg',
                        lambda path: VOCFolder(folder, 'train', SCENE_CLASSES)[0])):
        path.write_bytes(BOMBS[name])
        refused(lambda: read(path), path)


def test_postscript_is_not_handed_to_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *_, **__: pytest.fail('Ghostscript was started'))
    (tmp_path / 'x.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 3\n%%EndComments\n'
                                     b'(%pipe%touch pwned)(w)file\n%%EOF\n')
    with Image.open(tmp_path / 'x.jpg') as picture:
        assert picture.format == 'EPS'  # what Pillow would make of it
    refused(lambda: read_image(tmp_path / 'x.jpg'), 'x.jpg')


@pytest.mark.parametrize('kind',
                         ['JPEGImages/train_00000.jpg', 'SegmentationClass/train_00000.png',
                          'Annotations/train_00000.xml'])
def test_a_pipe_or_device_in_the_place_of_a_file(folder, kind):
    "Neither waits for somebody to write."
    for make in (os.mkfifo, lambda path: os.symlink('/dev/zero', path), os.mkdir):
        (folder / kind).unlink(missing_ok=True)
        make(folder / kind)
        refused(lambda: VOCFolder(folder, 'train', SCENE_CLASSES, masks=True), folder / kind)
        if kind.endswith('g'):
            with pytest.raises(DataError), open_picture(folder / kind):
                pass
        os.rmdir(folder / kind) if os.path.isdir(folder / kind) else os.unlink(folder / kind)


# names that are paths

ESCAPES = ['../../secret', '/etc/passwd', '..', 'a/../../secret', 'a;b', '$(touch${IFS}pwned)', '`id`', '-rf',
           '.hidden', '~root',
           'a\\..\\b', 'C:x', 'a\0b', '\x1b[31mred', '\u202ereversed', 'x' * 250, '<script>']


@pytest.mark.parametrize('name', ESCAPES)
def test_names_that_lead_out_of_the_folder(folder, name):
    secret = folder.parent / 'secret'
    for path, kind in ((f'{secret}.jpg', 'JPEGImages'), (f'{secret}.xml', 'Annotations'),
                       (f'{secret}.png', 'SegmentationClass')):
        shutil.copy(next((folder / kind).iterdir()), path)
    (folder / 'ImageSets/Segmentation/train.txt').write_text(f'train_00000\n{name}\n')
    message = refused(lambda: VOCFolder(folder, 'train', SCENE_CLASSES), 'train.txt')
    assert message.isprintable()
    refused(lambda: read_split(folder, '../../../secret'), 'no such split')
    (folder / 'labels.csv').write_text(f'file,labels\n{name}.jpg,cat\n')
    refused(lambda: folder_from_table(folder / 'labels.csv', folder / 'JPEGImages', folder.parent / 'out', CLASSES),
            'line 2')
    assert not (folder.parent / 'out').exists()


# COCO

def coco(**changes):
    image = {'id': 1, 'file_name': 'a.jpg', 'height': 6, 'width': 8}
    item = {'id': 7, 'image_id': 1, 'category_id': 3, 'iscrowd': 0, 'segmentation': [[1, 1, 5, 1, 5, 4]]}
    for key, value in changes.items():
        (image if key in image else item)[key] = value
    return {'images': [image], 'annotations': [item], 'categories': [{'id': 3, 'name': 'cat'}]}


def convert(tmp_path, content):
    for part in ('JPEGImages', 'Annotations', 'SegmentationClass', 'photographs'):
        (tmp_path / part).mkdir(exist_ok=True)
    Image.new('RGB', (8, 6)).save(tmp_path / 'photographs/a.jpg')
    (tmp_path / 'coco.json').write_text(json.dumps(content))
    indices, images = read_coco(tmp_path / 'coco.json', ['cat'])
    for image in images:
        convert_coco(tmp_path / 'coco.json', tmp_path / 'photographs', tmp_path, indices, image)
    return tmp_path / 'SegmentationClass'


def test_the_harmless_coco_file(tmp_path, monkeypatch):
    monkeypatch.setattr('bnrcam.datasets.coco.COCO_CLASSES', ('cat',))
    assert (read_mask(convert(tmp_path, coco()) / 'a.png', 2) == 1).sum() in range(6, 13)


RUNS = lambda counts: {'segmentation': {'size': [6, 8], 'counts': counts}}


@pytest.mark.parametrize('changes', [
    RUNS([2**32 - 1, 2**32 + 1, -2**33 + 48]), RUNS([-48, 96]), RUNS([10**18]), RUNS([24.5, 23.5]), RUNS(['48']),
    RUNS([]), RUNS(''),
    RUNS('0'), RUNS('o' * 100_000), RUNS('oooooooo0'), RUNS('PPPP'), RUNS('\N{SNOWMAN}'), RUNS(None), RUNS({'a': 1}),
    {'segmentation': {'size': [2**31, 2**31], 'counts': [2**62]}}, {'segmentation': {'size': '68', 'counts': [48]}},
    {'segmentation': [[0, 0, 1e9, 0, 1e9, 1e9]]}, {'segmentation': [[0, 0, 1e300, 0, 5, 5]]},
    {'segmentation': [[0, 0, -1e9, 0, 5, 5]]},
    {'segmentation': [[0, 0, 10**400, 0, 5, 5]]}, {'segmentation': [[[0, 0], [1, 1], [2, 2]] * 2]},
    {'segmentation': 'a' * 10},
    {'height': 2**31, 'width': 2**31}, {'height': -6}, {'height': '6'}, {'category_id': 99}, {'category_id': [3]},
    {'image_id': 2},
    {'file_name': '..'}, {'file_name': 'a\nb.jpg'}, {'file_name': '<a>.jpg'}, {'file_name': 'a\0.jpg'},
    {'file_name': 'x' * 300},
    {'file_name': '\ud800.jpg'}, {'file_name': '.jpg'}, {'file_name': 7}])
def test_hostile_coco(tmp_path, changes):
    "In C code a wrong number is no exception, but a crash or what lay in memory."
    start = time.perf_counter()
    refused(lambda: convert(tmp_path, coco(**changes)), 'coco.json')
    assert time.perf_counter() - start < HANG and not list((tmp_path / 'SegmentationClass').iterdir())


def test_coco_photograph_by_a_path_stays_in_its_folder(tmp_path, monkeypatch):
    "Only the last part of a name counts."
    monkeypatch.setattr('bnrcam.datasets.coco.COCO_CLASSES', ('cat',))
    convert(tmp_path, coco(file_name='../../etc/a.jpg'))
    assert [path.name for path in (tmp_path / 'JPEGImages').iterdir()] == ['a.jpg']


# archives, servers

def test_a_bomb_of_empty_files(tmp_path):
    with tarfile.open(tmp_path / 'x.tgz', 'w:gz') as tar:
        for number in range(5000):
            tar.addfile(tarfile.TarInfo(f'{number}'))
    refused(lambda: unpack(tmp_path / 'x.tgz', tmp_path / 'to'), '100 times')
    assert not list(tmp_path.glob('to*'))


@pytest.mark.parametrize('name', ['', '.', './', 'a' * 5000, 'a/' * 3000 + 'a', 'a\nb', '\ud800'])
def test_zip_with_a_name_that_is_none(tmp_path, name):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
        archive.writestr('x' * 3, 'good')
    raw = (tmp_path / 'x.zip').read_bytes()
    encoded = name.encode('utf-8', 'surrogatepass')
    for kind, field in ((b'PK\3\4', 26), (b'PK\1\2', 28)):
        at = raw.index(kind)
        raw = raw[:at + field] + struct.pack('<H', len(encoded)) + raw[at + field + 2:].replace(b'xxx', encoded, 1)
    end = raw.rindex(b'PK\5\6')
    raw = raw[:end + 12] + struct.pack('<II', end - raw.index(b'PK\1\2'), raw.index(b'PK\1\2')) + raw[end + 20:]
    (tmp_path / 'x.zip').write_bytes(raw)
    try:
        unpack(tmp_path / 'x.zip', tmp_path / 'to')
    except DataError as error:
        assert len(str(error).splitlines()) == 1
    assert all(path.name in ('x.zip', 'to') or tmp_path / 'to' in path.parents for path in tmp_path.rglob('*'))


def test_a_server_that_never_ends(tmp_path):
    class Endless(io.RawIOBase):
        def read(self, size=-1): return bytes(size)
    refused(lambda: receive(Endless(), tmp_path / 'part', 0, 5_000_000, 'x'), 'more than')
    assert not (tmp_path / 'part').exists()


# what becomes a notebook's cell, and what goes to the shell

CODE = "__import__('os').system('touch {mark}')"
PROFILES = {
    'a python tag': '!!python/object/apply:os.system ["touch {mark}"]', 'python/name': 'x: !!python/name:os.system',
    'python/object/new': 'x: !!python/object/new:os.system ["touch {mark}"]',
    'code as a name': f'"{CODE}": 1', 'code before a name': f'"a = {CODE}; b": 1',
    'a name of two lines': f'"a\\n{CODE}\\nb": 1',
    'a name that is none': '1: 2', 'a keyword': 'None: 1\nimport: 2', 'no name': '? [a, b]\n: 1',
    # papermill quotes texts, but not what it does not know
    'a set': f"x: !!set {{'\"; {CODE}; \"'}}", 'bytes': 'x: !!binary ' + 'IjsgMS8wOyAi',
    'pairs': f"x: !!pairs [a: '\"; {CODE}; \"']",
    'a date': 'x: 2012-12-12', 'a number as a key': 'x: {{1: 2}}',
    'laughs': 'a: &a [x, x]\n' + '\n'.join(f'a{i}: &a{i} [*a{i - 1 if i else ""}, *a{i - 1 if i else ""}]'
                                           for i in range(60)),
    'itself': 'a: &a [*a]', 'depth': 'a: ' + '[' * 2000, 'a path': 'profile: ../../out', 'a list': '[a, b]',
    'text': 'a', 'nothing': ''}


@pytest.mark.parametrize('name', PROFILES)
def test_profiles_that_are_no_plain_values(tmp_path, mark, name):
    start = time.perf_counter()
    (tmp_path / 'evil.yaml').write_text(PROFILES[name].replace('{mark}', str(mark)).replace('{{', '{').replace('}}',
                                                                                                               '}'))
    refused(lambda: read_profile(tmp_path / 'evil.yaml'), 'evil.yaml')
    assert time.perf_counter() - start < HANG


VALUES = ['"; import os; os.system("touch pwned"); "', "'; import os #", '\\"; x = 1; "', 'a\nimport os', '{x}',
          '{{x}}', "f'{1}'", '%s',
          '\\', '\\\\"', '"""', "'''", '\u2028import os', '\x85import os', '\0', 'None', '\N{SNOWMAN}',
          '$(touch pwned)', '`touch pwned`']


def injected(notebook):
    cell = next(cell for cell in notebook.cells if 'injected-parameters' in cell.metadata.get('tags', []))
    lines = ast.parse(cell.source).body
    assert all(isinstance(line, ast.Assign) and len(line.targets) == 1 for line in lines), cell.source
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def test_parameters_are_values(tmp_path):
    "From the file of a job (-f) and a command line (-p, -r): papermill writes one assignment a value, the same value."
    from papermill.cli import papermill
    profile = {'profile': 'x', 'about': VALUES[0], 'variants': VALUES, 'dataset': {value: value for value in VALUES}}
    (tmp_path / 'x.yaml').write_text('\n'.join(line(*item) for item in profile.items()))
    assert yaml.safe_load((tmp_path / 'x.yaml').read_text()) == profile
    for i, value in enumerate(VALUES):
        arguments = [str(ROOT / 'nbs/stages/cams.ipynb'), str(tmp_path / 'out.ipynb'), '--prepare-only', '-f',
                     str(tmp_path / 'x.yaml'),
                     '-p' if i % 2 else '-r', 'run', value]
        papermill(arguments, standalone_mode=False)
        expected = {'run': None if (value, i % 2) == ('None', 1) else value, **profile}
        assert injected(nbformat.read(tmp_path / 'out.ipynb', 4)) == expected


@pytest.fixture(scope='module')
def repo(tmp_path_factory):
    "What make needs to begin, and no data."
    folder = tmp_path_factory.mktemp('repo')
    for name in ('Makefile', 'settings.ini', 'setup.py', 'constraints.txt'):
        shutil.copy(ROOT / name, folder)
    for name in ('bnrcam', 'nbs/profiles', 'nbs/stages'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    return folder


def make(repo, *arguments):
    environment = {key: value for key, value in os.environ.items() if key not in ('MAKEFLAGS', 'MAKELEVEL')}
    return subprocess.run(['make', f'VENV={sys.prefix}', '-o', f'{sys.prefix}/ready', 'JOBS=1', *arguments], cwd=repo,
                          text=True,
                          capture_output=True, timeout=100, env=environment)


@pytest.mark.parametrize('argument', [
    'PROFILE=x; touch {}', 'PROFILE=$$(touch {})', 'PROFILE=`touch {}`', "PROFILE=x'; touch {}; '",
    'PROFILE=x\ntouch {}',
    'PROFILE=$(shell touch {})', 'PROFILE=..', 'PROFILE=../../x', 'PROFILE=', 'PROFILE=x y', 'DATA=x; touch {}',
    'DATA=$$(touch {})',
    'DATA=x y', 'DATA=', 'DATA=a:b', "SOURCES=')+__import__('os').system('touch {}')+str('", 'SOURCES=x|touch {}'])
@pytest.mark.parametrize('target', ['reproduce', 'clean'])
def test_what_goes_to_the_shell(repo, mark, argument, target):
    result = make(repo, target, argument.format(mark))
    name, _, value = argument.partition('=')
    assert result.returncode == 2 and f"{name}='" in result.stderr and 'give' in result.stderr, result.stderr
    assert (repo / 'nbs/profiles/mini.yaml').exists() and not (repo / 'reports').exists()


MINI = (ROOT / 'nbs/profiles/mini.yaml').read_text().replace('profile: mini', 'profile: evil')


@pytest.mark.parametrize('old, new', [
    ('variants: [', 'variants: [a$(touch${{IFS}}{}), '), ('random_seeds: [', 'random_seeds: [`touch\t{}`, '),
    ('timm_backbones: [', "timm_backbones: [x;'touch {}', "),
    ('segment: {{weights: ', 'segment: {{weights: x$(touch\t{}).params, other: '),
    ('profile: evil', 'profile: ../../evil'),
    ('profile: evil', 'profile: mini'), ('root: ', '"__import__(\'os\').system(\'touch {}\')": ')])
def test_a_profile_that_speaks_to_the_shell_or_to_python(repo, mark, old, new):
    old, new = old.format(mark), new.format(mark)
    assert MINI.count(old) >= 1
    (repo / 'nbs/profiles/evil.yaml').write_text(MINI.replace(old, new, 1))
    result = make(repo, 'reports/evil/baseline-s0/train.ipynb', 'PROFILE=evil', 'DATA=none')
    assert result.returncode == 2 and 'nbs/profiles/evil.yaml: ' in result.stderr, result.stdout + result.stderr
    assert not list(repo.glob('reports/evil/*/*')) and not (repo.parent / 'evil').exists()
    shutil.rmtree(repo / 'reports', ignore_errors=True)


# the page

SCRIPT = '<script>alert(1)</script>'
QUOTE = '"><img src=x onerror=alert(1)>'


def test_the_page_shows_markup_as_text(tmp_path):
    frame = pd.DataFrame({'class': [SCRIPT, QUOTE, '=HYPERLINK("http://x")'], f'here {SCRIPT}': ['1.0', '2.0', '3.0']})
    write_table(frame, tmp_path, 'table2', f'{SCRIPT}. {QUOTE}', {'profile': SCRIPT, 'results': {}, QUOTE: {SCRIPT: [QUOTE]}})
    cell = nbformat.v4.new_code_cell(f'x = {SCRIPT!r}', outputs=[
        nbformat.v4.new_output('stream', text=f'{SCRIPT}{QUOTE}'), nbformat.v4.new_output('execute_result', data={
            'text/html': frame.style.hide(axis='index').format(escape='html').format_index(escape='html',
                                                                                           axis=1).to_html()})])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / 'table2.ipynb')
    run = tmp_path / 'noise1" onload="alert(1)'
    run.mkdir()
    picture = {'image/png': 'iVBORw0KGgo='}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[
        nbformat.v4.new_output('display_data', data=picture)])]), run / 'cams.ipynb')
    write_json(run / 'cams.json', {})
    write_index(tmp_path, SCRIPT, QUOTE)
    for page in (tmp_path / 'index.html', tmp_path / 'table2.html', run / 'cams.html'):
        text = page.read_text()
        assert '<script>alert' not in text and '<img src=x' not in text and '" onload=' not in text, page
    assert '&lt;script&gt;alert(1)' in (tmp_path / 'index.html').read_text()


def test_results_whose_names_are_addresses(tmp_path):
    "A click on them opens a file beside the page, or none."
    frame = pd.DataFrame({'class': ['cat'], 'here': ['1.0']})
    write_table(frame, tmp_path, 'table2', 'Table 2. One.', {'results': {'javascript:alert(1)//x.json': dict.fromkeys(('sha256', *OF_RESULTS), '')}})
    run = tmp_path / 'javascript:alert(1)'
    run.mkdir()
    for path in (tmp_path / 'table2.ipynb', run / 'cams.ipynb'):
        nbformat.write(nbformat.v4.new_notebook(), path)
    page = write_index(tmp_path, 'x', 'x').read_text()
    assert page.count('href="./javascript:alert(1)') >= 2 and 'href="javascript' not in page


@pytest.mark.parametrize('name', ['a|99.9', '=HYPERLINK("http://x")', '+1+1', '-1', '@SUM(1)', 'a\x1b[2J', 'a\0', 'a\x0b', 'a\nb', ' a', ''])
def test_classes_that_a_table_would_not_show_as_text(tmp_path, name):
    settings = yaml.safe_load(MINI)
    settings['dataset']['classes'][0] = name
    (tmp_path / 'evil.yaml').write_text(yaml.safe_dump(settings))
    refused(lambda: read_profile(tmp_path / 'evil.yaml'), 'dataset.classes.0')


def test_tables_in_notebooks_escape_their_cells():
    for path in (ROOT / 'nbs/results').glob('table*.ipynb'):
        shown = [line for line in path.read_text().splitlines() if '.style.' in line]
        assert shown and all('.format(' in line and 'escape=' in line for line in shown), path


@pytest.mark.parametrize('run', ['=cmd|"/c calc"!A1', SCRIPT, '@SUM(1)', '../noise1-s0', ''])
@pytest.mark.parametrize('value', ['=1+1', SCRIPT, '1e400', 'nan', "__import__('os')"])
def test_returned_scores_with_formulas(tmp_path, run, value):
    import csv
    for row in ((run, 90, 50, 50), ('noise1-s0', 90, 50, value)):
        with open(tmp_path / 'scores.csv', 'w', newline='') as file:
            csv.writer(file).writerows([('run', 'background', *CLASSES), row])
        refused(lambda: read_scores(tmp_path / 'scores.csv', CLASSES), 'line 2')
