"""A folder of images and a CSV of labels: what is refused, and that nothing is left of it."""
import subprocess
import sys

import pytest
from PIL import Image

from bnrcam.data import DataError, VOCFolder
from bnrcam.datasets.folder import FROM_NPY, folder_from_table
from bnrcam.scenes import SCENE_CLASSES

CLASSES = ('cat', 'dog')


@pytest.fixture
def photos(tmp_path):
    (tmp_path / 'photos').mkdir()
    for name in ('a.jpg', 'b.jpg', 'c.png'):
        Image.new('RGB', (40, 30), (200, 100, 50)).save(tmp_path / 'photos' / name)
    Image.new('RGBA', (40, 30)).save(tmp_path / 'photos' / 'clear.png')
    Image.new('RGB', (40, 30)).save(tmp_path / 'photos' / 'a.png')
    (tmp_path / 'photos' / 'text.jpg').write_text('no image')
    return tmp_path / 'photos'


def convert(photos, text, split='train'):
    table = photos.parent / 'labels.csv'
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder_from_table(table, photos, photos.parent / 'voc', CLASSES, split)


@pytest.mark.parametrize('text', [
    'file,labels\na.jpg,dog\nb.jpg,dog;cat\nc.png, cat ;\n', 'file,dog,cat\na.jpg,1,0\nb.jpg,1,1\nc.png,0,1\n',
    '\ufefffile,labels\r\na.jpg,dog\r\n\r\n"b.jpg","cat;dog"\r\nc.png,cat\r\n',
    # where a decimal comma is the custom, and what a copied range has
    '\ufefffile;labels\r\na.jpg;dog\r\nb.jpg;"cat;dog"\r\nc.png;cat\r\n', 'file;labels\na.jpg;dog\nb.jpg;cat;dog\nc.png;cat;\n',
    '"file";"labels"\n"a.jpg";"dog"\n"b.jpg"; "dog;cat"\n"c.png";"cat"\n', 'file;dog;cat\na.jpg;1;0\nb.jpg;1;1\nc.png;0;1\n',
    'file,label\na.jpg,dog\nb.jpg,cat\nb.jpg,dog\nc.png,cat\n', 'file\tlabels\na.jpg\tdog\nb.jpg\tdog; cat\nc.png\tcat\n', 'file\tcat\tdog\ra.jpg\t0\t1\rb.jpg\t1\t1\rc.png\t1\t0\r'])
def test_both_forms_and_a_spreadsheets_habits(photos, text):
    data = VOCFolder(convert(photos, text), 'train', CLASSES)
    assert data.names == ['a', 'b', 'c'] and data.labels.tolist() == [[0, 1], [1, 1], [1, 0]]
    assert [tuple(item['image'].shape) for item in data] == [(3, 30, 40)] * 3
    assert Image.open(data.image_path('c')).format == 'JPEG' and data.image_path('a').samefile(photos / 'a.jpg')


@pytest.mark.parametrize('text, words', [
    ('file,labels\na.jpg,dog\nz.jpg,cat\n', ['line 3', 'z.jpg', 'no such image']),
    ('file,labels\na.jpg,dog\nb.jpg,cat\na.jpg,cat\n', ['line 4', 'line 2']),
    ('file,labels\na.jpg,dog\na.png,cat\n', ['line 3', 'line 2']),
    ('file,labels\na.jpg,Dog\n', ['line 2', "'Dog'", 'cat, dog']),
    ('file,labels\na.jpg,dog\nb.jpg,\n', ['line 3', 'no label']),
    ('file,cat,dog\na.jpg,0,0\n', ['line 2', 'no label']),
    ('file,cat,dog\na.jpg,0,yes\n', ['line 2', "'yes'"]),
    ('file,cat\na.jpg,1\n', ['dog']),
    ('file,cat,dog,cow\na.jpg,1,0,0\n', ['cow']),
    ('file,cat,dog,dog\na.jpg,1,0,0\n', ['twice']),
    ('name,labels\na.jpg,cat\n', ['file,labels']),
    ('name;labels\na.jpg;cat\n', ['file,labels']),
    ('file;labels\na.jpg;cat,dog\n', ['line 2', "'cat,dog'", "with ';' between"]),
    ('file;labels\na.jpg\n', ['line 2', 'no label']),
    ('file;cat;dog\na.jpg;1,0\n', ['line 2', '2 fields', "';' between"]),
    ('file|labels\na.jpg|cat\n', ['file,labels']),
    ('file,labels\na.jpg,cat,dog\n', ['line 2', '3 fields']),
    ('file,labels\n../photos/a.jpg,cat\n', ['line 2', 'one folder or below']),
    ('file,labels\n/etc/passwd,cat\n', ['line 2', 'one folder or below']),
    ('file,labels\nclear.png,cat\n', ['line 2', 'RGBA']),
    ('file,labels\ntext.jpg,cat\n', ['line 2', 'damaged']),
    ('file,labels\n', ['no rows']),
    ('', ['no rows']),
    ('file,labels\na.jpg,"cat\n', ['not a CSV file']),
    (b'file,labels\na.jpg,caf\xe9\n', ['UTF-8'])])
def test_refused_in_one_line_with_nothing_written(photos, text, words):
    with pytest.raises(DataError) as error:
        convert(photos, text)
    message = str(error.value)
    assert '\n' not in message and 'labels.csv' in message and all(word in message for word in words), message
    assert not (photos.parent / 'voc').exists()


