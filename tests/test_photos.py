"Photographs with a table of labels and no masks: from the two to masks, a page and a network for new photographs."
import csv
import os
import signal
import subprocess
import time

import pytest
import yaml
from PIL import Image

from bnrcam.data import read_image, read_mask
from bnrcam.predict import load_model, predict
from bnrcam.scenes import SCENE_CLASSES, make_scene, scene_rng
from browsing import check_page
from test_batch import ROOT, TINY, command, environment, make, new_repo

pytestmark = pytest.mark.slow

START = ROOT / 'data/start'
CHANGES = {
    'variants': ['noise1'], 'ours': 'noise1', 'pretrain': None, 'trunk': None, 'timm_backbones': [],
    'weights': str(START / 'conformer_mini.safetensors'),
    'dataset': {'classes': [*SCENE_CLASSES], 'train': 'train', 'eval': 'train', 'val': 'train', 'masks': False}}


NAMES = {1: 'Été (1).JPG', 2: 'trip/day [2].png', 4: 'trip/ünder way.webp'}  # as people have them


def photos_repo(folder):
    "A copy of the project with a folder of photographs, a table of their labels, and a tiny profile for them."
    repo, photos = new_repo(folder), folder / 'my photos'
    profile = yaml.safe_load(TINY) | CHANGES
    for stage in ('affinity', 'segment'):
        profile[stage] |= {'weights': str(START / 'resnet38_eighth.safetensors'), 'width': 0.125}
    (repo / 'nbs/profiles/tiny.yaml').write_text(yaml.safe_dump(profile))
    photos.mkdir()
    with open(folder / 'my labels.csv', 'w', newline='') as file:
        table = csv.writer(file)
        table.writerow(['file', 'labels'])
        for i in range(24):
            scene, name = make_scene(scene_rng(0, 'train', i)), NAMES.get(i, f'holiday_{i}.jpg')
            (photos / name).parent.mkdir(exist_ok=True)
            Image.fromarray(scene.image).save(photos / name, quality=95)
            table.writerow([name, ';'.join(SCENE_CLASSES[c - 1] for c in scene.labels)])
    return repo


GIVEN = 'DATA=data/tiny', 'PHOTOS=my photos', 'LABELS=my labels.csv'


def run(repo, *arguments): return make(repo, *arguments, *GIVEN)


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "Killed with all that it had started when the masks began, and run again."
    repo = photos_repo(tmp_path_factory.mktemp('photos'))
    process = subprocess.Popen(command('reproduce', *GIVEN), cwd=repo, env=environment(), start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not [*(repo / 'data/runs/tiny/noise1-s0').glob('conf_fg/*.png')]:
        assert process.poll() is None, 'ended before the masks began'
        time.sleep(.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    result = run(repo, 'reproduce')
    assert 'noise1-s0/train]' not in result.stdout  # what was finished
    assert result.returncode == 0, result.stdout + result.stderr
    return repo


def test_masks_of_all_photographs_and_nothing_that_needs_truth(study):
    out = study / 'reports/tiny'
    made = {str(path.relative_to(out).with_suffix('')) for path in out.rglob('*.ipynb')}
    assert made == {'index', 'masks', 'coverage', 'levels',
                    *(f'noise1-s0/{stage}' for stage in ('train', 'cams', 'pseudo', 'segment'))}
    assert len([*(study / 'data/runs/tiny/noise1-s0/segment/crf').glob('*.png')]) == 24
    page = (out / 'index.html').read_text()
    assert 'There are no true masks here' in page and 'Tables 1 to 5' in page
    assert (out / 'coverage.csv').read_text().startswith('class,images with the label,')
    assert 'Nothing to do' in run(study, 'reproduce').stdout


def test_verify_without_masks(study):
    result = run(study, 'verify')
    assert result.returncode == 0 and 'checks passed' in result.stdout, result.stdout + result.stderr


def test_page_in_a_browser(study, browser):
    check_page(browser, study / 'reports/tiny/index.html')


def test_a_new_photograph(study):
    "By the segmentation network, as its stage; by the classifier, with the profile's threshold."
    folder = study / 'data/runs/tiny/noise1-s0'
    image = read_image(study / 'data/tiny/JPEGImages/holiday_3.jpg')
    mask = read_mask(folder / 'segment/crf/holiday_3.png', 7)
    assert (predict(load_model(folder / 'segment'), image) == mask).all()
    assert predict(load_model(folder), image, ['apple']).max() <= 1


@pytest.mark.parametrize(('line', 'said'), [
    ('holiday_99.jpg,apple', 'holiday_99.jpg: no such image'),
    ('holiday_0.jpg,appel', "unknown class 'appel'"),
], ids=['no photograph', 'no class'])
def test_a_wrong_table_makes_nothing(study, tmp_path, line, said):
    (tmp_path / 'wrong.csv').write_text(f'file,labels\n{line}\n')
    result = make(study, 'reproduce', 'DATA=data/other', 'PHOTOS=my photos', f"LABELS={tmp_path / 'wrong.csv'}")
    assert result.returncode != 0 and said in result.stdout + result.stderr
    assert not (study / 'data/other').exists()
