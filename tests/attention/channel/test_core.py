import pytest
import torch

from visattn.attention.channel import core
from visattn.attention.channel.core import Scale, scale

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "expanded": lambda x: x[:, :, :, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("layout_of_gradient", LAYOUTS.values(), ids=list(LAYOUTS))
def test_gradients_equal_those_of_the_product(layout, layout_of_gradient):
    x = layout(torch.randn(3, 8, 5, 7, dtype=torch.double)).requires_grad_()
    weights = torch.rand(3, 8, 1, 1, dtype=torch.double, requires_grad=True)
    g = layout_of_gradient(torch.randn(3, 8, 5, 7, dtype=torch.double))
    before = g.clone()
    assert torch.equal(scale(x, weights), x * weights)
    ours, expected = (torch.autograd.grad(y, (x, weights), g) for y in (scale(x, weights), x * weights))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(g, before)


def test_gradients_can_be_differentiated_again():
    inputs = [torch.randn(2, 3, 2, 3).double().requires_grad_(), torch.rand(2, 3, 1, 1).double().requires_grad_()]
    assert torch.autograd.gradcheck(scale, inputs)
    assert torch.autograd.gradgradcheck(scale, inputs)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float, torch.double], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_keeps_the_dtype_of_the_map(dtype, autocast):
    x, weights = torch.randn(2, 8, 5, 7, dtype=dtype), torch.rand(2, 8, 1, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = scale(x, weights)
    assert torch.equal(y, x * weights.to(dtype))


@pytest.mark.parametrize("quick", [True, False])
def test_leaves_the_map_to_plain_operations_where_these_are_wanted(quick, monkeypatch):
    x, weights = torch.randn(2, 8, 5, 7), torch.rand(2, 8, 1, 1, requires_grad=True)
    monkeypatch.setattr(core, "plain", lambda x: not quick)
    assert (type(scale(x, weights).grad_fn).__name__ == f"{Scale.__name__}Backward") == quick
