"""Properties that hold for any input: readers give the right value or one line, counts are those of a plain loop."""
import ast
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import string
import struct
import warnings
import zlib
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from safetensors.torch import save_file

from bnrcam.affinity import pair_affinities, random_walk, transition_matrix
from bnrcam.engine.weights import WeightsError, fill_weights, read_weights
from bnrcam.crf import fill_fours, label_groups, plane_groups
from bnrcam.data import IGNORE, DataError, read_image, read_labels, read_mask, read_split, write_mask
from bnrcam.datasets.coco import coco_mask, read_annotations, read_coco
from bnrcam.datasets.voc import read_sbd
from bnrcam.datasets.download import VOC_FILES, read_sources, unpack
from bnrcam.evaluate import confusion_matrix, curve_confusions, score_histogram
from bnrcam.datasets.folder import read_table
from bnrcam.resnet38 import read_params
from bnrcam.scenes import voc_palette
from bnrcam.cams import CAMs, read_cams, seed_scores, write_cams
from bnrcam.study.profile import ProfileError, read_profile
from bnrcam.study.records import read_json
from bnrcam.study.submit import read_prediction, read_scores
from bnrcam.study.verify import check_scores
from miniature import coco_json, run_lengths, sbd_mat, write_tar, write_zip
from test_batch import TINY

pytestmark = pytest.mark.slow

CLASSES = ('cat', 'dog', 'tea pot')


FUZZ = int(os.environ.get('FUZZ', 1))  # how many times as many examples, other ones each time (make fuzz)


def examples(count): return settings(max_examples=count * FUZZ, deadline=None, derandomize=FUZZ == 1, database=None)


@pytest.fixture(autouse=True)
def no_hang():
    "A test that takes 5 minutes (`FUZZ` times as long) hangs; the longest takes some 10 seconds."
    def ring(*_): raise AssertionError('hangs')
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(300 * FUZZ)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('properties')


def value_or_line(read, kind=DataError):
    "What `read` gives, or None if it raises exactly `kind` with one line. Anything else fails the test."
    try:
        return read()
    except kind as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable(), repr(str(error))


def damaged(content):
    "`content` with up to three places overwritten, cut out or filled in, or cut off."
    def spoil(content, cuts, length):
        for start, size, new in cuts:
            start = start % (len(content) + 1)
            content = content[:start] + new + content[start + size:]
        return content[:length % (len(content) + 1)] if length is not None else content
    cut = st.tuples(st.integers(0, 1 << 16), st.integers(0, 5), st.binary(max_size=5))
    return st.builds(spoil, st.just(content), st.lists(cut, min_size=1, max_size=3), st.none()
                     | st.integers(0, 1 << 16))


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=3)
                           | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                           max_leaves=8)


@st.composite
def spoiled_json(draw, value):
    "`value` with one part of it, at any depth, replaced by an arbitrary JSON value, left out, or twice there."
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from([*value] if isinstance(value, dict) else range(len(value))))
        copy = value.copy()
        if draw(st.integers(0, 5)):
            copy[key] = draw(spoiled_json(value[key]))
        else:
            del copy[key]
        return copy
    return draw(json_values)


# lists of names

names = st.text(string.ascii_letters + string.digits + '_', min_size=1, max_size=8)
odd_names = st.sampled_from(['../a', '/etc/passwd', 'a/b', '..', '.', '.a', 'a\\b', '-a', 'a;b', '$(a)', 'a\0b',
                             'a\x1b[2Jb',
                             'a' * 300, '\N{SNOWMAN}' * 90, '<b>', 'a"b', "a'b", 'a:b', '*', '\ufeffa'])


def split_file(place, content):
    path = place / 'ImageSets/Segmentation/any.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@examples(60)
@given(st.lists(names | st.text(max_size=6), max_size=5), st.sampled_from(['\n', '\r\n', '\n\n']))
@example(['a', 'b', 'a'], '\n')
@example([], '\n')
def test_split(place, lines, gap):
    split_file(place, gap.join(lines).encode('utf-8', 'surrogatepass'))
    expected = [line.strip() for line in re.split('[\r\n]+', gap.join(lines)) if line.strip()]
    found = value_or_line(lambda: read_split(place, 'any'))
    assert found in (None, expected)
    if found is None:
        assert not expected or len(set(expected)) < len(expected) or any(not name.isidentifier() for name in expected)


