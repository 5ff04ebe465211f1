"""The archive for VOC's test server, read back as the server would, and the file of what it answered."""
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from bnrcam.data import DataError, VOCFolder, read_split, write_mask
from bnrcam.evaluate import class_scores, confusion_matrix, evaluate_labels
from bnrcam.paper import VOC_LABELS
from bnrcam.scenes import SCENE_CLASSES, voc_palette, write_scenes
from bnrcam.study.submit import read_scores, write_submission

CLASSES = VOC_LABELS[1:]
SERVER = 'results/VOC2012/Segmentation/comp6_test_cls'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = write_scenes(tmp_path_factory.mktemp('submit') / 'mini', sizes={'test': 5})
    return VOCFolder(root, 'test', SCENE_CLASSES, masks=True)


@pytest.fixture
def predictions(data, tmp_path):
    "Made up: the truth, moved, without the ignored band; a hidden file and a note as a stage leaves them."
    folder = tmp_path / 'crf'
    folder.mkdir()
    for name in data.names:
        mask = np.roll(data.mask(name), 5, axis=0)
        write_mask(folder / f'{name}.png', np.where(mask == 255, 0, mask), voc_palette())
    (folder / 'provenance.txt').write_text('a test')
    (folder / '.unfinished.part.png').write_bytes(b'')
    return folder


def submit(data, predictions, names=None):
    return write_submission(predictions, names or data.names, data.root, predictions.parent / 'submission.tar')


def test_the_server_reads_what_we_wrote(data, predictions, tmp_path):
    path = submit(data, predictions)
    server = tmp_path / 'server'
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        archive.extractall(server, filter='data')
    split = read_split(data.root, 'test')
    assert [member.name for member in members] == sorted(f'{SERVER}/{name}.png' for name in split)
    assert all(member.isfile() and member.mtime == 0 and member.uid == 0 and not member.uname for member in members)
    assert sum(path.is_file() for path in server.rglob('*')) == len(split)
    total = 0
    for name in split:
        with Image.open(server / SERVER / f'{name}.png') as image, Image.open(data.image_path(name)) as photo:
            assert (image.format, image.mode, image.size) == ('PNG', 'P', photo.size)
            assert image.getpalette()[:63] == voc_palette()[:21].flatten().tolist()
            values = np.array(image)
        assert values.max() <= 20
        total = total + confusion_matrix(data.mask(name), values, 7)
    ours = evaluate_labels(data, predictions)
    assert class_scores(total, ('background', *SCENE_CLASSES))['iou'] == ours['iou'] and 0 < ours['miou'] < 100


def test_same_predictions_give_the_same_bytes(data, predictions):
    first = submit(data, predictions).read_bytes()
    for path in predictions.glob('*.png'):
        os.utime(path, (1, 1))
    assert submit(data, predictions, data.names[::-1]).read_bytes() == first
    assert {path.name for path in predictions.parent.iterdir()} == {'crf', 'submission.tar'}


def replace(path, mode=None, size=None, palette=None, value=None, kind='PNG'):
    "Write a prediction again with one thing wrong."
    image = Image.open(path)
    values = np.array(image)
    if value is not None:
        values[0, 0] = value
    image = Image.fromarray(values)
    image.putpalette((voc_palette() if palette is None else palette).tobytes())
    if mode:
        image = Image.fromarray(values) if mode == 'L' else image.convert(mode)
    if size:
        image = image.resize(size, Image.Resampling.NEAREST)
    image.save(path, kind)


WRONG = {'RGB': (dict(mode='RGB'), 'PNG of mode RGB'), 'RGBA': (dict(mode='RGBA'), 'PNG of mode RGBA'),
         'grey': (dict(mode='L'), 'PNG of mode L'), 'a GIF by name': (dict(kind='GIF'), 'none of JPEG'),
         'palette': (dict(palette=voc_palette()[::-1].copy()), "palette is not VOC's"),
         'one colour': (dict(palette=np.where(np.arange(256)[:, None] == 20, np.uint8(7), voc_palette())), "not VOC's"),
         'size': (dict(size=(40, 30)), 'the prediction is 40x30'), '255': (dict(value=255), 'value 255 is no class'),
         '21': (dict(value=21), 'value 21 is no class')}


@pytest.mark.parametrize('change, message', WRONG.values(), ids=WRONG.keys())
def test_wrong_predictions(data, predictions, change, message):
    good = submit(data, predictions).read_bytes()
    victim = predictions / f'{data.names[2]}.png'
    replace(victim, **change)
    with pytest.raises(DataError, match=f'{data.names[2]}.png.*{message}'):
        submit(data, predictions)
    assert (predictions.parent / 'submission.tar').read_bytes() == good, 'a refused folder replaced a good archive'


@pytest.mark.parametrize('content', [b'', b'\x89PNG\r\n\x1a\n', b'no picture'])
def test_damaged_prediction(data, predictions, content):
    (predictions / f'{data.names[0]}.png').write_bytes(content)
    with pytest.raises(DataError, match='damaged prediction'):
        submit(data, predictions)


