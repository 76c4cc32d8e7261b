import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.case import Case
from tests.attention.pairwise.test_core import Largest
from visattn import ExternalAttention

CASES = [
    Case(
        ExternalAttention,
        {"heads": 1, "tied": tied},
        lambda c, tied=tied: 2 * c * c + 3 * c + (1 if tied else 2) * 64 * c,
        golden,
        macs=lambda c, h, w: 2 * h * w * (c * c + 64 * c),
        sums_to_one=1,
        norm_over="positions",
        small=8,
    )
    for tied, golden in ((False, (16_576, 164_608)), (True, (12_480, 148_224)))
]
CASES += [  # each head sums to one, all of them to four
    Case(
        ExternalAttention,
        {"heads": 4, "expansion": 2},
        lambda c: 4 * c * c + 4 * c + 64 * c,
        (20_736, 279_552),
        macs=lambda c, h, w: 2 * h * w * (2 * c * c + 64 * 2 * c),
        norm_over="positions",
        small=8,
    )
]
FORMS = [{}, {"tied": True}, {"heads": 2}, {"heads": 4, "expansion": 2}, {"slots": 16}]


def lively(channels: int = 8, slots: int = 5, **options: int | bool) -> ExternalAttention:
    """In double precision, with nothing small, in eval mode."""
    module = ExternalAttention(channels, slots=slots, **options).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    nn.init.uniform_(module.norm.running_mean, 0.5, 1.5)
    nn.init.uniform_(module.norm.running_var, 0.5, 1.5)
    return module


def paper(module: ExternalAttention, x: Tensor, order: str = "positions first") -> Tensor:
    """Section 3.2 of the paper and the block of its released code, in loops over heads, positions and slots."""
    x, size = x.flatten(2), x.shape[2:]
    y, at = torch.empty_like(x), range(x.shape[2])
    keys = module.key.weight
    values = keys.mT if module.value is None else module.value.weight
    for b in range(x.shape[0]):
        f = {i: module.query(x[b, :, i]).chunk(module.heads) for i in at}
        read: dict[int, list[Tensor]] = {i: [] for i in at}
        for head in range(module.heads):
            a = {i: torch.exp(keys @ f[i][head]) for i in at}
            if order == "positions first":
                total = sum(a.values())
                a = {i: each / total for i, each in a.items()}
            a = {i: each / (1e-9 + each.sum()) for i, each in a.items()}
            if order != "positions first":
                total = sum(a.values())
                a = {i: each / total for i, each in a.items()}
            for i in at:
                read[i].append(values @ a[i])
        for i in at:
            z = module.out(torch.cat(read[i]))
            norm = module.norm
            z = (z - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            y[b, :, i] = (z + x[b, :, i]).relu()
    return y.unflatten(2, size)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("size", [(1, 2), (3, 4)], ids=["layers", "products"])
def test_equals_the_paper_in_loops(options, size):
    module, x = lively(**options), torch.randn(2, 8, *size, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-10)
        assert (module(x) - paper(module, x, "slots first")).abs().max() > 0.01


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_weights_of_a_head_sum_to_one_over_slots_and_not_over_positions(options):
    module, x = lively(**options), torch.randn(2, 8, 3, 4, dtype=torch.double)
    weights = module.attend(x).view(2, module.heads, -1, 3, 4)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, module.heads, 3, 4, dtype=torch.double))
    assert (weights.sum((3, 4)) - 1).abs().max() > 0.1


def test_does_not_see_where_things_are_but_does_see_the_order_of_channels():
    module, x = lively(), torch.randn(2, 8, 4, 6, dtype=torch.double)
    order, channels = torch.randperm(24), torch.randperm(8)
    shuffled = module(x.flatten(2)[..., order].view_as(x)).flatten(2)
    torch.testing.assert_close(shuffled, module(x).flatten(2)[..., order], rtol=0, atol=1e-11)
    assert (module(x[:, channels]) - module(x)[:, channels]).abs().max() > 0.1


def test_costs_less_than_its_paper_says_on_a_large_map():
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ExternalAttention(256)(torch.randn(1, 256, 16, 24))
    products = 2 * 64 * 256 * 256 + 64 * 256
    assert counter.get_total_flops() == 2 * (2 * 64 * 256 * 16 * 24 + products) < 2 * 2 * (256 + 64) * 256 * 16 * 24


def test_is_linear_in_the_positions():
    module, x = ExternalAttention(16, slots=8), torch.randn(1, 16, 40, 50, requires_grad=True)
    with Largest() as largest:
        module(x).sum().backward()
    assert largest.elements == x.numel()


def test_memories_start_equal_and_are_one_only_if_tied():
    apart, tied = ExternalAttention(8), ExternalAttention(8, tied=True)
    assert torch.equal(apart.value.weight, apart.key.weight.mT)
    assert apart.value.weight.data_ptr() != apart.key.weight.data_ptr()
    twin = copy.deepcopy(tied)
    twin.load_state_dict(tied.state_dict())
    x = torch.randn(2, 8, 3, 4)
    twin.eval()(x).sum().backward()
    assert twin.value is None
    assert twin.key.weight.grad.any()
    assert "value.weight" not in twin.state_dict()


def test_tiny_weights_survive_in_half_precision():
    module, x = ExternalAttention(8).half().eval(), torch.randn(1, 8, 40, 50).half()
    weights = module.attend(x).float()
    torch.testing.assert_close(weights.sum(1), torch.ones(1, 40, 50), rtol=0, atol=0.01)


@pytest.mark.parametrize("heads", [0, 3])
def test_refuses_heads_that_do_not_divide_the_features(heads):
    with pytest.raises(ValueError, match=f"heads must divide the 128 features, got {heads}"):
        ExternalAttention(64, heads=heads, expansion=2)


@pytest.mark.parametrize("name", ["slots", "expansion"])
def test_refuses_nothing(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        ExternalAttention(64, **{name: 0})