@examples(40)
@given(st.lists(names, max_size=3), odd_names, st.lists(names, max_size=3))
def test_split_with_a_name_that_is_a_path_or_worse(place, before, odd, after):
    split_file(place, '\n'.join([*before, odd, *after]).encode())
    with pytest.raises(DataError):
        read_split(place, 'any')


@examples(30)
@given(st.binary(max_size=40))
def test_split_of_any_bytes(place, content):
    split_file(place, content)
    for name in value_or_line(lambda: read_split(place, 'any')) or []:
        assert Path(place, f'{name}.jpg').resolve().parent == place.resolve()


# labels

@examples(60)
@given(st.lists(st.sampled_from(CLASSES) | st.text(st.characters(exclude_categories=['Cs', 'Cc']), max_size=6),
                max_size=4))
def test_labels(place, present):
    objects = ''.join(f'<object><name> {escape(name)}\n</name><bndbox/></object>' for name in present)
    (place / 'any.xml').write_text(f'<annotation>{objects}</annotation>', encoding='utf-8')
    found = value_or_line(lambda: read_labels(place / 'any.xml', CLASSES))
    if {name.strip() for name in present} <= set(CLASSES):
        assert found.tolist() == [float(name in {p.strip() for p in present}) for name in CLASSES]
    else:
        assert found is None


@examples(80)
@given(st.binary(max_size=30)
       | damaged(b'<?xml version="1.0" encoding="utf-8"?><a><object><name>cat</name></object></a>')
       | st.sampled_from(['utf-16', 'cp037', 'idna', 'utf-7', 'big5', 'nonsense']).map(
           lambda name: f'<?xml version="1.0" encoding="{name}"?><a/>'.encode()))
def test_labels_of_any_bytes(place, content):
    (place / 'any.xml').write_bytes(content)
    value_or_line(lambda: read_labels(place / 'any.xml', CLASSES))


# pictures

def png(pixels=np.arange(35, dtype=np.uint8).reshape(5, 7) % 5, kind='PNG', palette=True):
    picture, file = Image.fromarray(pixels), io.BytesIO()
    if palette:
        picture.putpalette(voc_palette().tobytes())
    picture.save(file, kind)
    return file.getvalue()


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


@st.composite
def built_png(draw):
    "A PNG of valid checksums, whose chunks are in any order and hold anything."
    side = st.sampled_from([0, 1, 5, 7, 100_000, 2**31 - 1, 2**32 - 1])
    header = struct.pack('>II', draw(side), draw(side)) + bytes(
        draw(st.sampled_from(choices))
        for choices in ([1, 2, 4, 8, 16, 3], [0, 2, 3, 4, 6, 1], [0, 1], [0, 1], [0, 1, 2]))
    kinds = st.sampled_from([b'IHDR', b'IDAT', b'PLTE', b'tRNS', b'IEND', b'iCCP', b'zTXt', b'iTXt', b'tEXt', b'gAMA',
                             b'pHYs',
                             b'acTL', b'fcTL', b'fdAT', b'cHRM', b'sRGB', b'eXIf', b'abcd', b'ABCD'])
    chunks = draw(st.lists(st.tuples(kinds, st.binary(max_size=14)), max_size=4))
    body = [chunk(b'IHDR', header), *(chunk(*part) for part in chunks), chunk(b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(body)


GREY = np.arange(24, dtype=np.uint8).reshape(4, 6)
PICTURES = [png(), png(np.dstack([GREY] * 3), palette=False), png(np.dstack([GREY] * 3), 'JPEG', False),
            png(GREY, 'TIFF', False), png(GREY, 'BMP', False), png(np.dstack([GREY] * 3), 'WEBP', False)]
any_picture = st.binary(max_size=30) | built_png() | st.sampled_from(PICTURES).flatmap(damaged)


@pytest.mark.filterwarnings('ignore')  # of Pillow, about what it then refuses
@examples(250)
@given(any_picture)
def test_pictures_of_any_bytes(place, content):
    (place / 'any').write_bytes(content)
    image = value_or_line(lambda: read_image(place / 'any'))
    assert image is None or image.mode == 'RGB' and np.array(image).shape == (*image.size[::-1], 3)
    mask = value_or_line(lambda: read_mask(place / 'any', 5))
    assert mask is None or mask.dtype == np.uint8 and mask.ndim == 2 and ((mask < 5) | (mask == IGNORE)).all()
    assert value_or_line(lambda: read_prediction(place / 'any', (7, 5))) in (None, content)


masks = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6),
                      elements=st.sampled_from([0, 1, 2, 3, 4, 5, 254, 255]))


