import math

import pytest
import torch
from torch import Tensor

from benchmarks.measure import peak
from tests.attention.case import Case
from tests.attention.pairwise.loops import lively
from visattn import StandAloneSelfAttention


def macs(c: int, h: int, w: int, window: int) -> int:
    """Three projections, two of them of the zeros beyond the border too; blocks of up to window + 1 queries a side.

    The paper's formula counts the k² pairs of a query, here a block reads the union of its windows.
    """
    blocks = [math.ceil(side / math.ceil(side / (window + 1))) for side in (h, w)]
    queries = math.prod(math.ceil(side / block) * block for side, block in zip((h, w), blocks, strict=True))
    rows, columns = (block + window - 1 for block in blocks)
    return (3 * h * w + 2) * c * c + queries * (4 * rows * columns + rows + columns) * c // 2


CASES = [
    Case(
        StandAloneSelfAttention,
        options,
        lambda c, window=window: 3 * c * c + c * window,
        golden,
        lambda c, h, w, window=window: macs(c, h, w, window),
        grid=(9, 11) if window == 7 else (5, 7),  # more than one block, or an exported graph is for one alone
        sums_to_one=-1 if options.get("border") == "mask" else None,
    )
    for options, window, golden in (
        ({}, 7, (12_736, 198_400)),
        ({"window": 3, "border": "mask"}, 3, (12_480, 197_376)),
    )
]
either_border = pytest.mark.parametrize("border", ["zero", "mask"])


def paper(module: StandAloneSelfAttention, x: Tensor, window: int, border: str) -> Tensor:
    """Equation 3 and section 3.2 of the paper, in loops."""
    heads, out, radius = module.heads, module.query.out_features, window // 2
    width, (b, _, h, w) = out // heads, x.shape
    y = torch.zeros(b, out, h, w, dtype=x.dtype)
    for sample in range(b):
        for i in range(h):
            for j in range(w):
                for head in range(heads):
                    part = slice(head * width, (head + 1) * width)
                    q = module.query.weight[part] @ x[sample, :, i, j]
                    e, values = [], []
                    for da in range(-radius, radius + 1):
                        for db in range(-radius, radius + 1):
                            inside = 0 <= i + da < h and 0 <= j + db < w
                            if not inside and border == "mask":
                                continue
                            at = x[sample, :, i + da, j + db] if inside else torch.zeros(x.shape[1], dtype=x.dtype)
                            r = torch.cat((module.rows[head, da + radius], module.columns[head, db + radius]))
                            e.append(math.exp(q @ (module.key.weight[part] @ at) + q @ r))
                            values.append(module.value.weight[part] @ at)
                    y[sample, part, i, j] = sum(weight * value for weight, value in zip(e, values, strict=True)) / sum(
                        e
                    )
    return y


@either_border
@pytest.mark.parametrize(("window", "size", "out"), [(3, (4, 6), 8), (5, (3, 2), 8), (3, (5, 1), 12)])
def test_equals_the_paper_in_loops(border, window, size, out):
    module = lively(StandAloneSelfAttention(8, out_channels=out, window=window, heads=2, border=border), 0.4)
    x = torch.randn(2, 8, *size, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, window, border), rtol=0, atol=1e-12)


def test_weighs_zeros_beyond_the_border_unless_they_are_masked():
    x = torch.randn(1, 16, 5, 7, dtype=torch.double)
    for border in ("zero", "mask"):
        total = lively(StandAloneSelfAttention(16, window=3, border=border), 0.1).attend(x).sum(-1).view(8, 5, 7)
        inner = torch.ones_like(total[:, 1:-1, 1:-1])
        torch.testing.assert_close(total[:, 1:-1, 1:-1], inner)
        assert (total[:, 0] < 0.999).all() == (border == "zero")


@either_border
def test_a_window_of_one_is_a_projection(border):
    module = lively(StandAloneSelfAttention(16, window=1, border=border))
    x = torch.randn(2, 16, 5, 7, dtype=torch.double)
    torch.testing.assert_close(module(x), module.value(x.movedim(1, -1)).movedim(-1, 1), rtol=0, atol=1e-12)


