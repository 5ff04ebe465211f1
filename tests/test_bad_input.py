"""Bad input stops with one clear line that names the file and the way out, and leaves no half-made product."""
import pickle
import shutil

import struct

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from bnrcam.engine.weights import WeightsError, load_weights
from bnrcam.data import DataError, VOCFolder, read_image
from bnrcam.evaluate import evaluate_seeds
from bnrcam.models import create_classifier
from bnrcam.scenes import SCENE_CLASSES
from bnrcam.cams import infer_cams
from bnrcam.train import TrainingError, train_classifier
from bnrcam.datasets.transforms import train_transform

SCALES = (64,)


def one_line(error, *words):
    message = str(error.value)
    assert '\n' not in message
    for word in words:
        assert str(word) in message
    return message


def first(folder, kind, ending): return folder / kind / f'train_00000.{ending}'


def test_missing_folder(tmp_path):
    with pytest.raises(DataError) as error:
        VOCFolder(tmp_path / 'nowhere', 'train', SCENE_CLASSES)
    one_line(error, tmp_path / 'nowhere', 'JPEGImages')


@pytest.mark.parametrize('classes', ['cat', [0, 1], [], ['cat', 'cat'], ['cat', ' ']])
def test_classes_that_are_no_list_of_names(folder, classes):
    with pytest.raises(DataError, match="classes .*give a list of names|names must differ") as error:
        VOCFolder(folder, 'train', classes)
    one_line(error)


def test_a_header_that_says_more_pixels_than_there_are(folder):
    "The rest would be grey, as a torn download is."
    path = first(folder, 'JPEGImages', 'jpg')
    width, height = Image.open(path).size
    path.write_bytes(path.read_bytes().replace(struct.pack('>HH', height, width), struct.pack('>HH', 9000, 9000), 1))
    with pytest.raises(DataError) as error:
        VOCFolder(folder, 'train', SCENE_CLASSES)[0]
    one_line(error, path)


def test_missing_split(folder):
    with pytest.raises(DataError) as error:
        VOCFolder(folder, 'test', SCENE_CLASSES)
    one_line(error, 'test.txt')


def test_empty_split(folder):
    (folder / 'ImageSets/Segmentation/train.txt').write_text('\n')
    with pytest.raises(DataError) as error:
        VOCFolder(folder, 'train', SCENE_CLASSES)
    one_line(error, 'train.txt', 'empty')


def test_name_listed_twice(folder):
    (folder / 'ImageSets/Segmentation/train.txt').write_text('train_00000\ntrain_00000\n')
    with pytest.raises(DataError) as error:
        VOCFolder(folder, 'train', SCENE_CLASSES)
    one_line(error, 'train_00000', '2 times')


@pytest.mark.parametrize('kind, ending', [('JPEGImages', 'jpg'), ('Annotations', 'xml'), ('SegmentationClass', 'png')])
def test_missing_file(folder, kind, ending):
    first(folder, kind, ending).unlink()
    with pytest.raises(DataError) as error:
        VOCFolder(folder, 'train', SCENE_CLASSES, masks=True)
    one_line(error, first(folder, kind, ending))


def test_masks_are_not_asked_for_in_training(folder):
    shutil.rmtree(folder / 'SegmentationClass')
    assert len(VOCFolder(folder, 'train', SCENE_CLASSES)) == 8


def test_unknown_class(folder):
    path = first(folder, 'Annotations', 'xml')
    path.write_text('<annotation><object><name>zebra</name></object></annotation>')
    with pytest.raises(DataError) as error:
        VOCFolder(folder, 'train', SCENE_CLASSES)
    one_line(error, path, 'zebra', 'apple')


@pytest.mark.parametrize('text', ['', '<annotation><object>', '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'])
def test_broken_or_hostile_xml(folder, text):
    path = first(folder, 'Annotations', 'xml')
    path.write_text(text)
    with pytest.raises(DataError) as error:
        VOCFolder(folder, 'train', SCENE_CLASSES)
    one_line(error, path)