@examples(40)
@given(masks, st.integers(1, 6))
def test_mask(place, mask, num_classes):
    write_mask(place / 'any.png', mask, voc_palette())
    found = value_or_line(lambda: read_mask(place / 'any.png', num_classes, mask.shape[::-1]))
    if ((mask < num_classes) | (mask == IGNORE)).all():
        assert np.array_equal(found, mask)
    else:
        assert found is None


# tables

@pytest.fixture(scope='module')
def photos(place):
    (place / 'photos').mkdir()
    for name in ('a.jpg', 'b.jpg'):
        Image.new('RGB', (4, 3)).save(place / 'photos' / name)
    return place / 'photos'


cells = st.sampled_from(['a.jpg', 'b.jpg', 'cat', 'dog', 'cat;dog', 'file', 'labels', '0', '1', 'c.jpg',
                         '../photos/a.jpg',
                         '=1+1', '"', 'x' * 300 + '.jpg']) | st.text(max_size=4)


def csv_bytes(rows):
    file = io.StringIO(newline='')
    csv.writer(file).writerows(rows)
    return file.getvalue().encode('utf-8', 'surrogatepass')


@examples(120)
@given(st.sampled_from([['file', 'labels'], ['file', 'dog', 'cat', 'tea pot'], ['file', 'cat']])
       | st.lists(cells, max_size=3),
       st.lists(st.lists(cells, min_size=2, max_size=2) | st.lists(cells, max_size=4), max_size=3))
@example(['file', 'labels'], [['a.jpg', 'dog;cat'], ['b.jpg', 'cat']])
@example(['file', 'dog', 'cat', 'tea pot'], [['a.jpg', '1', '0', '1']])
@example(['file', 'labels'], [['a.jpg', 'x\nfile']])
def test_table_of_labels(place, photos, header, rows):
    (place / 'any.csv').write_bytes(csv_bytes([header, *rows]))
    for item in value_or_line(lambda: read_table(place / 'any.csv', photos, CLASSES)) or []:
        line = next(row for row in rows if row and row[0].strip() == item.image.name)
        told = {label.strip() for label in line[1].split(';')} if header[1:] == ['labels'] else {
            name for name, value in zip(header[1:], line[1:]) if value.strip() == '1'}
        assert item.image in (photos / 'a.jpg', photos / 'b.jpg') and set(item.labels) == told - {''}


@examples(100)
@given(st.permutations(['run', 'background', *CLASSES]), st.lists(st.lists(
    st.floats(0, 100).map(str) | st.sampled_from(['', '101', '-1', 'nan', 'inf', '=1+1', '<b>', 'x\ny']), min_size=5,
    max_size=5),
    max_size=2), st.booleans())
def test_scores(place, header, rows, blank):
    rows = [[f'run{i}' if name == 'run' else cell for name, cell in zip(header, row)] for i, row in enumerate(rows)]
    (place / 'any.csv').write_bytes(csv_bytes([header, *[[]] * blank, *rows]))
    found = value_or_line(lambda: read_scores(place / 'any.csv', CLASSES))
    if found is not None:
        for (_, told), row in zip(found.iterrows(), rows, strict=True):
            assert all(told[name] == (cell if name == 'run' else float(cell)) for name, cell in zip(header, row))
            assert all(0 <= told[name] <= 100 for name in header if name != 'run')


@examples(80)
@given(st.binary(max_size=60) | damaged(b'run,background,cat,dog,tea pot\nours,90,1.5,2,"3"\n')
       | damaged(b'file,labels\na.jpg,"cat;dog"\n'))
@example(b'file,labels\na.jpg,' + b'x' * 200_000)
@example(b'run,background,cat,dog,tea pot\nours,' + b'9' * 200_000)
def test_tables_of_any_bytes(place, photos, content):
    (place / 'any.csv').write_bytes(content)
    value_or_line(lambda: read_table(place / 'any.csv', photos, CLASSES))
    value_or_line(lambda: read_scores(place / 'any.csv', CLASSES))


# weights

def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


TENSORS = {'weight': torch.arange(6.).view(2, 3), 'bias': torch.ones(2)}


@pytest.fixture(scope='module')
def stored(place):
    save_file(TENSORS, place / 'small.safetensors')
    write_cams(place / 'cams.safetensors', CAMs(torch.tensor([1]), (8, 9), [torch.rand(1, 2, 3), torch.rand(1, 4, 4)]),
               'test')
    return {'.safetensors': (place / 'small.safetensors').read_bytes(), '.pth': saved(TENSORS),
            'cams': (place / 'cams.safetensors').read_bytes()}


