"""VOC with SBD and COCO from miniature archives, true to their layout, through a server; and what may go wrong."""
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy.io import loadmat, savemat

from bnrcam.data import VOC_CLASSES, DataError, VOCFolder, read_split
from bnrcam.datasets.coco import (COCO_CLASSES, category_indices, coco_mask, convert_coco, prepare_coco,
                                  read_annotations, read_coco, to_rle)
from bnrcam.datasets.voc import (TRAIN_AUG, check_count, for_each, make_layout, prepare_voc, read_sbd, save_mask,
                                 train_aug)
from miniature import (COCO_IDS, coco_archives, coco_json, coco_shapes, run_lengths, sbd_mat, voc_archives,
                       voc_mask, write_sources)

INDICES = {number: index for index, number in enumerate(COCO_IDS, 1)}


@pytest.fixture
def voc(web):
    return voc_archives(web.folder, web.url)


@pytest.fixture
def coco(web):
    return coco_archives(web.folder, web.url)


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob('*')) if path.is_file()}


# the lists

def published_structure():
    "Lists of the published sizes that overlap as these do: SBD has 1,134 of VOC train and 1,103 of VOC val."
    train, val = [f't{i}' for i in range(1464)], [f'v{i}' for i in range(1449)]
    own = [f's{i}' for i in range(11_355 - 1134 - 1103)]
    sbd = train[:1134] + val[:1103] + own
    np.random.default_rng(0).shuffle(sbd)
    return train, val, sbd[:8498], sbd[8498:]


def test_train_aug_of_the_published_sizes():
    train, val, sbd_train, sbd_val = published_structure()
    assert len(sbd_train) == 8498 and len(sbd_val) == 2857
    names = train_aug(train, val, sbd_train + sbd_val)
    assert len(names) == TRAIN_AUG == len(set(names)) and not set(names) & set(val) and set(train) <= set(names)
    check_count('train_aug', names, TRAIN_AUG)
    assert names == train_aug(train[::-1], val * 2, (sbd_val + sbd_train) * 2)  # neither order nor repetition matters
    assert len(set(names) | set(val)) == 12_031


def test_a_count_that_is_off():
    train, val, sbd_train, sbd_val = published_structure()
    with pytest.raises(DataError, match='train_aug: .* images, not 10582'):
        check_count('train_aug', train_aug(train, val, sbd_train), TRAIN_AUG)
    with pytest.raises(DataError, match='0 images'):
        check_count('train_aug', [], None)


# VOC

def test_voc_all_the_way(voc, web, tmp_path):
    web.patience = 30_000
    root = prepare_voc(tmp_path / 'voc', voc, expected=11)
    sizes = {key: file.size for key, file in voc.items()}
    assert sum(length for *_, length in web.log) == sum(sizes.values()) and len(web.log) > 4  # broken, no byte twice
    parts = {split: VOCFolder(root, split, VOC_CLASSES, masks=True) for split in ('train', 'val', 'train_aug')}
    assert {split: len(part) for split, part in parts.items()} == {'train': 6, 'val': 4, 'train_aug': 11}
    assert not set(parts['train_aug'].names) & set(parts['val'].names)
    for part in parts.values():
        for item in part:
            present = np.setdiff1d(np.unique(item['mask']), [0, 255])
            assert (item['labels'].nonzero().flatten().numpy() + 1 == present).all()
    # VOC's masks, with their band, as they came; SBD's elsewhere
    raw, aug = root / 'raw/voc/VOCdevkit/VOC2012/SegmentationClass', parts['train_aug']
    for name in aug.names:
        if name.startswith('2007'):
            assert aug.mask_path(name).read_bytes() == (raw / f'{name}.png').read_bytes() and 255 in aug.mask(name)
        else:
            mat = loadmat(root / f'raw/sbd/benchmark_RELEASE/dataset/cls/{name}.mat')
            assert (aug.mask(name) == mat['GTcls'][0]['Segmentation'][0]).all() and 255 not in aug.mask(name)
    assert not (root / 'JPEGImages/2011_000001.jpg').exists() and not list(root.rglob('*.part*'))
    assert (root / f'JPEGImages/{name}.jpg').samefile(raw.parent / f'JPEGImages/{name}.jpg')  # no second copy


