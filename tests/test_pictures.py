"""Photographs and masks as cameras, phones and drawing programs write them: read to the right values, or refused."""
import json
import struct
import subprocess
import sys
import unicodedata
import zlib
from xml.etree.ElementTree import parse

import numpy as np
import pytest
from PIL import ExifTags, Image

from bnrcam.crf import crf_folder, crf_labels
from bnrcam.data import DataError, VOCFolder, image_size, read_image, read_labels, read_mask, write_mask
from bnrcam.datasets.coco import CocoImage, convert_coco, read_annotations, read_coco
from bnrcam.datasets.voc import convert_sbd
from bnrcam.evaluate import evaluate_labels
from bnrcam.datasets.folder import folder_from_table, read_table
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


# all that Pillow writes: read to the right values, or refused

MODES = ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'F', 'I;16', 'I;16B', 'I;16L', 'RGBX', 'La', 'RGBa']
FORMATS = {'PNG': [{}, {'bits': 1}, {'bits': 2}, {'bits': 4}, {'transparency': 0}], 'JPEG': [{'quality': 95, 'subsampling': 0}, {'progressive': True, 'quality': 95}],
           'TIFF': [{}, {'compression': 'tiff_lzw'}, {'compression': 'tiff_adobe_deflate'}, {'big_tiff': True}], 'BMP': [{}], 'WEBP': [{'lossless': True}],
           'GIF': [{}], 'PPM': [{}], 'TGA': [{}], 'JPEG2000': [{}], 'ICO': [{}], 'PCX': [{}], 'DDS': [{}], 'SGI': [{}], 'MPO': [{}]}


def written(tmp_path):
    "(what was written, as Pillow has it in memory; its file) for each mode, format and option that Pillow takes."
    for mode in MODES:
        for kind, choices in FORMATS.items():
            for options in choices:
                if 'bits' in options and mode != 'P': continue  # of grey values Pillow writes the lowest bits
                picture, path = in_mode(mode), tmp_path / f'{mode.replace(";", "")}.{kind.lower()}'
                try: picture.save(path, kind, **options)
                except (OSError, KeyError, ValueError, TypeError, SystemError): continue
                yield picture, path, f'{mode} {kind} {options}'


def in_mode(mode):
    try: return Image.fromarray(photograph() % 3 * 40).convert(mode)
    except ValueError: return Image.new(mode, (40, 24), 1)


@pytest.mark.filterwarnings('ignore')
def test_photographs_in_every_form(tmp_path):
    taken = []
    for picture, path, form in written(tmp_path):
        try: image = np.array(read_image(path)).astype(int)
        except DataError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            continue
        taken.append(form)
        if 'bits' in form: picture = Image.open(path)  # fewer colours than there were
        assert np.abs(image - np.array(picture.convert('RGB'))).mean() < 12, form
    assert {'RGB JPEG', 'L JPEG', 'CMYK JPEG', 'RGB PNG', 'L PNG', 'RGB TIFF', 'RGB BMP', 'RGB WEBP'} <= {
        ' '.join(form.split()[:2]) for form in taken} and not any('transparency' in form for form in taken), taken


@pytest.mark.filterwarnings('ignore')
def test_masks_in_every_form(tmp_path):
    taken = []
    for picture, path, form in written(tmp_path):
        try: mask = read_mask(path, 200)
        except DataError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            continue
        taken.append(form)
        assert picture.mode in 'LP' and np.array_equal(mask, np.array(picture)), form
    assert taken and all(' PNG ' in form for form in taken)


def png(depth, colour, rows):
    chunk = lambda kind, content: struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    header = struct.pack('>IIBBBBB', 4, 2, depth, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b''.join(b'\0' + row for row in rows))) + chunk(b'IEND', b'')


@pytest.mark.parametrize('depth, row', [(1, b'\x50'), (2, b'\x1b'), (4, b'\x01\x23')])
def test_grey_masks_of_few_bits_are_not_multiplied(tmp_path, depth, row):
    (tmp_path / 'a.png').write_bytes(png(depth, 0, [row, row]))
    with pytest.raises(DataError, match='a.png: PNG of mode .* is no mask'):
        read_mask(tmp_path / 'a.png', 200)