with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # PyTorch wants to be rid of them
    QUANTIZED = torch.quantize_per_tensor(torch.ones(2, 3), .1, 0, torch.quint8)

odd_tensors = st.sampled_from([
    torch.tensor(1.), torch.ones(2, 3, dtype=torch.complex64), torch.ones(2, 3).to(torch.float8_e4m3fn),
    torch.full((2, 3), torch.nan),
    torch.ones(2, 3).to_sparse(), torch.ones(2, 3, dtype=torch.int64), torch.empty(2, 3, device='meta'),
    torch.ones(3).expand(2, 3),
    QUANTIZED, torch.ones(2, 3, dtype=torch.bool),
    torch.nn.Parameter(TENSORS['weight'])])
odd_states = st.recursive(
    st.none() | st.integers() | st.text(max_size=4) | odd_tensors | st.just(TENSORS['weight']),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(['model', 'state_dict', 'weight', 'bias', 'module.weight', 3, None]), inner, max_size=3),
    max_leaves=5)


def load(path):
    "Read and put into a layer, as `load_weights` does."
    layer = torch.nn.Linear(3, 2)
    fill_weights(layer, read_weights(path), path, ())
    return layer


@pytest.mark.filterwarnings('ignore')  # of torch, about odd tensors
@examples(100)
@given(odd_states)
@example({'model': TENSORS})
@example({'state_dict': {f'module.{name}': value for name, value in TENSORS.items()}})
@example({'weight': torch.ones(2, 3, dtype=torch.complex64), 'bias': torch.ones(2)})
@example({'weight': torch.ones(2, 3).to_sparse(), 'bias': torch.ones(2)})
@example({'weight': torch.ones(2, 3).to(torch.float8_e4m3fn), 'bias': torch.ones(2)})
@example({'weight': torch.empty(2, 3, device='meta'), 'bias': torch.ones(2)})
@example({'weight': QUANTIZED, 'bias': torch.ones(2)})
def test_weights_of_any_structure(place, state):
    (place / 'any.pth').write_bytes(saved(state))
    layer = value_or_line(lambda: load(place / 'any.pth'), WeightsError)
    if layer:
        for _ in range(3):
            inner = state.get('model', state.get('state_dict')) if isinstance(state, dict) else None
            state = inner if isinstance(inner, dict) else state
        given = {name.removeprefix('module.'): value for name, value in state.items()}
        assert all(torch.equal(value, given[name].to(value.dtype)) for name, value in layer.state_dict().items())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['.safetensors', '.pth'])
def test_weights_of_any_bytes(place, stored, kind):
    @examples(100)
    @given(st.binary(max_size=40) | damaged(stored[kind]))
    def check(content):
        (place / f'any{kind}').write_bytes(content)
        value_or_line(lambda: load(place / f'any{kind}'), WeightsError)
    check()


def params(arrays_of):
    "An MXNet .params file, in its newest form."
    from bnrcam.resnet38 import LIST_MAGIC, V2_MAGIC
    content = b''.join(number.to_bytes(8, 'little') for number in (LIST_MAGIC, 0, len(arrays_of)))
    for value in arrays_of.values():
        content += b''.join(number.to_bytes(4, 'little') for number in (V2_MAGIC, 0, value.ndim))
        content += b''.join(side.to_bytes(8, 'little') for side in value.shape)
        content += b''.join(number.to_bytes(4, 'little') for number in (1, 0, 0)) + value.astype('<f4').tobytes()
    content += len(arrays_of).to_bytes(8, 'little')
    return content + b''.join(len(name).to_bytes(8, 'little') + name.encode() for name in arrays_of)


def test_params_are_built_right(place):
    (place / 'any.params').write_bytes(params({'arg:a': np.arange(6).reshape(2, 3)}))
    assert read_params(place / 'any.params')['a'].tolist() == [[0, 1, 2], [3, 4, 5]]


@examples(200)
@given(st.binary(max_size=80) | damaged(params({'arg:a': np.arange(6).reshape(2, 3), 'aux:b': np.ones(2)}))
       | st.lists(st.sampled_from([0, 1, 2, 2**31, 2**62, 2**63, 2**64 - 1]), min_size=2, max_size=4).map(
           lambda shape: params({})[:16] + (1).to_bytes(8, 'little') + (0xF993FAC9).to_bytes(4, 'little')
           + bytes(4) + len(shape).to_bytes(4, 'little') + b''.join(side.to_bytes(8, 'little')
                                                                    for side in shape) + bytes(40)))
