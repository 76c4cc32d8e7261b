import pytest
import torch
from torch import nn

from visattn.models.at_once import AtOnce


def test_gradients_are_those_of_layers_step_by_step():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5, bias=False)]).double()
    x = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)

    def run():
        y, total = x, 0.0
        for t in range(4):
            y = layers[0](y).tanh() + layers[1](y)
            y = y[:, : 3 - t // 2]  # fewer rows, later
            total = total + y.square().sum()
        return total

    wanted = [x, *layers.parameters()]
    expected = torch.autograd.grad(run(), wanted)
    with AtOnce(4):
        total = run()
    torch.testing.assert_close(torch.autograd.grad(total, wanted), expected, rtol=1e-12, atol=1e-12)


def test_a_weight_gets_its_gradient_once_however_often_it_is_applied():
    layer, calls = nn.Linear(3, 3), []
    x = torch.randn(2, 3, requires_grad=True)
    with AtOnce(2):  # more steps than were said: counted anew
        y = x
        for _ in range(5):
            y = layer(y)
    layer.weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    y.sum().backward()
    assert calls == [1]
    expected = torch.func.grad(lambda weight: sum_of_five(x.detach(), weight, layer.bias.detach()))(
        layer.weight.detach()
    )
    torch.testing.assert_close(layer.weight.grad, expected)


def sum_of_five(x, weight, bias):
    for _ in range(5):
        x = nn.functional.linear(x, weight, bias)
    return x.sum()


def test_going_back_twice_or_in_part_counts_nothing_twice():
    layer = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    with AtOnce(3):
        first = layer(x)
        last = layer(layer(first))
    torch.autograd.grad(last.sum(), x, retain_graph=True)
    whole = torch.autograd.grad(last.sum(), layer.weight, retain_graph=True)[0]
    part = torch.autograd.grad(first.sum(), layer.weight, retain_graph=True)[0]
    torch.testing.assert_close(part, x.detach().sum(0).expand(3, -1))
    torch.testing.assert_close(torch.autograd.grad(last.sum(), layer.weight)[0], whole, rtol=0, atol=0)


@pytest.mark.parametrize("learns", [True, False])
def test_what_learns_nothing_or_is_cast_is_left_as_it_is(learns):
    layer = nn.Linear(3, 3).requires_grad_(learns)
    x = torch.randn(2, 3, requires_grad=not learns)
    with AtOnce(1):
        y = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = layer(x)
    assert "AddmmBackward0" in type(y.grad_fn).__name__
    assert cast.dtype == torch.bfloat16


def test_gradients_of_gradients_are_refused():
    layer, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    with AtOnce(1):
        y = layer(x).square().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
