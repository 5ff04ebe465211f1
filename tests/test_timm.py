"""The Conformers as networks of timm, CAM networks of either kind, and tools that capture them."""
import copy
import hashlib

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg, group_parameters

import bnrcam.models
from bnrcam.cam import block_attention, refine
from bnrcam.conformer import CAMConformer, tie_query_key
from bnrcam.data import DataError
from bnrcam.datasets.download import Download
from bnrcam.engine.weights import tensor_digest
from bnrcam.losses import VARIANTS, bnr_loss
from bnrcam.models import AttentionRecorder, create_classifier
from bnrcam.cams import GraphCAM, refiner
from references import close, filled, golden
from test_parity import batch

NAMES = [f'conformer_{size}_patch16' for size in ('mini', 'tiny', 'small', 'base')]
MINI = NAMES[0]
VITS = {'vit_tiny_patch16_224': 1, 'deit_tiny_distilled_patch16_224': 2,
        'vit_small_patch14_reg4_dinov2': 5, 'vit_small_patch16_18x2_224': None,
        'vit_base_patch16_gap_224': 0, 'eva02_tiny_patch14_224': 1,
        'vit_small_patch16_rope_mixed_224': 1, 'vit_base_patch16_siglip_gap_224': 0}


@pytest.fixture
def plain():
    "A Conformer of timm in eval mode."
    torch.manual_seed(0)
    return timm.create_model(MINI, num_classes=5).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('name', NAMES)
def test_pretrained_cfg(name):
    cfg = get_pretrained_cfg(name)
    data = timm.data.resolve_data_config({}, pretrained_cfg=cfg.to_dict())
    assert data['input_size'] == (3, 224, 224) and data['mean'] == timm.data.IMAGENET_DEFAULT_MEAN
    assert cfg.num_classes == 1000 and cfg.classifier == ('conv_cls_head', 'trans_cls_head')
    assert bool(cfg.url) == (name in bnrcam.models.PUBLISHED)


@torch.no_grad()
def test_logits_features_and_heads(plain, images):
    assert plain(images).shape == (2, 5) and plain.default_cfg['first_conv'] == 'conv1'
    features = plain.forward_features(images)
    assert features.shape == (2, plain.num_features, 2, 3)  # 1/32 of 64 x 96
    assert plain.forward_head(features, pre_logits=True).shape == (2, plain.head_hidden_size)
    conv, token = plain.get_classifier()
    halves = conv(features.mean((-2, -1))), token(plain.branches(images)[1])
    assert torch.allclose(plain(images), sum(halves) / 2, atol=1e-6)
    plain.reset_classifier(0)
    assert torch.equal(plain(images), features.mean((-2, -1)))
    plain.reset_classifier(0, '')
    assert torch.equal(plain(images), features)
    plain.reset_classifier(3, 'avg')
    assert plain(images).shape == (2, 3) and plain.num_classes == 3