def test_params_of_any_bytes(place, content):
    (place / 'any.params').write_bytes(content)
    value_or_line(lambda: read_params(place / 'any.params'), WeightsError)


# the CAM store

@st.composite
def cams(draw):
    count, scales = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    value = st.floats(-3e4, 3e4, width=32)
    shapes = [(count, draw(st.integers(1, 5)), draw(st.integers(1, 5))) for _ in range(scales)]
    maps = [torch.from_numpy(draw(arrays.arrays(np.float32, shape, elements=value))) for shape in shapes]
    classes = draw(st.lists(st.integers(0, 253), min_size=count, max_size=count, unique=True).map(sorted))
    return CAMs(torch.tensor(classes, dtype=torch.int64), (draw(st.integers(1, 40)), draw(st.integers(1, 40))), maps)


@examples(80)
@given(cams())
def test_cams_come_back_within_half_precision(place, given):
    write_cams(place / 'any.safetensors', given, 'test')
    found = read_cams(place / 'any.safetensors')
    assert found.classes.tolist() == given.classes.tolist() and found.size == given.size
    for before, after in zip(given.maps, found.maps, strict=True):
        mean = before.mean((1, 2), keepdim=True)
        # half a unit in the last place of half precision, of its smallest number, and of the sum in single precision
        bound = (before - mean).abs() * 2**-11 + 2**-25 + (mean.abs() + before.abs()) * 2**-22
        assert after.shape == before.shape and ((before - after).abs() <= bound).all()
    scores = seed_scores(found)
    assert scores.shape == (len(given.classes), *given.size) and ((scores >= 0) & (scores <= 1)).all()


@examples(30)
@given(cams().filter(lambda given: len(given.classes)), st.sampled_from([math.nan, math.inf, -math.inf, 3e38, 1e6]),
       st.randoms())
def test_cams_that_are_not_finite_are_not_stored(place, given, value, random):
    random.choice(given.maps).view(-1)[0] = value
    path = place / 'never.safetensors'
    value_or_line(lambda: write_cams(path, given, 'test'))
    assert not path.exists() or all(m.isfinite().all() for m in read_cams(path).maps)
    path.unlink(missing_ok=True)
    if not math.isfinite(value):
        with pytest.raises(DataError):
            write_cams(path, given, 'test')
        assert not path.exists()


def test_cams_of_any_bytes(place, stored):
    @examples(100)
    @given(st.binary(max_size=40) | damaged(stored['cams']))
    def check(content):
        (place / 'any.safetensors').write_bytes(content)
        value_or_line(lambda: read_cams(place / 'any.safetensors'))
    check()


tensors = arrays.arrays(st.sampled_from([np.float32, np.float16, np.uint8, np.int64]),
                        arrays.array_shapes(min_dims=0, max_dims=4, max_side=3),
                        elements=st.integers(0, 3)).map(torch.from_numpy)


@examples(150)
@given(st.fixed_dictionaries({}, optional={key: tensors for key in ('classes', 'means', 'map_0', 'map_1')}),
       spoiled_json({'size': [8, 9], 'provenance': 'x'}), st.booleans())
@example({'classes': torch.tensor([0], dtype=torch.uint8), 'means': torch.zeros(1, 1),
          'map_0': torch.full((1, 2, 2), torch.nan)},
         {'size': [8, 9]}, True)
@example({'classes': torch.tensor([0], dtype=torch.uint8), 'means': torch.zeros(1, 1), 'map_0': torch.zeros(1, 2, 2)},
         {'size': [10**9, 10**9]}, True)
def test_cams_of_any_structure(place, given, metadata, ours):
    save_file({name: value.contiguous() for name, value in given.items()}, place / 'any.safetensors',
              {'bnrcam' if ours else 'x': json.dumps(metadata)})
    found = value_or_line(lambda: read_cams(place / 'any.safetensors'))
    if found:
        assert found.maps and all(m.ndim == 3 and len(m) == len(found.classes) and m.isfinite().all()
                                  for m in found.maps)
        assert len(found.size) == 2 and all(isinstance(side, int) and 0 < side < 100_000 for side in found.size)


# JSON and YAML

SOURCES = {'voc': {'url': 'https://example.org/a.tar', 'size': 5, 'digest': 'md5:00', 'unpacked': 3}}


@examples(200)
@given(spoiled_json(SOURCES).map(json.dumps).map(str.encode) | st.binary(max_size=20)
       | st.sampled_from(['https://[', 'https://a/..', 'https://a/', 'https://a/.', 'http://a/b', 'ftp://a/b',
                          'https://a/b\n', '//a/b']).map(
           lambda url: json.dumps({'voc': {'url': url}}).encode()))
