"New photographs: masks of a run's networks, exported or where they lie, and what may go wrong."
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from bnrcam.affinity import crf_seed
from bnrcam.cams import infer_cams
from bnrcam.data import DataError, VOCFolder, read_image, read_mask
from bnrcam.engine.checkpoints import save_tensors
from bnrcam.models import create_classifier
from bnrcam.predict import export_model, load_model, main, pictures, predict, read_model
from bnrcam.scenes import SCENE_CLASSES
from bnrcam.segment import deeplab, infer_segments

ROOT = Path(__file__).parent.parent
NAMES, MODEL = list(SCENE_CLASSES), {'name': 'conformer_mini_patch16'}
JOBS = {'cams': {'dataset': {'classes': NAMES}, 'model': MODEL, 'inference': {'scales': [96]}},
        'segment': {'dataset': {'classes': NAMES}, 'backbone': 'resnet38', 'timm_options': {},
                    'segment': {'width': 1 / 32, 'scales': [1.]}}}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "The folder of a run with a classifier and a segmentation network."
    base = tmp_path_factory.mktemp('a study')
    run, report = base / 'data/runs/tiny/noise1-s0', base / 'reports/tiny/noise1-s0'
    torch.manual_seed(0)
    classifier = create_classifier(MODEL, 7, ROOT / 'data/start/conformer_mini.safetensors')
    save_tensors(run / 'model.safetensors', classifier.state_dict(), provenance={'seed': 0})
    save_tensors(run / 'segment/model.safetensors', deeplab('resnet38', 7, width=1 / 32).state_dict())
    report.mkdir(parents=True)
    for name, job in JOBS.items(): (report / f'{name}.yaml').write_text(yaml.safe_dump(job))
    (report / 'cams.json').write_text(json.dumps({'best_threshold': .4}))
    return run


def photograph(scenes, name): return scenes / f'JPEGImages/{name}.jpg'


def test_segmentation_network_gives_the_files_of_its_stage(run, scenes, tmp_path):
    model = load_model(run / 'segment')
    infer_segments(model.network, scenes, ['val_00000', 'val_00001'], tmp_path, scales=[1.], workers=1)
    for name in ('val_00000', 'val_00001'):
        assert (predict(model, read_image(photograph(scenes, name)))
                == read_mask(tmp_path / f'crf/{name}.png', 7)).all()


def test_classifier_gives_the_labels_of_its_stage(run, scenes, tmp_path):
    "All but the pixels that half precision of the stored CAMs moves over the threshold."
    model, data = load_model(run), VOCFolder(scenes, 'train', SCENE_CLASSES)
    infer_cams(model.network, data, tmp_path, scales=[96], batch_size=4)
    for name, labels in zip(data.names[:3], data.labels):
        stage = crf_seed(scenes, SCENE_CLASSES, tmp_path, .4, name)
        given = [label for label, there in zip(NAMES, labels) if there]
        ours = predict(model, read_image(photograph(scenes, name)), given)
        assert (ours == stage).mean() > .99 and ours.any()


def test_one_file_says_all(run, tmp_path):
    for part in (run, run / 'segment'):
        path = export_model(part, tmp_path / f'{part.name}.safetensors')
        (tensors, settings, record), again = read_model(part), read_model(path)
        assert again[1:] == (settings, record) and settings['classes'] == NAMES
        assert all(torch.equal(tensors[name], again[0][name]) for name in tensors)
        assert load_model(path).settings == settings
    assert export_model(run) == run.with_suffix('.safetensors')


def test_command_line(run, scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'my été photos/more'
    folder.mkdir(parents=True)
    shutil.copy(photograph(scenes, 'val_00000'), folder / 'a b.JPG')
    turned, exif = Image.open(photograph(scenes, 'val_00001')), Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / 'turned.png', exif=exif)
    (folder / 'broken.jpg').write_bytes(b'none')
    status = main([str(folder.parent), '--model', str(run), '--labels', 'apple; fish', '--out', 'out here'])
    said = capsys.readouterr().out
    assert status == 1 and '2 masks in out here, 1 pictures left out' in said
    assert 'left out:' in said and 'broken.jpg: damaged image' in said and '(turned upright)' in said
    assert read_mask(tmp_path / 'out here/turned.png', 7).shape == turned.size
    assert Image.open(tmp_path / 'out here/a b_overlay.jpg').size == Image.open(folder / 'a b.JPG').size
    assert main([str(folder / 'a b.JPG'), '--model', str(run / 'segment'), '--out', 'out']) == 0
    assert np.array_equal(read_mask(tmp_path / 'out/a b.png', 7),
                          predict(load_model(run / 'segment'), read_image(folder / 'a b.JPG')))


