"Files are opened in one place, `bnrcam.engine.files`, which reads regular ones of a bounded size and follows no link."

import ast
import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from bnrcam.cams import read_cams
from bnrcam.data import DataError, read_image, read_labels, read_mask, read_split, write_mask
from bnrcam.datasets.coco import read_coco
from bnrcam.datasets.download import read_sources, unpack
from bnrcam.datasets.folder import csv_rows
from bnrcam.datasets.voc import read_sbd, save_mask, write_split
from bnrcam.engine import files
from bnrcam.engine.checkpoints import save_tensors, write_record
from bnrcam.engine.weights import read_weights
from bnrcam.resnet38 import read_params
from bnrcam.scenes import voc_palette
from bnrcam.study import batch
from bnrcam.study.figures import save_figure
from bnrcam.study.graph import cells, replace
from bnrcam.study.page import table_html
from bnrcam.study.profile import ProfileError, read_profile
from bnrcam.study.records import file_digest, read_json, write_text
from bnrcam.study.verify import check_products

PACKAGE = Path(files.__file__).parents[1]
OPENINGS = {'open', 'fdopen', 'read_text', 'read_bytes', 'write_text', 'write_bytes', 'load', 'save', 'savefig', 'read_csv',
            'to_csv', 'safe_open', 'load_file', 'save_file', 'ZipFile', 'is_zipfile', 'mkstemp', 'NamedTemporaryFile',
            'memmap', 'loadtxt', 'fromfile', 'tofile', 'imread', 'copyfile', 'read_json', 'to_json'}
DOOR = {'read_text', 'read_bytes', 'write_text', 'write_bytes', 'read_json', 'files.read_text', 'files.write_text'}
IN_MEMORY = 'works on what is in memory'
NEW = 'writes in a folder that it has made itself'
ALLOWED = {
    'cams.py': {}, 'data.py': {'Image.open': 'of `open_regular`', 'image.save': 'in `replacing`', 'picture.load': IN_MEMORY},
    'datasets/download.py': {
        'zipfile.is_zipfile': 'of `regular`', 'zipfile.ZipFile': 'of `regular`', 'gzip.open': 'an archive that `open_regular` took',
        '.open': 'a request', 'member.open': IN_MEMORY, 'file.open': IN_MEMORY, '.write_text': NEW,
        'open': 'goes on with a part, after a link in its place is removed; members of an archive, in a new folder'},
    'datasets/folder.py': {'image.save': IN_MEMORY}, 'datasets/voc.py': {'image.save': 'in `replacing`'},
    'engine/checkpoints.py': {'save': IN_MEMORY},
    'engine/files.py': {'open': 'the door', 'os.open': 'the door', 'partial.write_bytes': 'the door'},
    'engine/weights.py': {'zipfile.ZipFile': 'of `open_regular`', 'torch.load': 'of `regular`', 'safe_open': 'of `regular`'},
    'paper.py': {'pd.read_csv': IN_MEMORY}, 'predict.py': {'.save': 'in `replacing`'}, 'scenes.py': {'.save': NEW, 'mask.save': NEW, '.write_text': NEW},
    'study/batch.py': {'open': 'its own door: a bare Python runs it', 'partial.write_text': 'so', '.read_text': 'of /proc',
                       'os.open': 'locks, never through a link; the null device'},
    'study/figures.py': {'figure.savefig': 'in `replacing`'}, 'study/graph.py': {'contents.save': 'of batch'},
    'study/page.py': {'picture.save': IN_MEMORY, 'pd.read_csv': IN_MEMORY}, 'study/plan.py': {'.save': NEW, '.write_text': NEW},
    'study/profile.py': {'yaml.load': IN_MEMORY}, 'study/submit.py': {'tarfile.open': IN_MEMORY}, 'study/tables.py': {'frame.to_csv': IN_MEMORY},
    'study/verify.py': {'.to_csv': IN_MEMORY}, 'train.py': {'frame.to_csv': IN_MEMORY}}


def called(call):
    "How a call names its function: open, os.open, or .open where a value with no name has it."
    function = call.func
    if isinstance(function, ast.Attribute):
        return f"{getattr(function.value, 'id', '')}.{function.attr}"
    return getattr(function, 'id', '')


