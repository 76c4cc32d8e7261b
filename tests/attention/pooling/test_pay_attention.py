import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.case import Case
from visattn import PayAttention

CASES = [
    Case(PayAttention, {}, lambda c: c, (64, 256), macs=lambda c, h, w: 2 * c * h * w + c, sums_to_one=(2, 3)),
    Case(
        PayAttention,
        {"compatibility": "dot"},
        lambda c: 0,
        (0, 0),
        macs=lambda c, h, w: 2 * c * h * w,
        sums_to_one=(2, 3),
    ),
    Case(PayAttention, {"normalise": "sigmoid"}, lambda c: c, (64, 256), macs=lambda c, h, w: 2 * c * h * w + c),
]
FORMS = [(c, n) for c in ("parametrised", "dot") for n in ("softmax", "sigmoid")]


def lively(channels: int = 4, width: int = 6, **options) -> PayAttention:
    module = PayAttention(channels, global_channels=width, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def inputs(channels: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(2, channels, 3, 5, dtype=torch.double), torch.randn(2, width, dtype=torch.double)


def paper(module: PayAttention, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """What one image is read as, and where, in loops."""
    local = [x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])]
    if module.projector is not None:
        local = [module.projector.weight @ one for one in local]
    scores = [(one @ g if module.score is None else module.score.weight[0] @ (one + g)).item() for one in local]
    if module.normalise == "softmax":
        powers = [math.exp(s) for s in scores]
        weights = [p / sum(powers) for p in powers]
    else:
        weights = [1 / (1 + math.exp(-s)) / len(scores) for s in scores]
    return sum(a * one for a, one in zip(weights, local, strict=True)), torch.tensor(weights, dtype=torch.double)


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize(("compatibility", "normalise"), FORMS)
def test_equals_the_paper_in_loops(compatibility, normalise, width):
    module = lively(width=width, compatibility=compatibility, normalise=normalise)
    x, g = inputs(width=width)
    y, weights = module(x, g), module.attend(x, g)
    assert (module.projector is None) == (width == 4)
    for b in range(2):
        read, looked = paper(module, x[b], g[b])
        torch.testing.assert_close(y[b], read, rtol=0, atol=1e-12)
        scale = 1 if normalise == "softmax" else 15
        torch.testing.assert_close(weights[b].flatten(), scale * looked, rtol=0, atol=1e-12)


def test_without_a_global_vector_the_mean_of_the_map_asks():
    module, x = lively(width=4, compatibility="dot"), inputs()[0]
    assert torch.equal(module(x), module(x, x.mean((2, 3))))


def test_the_parametrised_softmax_does_not_depend_on_what_asks_and_all_others_do():
    x, g = inputs()
    for compatibility, normalise in FORMS:
        module = lively(compatibility=compatibility, normalise=normalise)
        alike = torch.allclose(module.attend(x, g), module.attend(x, g.flip(0) + 1), rtol=0, atol=1e-6)
        assert alike == ((compatibility, normalise) == ("parametrised", "softmax"))


def test_without_a_score_the_mean_is_read():
    module, (x, g) = lively(), inputs()
    nn.init.zeros_(module.score.weight)
    torch.testing.assert_close(module(x, g), module.projector(x.mean((2, 3))))


def test_what_asks_is_not_read():
    module, (x, g) = lively(compatibility="dot"), inputs()
    weights = module.attend(x, g)
    assert torch.equal(module.read(x, g, weights=weights), module.read(x, g + 1, weights=weights))


def test_does_not_see_where_things_are_but_which_channel_is_which():
    module, (x, g) = lively(), inputs()
    torch.testing.assert_close(module(x.flip(2, 3), g), module(x, g), rtol=0, atol=1e-12)
    assert not torch.allclose(module(x.flip(1), g), module(x, g))


def test_the_map_itself_is_not_projected():
    module, (x, g) = PayAttention(64, global_channels=128).eval(), inputs(64, 128)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x[:1].float(), g[:1].float())
    assert counter.get_total_flops() // 2 == 2 * 64 * 15 + 2 * 64 * 128 + 128


def test_says_what_does_not_fit(unchecked):
    with pytest.raises(ValueError, match="compatibility must be parametrised or dot, got 'pc'"):
        PayAttention(64, compatibility="pc")
    with pytest.raises(ValueError, match="normalise must be softmax or sigmoid, got 'none'"):
        PayAttention(64, normalise="none")
    with pytest.raises(ValueError, match="g must be given: the mean of the map is not 6 wide"):
        lively()(inputs()[0])