@example(b'["voc"]')
@example(b'[' * 100_000)
def test_sources(place, content):
    (place / 'any.json').write_bytes(content)
    for file in (value_or_line(lambda: read_sources(place / 'any.json', VOC_FILES)) or {}).values():
        assert file.url.startswith('https://') and Path('folder', file.name).name == file.name not in ('', '.', '..')
        assert file.size is None or file.size >= 0
        assert file.digest == '' or file.digest.partition(':')[0] in ('md5', 'sha256')


@examples(100)
@given(st.binary(max_size=30) | json_values.map(json.dumps).map(str.encode))
@example(b'[' * 100_000)
@example(b'{"a": ' * 100_000)
def test_json(place, content):
    (place / 'any.json').write_bytes(content)
    assert isinstance(value_or_line(lambda: read_json(place / 'any.json')), (dict, type(None)))


PROFILE = yaml.safe_load(TINY.replace('tiny', 'any'))
PROFILE['dataset']['classes'][:2] = ['cat', 'it\'s "so"']


@examples(150)
@given(spoiled_json(PROFILE).map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode('utf-8',
                                                                                                'surrogatepass'))
       | st.binary(max_size=30) | damaged(yaml.safe_dump(PROFILE).encode()))
def test_profile(place, content):
    "What is accepted is plain values under plain names, and is itself again as the cell that papermill makes of it."
    from papermill.translators import PythonTranslator
    (place / 'any.yaml').write_bytes(content)
    profile = value_or_line(lambda: read_profile(place / 'any.yaml'), ProfileError)
    if profile is None:
        return
    cell = ast.parse(PythonTranslator.codify(profile))
    assert [line.targets[0].id for line in cell.body] == list(profile)
    for line, value in zip(cell.body, profile.values(), strict=True):
        if 'float(' not in ast.unparse(line):
            assert ast.literal_eval(line.value) == value


# data sets

COCO = coco_json(np.random.default_rng(0), 'train', 2, (24, 20), objects=1, points=4)
COCO['categories'] = COCO['categories'][:3]
for number, item in enumerate(COCO['annotations']):
    item['category_id'] = 1 + number % 3
COCO_NAMES = [category['name'] for category in COCO['categories']]


@examples(200)
@given(spoiled_json(COCO))
@example(COCO)
def test_coco(place, content):
    (place / 'any.json').write_text(json.dumps(content))

    def read():
        indices, images = read_coco(place / 'any.json', COCO_NAMES)
        return [(image, coco_mask(read_annotations(place / 'any.json', image), 24, 20, indices)) for image in images]
    for image, mask in value_or_line(read) or []:
        assert Path(place, image.name).parent == place and mask.shape == (24, 20)
        assert ((mask <= 3) | (mask == IGNORE)).all()


@examples(100)
@given(st.binary(max_size=30) | damaged(json.dumps(COCO).encode()))
@example(b'{"a": ' + b'[' * 100_000)
def test_coco_of_any_bytes(place, content):
    (place / 'any.json').write_bytes(content)
    value_or_line(lambda: read_coco(place / 'any.json', COCO_NAMES))


@examples(150)
@given(st.text('0123456789:;<=>?@ABCPQRSTUVWXYZ[\\]^_`abcdefghijklmno', max_size=12) | json_values
       | st.lists(st.integers(-10, 130) | st.floats(0, 120), max_size=6))
def test_run_lengths(shape_counts):
    "Run lengths that do not cover the image to the pixel are refused: the C code would leave the rest to chance."
    item = {'id': 1, 'iscrowd': 0, 'category_id': 1, 'segmentation': {'size': [12, 10], 'counts': shape_counts}}
    mask = value_or_line(lambda: coco_mask([item], 12, 10, {1: 1}))
    if mask is not None and isinstance(shape_counts, list):
        assert sum(shape_counts) == 120 and mask.sum() == sum(shape_counts[1::2])


@examples(60)
@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
                     elements=st.integers(0, 1)))
def test_run_lengths_of_any_mask(region):
    from pycocotools import mask as coco_rle
    item = {'id': 1, 'iscrowd': 0, 'category_id': 1}
    for counts in (run_lengths(region)['counts'], coco_rle.encode(np.asfortranarray(region))['counts'].decode()):
        shape = {'size': list(region.shape), 'counts': counts}
        assert np.array_equal(coco_mask([{**item, 'segmentation': shape}], *region.shape, {1: 1}), region)


