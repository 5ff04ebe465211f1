"""Dense CRF: the reference's outputs, the textbook form, bad input, and the folder run."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydensecrf.densecrf import DenseCRF2D
from pydensecrf.utils import unary_from_labels, unary_from_softmax

from bnrcam.crf import crf_folder, crf_labels, crf_probabilities, fill_fours, label_groups, map_images, mean_field, \
    plane_groups
from bnrcam.data import DataError

from references import golden

def textbook(image, unary, iterations, sxy, srgb):
    """One plane a label."""
    h, w, _ = image.shape
    crf = DenseCRF2D(w, h, len(unary))
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=image, compat=10)
    return np.array(crf.inference(iterations)).reshape(-1, h, w)


# parity with the reference

def test_label_unaries_as_the_reference():
    z = golden('crf_label_astronaut')
    assert (z['n_labels'], z['t'], z['gt_prob']) == (21, 10, 0.7)
    assert (crf_labels(z['image'], z['labels'], 21) == z['result']).all()


@pytest.mark.parametrize('name', ['cam_inference_tiny_astronaut', 'cam_inference_tiny_cat'])
@pytest.mark.parametrize('background', ['0.60', '0.25'])
def test_seeds_as_the_reference(name, background):
    z = golden(name)
    scores = np.concatenate([np.full((1, *z['norm_cam'].shape[1:]), float(background), np.float32), z['norm_cam']])
    seed = np.append(0, z['class_ids'] + 1)[scores.argmax(0)]
    same = crf_labels(z['image'], seed, 21) == z[f'crf_label_{background}']
    assert same.mean() >= 0.999  # float16 CAMs: a few pixels start from another label


@pytest.mark.parametrize('iterations', [1, 10])
def test_probability_unaries_as_the_reference(iterations):
    z = golden('crf_softmax_astronaut')  # its q_iters* are stored at every second row and column
    q = crf_probabilities(z['image'], z['probs'], iterations)
    assert (q.argmax(0) == z[f'argmax_iters{iterations}']).all()
    assert np.abs(q[:, ::2, ::2] - z[f'q_iters{iterations}']).max() < 5e-3


# the collapsed form is the textbook form

@pytest.mark.parametrize('num_labels', [21, 81])
@pytest.mark.parametrize('present', [1, 2, 5, 9])
def test_collapsed_labels(num_labels, present):
    z = golden('crf_label_astronaut')
    rng = np.random.default_rng(present)
    image = np.ascontiguousarray(z['image'][40:130, 30:140])
    blocks = rng.integers(0, present, (9, 11)).repeat(10, 0).repeat(10, 1)
    labels = rng.choice(num_labels, present, replace=False)[blocks]
    unary = unary_from_labels(labels, num_labels, 0.7, zero_unsure=False)
    full = textbook(image, unary, 10, 50, 5)
    assert (crf_labels(image, labels, num_labels) == full.argmax(0)).all()
    groups = fill_fours(label_groups(labels, num_labels))
    assert sorted(sum(groups, [])) == list(range(num_labels))
    q = mean_field(image, unary[[g[0] for g in groups]], [*map(len, groups)], 10, 50, 5)
    for group, plane in zip(groups, q):
        assert np.abs(full[group] - plane.reshape(labels.shape)).max() < 1e-5


@pytest.mark.parametrize('num_labels', [2, 21, 81])
def test_collapsed_probabilities(num_labels):
    image = np.ascontiguousarray(golden('crf_label_astronaut')['image'][40:130, 30:140])
    rng = np.random.default_rng(0)
    probs = np.zeros((num_labels, 90, 110), np.float32)
    probs[:min(num_labels, 6)] = rng.dirichlet(np.ones(min(num_labels, 6)), (90, 110)).transpose(2, 0, 1)
    for iterations in (1, 10):
        q = crf_probabilities(image, probs, iterations)
        full = textbook(image, unary_from_softmax(probs), iterations, 32, 13)
        assert np.abs(q - full).max() < 1e-5 and (q.argmax(0) == full.argmax(0)).all()


def test_two_groups_collapse_side_by_side():
    z = golden('crf_label_astronaut')
    image, odd = z['image'], (np.indices(z['labels'].shape).sum(0) // 25 % 2).astype(np.float32)
    probs = np.concatenate([np.repeat([odd * 0.1], 7, 0), np.repeat([(1 - odd * 0.7) / 13], 13, 0)]).astype(np.float32)
    assert sorted(map(len, plane_groups(unary_from_softmax(probs)))) == [7, 13]
    full = textbook(image, unary_from_softmax(probs), 10, 32, 13)
    assert np.abs(crf_probabilities(image, probs, 10) - full).max() < 1e-5


def test_fill_fours():
    for sizes in ([1], [21], [1, 20], [1, 1, 19], [1] * 5, [1, 1, 1, 1, 17], [3, 4]):
        labels = iter(range(100))
        groups = fill_fours([[next(labels) for _ in range(n)] for n in sizes])
        assert sorted(sum(groups, [])) == list(range(sum(sizes)))
        assert len(groups) % 4 == 0 or len(groups) == sum(sizes)


# inputs at the edge, and bad ones

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
LABELS = np.zeros((20, 30), np.uint8)


@pytest.mark.parametrize('shape', [(1, 1), (1, 9), (9, 1)])
def test_thin_images(shape):
    labels = np.arange(np.prod(shape)).reshape(shape) // 5
    q = crf_probabilities(np.zeros((*shape, 3), np.uint8), np.full((3, *shape), 1 / 3))
    assert crf_labels(np.zeros((*shape, 3), np.uint8), labels, 21).shape == shape and np.allclose(q, 1 / 3)


def test_any_memory_layout():
    z = golden('crf_label_astronaut')
    image, labels = np.asfortranarray(z['image']), np.asfortranarray(z['labels'].astype(np.int64))
    assert (crf_labels(image, labels, 21) == z['result']).all()
    mirrored = crf_labels(z['image'][:, ::-1], z['labels'][:, ::-1], 21)
    assert (mirrored == crf_labels(z['image'][:, ::-1].copy(), z['labels'][:, ::-1].copy(), 21)).all()


def test_every_label_present():
    labels = (np.arange(600) % 21).reshape(20, 30)
    assert crf_labels(IMAGE, labels, 21, iterations=0).tolist() == labels.tolist()


@pytest.mark.parametrize('image, labels, num_labels, more, message', [
    (IMAGE / 255, LABELS, 21, {}, 'uint8'), (IMAGE[..., 0], LABELS, 21, {}, 'RGB'),
    (np.dstack([IMAGE, IMAGE[..., :1]]), LABELS, 21, {}, 'RGB'), (IMAGE[:10], LABELS, 21, {}, r'\(10, 30\)'),
    (IMAGE.transpose(1, 0, 2), LABELS, 21, {}, 'equal'), (IMAGE[:0], LABELS[:0], 21, {}, 'empty'),
    (IMAGE, LABELS + 21, 21, {}, '0..20'), (IMAGE, LABELS + 255, 21, {}, 'unsure'),
    (IMAGE, LABELS - 1.0, 21, {}, 'integers'),
    (IMAGE, LABELS.astype(int) - 1, 21, {}, '-1'), (IMAGE, LABELS[None], 21, {}, r'\(1, 20, 30\)'),
    (IMAGE, LABELS, 1, {}, 'num_labels'), (IMAGE, LABELS, 300, {}, 'num_labels'),
    (IMAGE, LABELS, 21, {'confidence': 1.0}, 'confidence'), (IMAGE, LABELS, 21, {'iterations': -1}, 'iterations')])
def test_bad_labels(image, labels, num_labels, more, message):
    with pytest.raises(ValueError, match=message) as caught:
        crf_labels(image, labels, num_labels, **more)
    assert '\n' not in str(caught.value)


GOOD = np.full((4, 20, 30), 0.25)


NEGATIVE = GOOD - np.array([1, -1, 0, 0])[:, None, None]


@pytest.mark.parametrize('probs', [GOOD[0], GOOD[:1] * 4, GOOD * 2, GOOD * np.nan, NEGATIVE, GOOD[:, :0], np.log(GOOD)])
def test_bad_probabilities(probs):
    with pytest.raises(ValueError, match='probabilities'):
        crf_probabilities(IMAGE, probs)


def test_probabilities_of_another_size():
    with pytest.raises(ValueError, match='equal'):
        crf_probabilities(IMAGE[:, :10], GOOD)


# the folder run

def stuck(name):
    "A worker's job that does not end from the tenth image on."
    if int(name) >= 10: time.sleep(600)
    return constant(name)


def constant(name):
    """A worker's job for the tests: a label map."""
    if name == 'bad': raise ValueError('no seed')
    return np.full((4, 4), int(name), np.uint8)