def test_every_file_goes_through_the_door():
    "Others than the allowed ones, each with its reason, are not there; and these are."
    found = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        calls = {called(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        calls = {name for name in calls if name.rpartition('.')[2] in OPENINGS} - DOOR
        if calls:
            found[str(path.relative_to(PACKAGE))] = calls
    assert found == {module: {*reasons} for module, reasons in ALLOWED.items() if reasons}
    assert len(Path(files.__file__).read_text().splitlines()) < 150


READERS = {
    'list.txt': lambda path: read_split(path.parents[2], 'list'), 'labels.csv': csv_rows, 'a.xml': lambda path: read_labels(path, ['cat']),
    'a.jpg': read_image, 'a.png': lambda path: read_mask(path, 3), 'a.mat': read_sbd, 'coco.json': read_coco,
    'sources.json': lambda path: read_sources(path, {}), 'a.zip': lambda path: unpack(path, path.with_name('to')),
    'a.pth': read_weights, 'a.safetensors': read_weights, 'cams.safetensors': read_cams, 'a.params': read_params,
    'seeds.json': read_json, 'x.yaml': read_profile, 'x.ipynb': cells, 'table5.csv': table_html,
    'table5.png': file_digest, 'x.provenance': batch.text}


@pytest.mark.parametrize('name', READERS)
def test_no_reader_waits_or_fills_the_memory(tmp_path, name):
    "A pipe, an endless device, a folder, a file of 1 TB that takes no room: one line that names it, at once."
    path = tmp_path / 'ImageSets/Segmentation' / name
    path.parent.mkdir(parents=True)
    for make in (os.mkfifo, lambda path: path.symlink_to('/dev/zero'), os.mkdir, lambda path: path.touch()):
        make(path)
        if path.is_file():
            if name in ('table5.png', 'a.zip'): break  # read piece by piece
            os.truncate(path, 2**40)
        tracemalloc.start()
        start = time.monotonic()
        with pytest.raises((DataError, ProfileError, OSError, ValueError)) as error:
            READERS[name](path)
        assert name in str(error.value) and '\n' not in str(error.value)
        assert time.monotonic() - start < 2 and tracemalloc.get_traced_memory()[1] < 3e8
        tracemalloc.stop()
        path.rmdir() if path.is_dir() else path.unlink()


MASK = np.zeros((3, 4), np.uint8)
WRITERS = {
    'a.png': lambda path: write_mask(path, MASK, voc_palette()), 'b.png': lambda path: save_mask(path, MASK),
    'x.txt': lambda path: files.write_text(path, 'a'), 'table.csv': lambda path: write_text(path, 'a'),
    'a.safetensors': lambda path: save_tensors(path, {}), 'provenance.json': lambda path: write_record(path.parent, {}),
    'x.provenance': lambda path: batch.write(path, {}), 'x.yaml': lambda path: replace(path, 'ab' if path.is_symlink() else 'a'),
    'figure1.svg': lambda path: save_figure(Figure(), path.parent, 'figure1'),
    'ImageSets/Segmentation/train.txt': lambda path: write_split(path.parents[2], 'train', ['a'])}


@pytest.mark.parametrize('name', WRITERS)
def test_no_writer_writes_through_a_link(tmp_path, name):
    "A link in the place of a product, or of its unfinished form, is replaced; what it leads to stays. A folder is a line."
    mine, path = tmp_path / 'mine', tmp_path / 'there' / name
    path.parent.mkdir(parents=True)
    mine.write_text('mine')
    for place in (path, path.with_name(f'{path.name}.partial')):
        place.symlink_to(mine)
    WRITERS[name](path)
    assert mine.read_text() == 'mine' and not path.is_symlink() and path.stat().st_size
    assert not list(path.parent.glob('*.partial'))
    path.with_name(f'{path.name}.partial').mkdir()
    with pytest.raises((DataError, OSError)) as error:
        WRITERS[name](path)
    assert name.rpartition('/')[2] in str(error.value)


def test_what_records_name_lies_in_their_folder(tmp_path):
    "A product that is a path out of the reports is not read, a device neither."
    reports = tmp_path / 'reports'
    reports.mkdir()
    (tmp_path / 'mine').write_text('mine')
    (reports / 'link').symlink_to(tmp_path / 'mine')
    for product in ('../mine', 'link', '../../../../../../../../dev/zero'):
        write_text(reports / 'table5.json', json.dumps({'products': {product: ''}}))
        with pytest.raises(OSError, match='lies outside|not a regular file'):
            check_products(reports, 'table5')


def test_a_part_that_is_a_link_is_not_written_to(tmp_path, monkeypatch):
    "Nor is a damaged tag sent to the server."
    from bnrcam.datasets import download
    part, tag = tmp_path / 'a.zip.partial', tmp_path / 'a.zip.partial.tag'
    (tmp_path / 'mine').write_text('mine')
    part.symlink_to(tmp_path / 'mine')
    assert download.range_headers(part, tag) == {}
    part.unlink()
    part.write_bytes(b'abc')
    for content in (b'\xff\xfe', b'"a"\r\nHost: b'):
        tag.write_bytes(content)
        assert download.range_headers(part, tag) == {'Range': 'bytes=3-'}
