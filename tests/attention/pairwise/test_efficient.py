import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.case import Case
from tests.attention.pairwise.test_core import Largest
from visattn import DoubleAttention, EfficientAttention

CASES = [
    Case(
        EfficientAttention,
        options,
        lambda c: 4 * c * c + 4 * c,
        (16_640, 263_168),
        macs=lambda c, h, w, heads=heads: h * w * (4 * c * c + 2 * c * c // heads),
        sums_to_one=sums,
    )
    for options, heads, sums in (
        ({}, 1, [1, (2, 3)]),
        ({"heads": 4}, 4, [None, (2, 3)]),
        ({"normalize": "scaling"}, 1, None),
    )
]


def lively(channels: int = 8, **options: int | str) -> EfficientAttention:
    """In double precision, with nothing small."""
    module = EfficientAttention(channels, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def paper(module: EfficientAttention, x: Tensor) -> Tensor:
    """Section 3.2 of the paper, in loops over heads, positions and features."""
    x, size = x.flatten(2), x.shape[2:]
    y, at = torch.empty_like(x), range(x.shape[2])
    scale = len(at) ** -0.5
    for b in range(x.shape[0]):
        q, k = (
            {i: (layer.weight[:, :, 0] @ x[b, :, i] + layer.bias).chunk(module.heads) for i in at}
            for layer in (module.query, module.key)
        )
        v = {i: module.value(x[b, :, i]).chunk(module.heads) for i in at}
        read: dict[int, list[Tensor]] = {i: [] for i in at}
        for head in range(module.heads):
            if module.normalize == "softmax":
                rho_q = {i: torch.exp(q[i][head]) / torch.exp(q[i][head]).sum() for i in at}
                total = sum(torch.exp(k[i][head]) for i in at)
                rho_k = {i: torch.exp(k[i][head]) / total for i in at}
            else:
                rho_q, rho_k = ({i: scale * each[i][head] for i in at} for each in (q, k))
            context = sum(torch.outer(rho_k[i], v[i][head]) for i in at)
            for i in at:
                read[i].append(context.mT @ rho_q[i])
        for i in at:
            y[b, :, i] = x[b, :, i] + module.out(torch.cat(read[i]))
    return y.unflatten(2, size)


OPTIONS = [{}, {"heads": 2}, {"keys": 4, "values": 6, "heads": 2}, {"normalize": "scaling", "heads": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(2, 3), (3, 5)], ids=["values first", "sums first"])
def test_equals_the_paper_in_loops(options, size):
    module, x = lively(**options), torch.randn(2, 8, *size, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_implies_a_matrix_for_each_head_and_reads_by_it(options):
    module, x = lively(**options), torch.randn(2, 8, 3, 5, dtype=torch.double)
    query, key = (each.flatten(2).unflatten(1, (module.heads, -1)) for each in module.attend(x))
    matrix = query.mT @ key
    rows = matrix.sum(3)
    assert torch.allclose(rows, torch.ones_like(rows)) == (module.normalize == "softmax")
    value = module.value(x.flatten(2).mT).unflatten(2, (module.heads, -1)).transpose(1, 2)
    y = module.out((matrix @ value).transpose(1, 2).flatten(2)).mT.view_as(x)
    torch.testing.assert_close(module(x), x + y, rtol=0, atol=1e-11)


def test_is_double_attention_with_as_many_maps_as_key_features():
    ours, theirs = lively(keys=3, values=4), DoubleAttention(8, reduction=2, maps=3).double()
    with torch.no_grad():
        for one, other in (("query", "distribute"), ("key", "gather"), ("value", "value"), ("out", "out")):
            for name in ("weight", "bias"):
                target = getattr(getattr(theirs, other), name)
                target.copy_(getattr(getattr(ours, one), name).view_as(target))
    x = torch.randn(2, 8, 3, 5, dtype=torch.double)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)


def test_with_one_key_feature_pools_the_map():
    module, x = lively(keys=1), torch.randn(2, 8, 3, 5, dtype=torch.double)
    pooled = (module.attend(x).key * module.value(x.movedim(1, 3)).movedim(3, 1)).sum((2, 3))
    torch.testing.assert_close(module(x), x + module.out(pooled)[..., None, None], rtol=0, atol=1e-11)


def test_does_not_see_where_things_are_but_does_see_the_order_of_channels():
    module, x = lively(), torch.randn(2, 8, 4, 6, dtype=torch.double)
    order, channels = torch.randperm(24), torch.randperm(8)
    shuffled = module(x.flatten(2)[..., order].view_as(x)).flatten(2)
    torch.testing.assert_close(shuffled, module(x).flatten(2)[..., order], rtol=0, atol=1e-11)
    assert (module(x[:, channels]) - module(x)[:, channels]).abs().max() > 0.1


def test_costs_less_than_its_paper_says_on_a_large_map():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        EfficientAttention(64)(torch.randn(1, 64, 16, 24))
    assert counter.get_total_flops() == 2 * (4 * 64 * 64 * 16 * 24 + 2 * 64**3) < 2 * 6 * 64 * 64 * 16 * 24


def test_makes_nothing_larger_than_the_map():
    module, x = EfficientAttention(16), torch.randn(1, 16, 40, 50, requires_grad=True)
    with Largest() as largest:
        module(x).sum().backward()
    assert largest.elements == x.numel()


@pytest.mark.parametrize("options", [{"heads": 3}, {"heads": 0}, {"keys": 6, "heads": 4}, {"values": 6, "heads": 4}])
def test_refuses_heads_that_do_not_divide_keys_and_values(options):
    with pytest.raises(ValueError, match=rf"heads must divide keys=\d+ and values=\d+, got {options['heads']}"):
        EfficientAttention(64, **options)


def test_refuses_an_unknown_norm(unchecked):
    with pytest.raises(ValueError, match="normalize must be softmax or scaling, got 'sigmoid'"):
        EfficientAttention(64, normalize="sigmoid")