def test_moves_with_the_map_and_tells_left_from_right():
    module, x = lively(StandAloneSelfAttention(16, window=3)), torch.randn(2, 16, 9, 11, dtype=torch.double)
    moved = module(x.roll((1, 2), (2, 3)))
    torch.testing.assert_close(moved[:, :, 2:-1, 3:-1], module(x)[:, :, 1:-2, 1:-3], rtol=0, atol=1e-12)
    assert not torch.allclose(module(x.flip(3)), module(x).flip(3))
    with torch.no_grad():
        module.columns.copy_(module.columns.flip(1))
    turned = module(x.flip(3)).flip(3)
    with torch.no_grad():
        module.columns.copy_(module.columns.flip(1))
    torch.testing.assert_close(turned, module(x), rtol=0, atol=1e-12)


def test_rows_and_columns_swap_with_their_vectors():
    module, x = lively(StandAloneSelfAttention(16, window=3)), torch.randn(2, 16, 5, 7, dtype=torch.double)
    twin = lively(StandAloneSelfAttention(16, window=3))
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        for layer in (twin.query, twin.key):  # the halves of each head's features change places
            layer.weight.copy_(layer.weight.unflatten(0, (8, 2, 1)).flip(1).flatten(0, 2))
        twin.rows.copy_(module.columns)
        twin.columns.copy_(module.rows)
    torch.testing.assert_close(twin(x.mT), module(x).mT, rtol=0, atol=1e-12)
    assert not torch.allclose(module(x.mT), module(x).mT)


def test_sums_over_the_channels_of_a_head_as_a_known_port_does_not():
    module, x = lively(StandAloneSelfAttention(16, window=3, heads=1)), torch.randn(1, 16, 5, 7, dtype=torch.double)
    weights = module.attend(x)
    assert weights.shape == (1, 1, 35, 35)  # one weight a pair, for all channels of the head
    value = module.value(x.movedim(1, -1)).flatten(1, 2)
    torch.testing.assert_close(module(x), (weights[:, 0] @ value).mT.view_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("stride", "size"), [(2, (5, 7)), (2, (6, 4)), (3, (7, 8))])
def test_a_stride_takes_means_and_has_the_size_of_a_convolution(stride, size):
    module = lively(StandAloneSelfAttention(16, window=3, stride=stride, out_channels=32))
    x = torch.randn(2, 16, *size, dtype=torch.double)
    dense = lively(StandAloneSelfAttention(16, window=3, out_channels=32))
    dense.load_state_dict(module.state_dict())
    y, full = module(x), dense(x)
    assert y.shape == torch.nn.Conv2d(16, 32, 3, stride, 1)(x.float()).shape
    first = full[:, :, :stride, :stride].mean((2, 3))
    torch.testing.assert_close(y[:, :, 0, 0], first, rtol=0, atol=1e-12)
    i, j = y.shape[2] - 1, y.shape[3] - 1
    corner = full[:, :, i * stride :, j * stride :].mean((2, 3))
    torch.testing.assert_close(y[:, :, i, j], corner, rtol=0, atol=1e-12)
    torch.testing.assert_close(y, module.read(x, weights=module.attend(x)), rtol=0, atol=1e-12)


def test_what_fills_up_a_block_reaches_something_or_its_weights_have_no_gradient():
    module, x = lively(StandAloneSelfAttention(16, window=3, border="mask")), torch.randn(1, 16, 5, 7).double()
    gradients = []
    for y in (module(x), module.read(x, weights=module.attend(x))):
        gradients.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@either_border
def test_reads_the_same_with_gradients_and_without(border):
    module = lively(StandAloneSelfAttention(16, window=3, border=border), 0.3)
    x = torch.randn(2, 16, 9, 10, dtype=torch.double)
    y = module(x)
    assert y.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(module(x), y, rtol=0, atol=1e-12)


def test_makes_no_matrix_of_all_pairs():
    module, x = StandAloneSelfAttention(64, window=3, heads=4), torch.randn(1, 64, 64, 64, requires_grad=True)

    def train() -> None:
        module(x).sum().backward()

    assert peak(train) < 32 * x.nbytes < 4 * 4096**2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "window must be odd, got 4"),
        ({"heads": 5}, "heads must divide out_channels=64, got 5"),
        ({"heads": 64}, "heads must divide out_channels=64 into even parts, got 64"),
        ({"stride": 0}, "stride must be positive, got 0"),
        ({"border": "clamp"}, "border must be zero or mask, got 'clamp'"),
    ],
    ids=str,
)
def test_refuses_what_is_no_window(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        StandAloneSelfAttention(64, **options)