def test_voc_again_does_nothing(voc, web, tmp_path):
    root = prepare_voc(tmp_path / 'voc', voc, expected=11)
    before, times = contents(root), {path: path.stat().st_mtime_ns for path in root.rglob('*.png')}
    for path in (root / 'downloads').iterdir():
        path.unlink()  # not needed any more
    requests = len(web.log)
    prepare_voc(root, voc, expected=11)
    assert len(web.log) == requests
    assert {**before} == {**{key: value for key, value in before.items() if 'downloads' in key}, **contents(root)}
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob('*.png')}


def test_voc_with_a_list_that_is_off(voc, tmp_path):
    with pytest.raises(DataError, match='train_aug: 11 images, not 10582'):
        prepare_voc(tmp_path / 'voc', voc)
    assert len(read_split(prepare_voc(tmp_path / 'voc', voc, expected=None), 'train_aug')) == 11


def killed(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize('step', [
    'bnrcam.datasets.download.check_file', 'bnrcam.datasets.download.write_members', 'pathlib.Path.rename',
    'bnrcam.datasets.{}.make_layout', 'bnrcam.datasets.voc.read_sbd', 'bnrcam.datasets.voc.os.replace',
    'bnrcam.datasets.{}.write_split'])
@pytest.mark.parametrize('kind', ['voc', 'coco'])
def test_killed_between_steps(kind, step, web, tmp_path, monkeypatch, request):
    files = request.getfixturevalue(kind)
    prepare = {'voc': partial(prepare_voc, expected=11), 'coco': partial(prepare_coco, expected=None)}[kind]
    undisturbed = contents(prepare(tmp_path / 'whole', files))
    step = step.format(kind)
    if (kind, step) == ('coco', 'bnrcam.datasets.voc.read_sbd'):
        pytest.skip('not of COCO')
    kills = 0
    for calls in range(3):  # killed at the first, second and third call of this step
        original, count = _resolve(step), 0

        def sometimes(*args, **kwargs):
            nonlocal count
            count += 1
            return killed() if count > calls else original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(step, sometimes)
            try:
                prepare(tmp_path / 'killed', files)
            except KeyboardInterrupt:
                kills += 1
    assert kills
    after = contents(prepare(tmp_path / 'killed', files))
    assert {key: value for key, value in after.items() if not key.endswith('.part')} == undisturbed


def _resolve(path):
    module, _, name = path.rpartition('.')
    target = sys.modules.get(module)
    if target is None:
        parent, _, inner = module.rpartition('.')
        target = getattr(_resolve(parent) if parent not in sys.modules else sys.modules[parent], inner)
    return getattr(target, name)


def test_missing_picture_in_the_archive(voc, tmp_path):
    root = tmp_path / 'voc'
    prepare_voc(root, voc, expected=11)
    name = read_split(root, 'train_aug')[-1]
    for path in root.rglob(f'{name}.jpg'):
        path.unlink()
    with pytest.raises(DataError, match=f'{name}.jpg: missing in what was unpacked; delete the folder') as error:
        prepare_voc(root, voc, expected=11)
    assert '\n' not in str(error.value) and str(root / 'raw/voc/VOCdevkit') in str(error.value)


# SBD's files

def test_sbd_as_torchvision_reads_it(tmp_path):
    mask = voc_mask(np.random.default_rng(0), 60, 50, band=False)
    (tmp_path / 'x.mat').write_bytes(sbd_mat(mask))
    assert (read_sbd(tmp_path / 'x.mat') == mask).all()
    assert (np.array(Image.fromarray(loadmat(tmp_path / 'x.mat')['GTcls'][0]['Segmentation'][0])) == mask).all()
    save_mask(tmp_path / 'x.png', mask)
    with Image.open(tmp_path / 'x.png') as image:
        assert image.mode == 'P' and image.getpalette()[3:6] == [128, 0, 0] and (np.array(image) == mask).all()


@pytest.mark.parametrize('content', [{'other': 1}, {'GTcls': 1}, {'GTcls': {'Segmentation': np.zeros((3, 3))}},
                                     {'GTcls': {'Segmentation': np.full((3, 3), 21, np.uint8)}},
                                     {'GTcls': {'Segmentation': np.zeros((3, 3, 3), np.uint8)}},
                                     {'GTcls': {'Segmentation': np.zeros((0, 0), np.uint8)}}])
def test_sbd_files_with_something_else(tmp_path, content):
    savemat(tmp_path / 'x.mat', content)
    with pytest.raises(DataError, match='x.mat'):
        read_sbd(tmp_path / 'x.mat')


@pytest.mark.parametrize('seed', range(40))
def test_damaged_sbd_files(tmp_path, seed):
    "Cut or spoiled: an error that names the file, or a mask that is in range; never anything else."
    rng = np.random.default_rng(seed)
    content = bytearray(sbd_mat(voc_mask(rng, 60, 50, band=False)))
    if seed % 2:
        content = content[:rng.integers(0, len(content))]
    else:
        for place in rng.integers(100, len(content), 5):
            content[place] ^= 1 << rng.integers(8)
    (tmp_path / 'x.mat').write_bytes(content)
    try:
        assert read_sbd(tmp_path / 'x.mat').max() <= 20
    except DataError as error:
        assert 'x.mat' in str(error) and '\n' not in str(error)


def test_sbd_mask_of_another_size(voc, tmp_path):
    root = prepare_voc(tmp_path / 'voc', voc, expected=11)
    name = read_split(root, 'train_aug')[-1]
    (root / f'SegmentationClass/{name}.png').unlink()
    (root / f'raw/sbd/benchmark_RELEASE/dataset/cls/{name}.mat').write_bytes(sbd_mat(np.zeros((5, 7), np.uint8)))
    with pytest.raises(DataError, match=f'{name}.mat: the mask is 7x5, its image'):
        prepare_voc(root, voc, expected=11)


# COCO

def test_coco_all_the_way(coco, web, tmp_path):
    web.patience = 30_000
    root = prepare_coco(tmp_path / 'coco', coco, expected={'train': 7, 'val': 4})
    assert sum(length for *_, length in web.log) == sum(file.size for file in coco.values())
    for split, count in (('train', 7), ('val', 4)):
        part = VOCFolder(root, split, COCO_CLASSES, masks=True)
        assert len(part) == count and len(part.classes) == 80
        reference = COCO(root / f'raw/annotations/annotations/instances_{split}2014.json')
        ignored = 0
        for item in part:
            number = int(item['name'][-12:])
            shapes = reference.loadAnns(reference.getAnnIds(number))
            present = set(item['labels'].nonzero().flatten().tolist())
            assert present == {INDICES[shape['category_id']] - 1 for shape in shapes}
            expected = np.zeros((60, 80), np.uint8)
            objects = [reference.annToMask(shape) for shape in shapes]
            for crowd in (1, 0):
                for k in sorted(range(len(shapes)), key=lambda k: -int(objects[k].sum())):
                    if shapes[k]['iscrowd'] == crowd:
                        expected[objects[k] == 1] = 255 if crowd else INDICES[shapes[k]['category_id']]
            assert (item['mask'].numpy() == expected).all()
            ignored += (expected == 255).sum()
        assert ignored > 0
    assert not (root / 'raw/annotations/annotations/captions_train2014.json').exists()
    assert len(list((root / 'JPEGImages').iterdir())) == 11  # those without annotations are left out
    requests = len(web.log)
    prepare_coco(root, coco, expected=None)
    assert len(web.log) == requests


def test_coco_with_a_list_that_is_off(coco, tmp_path):
    with pytest.raises(DataError, match='instances_train2014.json: 7 images, not 82081'):
        prepare_coco(tmp_path / 'coco', coco)


def test_coco_photograph_of_another_size_or_missing(coco, tmp_path):
    root = prepare_coco(tmp_path / 'coco', coco, expected=None)
    name = read_split(root, 'train')[2]
    photograph = root / f'raw/train/train2014/{name}.jpg'
    (root / f'SegmentationClass/{name}.png').unlink()
    Image.new('RGB', (10, 10)).save(photograph)
    with pytest.raises(DataError, match=f'{name}.jpg: 10x10, but instances_train2014.json says 80x60'):
        prepare_coco(root, coco, expected=None)
    photograph.unlink()
    (root / f'JPEGImages/{name}.jpg').unlink()
    with pytest.raises(DataError, match=f'{name}.jpg: missing in what was unpacked'):
        prepare_coco(root, coco, expected=None)


def annotation_files():
    folder = os.environ.get('BNRCAM_COCO_SAMPLE')
    return sorted(Path(folder).glob('*.json')) if folder else []


def same_as_pycocotools(path, indices):
    "Compares every object with annToMask, and every image with painting these; returns (images, objects, pixels)."
    reference, counts = COCO(path), np.zeros(3, int)
    found = read_coco(path, [category['name'] for category in reference.loadCats(reference.getCatIds())])
    assert found[0] == indices
    assert len(found[1]) == len({shape['image_id'] for shape in reference.anns.values()})
    numbers = {Path(image['file_name']).stem: number for number, image in reference.imgs.items()}
    for image in found[1]:
        items = read_annotations(path, image)
        expected = reference.loadAnns(reference.getAnnIds(numbers[image.name]))
        assert sorted(item['id'] for item in items) == sorted(item['id'] for item in expected)
        for item in items:
            ours = coco_mask([{**item, 'iscrowd': 0}], image.height, image.width, indices) > 0
            assert (ours == reference.annToMask(item)).all()
            counts += 0, 1, ours.sum()
        counts += 1, 0, 0
    return counts


def test_rasterising_equals_pycocotools(tmp_path):
    content = coco_json(np.random.default_rng(1), 'train', 30, size=(120, 90), objects=6, points=20)
    kinds = {type(shape['segmentation']['counts']) if shape['iscrowd'] else list for shape in content['annotations']}
    assert kinds == {list, str} and sum(shape['iscrowd'] for shape in content['annotations']) == 20
    (tmp_path / 'instances.json').write_text(json.dumps(content))
    images, objects, pixels = same_as_pycocotools(tmp_path / 'instances.json', INDICES)
    assert images == 30 and objects == 200 and pixels > 100_000


@pytest.mark.parametrize('path', annotation_files(), ids=lambda path: path.stem)
def test_rasterising_equals_pycocotools_on_real_files(path):
    print(path.name, 'images, objects, pixels:', same_as_pycocotools(path, {1: 1}))


def shape(segmentation, crowd=0):
    return {'id': 7, 'category_id': 1, 'iscrowd': crowd, 'segmentation': segmentation}


@pytest.mark.parametrize('wrong', [
    [], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, float('nan')]], [[1, 2, 3, 4, 5, float('inf')]],
    {'size': [10, 9], 'counts': [90]}, {'size': [10, 10], 'counts': [99]}, {'size': [10, 10], 'counts': [-100, 200]}])