@examples(100)
@given(st.lists(st.lists(st.floats() | st.integers(-2**70, 2**70) | st.floats(-20, 30), max_size=9), max_size=3))
def test_polygons(parts):
    item = {'id': 1, 'iscrowd': 0, 'category_id': 1, 'segmentation': parts}
    mask = value_or_line(lambda: coco_mask([item], 12, 10, {1: 1}))
    assert mask is None or mask.shape == (12, 10)


@examples(100)
@given(st.binary(max_size=30) | damaged(sbd_mat(np.arange(30, dtype=np.uint8).reshape(5, 6) % 21)))
def test_sbd_of_any_bytes(place, content):
    (place / 'any.mat').write_bytes(content)
    mask = value_or_line(lambda: read_sbd(place / 'any.mat'))
    assert mask is None or mask.ndim == 2 and mask.max() <= 20


@pytest.mark.parametrize('name', ['x.tar', 'x.tgz', 'x.zip'])
def test_archives_of_any_bytes(place, name):
    files = {'data/a.txt': b'a' * 700, 'data/b.txt': b'b'}
    good = (write_zip if name == 'x.zip' else write_tar)(place / name, files).read_bytes()

    @examples(80)
    @given(st.binary(max_size=40) | damaged(good))
    def check(content):
        folder = place / 'unpacked'
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / name).write_bytes(content)
        value_or_line(lambda: unpack(folder / name, folder / 'deep' / 'to'))
        assert not (folder / 'deep' / 'to.partial').exists()
        assert all(folder / 'deep' / 'to' in path.parents for path in folder.rglob('*') if path.is_file()
                   and path.name != name)
    check()


# results

RESULT = {'iou': {'background': 50., 'cat': None}, 'scored': ['background', 'cat'], 'absent': ['cat'], 'miou': 50.,
          'fp_share': 1., 'fn_share': 2., 'confusion': [[3, 0], [0, 0]]}


@pytest.mark.filterwarnings('ignore')  # of numpy, about means of nothing
@examples(100)
@given(spoiled_json({'plain': RESULT, 'crf': RESULT})
       | spoiled_json({**RESULT, 'thresholds': [0.], 'miou': [50.], 'best_miou': 50.}))
def test_results_of_any_structure(place, content):
    "`verify` catches these four kinds and names the file."
    (place / 'any.json').write_text(json.dumps(content))
    try:
        assert isinstance(check_scores(place / 'any.json'), (str, type(None)))
    except (ValueError, KeyError, TypeError, OSError, AttributeError, LookupError):
        pass


# counts

@st.composite
def label_maps(draw, num_classes, count=1):
    shape = draw(arrays.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6))
    valid = st.integers(0, num_classes - 1)
    truth = draw(arrays.arrays(np.uint8, shape, elements=valid | st.just(IGNORE)))
    return truth, *(draw(arrays.arrays(draw(st.sampled_from([np.uint8, np.int64, np.int32])), shape, elements=valid))
                    for _ in range(count))


def counted(truth, prediction, num_classes):
    "The textbook's confusion matrix."
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for t, p in zip(truth.ravel().tolist(), prediction.ravel().tolist()):
        if t != IGNORE:
            matrix[t, p] += 1
    return matrix


@examples(100)
@given(st.integers(2, 5).flatmap(lambda n: st.tuples(st.just(n), label_maps(n, 2))))
def test_confusion_matrix(case):
    n, (truth, first, second) = case
    matrix = confusion_matrix(truth, first, n)
    assert np.array_equal(matrix, counted(truth, first, n)) and matrix.sum() == (truth != IGNORE).sum()
    assert np.array_equal(confusion_matrix(first, second, n), confusion_matrix(second, first, n).T)
    cut = len(truth) // 2
    assert np.array_equal(matrix,
                          confusion_matrix(truth[:cut], first[:cut], n) + confusion_matrix(truth[cut:], first[cut:], n))


@examples(100)
@given(arrays.arrays(np.int64, (2, 3), elements=st.sampled_from([0, 1, 2, 3, 255])),
       arrays.arrays(np.int64, (2, 3), elements=st.sampled_from([-300, -1, 0, 1, 2, 3, 4, 255, 10**12])))
def test_confusion_matrix_of_labels_out_of_range(truth, prediction):
    valid = truth != IGNORE
    if ((truth >= 3) & valid).any() or ((prediction < 0) | (prediction >= 3))[valid].any():
        with pytest.raises(ValueError):
            confusion_matrix(truth, prediction, 3)
    else:
        assert np.array_equal(confusion_matrix(truth, prediction, 3), counted(truth, prediction, 3))


