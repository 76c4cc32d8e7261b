import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from tests.attention.loops import chain, dense, lively, logistic, mean, normalise
from visattn import ParallelNetAttention

CASES = [  # in eval the two convolutions are one; as they are trained they take 10 c² multiply-adds a position
    Case(
        ParallelNetAttention,
        {},
        lambda c: 11 * c * c + 6 * c,
        (45_440, 722_432),
        macs=lambda c, h, w: 9 * c * c * h * w + c * c,
        norm_over="positions",
        small=6,
    ),
    Case(
        ParallelNetAttention,
        {"fused": True},
        lambda c: 10 * c * c + 3 * c,
        (41_152, 656_128),
        macs=lambda c, h, w: 9 * c * c * h * w + c * c,
        norm_over="positions",
        small=6,
    ),
]


def paper(module: ParallelNetAttention, x: Tensor) -> Tensor:
    """Section 3.1 of the paper in loops, as the block is trained but with norms as in eval."""
    z = normalise(module.norm, x)
    gate = logistic(dense(module.excite, mean(z)))
    total = chain(module.wide, x) + chain(module.narrow, x)
    for c in range(len(x)):
        total[c] += z[c] * gate[c]
    return total * logistic(total)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_equals_the_paper_in_loops(bias):
    module, x = lively(ParallelNetAttention(4, bias=bias)), torch.randn(2, 4, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), torch.stack([paper(module, image) for image in x]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("channels", "count"), [(64, 45_504), (256, 722_688)])
def test_has_a_bias_a_channel_if_told(channels, count):
    formula = 11 * channels**2 + 7 * channels
    assert sum(p.numel() for p in ParallelNetAttention(channels, bias=True).parameters()) == formula == count


@torch.no_grad()
def test_fused_gives_the_same_with_one_convolution():
    module, x = lively(ParallelNetAttention(64, bias=True)), torch.randn(2, 64, 5, 7, dtype=torch.double)
    fused = module.fuse()
    assert not fused.training
    assert [layer.kernel_size for layer in fused.modules() if isinstance(layer, nn.Conv2d)] == [(3, 3)]
    assert fused.arguments == {"channels": 64, "bias": True, "fused": True}
    torch.testing.assert_close(fused(x), module(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(fused.attend(x), module.attend(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(fused.fuse()(x), module(x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_fused_is_apart_from_what_it_was_made_of():
    module, x = lively(ParallelNetAttention(8)), torch.randn(2, 8, 5, 7, dtype=torch.double)
    fused, before = module.fuse(), module(x)
    for parameter in fused.parameters():
        parameter.zero_()
    assert torch.equal(module(x), before)


def test_trains_each_convolution_with_its_own_norm():
    module, x = ParallelNetAttention(64).double().train(), torch.randn(4, 64, 5, 7, dtype=torch.double)
    skip = nn.functional.batch_norm(x, None, None, module.norm.weight, module.norm.bias, True)
    gate = module.excite(skip.mean((2, 3))).sigmoid()[..., None, None]
    expected = module.wide(x) + module.narrow(x) + skip * gate
    torch.testing.assert_close(module(x), nn.functional.silu(expected), rtol=0, atol=1e-12)
    tracked = [norm.num_batches_tracked.item() for norm in (module.wide[1], module.narrow[1], module.norm)]
    assert tracked == [2, 2, 1]  # the expected value above took one step too, the module one


def test_weights_do_not_see_where_things_are_but_the_convolution_does():
    module, x = lively(ParallelNetAttention(64)), torch.randn(2, 64, 5, 7, dtype=torch.double)
    order = torch.randperm(35)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module.attend(shuffled), module.attend(x), rtol=0, atol=1e-12)
    assert not torch.allclose(module(shuffled), module(x).flatten(2)[..., order].view_as(x))


def test_weighs_the_normalised_map_not_the_map():
    module, x = lively(ParallelNetAttention(64)), torch.randn(2, 64, 5, 7, dtype=torch.double)
    raw = module.excite(x.mean((2, 3))).sigmoid()[..., None, None]
    assert not torch.allclose(module.attend(x), raw, atol=1e-3)
    torch.testing.assert_close(
        module.attend(x), module.excite(module.norm(x).mean((2, 3))).sigmoid()[..., None, None], rtol=0, atol=1e-12
    )


def test_follows_the_map_around_a_torus():
    module, x = lively(ParallelNetAttention(8)).train(), torch.randn(2, 8, 6, 9, dtype=torch.double)
    module.wide[0].padding_mode = "circular"
    module.wide[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    torch.testing.assert_close(module(x.roll((2, 3), (2, 3))), module(x).roll((2, 3), (2, 3)), rtol=0, atol=1e-12)
