"""The embedded dataset: same seed, same bytes; VOC layout; whole or not at all."""
import hashlib
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from bnrcam import scenes
from bnrcam.scenes import SCENE_CLASSES, make_scene, scene_rng, voc_palette, write_scenes

SIZES = {'train': 12, 'val': 5}


def digests(root):
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(root.rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('data') / 'deep' / 'scenes', SIZES, seed=3)


def names(root, split):
    return (root / f'ImageSets/Segmentation/{split}.txt').read_text().split()


def test_same_seed_same_bytes(root, tmp_path):
    assert digests(write_scenes(tmp_path / 'again', SIZES, seed=3)) == digests(root)


def test_another_seed_other_pictures(root, tmp_path):
    ours, other = digests(root), digests(write_scenes(tmp_path / 'other', SIZES, seed=4))
    assert ours.keys() == other.keys()
    assert all(ours[f] != other[f] for f in ours if f.endswith(('.jpg', '.png')))


def test_more_images_or_splits_do_not_change_earlier_ones(root, tmp_path):
    bigger = digests(write_scenes(tmp_path / 'bigger', {'pretrain': 2, 'val': 7, 'train': 14}, seed=3))
    shared = [f for f in digests(root) if f.endswith(('.jpg', '.png', '.xml'))]
    assert len(shared) == 3 * 17 and all(bigger[f] == digests(root)[f] for f in shared)


def test_splits_share_no_picture(root):
    pictures = [d for f, d in digests(root).items() if f.endswith('.jpg')]
    assert len(set(pictures)) == len(pictures) == 17


def test_layout(root):
    stems = [name for split in SIZES for name in names(root, split)]
    assert len(stems) == len(set(stems)) == 17
    for folder, ext in (('JPEGImages', 'jpg'), ('SegmentationClass', 'png'), ('Annotations', 'xml')):
        assert sorted(p.name for p in (root / folder).iterdir()) == sorted(f'{s}.{ext}' for s in stems)
    assert json.loads((root / 'scenes.json').read_text())['sizes'] == SIZES


def test_masks_images_and_xml_agree(root):
    for name in names(root, 'train') + names(root, 'val'):
        image, mask = Image.open(root / f'JPEGImages/{name}.jpg'), Image.open(root / f'SegmentationClass/{name}.png')
        assert image.mode == 'RGB' and mask.mode == 'P' and image.size == mask.size
        assert 96 <= min(image.size) and max(image.size) <= 128
        values = set(np.unique(np.asarray(mask)).tolist())
        assert {0, 255} < values and values <= {*range(len(SCENE_CLASSES) + 1), 255}
        assert (np.asarray(mask.convert('RGB')) == voc_palette()[np.asarray(mask)]).all()
        tree = ET.parse(root / f'Annotations/{name}.xml')
        listed = [e.text for e in tree.findall('object/name')]
        assert sorted(SCENE_CLASSES.index(n) + 1 for n in listed) == sorted(values - {0, 255})
        assert tree.findtext('filename') == f'{name}.jpg'
        assert (int(tree.findtext('size/width')), int(tree.findtext('size/height'))) == image.size


def test_every_object_stays_visible_and_the_band_is_thin():
    for i in range(100):
        s = make_scene(scene_rng(0, 'train', i))
        assert 1 <= len(s.labels) <= s.num_objects <= 3
        assert min((s.mask == c).sum() for c in s.labels) > 100
        assert (s.mask == 255).mean() < .15 and s.mask.shape == s.image.shape[:2] == s.context.shape


def test_palette_is_the_voc_one():
    palette = voc_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8 and len({tuple(c) for c in palette.tolist()}) == 256
    # as published: aeroplane, tvmonitor, void
    assert palette[[1, 20, 255]].tolist() == [[128, 0, 0], [0, 64, 128], [224, 224, 192]]


def test_second_call_writes_nothing(root, monkeypatch):
    monkeypatch.setattr(scenes, 'make_scene', lambda rng: pytest.fail('made a scene again'))
    assert write_scenes(str(root), dict(reversed(SIZES.items())), seed=3) == root


@pytest.mark.parametrize('request_', [dict(sizes=SIZES, seed=4), dict(sizes={'train': 12}, seed=3), dict(seed=3)])
def test_another_request_is_refused(root, request_):
    before = digests(root)
    with pytest.raises(ValueError, match='delete the folder, or name another') as error:
        write_scenes(root, **request_)
    assert str(root) in str(error.value) and '\n' not in str(error.value) and digests(root) == before


@pytest.mark.parametrize('stamp', [None, '{"seed": 0', '[]', 'é'.encode('latin1')])
def test_a_foreign_or_broken_folder_is_refused_and_kept(tmp_path, stamp):
    mine = tmp_path / 'mine.txt'
    mine.write_text('precious')
    if stamp is not None: (tmp_path / 'scenes.json').write_bytes(stamp if isinstance(stamp, bytes) else stamp.encode())
    with pytest.raises(ValueError, match='name another'): write_scenes(tmp_path, SIZES)
    assert mine.read_text() == 'precious'


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / 'scenes').write_text('')
    with pytest.raises(ValueError, match='name another folder'): write_scenes(tmp_path / 'scenes', SIZES)


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / 'scenes').mkdir()
    assert names(write_scenes(tmp_path / 'scenes', {'val': 2}), 'val') == ['val_00000', 'val_00001']


@pytest.mark.parametrize('error', [OSError('disk full'), KeyboardInterrupt()])
def test_a_stopped_run_leaves_nothing(tmp_path, monkeypatch, error):
    real, done = scenes.write_scene, []

    def stop_at_third(*args):
        if len(done) == 2: raise error
        done.append(real(*args))
    monkeypatch.setattr(scenes, 'write_scene', stop_at_third)
    with pytest.raises(type(error)): write_scenes(tmp_path / 'scenes', SIZES)
    assert len(done) == 2 and not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert write_scenes(tmp_path / 'scenes', SIZES).is_dir()


def test_a_faster_process_wins(tmp_path, monkeypatch):
    real = scenes.fill

    def overtaken(unfinished, sizes, seed, context_rate):
        monkeypatch.undo()
        write_scenes(tmp_path / 'scenes', sizes, seed)
        unfinished.mkdir()
        real(unfinished / 'late', sizes, seed, context_rate)
    monkeypatch.setattr(scenes, 'fill', overtaken)
    root = write_scenes(tmp_path / 'scenes', {'val': 2})
    assert not (root / 'late').exists() and [p.name for p in tmp_path.iterdir()] == ['scenes']


@pytest.mark.parametrize('sizes, seed, words', [
    ({}, 0, 'at least one split'), ({'train': 0}, 0, 'split train'), ({'train': 2.5}, 0, 'split train'),
    ({'../out': 3}, 0, 'split name'), ({'train': 3}, -1, 'seed'), ({'train': 3}, '0', 'seed')])
def test_bad_requests(tmp_path, sizes, seed, words):
    with pytest.raises(ValueError, match=words): write_scenes(tmp_path / 'scenes', sizes, seed)
    assert not (tmp_path / 'scenes').exists()