@st.composite
def curves(draw):
    "Truth, scores, their classes, the number of classes, thresholds; many scores lie on or just beside a threshold."
    thresholds = np.array(draw(st.lists(st.floats(0, 1) | st.integers(0, 100).map(lambda i: i / 100),
                                        max_size=6).map(sorted)))
    edges = [float(edge) for t in thresholds.astype(np.float32) for edge in
             (t, np.nextafter(t, np.float32(-1)), np.nextafter(t, np.float32(2)))]
    score = st.floats(0, 1, width=32) | st.sampled_from([0., 1., *edges])
    n, shape = draw(st.integers(2, 5)), draw(arrays.array_shapes(min_dims=2, max_dims=2, max_side=4))
    classes = draw(st.lists(st.integers(1, n - 1), unique=True).map(sorted))
    scores = draw(arrays.arrays(np.float32, (len(classes), *shape), elements=score))
    truth = draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, n - 1) | st.just(IGNORE)))
    return truth, scores, np.array(classes, np.int64), n, thresholds


@examples(200)
@given(curves())
def test_threshold_curve(case):
    truth, scores, classes, n, thresholds = case
    confusions = curve_confusions(score_histogram(truth, scores, classes, n, thresholds))
    assert confusions.shape == (len(thresholds), n, n)
    for threshold, confusion in zip(thresholds.astype(np.float32), confusions):
        # background first, at the threshold's score: argmax gives it ties, and the lower class ties between classes
        planes = np.concatenate([np.full((1, *truth.shape), threshold), scores])
        prediction = np.array([0, *classes])[planes.argmax(0)]
        assert np.array_equal(confusion, counted(truth, prediction, n))


@examples(30)
@given(st.sampled_from([[0, 1], [1, 3], [1, 200], [-1, 1]]))
def test_threshold_curve_of_classes_out_of_range(classes):
    with pytest.raises(ValueError):
        score_histogram(np.zeros((2, 2), np.uint8), np.full((2, 2, 2), .5, np.float32), np.array(classes), 3)


# label groups, random walk

@examples(80)
@given(arrays.arrays(np.uint8, (3, 4), elements=st.integers(0, 9)), st.integers(10, 24))
def test_groups_hold_each_label_once(labels, num_labels):
    present, planes = set(np.unique(labels)), np.array([labels.ravel() == label for label in range(num_labels)],
                                                       np.float32)
    for groups in (label_groups(labels, num_labels), plane_groups(planes)):
        full = fill_fours(groups)
        for found in (groups, full):
            assert sorted(label for group in found for label in group) == list(range(num_labels))
            assert all(len(group) == 1 for group in found if present & set(group))
        assert full == sorted(full) and (len(full) % 4 == 0 or len(full) == num_labels)


@examples(25)
@given(st.tuples(st.integers(5, 9), st.integers(5, 9)), st.integers(1, 2), st.sampled_from([1., 8., 14.]),
       st.integers(0, 9),
       st.sampled_from([0., 1., 100.]))
def test_transition_matrix(size, batch, beta, seed, contrast):
    rng = torch.Generator().manual_seed(seed)
    pairs = pair_affinities(contrast * torch.rand(batch, 3, *size, generator=rng))
    matrix = transition_matrix(pairs, size, beta)
    dense = matrix.to_dense()
    assert torch.allclose(dense.sum(1), torch.ones(len(dense)), atol=1e-6) and (dense >= 0).all()
    # undo the division: what is left is symmetric, 1 on the diagonal, and reaches no other image
    weights = dense / dense.diagonal()[:, None]
    assert torch.allclose(weights, weights.T, atol=1e-6)
    blocks = torch.arange(len(dense)) // (size[0] * size[1])
    assert (dense[blocks[:, None] != blocks] == 0).all()
    scores = torch.rand(batch, 2, *size, generator=rng)
    propagated = random_walk(matrix, scores, 8)
    low, high = (extreme(scores, (2, 3)) for extreme in (torch.amin, torch.amax))
    assert (propagated.amin((2, 3)) >= low - 1e-5).all() and (propagated.amax((2, 3)) <= high + 1e-5).all()
    assert torch.allclose(propagated.flatten(),
                          (torch.linalg.matrix_power(dense, 8) @ scores.flatten(2).transpose(1, 2).flatten(0, 1))
                          .unflatten(0, (batch, -1)).transpose(1, 2).flatten(), atol=1e-5)