def test_shapes_that_fit_no_image(wrong):
    with pytest.raises(DataError, match='annotation 7'):
        to_rle(shape(wrong), 10, 10)


def test_order_of_the_file_does_not_matter():
    rng = np.random.default_rng(2)
    shapes = coco_shapes(rng, 100, 120, 10)
    masks = [coco_mask([shapes[k] for k in rng.permutation(len(shapes))], 100, 120, INDICES) for _ in range(5)]
    assert all((mask == masks[0]).all() for mask in masks)


def test_crowds_lie_below_even_small_and_large():
    crowd = shape(run_lengths(np.ones((10, 10), np.uint8)), 1)
    whole = shape([[0, 0, 10, 0, 10, 10, 0, 10]])
    assert (coco_mask([whole, crowd], 10, 10, INDICES) == 1).all()
    assert (coco_mask([crowd], 10, 10, INDICES) == 255).all()


def test_categories():
    right = [{'id': number, 'name': name} for number, name in zip(COCO_IDS, COCO_CLASSES)]
    assert len(set(COCO_CLASSES)) == 80 and category_indices(right) == INDICES
    for wrong in ([], right[:-1], [*right, {'id': 91, 'name': 'brush'}], [{**right[0], 'name': 'people'}, *right[1:]]):
        with pytest.raises(DataError, match='categories'):
            category_indices(wrong)


