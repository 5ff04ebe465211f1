"""Our numbers against those of the public reference code (tests/golden/README.md says how they were made)."""

import numpy as np
import pytest
import timm
import torch
from torchvision import tv_tensors

from bnrcam.cam import add_noise, attention_map, block_attention, refine
from bnrcam.evaluate import confusion_matrix, curve_confusions, iou, score_histogram
from bnrcam.losses import VARIANTS, bnr_loss, noise_logits
from bnrcam.models import create_classifier
from bnrcam.cams import SCALES, CAMs, Views, mirrored_cam, read_cams, refiner, seed_scores, write_cams
from golden.recipe import image
from references import close, filled, golden, names


def recipe_model(size, dtype=torch.float32):
    "A CAM network filled with the recipe's weights."
    return filled(create_classifier(f'conformer_{size}_patch16', 21), dtype)


def batch(file, key='seeds'):
    return torch.stack([torch.from_numpy(image(int(seed), *file['hw'])) for seed in file[key]])


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_state_dict_names_and_shapes(size):
    net = create_classifier(f'conformer_{size}_patch16', 21)
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == names(f'state_transcam_{size}')


@pytest.mark.slow
@pytest.mark.parametrize('size, pixels', [('tiny', 128), ('small', 128), ('tiny', 256), ('small', 256)])
def test_conformer(size, pixels):
    file = golden(f'conformer_{size}_{pixels}')
    net, images = recipe_model(size), batch(file)
    np.testing.assert_allclose(images.abs().double().sum(), file['input_abssum'], rtol=1e-9)
    weights = sum(v.abs().double().sum() for n, v in net.state_dict().items() if not n.endswith('num_batches_tracked'))
    np.testing.assert_allclose(weights, file['weights_abssum'], rtol=1e-9)
    with torch.no_grad():
        out = net(images)
        close(out.cam.mean((-2, -1)), file['conv_logits'], 2e-5)
        close(out.token_logits, file['trans_logits'], 2e-5)
        close(out.cam, file['convcam'], 2e-5)
        close(refine(out.cam, out.queries, out.keys), file['transcam'], 2e-5)
        close(attention_map(out.queries, out.keys), file['attn_sum'], 2e-5 if pixels == 128 else 2e-3)


@pytest.mark.usefixtures('form')
@pytest.mark.slow
@pytest.mark.parametrize('size', ['tiny', 'small'])
def test_conformer_float64(size):
    "Fine enough to tell the batch norms with eps 1e-5 from those with 1e-6."
    file = golden(f'conformer_{size}_128')
    with torch.no_grad():
        out = recipe_model(size, torch.float64)(batch(file).double())
        close(out.cam.mean((-2, -1)), file['conv_logits_f64'], 1e-9)
        close(out.token_logits, file['trans_logits_f64'], 1e-9)
        close(out.cam, file['convcam_f64'], 1e-9)
        close(refine(out.cam, out.queries, out.keys), file['transcam_f64'], 1e-9)
        close(attention_map(out.queries, out.keys), file['attn_sum_f64'], 1e-9)


@pytest.mark.slow
def test_attention_of_each_block():
    file = golden('conformer_small_128')
    with torch.no_grad():
        out = recipe_model('small')(batch(file)[:1])
        for ours, theirs in zip(map(block_attention, out.queries, out.keys), file['attn_blocks'], strict=True):
            close(ours[0], theirs, 2e-5)


def test_imagenet_classifier():
    "The published ImageNet network: linear heads, and stride 2 in the last fusion block."
    file = golden('conformer_cls_small_224')
    net = filled(timm.create_model('conformer_small_patch16'))
    assert {n: tuple(v.shape) for n, v in net.state_dict().items()} == names('state_conformer_small_patch16_1000')
    with torch.no_grad():
        features, token, *_ = net.branches(batch(file))
        close(net.forward_head(features), file['conv_cls'], 2e-5)
        close(net.trans_cls_head(token), file['trans_cls'], 2e-5)
        close(net(batch(file)), (file['conv_cls'] + file['trans_cls']) / 2, 2e-5)


BNR = {'k0': 'noise0', 'k1': 'noise1', 'k2': 'noise2', 'k1x2': 'noise2x'}


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('key', BNR)
def test_bnr_loss(key):
    file = golden('bnr_loss_small_128')
    out, labels = recipe_model('small')(batch(file)), torch.from_numpy(file['labels'])
    refined = refine(out.cam, out.queries, out.keys)
    close(refined.detach(), file['M_star'], 1e-4)
    close(add_noise(refined, out.queries, out.keys).detach(), file['M_2star'], 1e-4)
    close(VARIANTS[BNR[key]].logits(out).detach(), file[f'z_{key}'], 1e-4)
    losses = bnr_loss(out, labels, VARIANTS[BNR[key]])
    for ours, theirs in {'loss_cls': 'L_cls', 'loss_noise': f'L_bg_{key}', 'loss': f'L_{key}'}.items():
        np.testing.assert_allclose(losses[ours].item(), file[theirs], rtol=1e-4)