def test_mask_value_out_of_range(folder):
    path = first(folder, 'SegmentationClass', 'png')
    mask = np.array(Image.open(path))
    mask[0, 0] = 7
    Image.fromarray(mask).save(path)
    with pytest.raises(DataError) as error:
        VOCFolder(folder, 'train', SCENE_CLASSES, masks=True)[0]
    one_line(error, path, 'value 7', '255')


def test_mask_of_another_size(folder):
    path = first(folder, 'SegmentationClass', 'png')
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(path)
    with pytest.raises(DataError) as error:
        VOCFolder(folder, 'train', SCENE_CLASSES, masks=True)[0]
    one_line(error, path, '6x5')


def test_colour_mask(folder):
    path = first(folder, 'SegmentationClass', 'png')
    Image.open(path).convert('RGB').save(path)
    with pytest.raises(DataError) as error:
        VOCFolder(folder, 'train', SCENE_CLASSES, masks=True)[0]
    one_line(error, path, 'RGB')


@pytest.mark.parametrize('kind, ending', [('JPEGImages', 'jpg'), ('SegmentationClass', 'png')])
@pytest.mark.parametrize('share', [0, .02, .6])
def test_truncated_picture(folder, kind, ending, share):
    path = first(folder, kind, ending)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(DataError) as error:
        data = VOCFolder(folder, 'train', SCENE_CLASSES, masks=True)
        data[0], data.mask('train_00000')
    one_line(error, path)


@pytest.mark.parametrize('mode', ['L', 'CMYK'])
def test_grey_and_cmyk_become_rgb(folder, mode):
    path = first(folder, 'JPEGImages', 'jpg')
    Image.open(path).convert(mode).save(path)
    assert VOCFolder(folder, 'train', SCENE_CLASSES)[0]['image'].shape[0] == 3


@pytest.mark.parametrize('mode', ['I;16', 'RGBA'])
def test_deep_and_transparent_images_are_refused(tmp_path, mode):
    path = tmp_path / 'odd.png'
    pixels = np.zeros((4, 4), np.uint16) if mode == 'I;16' else np.zeros((4, 4, 4), np.uint8)
    Image.fromarray(pixels).save(path)
    with pytest.raises(DataError) as error:
        read_image(path)
    one_line(error, path, mode, '8-bit RGB')


@pytest.mark.parametrize('mode', ['RGBA', 'P', 'LA'])
def test_opaque_images_of_other_modes_are_converted(folder, tmp_path, mode):
    image = Image.open(first(folder, 'JPEGImages', 'jpg')).convert('RGB')
    image = image.quantize(64) if mode == 'P' else image.convert(mode)
    image.save(tmp_path / 'a.png')
    assert (np.array(read_image(tmp_path / 'a.png')) == np.array(image.convert('RGB'))).all()
    image.save(tmp_path / 'b.png', transparency=int(np.array(image).max())) if mode == 'P' else image.putalpha(200)
    if mode != 'P': image.save(tmp_path / 'b.png')
    with pytest.raises(DataError) as error:
        read_image(tmp_path / 'b.png')
    one_line(error, tmp_path / 'b.png', 'transparent')


def test_image_smaller_than_the_crop(folder):
    path = first(folder, 'JPEGImages', 'jpg')
    Image.new('RGB', (1, 1), 'red').save(path)
    item = VOCFolder(folder, 'train', SCENE_CLASSES, train_transform((8, 8), 96))[0]
    assert item['image'].shape == (3, 96, 96)
    assert (item['image'] == 0).all(0).sum() == 96 * 96 - 64  # 8 x 8 of the image, the rest padding


def test_fewer_images_than_a_batch(folder, net, tmp_path):
    data = VOCFolder(folder, 'train', SCENE_CLASSES, train_transform((64, 80), 64))
    with pytest.raises(TrainingError) as error:
        train_classifier(net, data, 'noise1', tmp_path / 'run', epochs=1, lr=1e-4, batch_size=9, seed=0)
    one_line(error, 'batch of 9')
    assert not (tmp_path / 'run').exists()