@torch.no_grad()
def test_intermediates_and_features_only(plain, images):
    last, maps = plain.forward_intermediates(images)
    sizes = [(i['num_chs'], 64 // i['reduction'], 96 // i['reduction']) for i in plain.feature_info]
    assert [tuple(m.shape[1:]) for m in maps] == sizes and [s[1] for s in sizes] == [16, 8, 4, 2]
    assert torch.equal(last, plain.forward_features(images)) and torch.equal(last, maps[-1])
    for indices, levels in (([0], [0]), (1, [3]), (2, [2, 3]), ((0, -2), [0, 2])):
        some = plain.forward_intermediates(images, indices, stop_early=True, intermediates_only=True)
        assert all(map(torch.equal, some, [maps[level] for level in levels]))
    net = timm.create_model(MINI, features_only=True, out_indices=(1, 3)).eval()
    assert net.feature_info.channels() == [128, 256] and net.feature_info.reduction() == [8, 32]
    assert [m.shape[1] for m in net(images)] == [128, 256]
    with pytest.raises(ValueError, match='NCHW'):
        plain.forward_intermediates(images, output_fmt='NLC')


def test_arguments_of_timm(images):
    net = timm.create_model(MINI, num_classes=4, in_chans=1, drop_rate=.5, img_size=96).train()
    assert net.head_drop.p == .5 and net(images[:, :1]).shape == (2, 4)
    pooled = timm.create_model(MINI, num_classes=0).eval()
    unpooled = timm.create_model(MINI, num_classes=0, global_pool='').eval()
    with torch.no_grad():
        assert pooled(images).dim() == 2 and unpooled(images).dim() == 4
    for wrong, words in ({'img_size': 100}, 'multiple of 16'), ({'global_pool': 'max'}, "'max'"), \
            ({'global_pool': ''}, 'num_classes must be 0'):
        with pytest.raises(ValueError, match=words):
            timm.create_model(MINI, **wrong)


@torch.no_grad()
def test_pruning(plain, images):
    "What comes behind the last level that somebody asked for is gone, and the rest as it was."
    for level, wanted in enumerate(plain.forward_intermediates(images)[1]):
        pruned = copy.deepcopy(plain)
        assert pruned.prune_intermediate_layers([level], prune_norm=True) == [level]
        assert torch.equal(pruned.forward_features(images), wanted)
        assert len(pruned.blocks) + 1 == [2, 4, 5, 6][level]
    plain.reset_classifier(0, '')
    plain.reset_classifier(3)
    assert plain(images).shape == (2, 3) and not any(head.training for head in plain.get_classifier())


def test_device_and_dtype(images):
    "As timm's networks since 1.0.2x take them; without them, the same weights."
    half = timm.create_model(MINI, num_classes=4, device='cpu', dtype=torch.bfloat16).eval()
    assert half(images.bfloat16()).dtype == torch.bfloat16
    half.reset_classifier(3)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    torch.manual_seed(0)
    doubled = timm.create_model(MINI, num_classes=5, dtype=torch.float64)
    torch.manual_seed(0)
    plain = timm.create_model(MINI, num_classes=5)
    assert all(map(torch.equal, doubled.parameters(), plain.double().parameters()))
    empty = [timm.create_model(name, device='meta', dtype=torch.float16) for name in (MINI, NAMES[1])]
    with torch.device('meta'):
        empty.append(create_classifier(MINI, 7))
    assert all(weight.is_meta for net in empty for weight in net.parameters())


def test_every_parameter_learns_and_belongs_to_a_group(plain, images):
    plain.train().set_grad_checkpointing()
    plain(images).mean().backward()
    assert all(weight.grad is not None for weight in plain.parameters())
    groups = group_parameters(plain, plain.group_matcher())
    assert len(groups) == 1 + 6 + 1 and sum(map(len, groups.values())) == len([*plain.parameters()])
    assert {'conv1.weight', 'cls_token'} <= set(groups[0]) and plain.no_weight_decay() == {'cls_token'}
    assert groups[len(groups) - 1] == ['trans_cls_head.weight', 'trans_cls_head.bias',
                                                    'conv_cls_head.weight', 'conv_cls_head.bias']


@pytest.mark.slow
def test_pretrained_weights(tmp_path, monkeypatch):
    "Published logits from the published file, once it is in its place; a line that names it, before."
    name = 'conformer_small_patch16'
    state = filled(timm.create_model(name)).state_dict()
    source = Download('https://localhost:1/small.pth', digest='sha256:0123')
    monkeypatch.setitem(bnrcam.models.PUBLISHED, name, source)
    with pytest.raises(DataError) as error:
        timm.create_model(name, pretrained=True, cache_dir=tmp_path)
    assert source.url in str(error.value) and str(tmp_path / 'small.pth') in str(error.value)
    assert '\n' not in str(error.value)
    torch.save({'model': state}, tmp_path / 'small.pth')
    with pytest.raises(DataError, match='small.pth'):  # another file
        timm.create_model(name, pretrained=True, cache_dir=tmp_path)
    digest = hashlib.sha256((tmp_path / 'small.pth').read_bytes()).hexdigest()
    monkeypatch.setitem(bnrcam.models.PUBLISHED, name, Download(source.url, digest=f'sha256:{digest}'))
    net = timm.create_model(name, pretrained=True, cache_dir=tmp_path).eval()
    file = golden('conformer_cls_small_224')
    with torch.no_grad():
        close(net(batch(file)), (file['conv_cls'] + file['trans_cls']) / 2, 2e-5)
    cam = timm.create_model(name, pretrained=True, cache_dir=tmp_path, num_classes=7, in_chans=1,
                            network=CAMConformer)
    assert torch.equal(cam.trans_norm.weight, net.trans_norm.weight)
    assert torch.allclose(cam.conv1.weight, net.conv1.weight.sum(1, keepdim=True))


def mixed(net):
    "A number that any other value, or order of values, of the weights would change; rounding by 1e-5 at most."
    flat = torch.cat([value.double().flatten() for value in net.state_dict().values()])
    return (flat * torch.arange(len(flat), dtype=torch.double).cos()).sum().item()


def test_random_weights_of_the_cam_network():
    "The same draws, in the same order, for the same seed as ever: stored studies stay valid."
    torch.manual_seed(0)
    net = create_classifier({'name': MINI, 'drop_path_rate': .6}, 7)
    assert mixed(net) == pytest.approx(22.137577, abs=1e-3)
    assert torch.rand(1).item() == 0.471369206905365  # and nothing beside the weights was drawn
    tie_query_key(net)
    assert mixed(net) == pytest.approx(144.58998, abs=1e-3)


def test_start(tmp_path):
    net, other = create_classifier(MINI, 7), timm.create_model(MINI)
    torch.save(other.state_dict(), tmp_path / 'imagenet.pth')
    torch.save(net.state_dict(), tmp_path / 'own.pth')
    started = create_classifier(MINI, 7, tmp_path / 'imagenet.pth')
    assert torch.equal(started.conv1.weight, other.conv1.weight) and len(started.left_out) == 4
    again = create_classifier(MINI, 7, tmp_path / 'own.pth')
    assert again.left_out == [] and tensor_digest(again.state_dict()) == tensor_digest(net.state_dict())


def test_start_of_a_transformer(tmp_path):
    model = {'name': 'vit_tiny_patch16_224', 'depth': 1}
    net, other = create_classifier(model, 7), timm.create_model('vit_tiny_patch16_224', depth=1)
    torch.save(other.state_dict(), tmp_path / 'imagenet.pth')
    torch.save(net.state_dict(), tmp_path / 'own.pth')
    started = create_classifier(model, 7, tmp_path / 'imagenet.pth')
    assert torch.equal(started.body.pos_embed, other.pos_embed) and started.left_out == []
    again = create_classifier(model, 7, tmp_path / 'own.pth')
    assert tensor_digest(again.state_dict()) == tensor_digest(net.state_dict())


@pytest.mark.parametrize('name', [name for name, prefix in VITS.items() if prefix is not None])
def test_attention_of_a_transformer(name):
    "Values mixed by the attention of the output's queries and keys are what enters each projection."
    net = create_classifier({'name': name, 'depth': 2}, 3).eval()
    patch, caught = net.body.patch_embed.patch_size[0], []
    for block in net.body.blocks:
        block.attn.proj.register_forward_pre_hook(lambda layer, args: caught.append(args[0]))
    with torch.no_grad(), AttentionRecorder() as recorder:
        out = net(torch.randn(2, 3, 4 * patch, 3 * patch))
    assert out.prefix_tokens == VITS[name] == net.body.num_prefix_tokens
    assert out.cam.shape == (2, 3, 4, 3) and not out.token_logits.any()
    for q, k, call, mixed in zip(out.queries, out.keys, recorder.calls, caught, strict=True):
        expected = (q @ k.mT / q.shape[-1]**.5).softmax(-1) @ call.value
        assert torch.allclose(expected.transpose(1, 2).flatten(2), mixed, atol=1e-5)


def test_a_transformer_on_a_stem_of_convolutions():
    "Its patch is one of the stem's map, 32 pixels."
    net = create_classifier({'name': 'vit_small_r26_s32_224', 'depth': 1}, 3).eval()
    with torch.no_grad(): assert net(torch.randn(1, 3, 96, 64)).cam.shape == (1, 3, 3, 2)


def test_scale_of_the_block():
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with AttentionRecorder() as recorder:
        mixed = F.scaled_dot_product_attention(q, k, v, scale=.3)
    call, = recorder.calls
    assert torch.allclose(call.expected, mixed, atol=1e-6)
    assert torch.allclose(block_attention(call.query, k), (q @ k.mT * .3).softmax(-1).mean(1))


@pytest.mark.slow
@pytest.mark.parametrize('name, why', [
    ('xcit_nano_12_p16_224', 'attention'), ('cait_xxs24_224', 'attention'),
    ('beit_base_patch16_224', 'bias'), ('resnet18', 'no transformer blocks'),
    ('vit_small_patch16_18x2_224', '36 attentions in 18 blocks'),
    ('swin_tiny_patch4_window7_224', 'blocks'), ('efficientnet_b0', 'its interface is not that of a vision transformer')])
def test_other_attention_is_refused(name, why):
    with pytest.raises(ValueError, match=f'{name}: no CAM network, .*{why}') as error:
        create_classifier(name, 7)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['vit_small_patch14_reg4_dinov2', 'vit_base_patch16_gap_224'])
def test_loss_and_refinement_of_a_transformer(name):
    net = create_classifier({'name': name, 'depth': 2}, 4)
    patch = net.body.patch_embed.patch_size[0]
    tie_query_key(net)
    net.set_grad_checkpointing()
    images, labels = torch.randn(2, 3, 3 * patch, 4 * patch), torch.eye(3)[:2]
    out = net(images)
    weights = [block.attn.qkv.weight for block in net.body.blocks]
    loss = bnr_loss(out._replace(cam=out.cam.detach()), labels, VARIANTS['noise1'])['loss_noise']
    assert all(grad.any() for grad in torch.autograd.grad(loss, weights))
    with torch.no_grad():
        seed = refiner(net.eval())(images)
        out = net(images)
        assert torch.equal(seed, refine(out.cam, out.queries, out.keys, out.prefix_tokens))


def cam_network(name):
    "A small CAM network of either kind, in eval mode, whose attention is not flat."
    torch.manual_seed(0)
    net = create_classifier({'name': name, 'depth': 3}, 4)
    tie_query_key(net)
    return net.eval()


def sizes(patch):
    "Batches of two and more images, of three patches and more a side."
    dim = torch.export.Dim
    return {0: dim('batch', min=2), 2: patch * dim('rows', min=3), 3: patch * dim('columns', min=3)}


def equal(ours, theirs):
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def check_graph(net, run, patch):
    "Logits, CAM and refined CAM of `run`, a graph, on another batch and size than it was made with."
    images = torch.randn(3, 3, 5 * patch, 4 * patch)
    with torch.no_grad():
        out, (logits, cam, refined) = net(images), run(images)
        equal(logits, out.logits)
        equal(cam, out.cam)
        equal(refined, refine(out.cam, out.queries, out.keys, out.prefix_tokens))


@pytest.mark.slow
@pytest.mark.parametrize('name, patch', [(MINI, 16), ('vit_tiny_patch16_224', 16),
                                         ('vit_small_patch14_reg4_dinov2', 14)])
def test_export(name, patch):
    net, images = cam_network(name), torch.randn(2, 3, 4 * patch, 3 * patch)
    with torch.no_grad():
        graph = torch.export.export(GraphCAM(net), (images,), dynamic_shapes=[sizes(patch)])
    check_graph(net, graph.module(), patch)


@pytest.mark.slow
def test_export_of_the_network_itself(images):
    "As a user would: no wrapper, no context."
    net = cam_network(MINI)
    graph = torch.export.export(net, (images,)).module()
    with torch.no_grad():
        for ours, theirs in zip(graph(images)[:2], net(images)[:2], strict=True):
            equal(ours, theirs)


@pytest.mark.parametrize('name, patch', [(MINI, 16)])
def test_onnx(name, patch, tmp_path):
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    net, images = cam_network(name), torch.randn(2, 3, 4 * patch, 3 * patch)
    torch.onnx.export(GraphCAM(net), (images,), tmp_path / 'cam.onnx', dynamo=True,
                      dynamic_shapes=[sizes(patch)])
    session = runtime.InferenceSession(tmp_path / 'cam.onnx')
    feed = lambda x: session.run(None, {session.get_inputs()[0].name: x.numpy()})
    check_graph(net, lambda x: map(torch.from_numpy, feed(x)), patch)


@pytest.mark.slow
def test_compile(images):
    net = cam_network(MINI)
    compiled = torch.compile(net, backend='aot_eager', fullgraph=True)
    labels = torch.eye(3)[:2]
    ours, theirs = compiled(images), net(images)
    equal(ours.cam, theirs.cam)
    gradients = [torch.autograd.grad(bnr_loss(out, labels)['loss'], net.conv1.weight)[0]
                 for out in (ours, theirs)]
    equal(*gradients)


@pytest.mark.parametrize('make', [lambda: timm.create_model(MINI, num_classes=4).eval(),
                                  lambda: cam_network(MINI)])
def test_fx(make, images):
    net = make()
    graph = torch.fx.symbolic_trace(net)
    with torch.no_grad():
        for size in (images, images[:1, :, :48]):  # another batch and another size
            ours, theirs = graph(size), net(size)
            assert torch.equal(getattr(ours, 'cam', ours), getattr(theirs, 'cam', theirs))
    with pytest.raises(ValueError, match='multiple of 16'):
        graph(images[:, :, :50])


def test_feature_extraction_of_torchvision(plain, images):
    from torchvision.models.feature_extraction import create_feature_extractor
    extractor = create_feature_extractor(plain, {'last_map': 'map', 'conv_trans_2': 'early'})
    with torch.no_grad():
        assert torch.equal(extractor(images)['map'], plain.forward_features(images))


def test_jit_trace(images):
    net = GraphCAM(cam_network(MINI))
    with torch.no_grad():
        traced = torch.jit.trace(net, images, check_trace=False)
        for ours, theirs in zip(traced(images), net(images), strict=True):
            equal(ours, theirs)


def class_activation(net, features, channel):
    "The textbook CAM of a network whose logits come from pooled features by a linear layer."
    weights = net.conv_cls_head.weight[channel]
    return torch.einsum('bchw,c->bhw', features, weights).detach()


def stretched(maps):
    "Maps (B, h, w), as (B, N) between 0 and 1."
    maps = maps.flatten(1)
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return (maps - low) / (high - low)


def test_torchcam(plain, images):
    "torch-cam, of the extra `dev`."
    torchcam = pytest.importorskip('torchcam.methods')
    ours = class_activation(plain, plain.forward_features(images), 2)
    for extractor, maps in ((torchcam.CAM(plain, 'last_map', fc_layer='conv_cls_head'), ours),
                            (torchcam.GradCAM(plain, 'last_map'), ours.clamp(min=0))):
        with extractor:
            theirs, = extractor(2, plain(images))
        assert torch.allclose(stretched(theirs), stretched(maps), atol=1e-4)


def test_pytorch_grad_cam(plain, images):
    "Where a person has installed grad-cam: it needs OpenCV and scikit-learn, 70 MB."
    gradcam = pytest.importorskip('pytorch_grad_cam')
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    with gradcam.GradCAM(plain, [plain.last_map]) as extractor:
        theirs = torch.from_numpy(extractor(images, [ClassifierOutputTarget(2)] * 2))
    maps = class_activation(plain, plain.forward_features(images), 2).clamp(min=0)[:, None]
    ours = F.interpolate(maps, images.shape[-2:], mode='bilinear')[:, 0]
    assert torch.allclose(stretched(theirs), stretched(ours), atol=.02)