PRECISION = pytest.mark.parametrize('dtype, suffix, norms, token', [(torch.float32, '', 1e-3, 1e-2),
                                                                   (torch.float64, '_f64', 1e-5, 1e-5)])


def gradients(file, variant, dtype):
    "The losses of recipe-made Conformer-S, the norms of the gradients that the file names, and that of the class token."
    net = recipe_model('small', dtype)
    labels = torch.from_numpy(golden('bnr_loss_small_128')['labels']).to(dtype)
    losses = bnr_loss(net(batch(file).to(dtype)), labels, VARIANTS[variant])
    losses['loss'].backward()
    ours = dict(net.named_parameters())
    return losses, np.array([ours[name].grad.norm().item() for name in file['grad_names']]), net.cls_token.grad.flatten()


@pytest.mark.usefixtures('form')
@PRECISION
def test_authors_loss_and_gradients(dtype, suffix, norms, token):
    """The authors' own code, i2mond/BNR, in which the noise attention is detached. Their file cannot run as it is: a second
    mean over the heads is left out, and `self.avgpooling`, which is defined nowhere, is `self.pooling`."""
    file = golden('bnr_official_small_128')
    losses, grads, cls_token = gradients(file, 'noise1', dtype)
    for ours, theirs in {'loss_cls': 'L_cls', 'loss_noise': 'L_bg', 'loss': 'L'}.items():
        np.testing.assert_allclose(losses[ours].item(), file[theirs + suffix], rtol=1e-4)
    np.testing.assert_allclose(grads, file[f'grad_norms{suffix}'], rtol=norms)
    close(cls_token, file['grad_cls_token_f64'], token)


@pytest.mark.usefixtures('form')
def test_authors_noise():
    file = golden('bnr_official_small_128')
    with torch.no_grad():
        out = recipe_model('small')(batch(file))
        refined = refine(out.cam, out.queries, out.keys)
        close(add_noise(refined, out.queries, out.keys), file['M_2star'], 1e-4)
        close(noise_logits(out), file['z'], 1e-4)


@pytest.mark.usefixtures('form')
@PRECISION
def test_gradients_through_both_factors(dtype, suffix, norms, token):
    "Our variant: its gradients are others than those with the noise attention detached."
    file = golden('bnr_loss_small_128')
    _, grads, cls_token = gradients(file, 'noise1_through', dtype)
    np.testing.assert_allclose(grads, file[f'grad_norms_k1{suffix}'], rtol=norms)
    authors = golden('bnr_official_small_128')
    assert list(authors['grad_names']) == list(file['grad_names'])
    assert np.abs(authors['grad_norms_f64'] / grads - 1).max() > .1
    close(cls_token, file['grad_cls_token_k1_f64'], token)


@pytest.mark.parametrize('photo', ['astronaut', 'cat'])
def test_multi_scale_cams(photo, tmp_path):
    "Through the views, the network and the store, as the cams stage does it."
    file = golden(f'cam_inference_tiny_{photo}')
    item = Views()({'name': photo, 'labels': torch.from_numpy(file['labels']),
                    'image': tv_tensors.Image(torch.from_numpy(file['image']).permute(2, 0, 1))})
    net, classes = recipe_model('tiny'), item['labels'].nonzero().flatten()
    np.testing.assert_array_equal(classes, file['class_ids'])
    with torch.inference_mode():
        maps = [mirrored_cam(refiner(net), item[f'view_{s}'][None])[0, classes] for s in SCALES]
    write_cams(tmp_path / 'one.safetensors', CAMs(classes, tuple(item['size'].tolist()), maps), 'test')
    ours, theirs = seed_scores(read_cams(tmp_path / 'one.safetensors')), file['norm_cam'].astype(np.float32)
    inside = theirs >= 0  # the reference's pixels at the minimum leave [0, 1]; ours are 0
    assert np.abs(ours - theirs)[inside].max() <= 2e-3
    assert (ours[~inside] == 0).all()


def seed_samples(file):
    for index, truth in enumerate(file['gt']):
        mine = file['cam_owner'] == index
        order = np.argsort(file['cam_class'][mine])
        yield truth, file['cam'][mine][order].astype(np.float32), file['cam_class'][mine][order] + 1


def reference_iou(confusions):
    "Percent, a class that is in neither truth nor prediction as 0: the reference's way."
    return 100 * np.nan_to_num(iou(confusions))


def test_threshold_curve():
    file = golden('seed_eval')
    total = sum(score_histogram(*sample, 21, file['thresholds']) for sample in seed_samples(file))
    classes = reference_iou(curve_confusions(total))
    np.testing.assert_allclose(classes, file['class_iou'], atol=1e-9)
    np.testing.assert_allclose(classes.mean(1), file['miou_curve'], atol=1e-9)
    assert classes.mean(1).argmax() == file['best_index']


def test_label_maps():
    file = golden('seed_eval')
    classes = reference_iou(sum(confusion_matrix(*pair, 21) for pair in zip(file['gt'], file['png_pred'])))
    np.testing.assert_allclose(classes, file['png_class_iou'], atol=1e-9)
    np.testing.assert_allclose(classes.mean(), file['png_miou'], atol=1e-9)