@pytest.mark.parametrize('colour, channels', [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_photographs_of_16_bits(tmp_path, colour, channels):
    (tmp_path / 'a.png').write_bytes(png(16, colour, [b'\x0b\xb8' * 4 * channels] * 2))
    with pytest.raises(DataError, match='a.png: .*convert it to 8-bit RGB'):
        read_image(tmp_path / 'a.png')


def test_no_limit_of_pixels_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert read_image(save(tmp_path / 'a.png', photograph(), 1, 'PNG')).size == (40, 24)


def test_a_mask_that_went_through_quantize(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[:20] = 15
    Image.fromarray(voc_palette()[mask]).quantize(8).save(tmp_path / 'a.png')
    with pytest.raises(DataError, match="a.png: has VOC's colours in another order"):
        read_mask(tmp_path / 'a.png', 21)
    for palette in (voc_palette(), np.random.default_rng(0).integers(1, 255, (256, 3)).astype(np.uint8), np.repeat(np.arange(256)[:, None], 3, 1)):
        write_mask(tmp_path / 'a.png', mask, palette.astype(np.uint8))
        assert np.array_equal(read_mask(tmp_path / 'a.png', 21), mask)


@pytest.fixture
def cracks(tmp_path):
    "Three photographs with a crack, and their masks as most tools save them: 0 and 255."
    (tmp_path / 'photos').mkdir()
    for name in 'abc': save(tmp_path / f'photos/{name}.jpg', photograph(), 1)
    (tmp_path / 'labels.csv').write_text('file,labels\na.jpg,crack\nb.jpg,crack\nc.jpg,crack\n')
    root = folder_from_table(tmp_path / 'labels.csv', tmp_path / 'photos', tmp_path / 'voc', ['crack'])
    draw(root, 255)
    return root


def draw(root, value, names='abc'):
    mask = np.zeros((24, 40), np.uint8)
    mask[:12] = value
    for name in names: Image.fromarray(mask).save(root / f'SegmentationClass/{name}.png')


def test_masks_of_0_and_255(cracks):
    for read in (lambda data: data[0], lambda data: data.mask('b'), lambda data: evaluate_labels(data, cracks / 'SegmentationClass')):
        with pytest.raises(DataError, match="0 and 255 alone.*write 1 where 'crack' is"):
            read(VOCFolder(cracks, 'train', ['crack'], masks=True))
    draw(cracks, 1, 'b')  # and where one has a class, 255 means what it says
    assert set(np.unique(VOCFolder(cracks, 'train', ['crack'], masks=True).mask('a'))) == {0, 255}
    draw(cracks, 1)
    data, out = VOCFolder(cracks, 'train', ['crack'], masks=True), cracks / 'none'
    out.mkdir()
    for name in 'abc': write_mask(out / f'{name}.png', np.zeros((24, 40), np.uint8), voc_palette())
    assert evaluate_labels(data, out)['miou'] == pytest.approx(25)  # half of the background's 50 %, and no object


def test_a_header_larger_than_the_annotation(cracks):
    path, content = cracks / 'JPEGImages/a.jpg', (cracks / 'JPEGImages/a.jpg').read_bytes()
    path.unlink()
    path.write_bytes(content.replace(b'\x00\x18\x00\x28', b'\x08\x00\x08\x00', 1))
    with pytest.raises(DataError, match='a.jpg: 2048x2048, but its annotation says 40'):
        VOCFolder(cracks, 'train', ['crack'])[0]


@pytest.mark.parametrize('classes', [[0, 1], 'cat', [], [None], ['cat', ' '], ['a', 'a']])
def test_classes_that_are_no_names(cracks, classes):
    for call in (lambda: VOCFolder(cracks, 'train', classes),
                 lambda: folder_from_table(cracks.parent / 'labels.csv', cracks.parent / 'photos', cracks, classes)):
        with pytest.raises(DataError, match='classes|names'): call()


@pytest.mark.parametrize('disk, told', [('NFC', 'NFD'), ('NFD', 'NFC'), ('NFD', 'NFD')])
def test_names_in_two_unicode_forms(tmp_path, disk, told):
    disk, told = (unicodedata.normalize(form, 'bäume_é') for form in (disk, told))
    (tmp_path / 'photos').mkdir()
    save(tmp_path / f'photos/{disk}.jpg', photograph(), 1)
    (tmp_path / 'labels.csv').write_text(f'\ufefffile,labels\n{told}.jpg,{told}\n', encoding='utf-8')
    root = folder_from_table(tmp_path / 'labels.csv', tmp_path / 'photos', tmp_path / 'voc', [disk])
    assert VOCFolder(root, 'train', [told])[0]['labels'].tolist() == [1]
    for path in root.glob('*/*.*'): path.rename(path.with_name(f'{disk}{path.suffix}'))  # a folder made by hand
    (root / 'ImageSets/Segmentation/train.txt').write_text(f'\ufeff{told}\n', encoding='utf-8')
    item = VOCFolder(root, 'train', [disk])[0]
    assert item['name'] == unicodedata.normalize('NFC', told) and item['labels'].tolist() == [1]


def test_long_messages_fit_a_screen(tmp_path):
    (tmp_path / 'labels.csv').write_text('file,' + ','.join(f'c{i}' for i in range(100_000)) + '\na,1\n')
    (tmp_path / 'a.xml').write_text(f'<a><object><name>{"x" * 5_000_000}\n\x85</name></object></a>')
    for call in (lambda: read_table(tmp_path / 'labels.csv', tmp_path, ['cat']), lambda: read_labels(tmp_path / 'a.xml', ['cat'])):
        with pytest.raises(DataError, match=str(tmp_path)) as error: call()
        assert len(str(error.value)) <= 600 and str(error.value).isprintable()


def test_a_picture_of_pillow_for_the_crf():
    labels = np.zeros((24, 40), np.uint8)
    labels.flags.writeable = False
    assert crf_labels(np.asarray(Image.fromarray(photograph())), labels, 3).shape == (24, 40)


# COCO's annotations, and scripts

def coco_file(path, name='bê.jpg', category='café', height=24, spoil=lambda content: content):
    content = {'images': [{'id': 1, 'file_name': name, 'height': height, 'width': 40}],
               'annotations': [{'id': 7, 'image_id': 1, 'category_id': 3, 'iscrowd': 0, 'segmentation': [[1, 1, 5, 1, 5, 4]]}],
               'categories': [{'id': 3, 'name': category}]}
    path.write_bytes(spoil(json.dumps(content, ensure_ascii=False).encode()))
    return path


@pytest.mark.parametrize('category', ['café', unicodedata.normalize('NFD', 'café'), '猫'])
def test_coco_in_utf_8(tmp_path, category):
    indices, (image,) = read_coco(coco_file(tmp_path / 'coco.json', category=category), [unicodedata.normalize('NFC', category)])
    assert indices == {3: 1} and image.name == 'bê' and read_annotations(tmp_path / 'coco.json', image)[0]['id'] == 7


@pytest.mark.parametrize('height', [6.0, '6', 0, None, [6]])
def test_coco_sizes_that_are_none(tmp_path, height):
    with pytest.raises(DataError, match='coco.json: bê.jpg: height .* whole numbers'):
        read_coco(coco_file(tmp_path / 'coco.json', height=height), ['café'])


def test_coco_with_a_damaged_byte(tmp_path):
    path = coco_file(tmp_path / 'coco.json', spoil=lambda content: content.replace(b'"iscrowd"', b'"iscr\xffwd"'))
    indices, (image,) = read_coco(path, ['café'])
    with pytest.raises(DataError, match='coco.json: bê: an annotation is not JSON in UTF-8'):
        read_annotations(path, image)
    for part in ('café', 'bê'):
        coco_file(path, spoil=lambda content: content.replace(part.encode(), part.encode('latin-1')))
        with pytest.raises(DataError, match='coco.json'):
            read_coco(path, ['café'])


def test_a_script_without_a_main_guard(cracks):
    draw(cracks, 1)
    script = cracks / 'script.py'
    script.write_text('from bnrcam.crf import crf_folder\n'
                      f'crf_folder({str(cracks / "JPEGImages")!r}, {str(cracks / "SegmentationClass")!r}, {str(cracks / "crf")!r}, 2, workers=2)\n')
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    said = [line for line in result.stderr.splitlines() if not line.startswith((' ', 'Traceback'))]
    assert result.returncode == 1 and "if __name__ == '__main__':" in said[-1] and result.stderr.count('Traceback') == 1, result.stderr
