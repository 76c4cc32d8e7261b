import itertools
import math

import pytest
import timm
import torch
from timm.layers.lambda_layer import LambdaLayer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.case import Case
from visattn import LambdaAttention, insert


def parameters(c: int, taps: int, heads: int = 4) -> int:
    return c * (heads * 16 + 16 + c // heads) + 2 * heads * 16 + 2 * c // heads + taps * 16


def lambdas(c: int, h: int, w: int, seen: int, heads: int) -> int:
    """Projections, content, positions that each position sees, and one product with the sum of both matrices."""
    return h * w * (c * (heads * 16 + 16 + c // heads) + (1 + seen) * 16 * c // heads + 16 * c)


def weights(c: int, h: int, w: int) -> int:
    """Projections; for each pair in each of four heads its content, its position and what is read.

    So it goes where the weights of a position are no more numbers than its matrix.
    """
    return h * w * (c * (4 * 16 + 16 + c // 4) + h * w * (4 * (16 + 16) + c))


CASES = [
    Case(
        LambdaAttention,
        {"scope": 9},
        lambda c: parameters(c, 9 * 9),
        (7600, 38_416),
        macs=weights,
        norm_over="positions",
        small=8,
    ),
    Case(
        LambdaAttention,
        {"scope": 3, "heads": 8},
        lambda c: parameters(c, 3 * 3, 8),
        (10144, 45_520),
        macs=lambda c, h, w: lambdas(c, h, w, 9, 8),
        norm_over="positions",
        small=8,
    ),
    Case(
        LambdaAttention,
        {"scope": None, "size": (5, 7)},
        lambda c: parameters(c, 9 * 13),
        (8176, 38_992),
        macs=weights,
        norm_over="positions",
        small=8,
    ),
]


def lively(scope: int | None = 3, size: tuple[int, int] = (3, 5), **options: object) -> LambdaAttention:
    """In eval mode and double precision, with nothing zero and no statistics those of a fresh norm."""
    options = {"heads": 2, "width": 3} | options
    module = LambdaAttention(8, scope=scope, size=size, **options).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    for norm in (module.query_norm, module.value_norm):
        nn.init.uniform_(norm.running_mean, 0.5, 1.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module


def paper(module: LambdaAttention, x: Tensor) -> Tensor:
    """Section 3 of the paper, in loops."""
    (h, w), v = x.shape[2:], module.value.out_channels
    middle = [side // 2 for side in module.positions.shape[1:]]
    at = list(itertools.product(range(h), range(w)))
    y = x.new_empty(x.shape[0], 2 * v, h, w)

    def normed(vector: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        return (vector - norm.running_mean) / (norm.running_var + norm.eps) ** 0.5 * norm.weight + norm.bias

    for b in range(x.shape[0]):
        keys = {place: (module.key.weight[:, :, 0, 0] @ x[b, :, place[0], place[1]]).exp() for place in at}
        total = sum(keys.values())
        values = {
            place: normed(module.value.weight[:, :, 0, 0] @ x[b, :, place[0], place[1]], module.value_norm)
            for place in at
        }
        content = sum(torch.outer(keys[place] / total, values[place]) for place in at)
        for i, j in at:
            position = torch.zeros_like(content)
            for m, n in at:
                dy, dx = m - i + middle[0], n - j + middle[1]
                if 0 <= dy < module.positions.shape[1] and 0 <= dx < module.positions.shape[2]:
                    position += torch.outer(module.positions[:, dy, dx], values[m, n])
            queries = normed(module.query.weight[:, :, 0, 0] @ x[b, :, i, j], module.query_norm).chunk(2)
            y[b, :, i, j] = torch.cat([(content + position).mT @ query for query in queries])
    return y


@pytest.mark.parametrize("scope", [1, 3, 7, None])
@pytest.mark.parametrize("out_channels", [None, 12])
@torch.no_grad()
def test_equals_the_paper_in_loops(scope, out_channels):
    module, x = lively(scope, out_channels=out_channels), torch.randn(2, 8, 3, 5).double()
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(module.read(x, weights=module.attend(x)), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", [3, 9, None])
@pytest.mark.parametrize("training", [False, True])
def test_equals_timm_without_its_bias_after_copying_weights(scope, training):
    ours = LambdaAttention(64, scope=scope, size=(6, 8)).train(training)
    theirs = LambdaLayer(64, feat_size=(6, 8), r=scope).train(training)
    with torch.no_grad():
        theirs.qkv.weight.copy_(torch.cat([layer.weight for layer in (ours.query, ours.key, ours.value)]))
        if scope:
            theirs.conv_lambda.weight.copy_(ours.positions[:, None, :, :, None])
            theirs.conv_lambda.bias.zero_()
        else:
            theirs.pos_emb.copy_(ours.positions.permute(1, 2, 0))
    x = torch.randn(2, 64, 6, 8)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)


def test_has_the_scope_of_the_paper():
    for channels in (64, 256):
        assert sum(p.numel() for p in LambdaAttention(channels).parameters()) == parameters(channels, 23 * 23)


@pytest.mark.parametrize(("scope", "bias", "counts"), [(9, 16, (7616, 38_432)), (None, 0, (17_968, 48_784))])
def test_has_the_parameters_of_timm_but_for_its_bias(scope, bias, counts):
    for channels, count in zip((64, 256), counts, strict=True):
        module = LambdaAttention(channels, scope=scope, size=(14, 14))
        assert sum(p.numel() for p in module.parameters()) + bias == count


@pytest.mark.parametrize(("scope", "cost"), [(9, 25_288_704), (None, 48_369_664)])
def test_costs_what_the_paper_says_less_one_product_where_both_matrices_are_summed_first(scope, cost, monkeypatch):
    module = LambdaAttention(256, scope=scope, size=(14, 14)).eval()

    def count() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(torch.randn(1, 256, 14, 14))
        return counter.get_total_flops() // 2

    assert count() == weights(256, 14, 14) < cost  # on a map so small, by weights
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert count() == cost - 196 * 16 * 256


@pytest.mark.parametrize(("heads", "batch", "calls"), [(1, 1, 0), (2, 16, 0), (2, 2, 1)])
def test_is_the_same_by_weights_by_one_product_and_by_a_convolution(heads, batch, calls, monkeypatch):
    module, x = lively(5, heads=heads, width=4), torch.randn(batch, 8, 3, 5).double()
    found, convolve = [], nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda *a, **k: found.append(k) or convolve(*a, **k))
    chosen = module(x)
    assert sum("padding" in options for options in found) == calls
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(module(x), chosen, rtol=0, atol=1e-12)
    assert "padding" in found[-1]
    torch.testing.assert_close(module.read(x, weights=module.attend(x)), chosen, rtol=0, atol=1e-12)


def test_keys_sum_to_one_over_positions_and_not_over_features():
    keys = lively()._keys(torch.randn(2, 8, 3, 5).double())
    torch.testing.assert_close(keys.sum(2), torch.ones(2, 3).double())
    assert not torch.allclose(keys.sum(1), torch.ones(2, 15).double(), atol=0.1)


def test_without_positions_it_does_not_see_where_things_are():
    module, x, order = lively(), torch.randn(2, 8, 3, 5).double(), torch.randperm(15)

    def shuffle(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].view_as(x)

    assert not torch.allclose(module(shuffle(x)), shuffle(module(x)), rtol=0, atol=1e-3)
    nn.init.zeros_(module.positions)
    torch.testing.assert_close(module(shuffle(x)), shuffle(module(x)), rtol=0, atol=1e-12)


def test_positions_reach_as_far_as_the_scope_and_keys_everywhere():
    module, x = lively(3, size=(5, 7)), torch.randn(1, 8, 5, 7).double()
    nn.init.constant_(module.key.weight, 0)  # every key is 1 / 35
    weights = module.attend(x)
    content = module._query(x).sum(3).mT / 35
    differs = (weights - content[..., None]).abs().amax((0, 1)) > 1e-9
    for (i, j), (m, n) in itertools.product(itertools.product(range(5), range(7)), repeat=2):
        assert differs[i * 7 + j, m * 7 + n] == (max(abs(m - i), abs(n - j)) <= 1)


def test_is_not_scaled():
    module, x = lively(), torch.randn(1, 8, 3, 5).double()
    nn.init.zeros_(module.positions)
    query, keys = module._query(x), module._keys(x)
    torch.testing.assert_close(module.attend(x), torch.einsum("bnak,bkm->banm", query, keys))
    assert not torch.allclose(module.attend(x), torch.einsum("bnak,bkm->banm", query, keys) / math.sqrt(3), atol=1e-3)


def test_stride_takes_means():
    module, plain, x = lively(stride=2), lively(), torch.randn(2, 8, 3, 5).double()
    plain.load_state_dict(module.state_dict())
    y = module(x)
    assert y.shape == (2, 8, 2, 3)
    torch.testing.assert_close(y, nn.functional.avg_pool2d(plain(x), 2, ceil_mode=True), rtol=0, atol=1e-12)


def test_takes_the_place_of_every_convolution_of_the_blocks():
    model = insert(timm.create_model("resnet50"), LambdaAttention, input_size=64).eval()
    assert len(model.visattn) == 16
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"size must be the \(height, width\) of the feature map, got None"):
        LambdaAttention(64, scope=None)
    with pytest.raises(ValueError, match="heads must divide out_channels=64, got 7"):
        LambdaAttention(64, heads=7)
    for scope in (0, 4):
        with pytest.raises(ValueError, match=f"scope must be odd and positive or None, got {scope}"):
            LambdaAttention(64, scope=scope)
    for name in ("width", "stride"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            LambdaAttention(64, **{name: 0})
    for call in (LambdaAttention.forward, LambdaAttention.attend):
        with pytest.raises(ValueError, match=r"size must be \(3, 5\) as constructed, got \(5, 3\)"):
            call(lively(None), torch.randn(1, 8, 5, 3).double())