@pytest.mark.parametrize(('part', 'arguments', 'line'), [
    ('', ['--labels', 'cow'], "the model does not know 'cow'; its classes are apple, banana"),
    ('', [], 'a classifier must be told what is in the picture: give --labels'),
    ('segment', ['--labels', 'apple'], 'finds the classes by itself; leave the labels out'),
    ('segment', ['--out', '{scenes}/JPEGImages/masks'], 'would be read as photographs; give another --out'),
    ('cams', [], 'no weights there; give the folder of a finished run or a file of make export'),
], ids=['label', 'no label', 'labels of a segmenter', 'out within', 'model'])
def test_what_is_wrong_is_one_line(run, scenes, tmp_path, monkeypatch, part, arguments, line):
    monkeypatch.chdir(tmp_path)
    given = [argument.format(scenes=scenes) for argument in arguments]
    with pytest.raises(SystemExit, match='^bnrcam-predict: .*' + line):
        main([str(scenes / 'JPEGImages'), '--model', str(run / part), *given])
    assert not (tmp_path / 'masks').exists() and not (scenes / 'JPEGImages/masks').exists()


def test_first_screen_of_the_readme(tmp_path, monkeypatch, capsys):
    "The numbers that it prints, to what another processor's rounding may move."
    text = (ROOT / 'README.md').read_text()
    command, = re.findall(r'^\.venv/bin/bnrcam-predict (data/start.*)$', text, re.M)
    stated, = re.findall(r'^    (data/start/photo.jpg: .*)$', text, re.M)
    monkeypatch.chdir(ROOT)
    assert main([*shlex.split(command), '--out', str(tmp_path)]) == 0
    said, number = capsys.readouterr().out.splitlines()[0], r'[\d.]+'
    assert re.sub(number, '', said) == re.sub(number, '', stated)
    assert np.abs(np.subtract(*(np.array(re.findall(number + '(?= %)', line), float) for line in (said, stated)))).max() < 1


def test_patterns(run, scenes, tmp_path, capsys):
    "Some shells leave them to the program."
    assert len(pictures([scenes / 'JPEGImages/val_*.jpg'], tmp_path)) == len([*(scenes / 'JPEGImages').glob('val_*.jpg')]) > 1
    (tmp_path / 'a[1].jpg').write_bytes(b'')
    assert pictures([tmp_path / 'a[1].jpg'], tmp_path / 'out') == [tmp_path / 'a[1].jpg']


MEMORY = """
import resource, sys
from pathlib import Path
from bnrcam.predict import load_model, predict_files
folder, run, out = map(Path, sys.argv[1:])
paths, model = sorted(folder.iterdir()), load_model(run)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for part in (paths[:100], paths):
    predict_files(model, part, None, out)
    print(f'peak {peak():.0f}')
"""


def test_1000_photographs_take_the_memory_of_100(run, scenes, tmp_path):
    "And it says how long is left."
    picture = Image.open(photograph(scenes, 'val_00000')).resize((48, 40))
    (tmp_path / 'photos').mkdir()
    picture.save(tmp_path / 'first.jpg')
    for i in range(1000): (tmp_path / f'photos/{i:04}.jpg').hardlink_to(tmp_path / 'first.jpg')
    result = subprocess.run([sys.executable, '-c', MEMORY, tmp_path / 'photos', run / 'segment', tmp_path / 'out'], text=True,
                            capture_output=True, timeout=600, check=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    few, many = (float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith('peak'))
    assert many - few < 20 and '1000 masks in' in result.stdout
    assert re.search(r'predict: .*\d+/1000 \[\d+:\d+<\d+:\d+', result.stdout), result.stdout[-300:]


def test_pictures_of_one_name(scenes, tmp_path):
    for place in ('a/one.jpg', 'b/one.png'):
        (tmp_path / place).parent.mkdir()
        shutil.copy(photograph(scenes, 'val_00000'), tmp_path / place)
    with pytest.raises(DataError, match='one.png and .*one.jpg have one name'): pictures([tmp_path], 'masks')
    with pytest.raises(DataError, match='nothing: no picture there'):
        (tmp_path / 'nothing').mkdir()
        pictures([tmp_path / 'nothing'], 'masks')


def test_weights_that_do_not_say_their_network(tmp_path):
    path = shutil.copy(ROOT / 'data/start/conformer_mini.safetensors', tmp_path / 'weights.safetensors')
    with pytest.raises(DataError, match='do not say their network; give the folder of a run'): load_model(path)