def same_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_map_images_goes_on(tmp_path):
    assert map_images(constant, ['1', '2', '2', '3'], tmp_path, workers=1) == 3
    before = same_files(tmp_path)
    (tmp_path / '2.png').unlink()
    assert map_images(constant, ['1', '2', '3'], tmp_path, workers=1) == 1 and same_files(tmp_path) == before
    assert map_images(constant, ['1', '2', '3'], tmp_path) == 0
    assert (np.array(Image.open(tmp_path / '3.png')) == 3).all() and sorted(before) == ['1.png', '2.png', '3.png', 'provenance.json']


@pytest.mark.parametrize('workers', [1, 2])
def test_first_error_names_the_image(tmp_path, workers):
    with pytest.raises(DataError, match='bad: no seed'):
        map_images(constant, ['1', 'bad'], tmp_path, workers)
    assert not (tmp_path / 'bad.png').exists()


def test_killed_run_leaves_no_worker_and_ends_the_same(tmp_path):
    names, out, whole = [str(i) for i in range(30)], tmp_path / 'out', tmp_path / 'whole'
    script = tmp_path / 'script.py'
    script.write_text(f'import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n'
                      'from bnrcam.crf import map_images\nfrom test_crf import stuck\n'
                      f'if __name__ == "__main__": map_images(stuck, {names}, {str(out)!r}, 2)\n')
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300  # it takes 5 s
    while not (out.exists() and len(list(out.glob('[0-9]*.png'))) == 10):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)  # to the end of the output, which all workers share: nobody goes on working
    assert len(list(out.glob('[0-9]*.png'))) == 10
    map_images(constant, names, out, workers=1)
    map_images(constant, names, whole, workers=1)
    assert same_files(out) == same_files(whole)