def test_second_tables_add_and_never_overwrite(photos):
    root = convert(photos, 'file,labels\na.jpg,dog\n')
    convert(photos, 'file,labels\na.jpg,dog\n')
    convert(photos, 'file,labels\na.jpg,dog\nc.png,cat\n', 'more')
    convert(photos, 'file,labels\na.jpg,dog\nc.png,cat\n', 'more')
    assert VOCFolder(root, 'more', CLASSES).names == ['a', 'c'] and VOCFolder(root, 'train', CLASSES).names == ['a']
    for text, split in (('file,labels\nb.jpg,dog\n', 'train'), ('file,labels\na.jpg,cat\n', 'other'),
                        ('file,labels\na.png,dog\n', 'other'), ('file,labels\na.jpg,dog\n', '../x')):
        with pytest.raises(DataError):
            convert(photos, text, split)
    assert VOCFolder(root, 'train', CLASSES).labels.tolist() == [[0, 1]]
    assert sorted(path.name for path in (root / 'ImageSets/Segmentation').iterdir()) == ['more.txt', 'train.txt']


def test_names_as_people_have_them(tmp_path, capsys):
    "In sub-folders, with blanks, brackets and accents, in any ending; what the table leaves out is said."
    photos = tmp_path / 'my photos'
    for i, name in enumerate(('Été (3).JPG', 'trip/cat [1].jpeg', 'trip/day 2/dog.webp', 'trip/left out.png')):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (40, 30), (20 * i, 100, 50)).save(photos / name)
    (tmp_path / 'labels.csv').write_text('file,labels\nÉté (3).JPG,cat\ntrip/cat [1].jpeg,cat\ntrip/day 2/dog.webp,dog\n')
    root = folder_from_table(tmp_path / 'labels.csv', photos, tmp_path / 'voc', CLASSES)
    data = VOCFolder(root, 'train', CLASSES)
    assert data.names == ['Été (3)', 'trip_cat [1]', 'trip_day 2_dog'] and data.labels.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert [int(item['image'][0, 0, 0]) // 10 for item in data] == [0, 2, 4]
    assert '1 pictures in' in (said := capsys.readouterr().out) and 'left out.png' in said


@pytest.mark.parametrize('ending', ['JPG', 'jpeg', 'png', 'WEBP'])
def test_photographs_of_other_endings(folder, ending):
    "In a folder that has the layout already."
    jpg = folder / 'JPEGImages/train_00000.jpg'
    before = VOCFolder(folder, 'train', SCENE_CLASSES)[0]['image']
    Image.open(jpg).save(jpg.with_suffix(f'.{ending}'), **({'quality': 98, 'subsampling': 0} if ending in ('JPG', 'jpeg') else {'lossless': True}))
    with pytest.raises(DataError, match='has the same name') as error:
        VOCFolder(folder, 'train', SCENE_CLASSES)
    assert 'train_00000' in str(error.value)
    jpg.unlink()
    data = VOCFolder(folder, 'train', SCENE_CLASSES)
    assert data.image_path('train_00000').suffix == f'.{ending}'
    assert (data[0]['image'].float() - before.float()).abs().mean() < (4 if ending in ('JPG', 'jpeg') else 1e-6)


@pytest.mark.parametrize('form', ['/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png', 'JPEGImages/{0}.jpg SegmentationClassAug/{0}.png',
                                  '/JPEGImages/{0}.jpg'])
def test_lists_of_paths(folder, form):
    "As TransCAM, PSA and IRN ship them; the masks lie where the list says."
    names = VOCFolder(folder, 'train', SCENE_CLASSES).names
    split = folder / 'ImageSets/Segmentation/train.txt'
    split.write_text(''.join(f'{form.format(name)}\n' for name in names))
    if 'Aug' in form:
        (folder / 'SegmentationClass').rename(folder / 'SegmentationClassAug')
    data = VOCFolder(folder, 'train', SCENE_CLASSES, masks=True)
    assert data.names == names and len(data[0]['mask'])
    split.write_text(f'/JPEGImages/{names[0]}.jpg /SegmentationClass/{names[0]}.png\n/JPEGImages/{names[1]}.jpg /SegmentationClassAug/{names[1]}.png\n')
    with pytest.raises(DataError, match='SegmentationClass and SegmentationClassAug'):
        VOCFolder(folder, 'train', SCENE_CLASSES)


def test_labels_as_a_pickle(photos, tmp_path):
    "cls_labels.npy of those repositories may run code: the line says how to make a table of it, and this works."
    import numpy as np
    np.save(tmp_path / 'cls_labels.npy', {'a': np.array([0., 1.]), 'b': np.array([1., 1.])}, allow_pickle=True)
    with pytest.raises(DataError, match='may run code') as error:
        folder_from_table(tmp_path / 'cls_labels.npy', photos, tmp_path / 'voc', CLASSES)
    assert FROM_NPY.split('"')[1][:40] in str(error.value)
    command = FROM_NPY.replace('python', sys.executable).replace('CLASS ...', ' '.join(CLASSES))
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    data = VOCFolder(folder_from_table(tmp_path / 'labels.csv', photos, tmp_path / 'voc', CLASSES), 'train', CLASSES)
    assert data.names == ['a', 'b'] and data.labels.tolist() == [[0, 1], [1, 1]]
