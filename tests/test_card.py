"What must hold on a GPU, as far as a processor can tell."
import pytest
import torch

from bnrcam.data import VOCFolder
from bnrcam.datasets.transforms import train_transform
from bnrcam.engine.launch import float32_products
from bnrcam.losses import bnr_loss
from bnrcam.scenes import SCENE_CLASSES
from bnrcam.train import (Seeded, TrainingError, fit, restore_scaler, scaler_tensors,
                          train_classifier)


@pytest.fixture
def crops(scenes): return VOCFolder(scenes, 'train', SCENE_CLASSES, train_transform((64, 80), 64))


def products(): return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def test_items_leave_the_generator_of_a_gpu_alone(crops, monkeypatch):
    "Else the network's noise on a GPU depends on whether loader workers draw the items."
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', lambda seed: pytest.fail('seeded the GPU'))
    state = torch.get_rng_state()
    first, again = Seeded(crops, 0)[0], Seeded(crops, 0)[0]
    assert torch.equal(first['image'], again['image']) and torch.equal(state, torch.get_rng_state())


def test_fp16_needs_a_gpu(crops, net, tmp_path):
    if torch.cuda.is_available(): pytest.skip('here is one')
    with pytest.raises(TrainingError, match="'fp16' needs a GPU; on a CPU take 'bf16'"):
        train_classifier(net, crops, 'baseline', tmp_path, epochs=1, lr=1e-4, batch_size=4, seed=0, precision='fp16')


def test_scaler_is_taken_up():
    scaler, other = (torch.amp.GradScaler('cpu', init_scale=scale) for scale in (8., 2.))
    restore_scaler(other, {'weight': torch.ones(2), **scaler_tensors(scaler)})
    assert other.state_dict() == scaler.state_dict() and scaler_tensors(None) == {}
    restore_scaler(other, {'weight': torch.ones(2)})
    assert other.get_scale() == 8


@pytest.mark.parametrize(('precision', 'kind'), [('no', 'ieee'), ('tf32', 'tf32')])
def test_float32_is_float32(crops, net, tmp_path, precision, kind):
    before, seen = products(), set()

    def loss(model, batch):
        seen.add(products())
        return bnr_loss(model(batch['image']), batch['labels'])

    optimizer = torch.optim.SGD(net.parameters(), 1e-4)
    fit(net, crops, loss, optimizer, tmp_path, epochs=1, batch_size=8, seed=0, precision=precision)
    assert seen == {(kind, kind)} and products() == before
    with float32_products(): assert products() == ('ieee', 'ieee')
