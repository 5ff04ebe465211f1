"""Refinement, noise and their gradients against the equations written out, with all that may differ between blocks."""
import pytest
import torch

from bnrcam.cam import add_noise, attention_map, pooled_noise, refine, strips


pytestmark = pytest.mark.usefixtures('form')


def textbook(cam, queries, keys, order, through):
    "z of M** by N x N matrices; the noise is a constant unless `through`."
    A = attention_map(queries, keys)
    noise = (A if through else A.detach()) / len(queries)
    refined = A @ cam.flatten(2).mT
    for _ in range(order):
        refined = noise @ refined
    return refined.mean(1)


def by_add_noise(cam, queries, keys, order, through):
    return add_noise(refine(cam, queries, keys), queries, keys, order, through=through).mean((-2, -1))


def by_pooled_noise(cam, queries, keys, order, through):
    return pooled_noise(cam, queries, keys, order, through=through)


def inputs(shapes, grid, dtypes=(torch.float64,)):
    "Leaves that want gradients: a CAM of 3 classes, a query and a key for each shape (1, heads, T, d)."
    torch.manual_seed(0)
    parts = [(2 * torch.randn(shape)).to(dtypes[i % len(dtypes)]).requires_grad_()
             for _ in range(2) for i, shape in enumerate(shapes)]
    cam = torch.randn(1, 3, *grid).to(dtypes[0]).requires_grad_()
    return cam, parts[:len(shapes)], parts[len(shapes):]


def value_and_gradients(form, cam, queries, keys, order, through):
    z = form(cam, queries, keys, order, through)
    return [z.detach(), *torch.autograd.grad(z.square().sum(), [cam, *queries, *keys])]


def assert_equal(ours, theirs, tolerance):
    for mine, yours in zip(ours, theirs, strict=True):
        assert (mine - yours).abs().max() <= tolerance * yours.abs().max()


@pytest.mark.parametrize('through', [False, True])
@pytest.mark.parametrize('order', [0, 1, 2, 3])
@pytest.mark.parametrize('shapes', [[(1, 2, 7, 8)] * 3, [(1, 2, 7, 8), (1, 4, 7, 8)], [(1, 2, 7, 8), (1, 2, 7, 4)],
                                    [(1, 1, 7, 16), (1, 4, 7, 4), (1, 2, 7, 8)]])
@pytest.mark.parametrize('written', [by_add_noise, by_pooled_noise])
def test_blocks_of_any_heads(written, shapes, order, through):
    "A block's gradient takes its own scale and its own number of heads."
    leaves = inputs(shapes, (2, 3))
    assert_equal(*[value_and_gradients(f, *leaves, order, through) for f in (written, textbook)], 1e-12)


def test_blocks_of_different_precision():
    "One block in float32 among those in float64: all is computed in float64, and gradients come back as their leaves are."
    cam, queries, keys = leaves = inputs([(1, 2, 7, 8)] * 2, (2, 3), (torch.float64, torch.float32))
    ours = value_and_gradients(by_pooled_noise, *leaves, 1, False)
    assert [g.dtype for g in ours[1:]] == [part.dtype for part in (cam, *queries, *keys)]
    wide = cam, [q.double() for q in queries], [k.double() for k in keys]
    z = textbook(*wide, 1, False)
    assert_equal(ours, [z.detach(), *torch.autograd.grad(z.square().sum(), [cam, *queries, *keys])], 1e-5)  # gradients of float32: 2**-24 each, some terms cancel


@pytest.mark.slow
@pytest.mark.parametrize('through', [False, True])
@pytest.mark.parametrize('pixels', [128, 256, 512, 768])
def test_sizes(pixels, through):
    side = pixels // 16
    leaves = inputs([(1, 2, 1 + side**2, 16)] * 2, (side, side))
    assert_equal(*[value_and_gradients(f, *leaves, 1, through) for f in (by_pooled_noise, textbook)], 1e-10)


def test_strips_are_made_for_the_block_of_most_heads():
    few, many = torch.zeros(1, 1, 5001, 4), torch.zeros(1, 16, 5001, 4)
    assert strips([few, many], 1) == strips([many, few], 1) == strips([many], 1) != strips([few], 1)


def test_gradient_of_the_noise_stops_at_the_cam():
    "With the refined CAM as a constant, nothing reaches the queries: the authors detach the noise."
    cam, queries, keys = inputs([(1, 2, 7, 8)], (2, 3))
    refined = refine(cam, queries, keys).detach().requires_grad_()
    loss = add_noise(refined, queries, keys).square().sum()
    gradients = torch.autograd.grad(loss, [refined, *queries, *keys], allow_unused=True)
    assert gradients[0].abs().max() > 0 and gradients[1:] == (None, None)