def folder_of(tmp_path):
    images, labels = tmp_path / 'images', tmp_path / 'labels'
    images.mkdir(), labels.mkdir()
    for name in 'ab':
        Image.fromarray(IMAGE).save(images / f'{name}.jpg')
        Image.fromarray(LABELS).save(labels / f'{name}.png')
    return images, labels


def test_crf_folder(tmp_path):
    images, labels = folder_of(tmp_path)
    (labels / '.c.part.png').write_bytes(b'left by a killed run')
    assert crf_folder(images, labels, tmp_path / 'one', 21, workers=1) == 2
    assert crf_folder(images, labels, tmp_path / 'two', 21, workers=2) == 2
    assert same_files(tmp_path / 'one') == same_files(tmp_path / 'two')


def break_image(images, labels): (images / 'b.jpg').write_bytes((images / 'b.jpg').read_bytes()[:100])
def lose_image(images, labels): (images / 'b.jpg').unlink()
def crop_labels(images, labels): Image.fromarray(LABELS[:10]).save(labels / 'b.png')
def unsure_labels(images, labels): Image.fromarray(LABELS + 255).save(labels / 'b.png')
def colour_labels(images, labels): Image.fromarray(IMAGE).save(labels / 'b.png')


@pytest.mark.parametrize('spoil', [break_image, lose_image, crop_labels, unsure_labels, colour_labels])
def test_bad_folder(tmp_path, spoil):
    images, labels = folder_of(tmp_path)
    spoil(images, labels)
    with pytest.raises(DataError, match='b[.:]') as caught:
        crf_folder(images, labels, tmp_path / 'out', 21, workers=1)
    assert '\n' not in str(caught.value) and not list((tmp_path / 'out').glob('*b*'))


def test_folder_without_labels(tmp_path):
    with pytest.raises(DataError, match='no label maps'):
        crf_folder(tmp_path, tmp_path, tmp_path / 'out', 21)