@pytest.mark.parametrize('text', ['', '[]', '{', '{"images": [', '{"images": [{"id": 1}]}', '{"annotations": [{}]}',
                                  '{"images": [], "annotations": [{"image_id": 1}]}', 'null', '\0'])
def test_broken_json(tmp_path, text):
    (tmp_path / 'x.json').write_text(text)
    with pytest.raises(DataError, match='x.json') as error:
        read_coco(tmp_path / 'x.json', [])
    assert '\n' not in str(error.value)


def test_forms_of_json_are_the_same(tmp_path):
    content = coco_json(np.random.default_rng(0), 'val', 5)
    content['info']['description'] = 'ünïcode, "quotes" ] } and \\ too'
    seen = []
    for options in ({}, {'indent': 2}, {'separators': (',', ':')}, {'ensure_ascii': False, 'sort_keys': True}):
        (tmp_path / 'x.json').write_text(json.dumps(content, **options), encoding='utf-8')
        indices, images = read_coco(tmp_path / 'x.json')
        seen.append([(image[:3], read_annotations(tmp_path / 'x.json', image)) for image in images])
    assert all(one == seen[0] for one in seen)
    assert sum(len(items) for _, items in seen[0]) == len(content['annotations'])


# several processes

def test_any_number_of_processes_writes_the_same(web, tmp_path):
    files = coco_archives(web.folder, web.url, counts=(70, 40))
    one, three = (prepare_coco(tmp_path / str(workers), files, None, workers) for workers in (1, 3))
    assert contents(one) == contents(three)