def test_cut_prediction(data, predictions):
    path = predictions / f'{data.names[0]}.png'
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match='damaged prediction'):
        submit(data, predictions)


def test_wrong_lists(data, predictions):
    (predictions / f'{data.names[0]}.png').unlink()
    with pytest.raises(DataError, match=f'{data.names[0]}.png: no prediction .1 of 5'):
        submit(data, predictions)
    with pytest.raises(DataError, match='no image of the split .1 such'):
        submit(data, predictions, data.names[2:])
    with pytest.raises(DataError, match='is named 2 times'):
        submit(data, predictions, [*data.names, data.names[0]])
    with pytest.raises(DataError, match='is a path'):
        submit(data, predictions, [*data.names[1:], '../../passwd'])
    with pytest.raises(DataError, match='no names'):
        write_submission(predictions, [], data.root, predictions.parent / 'submission.tar')
    assert not list(predictions.parent.glob('submission*'))


def test_missing_image(data, predictions, tmp_path):
    with pytest.raises(DataError, match='no such image'):
        write_submission(predictions, data.names, tmp_path, tmp_path / 'submission.tar')


def test_values_up_to_20_are_fine(data, predictions):
    replace(predictions / f'{data.names[0]}.png', value=20)
    assert submit(data, predictions).is_file()


HEADER = ','.join(['run', *VOC_LABELS])
ROW = 'noise1-s0,' + ','.join(str(50 + i / 10) for i in range(21))


def scores(tmp_path, text):
    path = tmp_path / 'test_scores_voc.csv'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_scores(path, CLASSES)


def test_scores(tmp_path):
    frame = scores(tmp_path, f'\ufeff{HEADER}\r\n\r\n{ROW}\r\n{ROW.replace("s0", "s1").replace(",", ", ")}\r\n')
    assert frame['run'].tolist() == ['noise1-s0', 'noise1-s1'] and frame['background'].tolist() == [50, 50]
    assert frame['tvmonitor'].tolist() == [52, 52] and list(frame.columns) == ['run', *VOC_LABELS]


def test_scores_of_a_spreadsheet_with_decimal_commas(tmp_path):
    text = '\n'.join(line.replace(',', ';').replace('.', ',') for line in (HEADER, ROW))
    assert scores(tmp_path, text).equals(scores(tmp_path, f'{HEADER}\n{ROW}'))


def test_columns_in_any_order(tmp_path):
    header, row = HEADER.split(','), ROW.split(',')
    assert scores(tmp_path, ','.join(header[::-1]) + '\n' + ','.join(row[::-1])).equals(scores(tmp_path, f'{HEADER}\n{ROW}'))


def test_nothing_uploaded(tmp_path):
    frame = read_scores(tmp_path / 'none.csv', CLASSES)
    assert frame.empty and list(frame.columns) == ['run', *VOC_LABELS]
    assert scores(tmp_path, HEADER).empty


BAD = {'unknown class': (HEADER.replace('sofa', 'couch'), "line 1: unknown class 'couch'"),
       'missing class': (HEADER.replace(',sofa', ''), "line 1: no column 'sofa'"),
       'class twice': (f'{HEADER},sofa', "line 1: column 'sofa' stands there twice"),
       'bars': (HEADER.replace(',', '|'), 'line 1 must be run,background'), 'empty file': ('', "no column 'run'"),
       'no number': (f'{HEADER}\n{ROW.replace("50.3", "n/a")}', "line 2, bird: 'n/a' is no number"),
       'percent sign': (f'{HEADER}\n{ROW.replace("50.3", "50.3%")}', 'line 2, bird'),
       'nan': (f'{HEADER}\n{ROW.replace("50.3", "nan")}', 'line 2, bird: nan is not between'),
       'empty cell': (f'{HEADER}\n{ROW.replace("50.3", "")}', "line 2, bird: '' is no number"),
       'negative': (f'{HEADER}\n{ROW.replace("50.3", "-50.3")}', 'line 2, bird: -50.3 is not between 0 and 100'),
       'over 100': (f'{HEADER}\n{ROW.replace("50.3", "503")}', 'line 2, bird: 503 is not'),
       'fractions': (f'{HEADER}\nnoise1-s0' + 21 * ',0.5', 'line 2: no value is above 1; give percent'),
       'decimal comma': (f'{HEADER}\n{ROW.replace("50.3", "50,3")}', 'line 2: 23 values for 22 columns'),
       'run twice': (f'{HEADER}\n{ROW}\n\n{ROW}', 'line 4: noise1-s0 stands in line 2 already'),
       'no run': (f'{HEADER}\n{ROW.replace("noise1-s0", "")}', 'line 2: no name of a run'),
       'no text': (b'run,\xff\xfe\x00', 'not a CSV file in UTF-8')}


@pytest.mark.parametrize('text, message', BAD.values(), ids=BAD.keys())
def test_wrong_scores(tmp_path, text, message):
    with pytest.raises(DataError, match='test_scores_voc.csv') as caught:
        scores(tmp_path, text)
    assert message in str(caught.value) and '\n' not in str(caught.value)