def test_loss_not_finite(folder, net, tmp_path):
    data = VOCFolder(folder, 'train', SCENE_CLASSES, train_transform((64, 80), 64))
    net.cls_token.data.fill_(torch.nan)
    with pytest.raises(TrainingError) as error:
        train_classifier(net, data, 'noise1', tmp_path / 'run', epochs=1, lr=1e-4, batch_size=8, seed=0)
    one_line(error, 'nan', 'epoch 1, batch 1', 'learning rate')
    assert not (tmp_path / 'run/model.safetensors').exists()


def test_damaged_checkpoint_is_not_taken_up(folder, net, tmp_path, capsys):
    data = VOCFolder(folder, 'train', SCENE_CLASSES, train_transform((64, 80), 64))
    (tmp_path / 'checkpoint.safetensors').write_bytes(b'half a file')
    history = train_classifier(net, data, 'baseline', tmp_path, epochs=1, lr=1e-4, batch_size=8, seed=0)
    assert len(history) == 1 and 'damaged' in capsys.readouterr().out


def save(net, path):
    torch.save({'model': net.state_dict()}, path)
    return path


def test_weights_of_another_network(net, tmp_path):
    path = save(create_classifier('conformer_tiny_patch16', 7), tmp_path / 'tiny.pth')
    before = net.conv1.weight.clone()
    with pytest.raises(WeightsError) as error:
        load_weights(net, path)
    one_line(error, path, 'another network')
    assert torch.equal(net.conv1.weight, before)


def test_published_form_loads_and_says_what_it_left_out(net, tmp_path):
    path = save(timm.create_model('conformer_mini_patch16', num_classes=1000), tmp_path / 'imagenet.pth')
    assert load_weights(net, path) == [f'{head}.{part}' for head in ('conv_cls_head', 'trans_cls_head')
                                       for part in ('bias', 'weight')]


class Bomb:
    def __reduce__(self): return open, ('pwned', 'w')


@pytest.mark.parametrize('write', [lambda path: torch.save({'model': Bomb()}, path),
                                   lambda path: path.write_bytes(pickle.dumps({'model': Bomb()}))])
def test_weights_that_run_code(net, tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(path := tmp_path / 'bomb.pth')
    with pytest.raises(WeightsError) as error:
        load_weights(net, path)
    one_line(error, path)
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('name, content', [('a.pth', b''), ('a.pth', b'rubbish'), ('a.safetensors', b'rubbish')])
def test_damaged_weights(net, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError) as error:
        load_weights(net, tmp_path / name)
    one_line(error, tmp_path / name)


def test_missing_weights(net, tmp_path):
    with pytest.raises(WeightsError) as error:
        load_weights(net, tmp_path / 'none.pth')
    one_line(error, 'none.pth')


def test_weights_that_are_not_finite(net, tmp_path):
    other = create_classifier('conformer_mini_patch16', 7)
    other.conv1.weight.data[0] = torch.inf
    with pytest.raises(WeightsError) as error:
        load_weights(net, save(other, tmp_path / 'inf.pth'))
    one_line(error, 'conv1.weight')


def test_missing_cams(folder, net, tmp_path):
    data = VOCFolder(folder, 'train', SCENE_CLASSES, masks=True)
    store = infer_cams(net, VOCFolder(folder, 'train', SCENE_CLASSES), tmp_path / 'cams', scales=SCALES)
    (store / 'train_00003.safetensors').unlink()
    with pytest.raises(DataError) as error:
        evaluate_seeds(data, store)
    one_line(error, 'train_00003', 'cams stage')


def test_image_without_labels(folder, net, tmp_path):
    first(folder, 'Annotations', 'xml').write_text('<annotation></annotation>')
    store = infer_cams(net, VOCFolder(folder, 'train', SCENE_CLASSES), tmp_path / 'cams', scales=SCALES)
    scores = evaluate_seeds(VOCFolder(folder, 'train', SCENE_CLASSES, masks=True), store)
    assert scores['images'] == 8


def test_network_that_diverged(folder, net, tmp_path):
    net.conv_cls_head.weight.data.mul_(1e12)
    with pytest.raises(DataError) as error:
        infer_cams(net, VOCFolder(folder, 'train', SCENE_CLASSES), tmp_path / 'cams', scales=SCALES)
    one_line(error, 'not finite')
    assert not list((tmp_path / 'cams').glob('*.safetensors'))
