import math

import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import SelfAttention2d

CASES = [
    *(
        Case(
            SelfAttention2d,
            options,
            lambda c: c * c // 2 + 1,
            (2049, 32_769),
            macs=lambda c, h, w: c * c * h * w // 2 + c * (h * w) ** 2 // 4,
            sums_to_one=-1,
        )
        for options in ({}, {"spectral_norm": True})
    ),
    Case(
        SelfAttention2d,
        {"form": "released"},
        lambda c: 5 * c * c // 4 + 1,
        (5121, 81_921),
        macs=lambda c, h, w: 5 * c * c * h * w // 4 + 5 * c * h * w * -(-h // 2) * -(-w // 2) // 8,
        sums_to_one=-1,
    ),
]

FORMS = ["paper", "released"]
either_form = pytest.mark.parametrize("form", FORMS)


def lively(channels: int = 8, form: str = "paper", reduction: int = 4) -> SelfAttention2d:
    """In double precision, with nothing zero."""
    module = SelfAttention2d(channels, form=form, reduction=reduction).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def paper(module: SelfAttention2d, x: Tensor, form: str) -> Tensor:
    """Section 3 of the paper, or its released code, in loops."""
    y = torch.empty_like(x)
    f, g, h, v = (layer.weight[:, :, 0] for layer in (module.key, module.query, module.value, module.out))
    for b in range(x.shape[0]):
        at = [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]
        keys = {(i, j): f @ x[b, :, i, j] for i, j in at}
        values = {(i, j): h @ x[b, :, i, j] for i, j in at}
        if form == "released":
            windows = {(i // 2, j // 2): [(p, q) for p, q in at if (p // 2, q // 2) == (i // 2, j // 2)] for i, j in at}
            keys, values = (
                {to: torch.stack([each[place] for place in of]).amax(0) for to, of in windows.items()}
                for each in (keys, values)
            )
        for i, j in at:
            query = g @ x[b, :, i, j]
            s = {place: math.exp(key @ query) for place, key in keys.items()}
            o = v @ sum(s[place] / sum(s.values()) * values[place] for place in s)
            y[b, :, i, j] = module.gamma * o + x[b, :, i, j]
    return y


@either_form
@pytest.mark.parametrize("size", [(4, 6), (3, 5)])
def test_equals_the_paper_in_loops(form, size):
    module, x = lively(form=form), torch.randn(2, 8, *size, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, form), rtol=0, atol=1e-12)


@either_form
def test_reads_one_from_values_of_one_as_the_wrong_axis_does_not(form):
    module, x = lively(form=form), torch.randn(2, 8, 4, 6, dtype=torch.double)
    x[:, 0] = 1
    with torch.no_grad():
        module.value.weight.zero_()
        module.value.weight[:, 0] = 1
    one = module.gamma * module.out.weight.sum((1, 2))[:, None, None]
    torch.testing.assert_close(module(x), x + one, rtol=0, atol=1e-12)
    columns = module.attend(x).sum(1)  # what each key gives away, which the untransposed form reads
    assert (columns - 1).abs().max() > 0.1


@either_form
def test_reads_the_value_of_a_key_that_dominates(form):
    module, x = lively(form=form), torch.rand(1, 8, 4, 6, dtype=torch.double)
    with torch.no_grad():
        module.query.weight.fill_(1)
        module.key.weight.fill_(1)
    x[:, :, 1, 2] += 10
    weights = module.attend(x)[0]
    at = 1 * 6 + 2 if form == "paper" else 0 * 3 + 1
    torch.testing.assert_close(weights[:, at], torch.ones(24, dtype=torch.double))


@either_form
def test_does_not_see_where_things_are_unless_it_pools(form):
    module, x = lively(form=form), torch.randn(2, 8, 4, 6, dtype=torch.double)
    order = torch.randperm(24)

    def shuffle(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].view_as(x)

    assert torch.allclose(module(shuffle(x)), shuffle(module(x)), rtol=0, atol=1e-11) == (form == "paper")


@either_form
def test_only_the_gain_has_a_gradient_at_init(form):
    module, x, g = SelfAttention2d(64, form=form), torch.randn(2, 64, 5, 7), torch.randn(2, 64, 5, 7)
    assert module.identity_at_init
    module(x).backward(g)
    moving = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad.any()}
    with torch.no_grad():
        module.gamma.fill_(1)
        o = module(x) - x
    assert set(moving) == {"gamma"}
    torch.testing.assert_close(moving["gamma"], (g * o).sum().view(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 7), (4, 6)])
def test_released_form_keeps_the_border_of_an_odd_map(size):
    module, (h, w) = lively(form="released"), size
    x = torch.randn(2, 8, h, w, dtype=torch.double)
    assert module.attend(x).shape == (2, h * w, -(-h // 2) * -(-w // 2))
    assert module(x).shape == x.shape


def test_spectral_norm_bounds_every_layer_in_training():
    module, x = SelfAttention2d(64, spectral_norm=True).train(), torch.randn(2, 64, 5, 7)
    with torch.no_grad():
        for layer in (module.query, module.key, module.value, module.out):
            layer.parametrizations.weight.original.mul_(7)
        for _ in range(50):
            module(x)
    module.eval()
    for layer in (module.query, module.key, module.value, module.out):
        largest = torch.linalg.matrix_norm(layer.weight[:, :, 0], 2)
        torch.testing.assert_close(largest, torch.ones(()), rtol=0.02, atol=0)


def test_refuses_an_unknown_form(unchecked):
    with pytest.raises(ValueError, match="form must be paper or released, got 'biggan'"):
        SelfAttention2d(64, form="biggan")


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        SelfAttention2d(64, reduction=reduction)
