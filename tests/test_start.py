"""The start weights: made again by their recipe, checked against their card, on scenes that no study has."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bnrcam.engine.weights import WeightsError, load_weights, read_weights
from bnrcam.models import create_classifier
from bnrcam.resnet38 import ResNet38Classifier
from bnrcam.scenes import SCENE_CLASSES, SCENE_SIZES, make_scene, scene_rng
from bnrcam.study.start import RECIPES, SceneStream, classifier_settings, make_start

START = Path(__file__).parent.parent / 'data/start'
TINY = {'conformer_mini': {}, 'resnet38_eighth': {'width': 1 / 32}}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('name', RECIPES)
def test_made_again(name, tmp_path):
    made = [make_start(name, tmp_path / place, tmp_path / place / 'work', scenes=4, length=16, epochs=1, **TINY[name])
            for place in 'ab']
    first, second = (read_weights(path) for path in made)
    assert all(torch.equal(first[key], second[key]) for key in first) and made[0].read_bytes() == made[1].read_bytes()
    card = json.loads(made[0].with_suffix('.json').read_text())
    assert card['samples'] == 16 and card['sha256'] == hashlib.sha256(made[0].read_bytes()).hexdigest()
    made[0].write_bytes(made[0].read_bytes()[:-1] + b'?')
    with pytest.raises(WeightsError, match='not the ones that were written|sha256'):
        read_weights(made[0])
    made[0].write_bytes(make_start(name, tmp_path / 'c', tmp_path / 'c/work', scenes=4, length=16, epochs=1, seed=1,
                                   **TINY[name]).read_bytes())
    with pytest.raises(WeightsError, match='sha256 .* the file was changed'):  # whole, but another
        read_weights(made[0])


def test_stopped_start_goes_on(tmp_path, capsys):
    options = {'scenes': 4, 'length': 16, **TINY['resnet38_eighth']}
    whole = make_start('resnet38_eighth', tmp_path / 'a', tmp_path / 'work', epochs=1, **options)
    again = make_start('resnet38_eighth', tmp_path / 'b', tmp_path / 'work', epochs=1, **options)
    assert whole.read_bytes() == again.read_bytes() and 'goes on after epoch 1' in capsys.readouterr().out


@pytest.mark.parametrize('name', RECIPES)
def test_committed_file_is_that_of_its_card(name):
    path = START / f'{name}.safetensors'
    card = json.loads(path.with_suffix('.json').read_text())
    if name == 'conformer_mini': assert card['model'] == classifier_settings(card['recipe'], card['scores']['threshold'])
    assert card['recipe'] == RECIPES[name] and card['sha256'] == hashlib.sha256(path.read_bytes()).hexdigest()
    net = create_classifier('conformer_mini_patch16', 7) if name == 'conformer_mini' else ResNet38Classifier(6, .125)
    assert load_weights(net, path) == []
    assert sum(path.stat().st_size for path in START.iterdir()) < 12e6


def test_another_architecture_is_refused():
    with pytest.raises(WeightsError, match='conformer_mini.safetensors: weights of another network, .* differ'):
        create_classifier('conformer_tiny_patch16', 7, START / 'conformer_mini.safetensors')


def test_no_scene_of_a_study_is_in_the_stream():
    "Other random streams; the first 300 pictures differ from all of mini's training and validation scenes."
    def digest(image): return hashlib.sha256(np.ascontiguousarray(image)).digest()
    studied = {digest(make_scene(scene_rng(0, split, i)).image) for split, n in SCENE_SIZES.items() if split != 'pretrain'
               for i in range(n)}
    stream = SceneStream(1, lambda item: item)
    torch.manual_seed(0)
    drawn = {digest(stream[0]['image'].permute(1, 2, 0).numpy()) for _ in range(300)}
    assert len(drawn) == 300 and not drawn & studied and len(studied) == 320


def test_contexts_are_at_chance_in_the_stream_alone():
    def own(rate): return np.mean([(scene.context == scene.labels[0]).any() for scene in
                                   (make_scene(np.random.default_rng([1, i]), rate) for i in range(300)) if len(scene.labels) == 1])
    assert SceneStream(1, None).context_rate == 1 / len(SCENE_CLASSES)
    assert own(1 / 6) < .3 and own(.75) > .6 and own(0) == 0
