import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import peak
from tests.attention.case import Case
from tests.attention.pairwise.loops import lively, multi_head
from visattn import StridedSelfAttention


def macs(c: int, h: int, w: int, options: dict) -> int:
    """Four projections, and half of the channels for each pattern, the masked pairs of a group among the others."""
    stride = options.get("stride") or w
    blocks = -(-h * w // stride)
    if options.get("pattern") == "fixed":
        pairs = blocks * stride * stride + h * w * blocks * min(options.get("summary", 1), stride)
    else:
        before = stride if options.get("form", "paper") == "paper" else stride - 1
        pairs = blocks * stride * (stride + before) + stride * blocks * blocks
    return 4 * h * w * c * c + pairs * c


CASES = [
    Case(
        StridedSelfAttention,
        options,
        lambda c: 4 * c * c + 4 * c,
        (16_640, 263_168),
        lambda c, h, w, options=options: macs(c, h, w, options),
        sums_to_one=None if options.get("pattern") == "fixed" else -1,  # the first find nobody afar
    )
    for options in ({"heads": 4}, {"heads": 2, "stride": 3, "form": "released"}, {"heads": 4, "pattern": "fixed"})
]


def reaches(pattern: str, form: str, half: int, i: int, j: int, stride: int, summary: int) -> bool:
    """The sets of section 4.2 and 4.3 of the paper; the released code counts the query among the last ones."""
    if pattern == "strided":
        last = max(0, i - stride) if form == "paper" else max(0, i - stride + 1)
        return last <= j <= i if half == 0 else j <= i and (i - j) % stride == 0
    return j <= i and (j // stride == i // stride if half == 0 else j % stride in range(stride - summary, stride))


def test_costs_the_same_with_any_number_of_heads():
    def cost(heads: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            StridedSelfAttention(64, heads=heads)(torch.randn(1, 64, 5, 7))
        return counter.get_total_flops()

    assert cost(2) == cost(4) == cost(8) == 2 * macs(64, 5, 7, {})


@pytest.mark.parametrize("size", [(4, 3), (3, 5), (1, 7), (7, 1)])
@pytest.mark.parametrize(
    ("options", "summary"),
    [
        ({}, 1),
        ({"stride": 2}, 1),
        ({"stride": 4, "form": "released"}, 1),
        ({"pattern": "fixed"}, 1),
        ({"pattern": "fixed", "stride": 4, "summary": 2}, 2),
        ({"pattern": "fixed", "summary": 2}, 2),
    ],
    ids=str,
)
def test_equals_the_paper_in_loops(options, summary, size):
    module = lively(StridedSelfAttention(8, **options))
    x, stride = torch.randn(2, 8, *size, dtype=torch.double), options.get("stride") or size[1]
    pattern, form = options.get("pattern", "strided"), options.get("form", "paper")

    def allowed(head: int, p: tuple[int, int], r: tuple[int, int]) -> bool:
        i, j = p[0] * size[1] + p[1], r[0] * size[1] + r[1]
        return reaches(pattern, form, int(head >= 2), i, j, stride, summary)

    with torch.no_grad():
        torch.testing.assert_close(module(x), multi_head(module, x, allowed), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"form": "released"}, {"stride": 4}, {"pattern": "fixed", "stride": 5}], ids=str
)
def test_two_steps_reach_all_that_came_before(options):
    near, far = StridedSelfAttention(8, heads=2, **options).reach(6, 7).double()
    past = torch.ones(42, 42).tril().bool()
    if options.get("pattern") == "fixed":  # to the end of an earlier block and into it, or within one's own
        assert torch.equal((near + far @ near) > 0, past)
        assert not torch.equal((near @ far) > 0, past)
    else:
        assert torch.equal((near @ far) > 0, past)
        assert torch.equal((far @ near) > 0, past)


def test_one_step_does_not():
    near, far = StridedSelfAttention(8, heads=2).reach(6, 7)
    assert not torch.equal(near | far, torch.ones(42, 42).tril().bool())


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_does_not_see_what_comes_later(pattern):
    module, x = lively(StridedSelfAttention(16, pattern=pattern)), torch.randn(2, 16, 6, 5, dtype=torch.double)
    torch.testing.assert_close(module(x)[:, :, :4], module(x[:, :, :4]), rtol=0, atol=1e-12)
    assert not torch.allclose(module(x)[:, :, 2:], module(x[:, :, 2:]))
    assert not torch.allclose(module(x.flip(2)), module(x).flip(2))


def test_a_row_is_the_default_stride():
    module, x = lively(StridedSelfAttention(16)), torch.randn(2, 16, 6, 5, dtype=torch.double)
    assert torch.equal(module(x), lively_twin(module, stride=5)(x))
    assert not torch.allclose(module(x), lively_twin(module, stride=6)(x))


def lively_twin(module: StridedSelfAttention, **options) -> StridedSelfAttention:
    twin = StridedSelfAttention(16, **options).double()
    twin.load_state_dict(module.state_dict())
    return twin


def test_the_released_code_looks_back_over_one_position_less():
    paper, released = (StridedSelfAttention(8, heads=2, form=form).reach(4, 5) for form in ("paper", "released"))
    assert (paper[0].sum(1).max(), released[0].sum(1).max()) == (6, 5)
    assert torch.equal(paper[1], released[1])


def test_the_first_block_finds_nobody_afar_and_reads_zeros():
    module, x = lively(StridedSelfAttention(16, pattern="fixed")), torch.randn(2, 16, 3, 5, dtype=torch.double)
    weights = module.attend(x.requires_grad_())
    assert not weights[:, 2:, :4].any()
    torch.testing.assert_close(weights[:, 2:, 4:].sum(-1), torch.ones(2, 2, 11, dtype=torch.double))
    module(x).sum().backward()
    assert x.grad.isfinite().all()


def test_makes_no_matrix_of_all_pairs():
    module, x = StridedSelfAttention(64), torch.randn(1, 64, 48, 48, requires_grad=True)

    def train() -> None:
        module(x).sum().backward()

    assert peak(train) < 30 * x.nbytes < 4 * (48 * 48) ** 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "dense"}, "pattern must be strided or fixed, got 'dense'"),
        ({"form": "code"}, "form must be paper or released, got 'code'"),
        ({"pattern": "fixed", "form": "released"}, "form must be paper for the fixed pattern, got 'released'"),
        ({"stride": 0}, "stride must be positive, got 0"),
        ({"summary": 0}, "summary must lie between 1 and stride=None, got 0"),
        ({"stride": 4, "summary": 5}, "summary must lie between 1 and stride=4, got 5"),
        ({"heads": 1}, "heads must be even, half of them for each pattern, got 1"),
        ({"heads": 6}, "heads must divide channels=64, got 6"),
    ],
    ids=str,
)
def test_refuses_what_makes_no_pattern(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        StridedSelfAttention(64, **options)