def fail_at(place, _):
    raise DataError(f'{place}: broken')


def test_errors_of_a_process_arrive():
    with pytest.raises(DataError, match='here: broken'):
        for_each(partial(fail_at, 'here'), range(100), 'broken', workers=2)


def test_1000_images(tmp_path):
    "As large as COCO's and as full (7.3 objects an image), on 2 processes."
    rng = np.random.default_rng(0)
    content = coco_json(rng, 'train', 1000, size=(480, 640), objects=7, points=30)
    (tmp_path / 'instances.json').write_text(json.dumps(content))
    photograph = tmp_path / 'photograph.jpg'
    Image.new('RGB', (640, 480)).save(photograph)
    (tmp_path / 'train2014').mkdir()
    indices, images = read_coco(tmp_path / 'instances.json')
    for image in images:
        os.link(photograph, tmp_path / 'train2014' / f'{image.name}.jpg')
    make_layout(tmp_path)
    job = partial(convert_coco, tmp_path / 'instances.json', tmp_path / 'train2014', tmp_path, indices)
    for_each(job, images, 'masks', workers=2)
    written = [path.stat().st_size for path in (tmp_path / 'SegmentationClass').glob('*.png')]
    assert len(written) == 1000 and np.mean(written) < 10_000  # of 307,200 pixels


def test_as_a_command(voc, tmp_path):
    "As make runs it: a script without a file, sources from a file."
    write_sources(tmp_path / 'sources.json', voc)
    code = ('from bnrcam.datasets.voc import prepare_voc, VOC_FILES; from bnrcam.datasets.download import read_sources; '
            f"prepare_voc('{tmp_path}/voc', read_sources('{tmp_path}/sources.json', VOC_FILES), None)")
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)
    assert len(VOCFolder(tmp_path / 'voc', 'train_aug', VOC_CLASSES, masks=True)) == 11
