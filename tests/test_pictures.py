"""Photographs and masks as cameras, phones and drawing programs write them: read to the right values, or refused."""
from xml.etree.ElementTree import parse

import numpy as np
import pytest
from PIL import ExifTags, Image

from bnrcam.crf import crf_folder, crf_labels
from bnrcam.data import DataError, VOCFolder, image_size, read_image, read_mask, write_mask
from bnrcam.datasets import CocoImage, convert_coco, convert_sbd
from bnrcam.folder import folder_from_table
from bnrcam.scenes import voc_palette
from miniature import sbd_mat

# the note beside the pixels (EXIF 2.32, 4.6.4): what has to be done to the stored array (H, W) to see it upright
UPRIGHT = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
           5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
           8: np.rot90}
LOSSLESS = {'PNG': {}, 'WEBP': {'lossless': True, 'exact': True}, 'TIFF': {}}


def photograph(width=40, height=24):
    "Pixels (H, W, 3) uint8 that are smooth and equal to none of their turns."
    y, x = np.mgrid[:height, :width]
    return np.stack([5 * x, 9 * y, 3 * (x + y)], -1).astype(np.uint8)


def note(number):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    exif[ExifTags.Base.Make] = 'a phone'
    return exif


def save(path, pixels, number, kind='JPEG', **options):
    Image.fromarray(pixels).save(path, kind, exif=note(number), **options)
    return path


@pytest.mark.parametrize('kind', LOSSLESS)
@pytest.mark.parametrize('number', UPRIGHT)
def test_turned_photographs_are_upright(tmp_path, number, kind):
    path, right = save(tmp_path / 'a', photograph(), number, kind, **LOSSLESS[kind]), UPRIGHT[number](photograph())
    image = read_image(path)
    assert np.array_equal(image, right) and image_size(path) == image.size == right.shape[1::-1]
    assert not image.getexif().get(ExifTags.Base.Orientation, 1) > 1  # or the next reader would turn it again


@pytest.mark.parametrize('number', UPRIGHT)
def test_turned_jpegs_are_upright(tmp_path, number):
    path = save(tmp_path / 'a.jpg', photograph(), number, quality=95, subsampling=0)
    right = UPRIGHT[number](photograph()).astype(int)
    assert image_size(path) == right.shape[1::-1] and np.abs(read_image(path) - right).mean() < 3
    grey = save(tmp_path / 'grey.jpg', photograph()[..., 0], number)
    assert read_image(grey).size == image_size(grey) == right.shape[1::-1]


def test_a_note_as_other_programs_write_it(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(photograph()).save(tmp_path / 'a.jpg', xmp=xmp, quality=95)
    assert read_image(tmp_path / 'a.jpg').size == image_size(tmp_path / 'a.jpg') == (24, 40)


@pytest.mark.parametrize('spoil', [lambda exif: exif[:20], lambda exif: exif[:6] + b'\xff' * 40, lambda exif: b'Exif\0\0',
                                   lambda exif: exif.replace(b'\x12\x01\x03\0', b'\x12\x01\x02\0'),
                                   lambda exif: exif[:-4]])
def test_a_damaged_note_does_not_cost_the_photograph(tmp_path, spoil):
    exif = b'Exif\0\0' + note(1).tobytes().removeprefix(b'Exif\0\0')
    Image.fromarray(photograph()).save(tmp_path / 'a.jpg', exif=spoil(exif), quality=95)
    assert read_image(tmp_path / 'a.jpg').size == image_size(tmp_path / 'a.jpg') == (40, 24)


@pytest.mark.parametrize('number', [0, 9, 255, 65535])
def test_a_note_that_means_nothing(tmp_path, number):
    assert read_image(save(tmp_path / 'a.png', photograph(), number, 'PNG')).size == (40, 24)


@pytest.fixture
def phone(tmp_path):
    "A folder in VOC layout of one photograph, stored on its side, and the mask that was drawn on it upright."
    (tmp_path / 'photos').mkdir()
    save(tmp_path / 'photos/a.jpg', photograph(), 6, quality=95)
    (tmp_path / 'labels.csv').write_text('file,labels\na.jpg,cat\n')
    root = folder_from_table(tmp_path / 'labels.csv', tmp_path / 'photos', tmp_path / 'voc', ['cat'])
    mask = np.zeros((40, 24), np.uint8)
    mask[:9, :5] = 1
    write_mask(root / 'SegmentationClass/a.png', mask, voc_palette())
    return root


def test_a_folder_of_phone_photographs(phone):
    item = VOCFolder(phone, 'train', ['cat'], masks=True)[0]
    assert item['image'].shape == (3, 40, 24) and item['mask'].shape == (40, 24) and item['mask'][:9, :5].all()
    size = parse(phone / 'Annotations/a.xml').getroot().find('size')
    assert (size.findtext('width'), size.findtext('height')) == ('24', '40')
    assert (phone / 'JPEGImages/a.jpg').samefile(phone.parent / 'photos/a.jpg')


def test_the_crf_of_a_phone_photograph(phone, tmp_path):
    crf_folder(phone / 'JPEGImages', phone / 'SegmentationClass', tmp_path / 'crf', 2, workers=1)
    mask = read_mask(phone / 'SegmentationClass/a.png', 2)
    right = crf_labels(np.array(read_image(phone / 'JPEGImages/a.jpg')), mask, 2)
    assert np.array_equal(read_mask(tmp_path / 'crf/a.png', 2), right)


def test_a_mask_drawn_on_its_side_is_refused_with_the_reason(phone):
    write_mask(phone / 'SegmentationClass/a.png', np.zeros((24, 40), np.uint8), voc_palette())
    with pytest.raises(DataError, match='40x24, its image 24x40, as every viewer shows it: draw the mask on the upright'):
        VOCFolder(phone, 'train', ['cat'], masks=True)[0]


def test_a_turned_mask_is_upright(tmp_path):
    mask = photograph()[..., 0] % 3
    save(tmp_path / 'a.png', mask, 6, 'PNG')
    assert np.array_equal(read_mask(tmp_path / 'a.png', 3, (24, 40)), np.rot90(mask, -1))


def test_sizes_in_datasets_are_those_of_the_upright_picture(phone, tmp_path):
    (tmp_path / 'a.mat').write_bytes(sbd_mat(np.ones((40, 24), np.uint8)))
    convert_sbd(tmp_path, phone, 'a')
    assert read_mask(phone / 'SegmentationClass/a.png', 2, (24, 40)).all()
    (tmp_path / 'coco.json').write_text('')
    convert_coco(tmp_path / 'coco.json', phone / 'JPEGImages', phone, {}, CocoImage('a', 40, 24, []))
    for height, width in ((24, 40), (40, 25)):
        with pytest.raises(DataError, match='24x40'):
            convert_coco(tmp_path / 'coco.json', phone / 'JPEGImages', phone, {}, CocoImage('a', height, width, []))
