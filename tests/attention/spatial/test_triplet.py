import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import TripletAttention
from visattn.attention.spatial import cbam

CASES = [
    Case(
        TripletAttention,
        {"kernel_size": k},
        lambda c, k=k: 3 * (2 * k * k + 2),
        (3 * (2 * k * k + 2),) * 2,
        macs=lambda c, h, w, k=k: 2 * k * k * (h * w + c * w + h * c),
        norm_over="positions",
    )
    for k in (7, 3)
]


def lively(channels: int = 64, kernel_size: int = 7) -> TripletAttention:
    """In double precision and eval, with norms that have seen something."""
    module = TripletAttention(channels, kernel_size=kernel_size).double().eval()
    for gate in module.children():
        for tensor in (gate.norm.weight.data, gate.norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)
        for tensor in (gate.norm.bias.data, gate.norm.running_mean):
            nn.init.normal_(tensor)
    return module


def gate(module: nn.Module, t: Tensor) -> Tensor:
    """The paper's z-pool over the first axis of ``t``, convolution, norm and logistic function, in loops."""
    taps, reach, norm = module.conv.weight[0], module.conv.kernel_size[0] // 2, module.norm
    depth, rows, columns = t.shape
    weights = torch.zeros(rows, columns, dtype=t.dtype)
    for p in range(rows):
        for q in range(columns):
            for dp in range(-reach, reach + 1):
                for dq in range(-reach, reach + 1):
                    if 0 <= p + dp < rows and 0 <= q + dq < columns:
                        values = t[:, p + dp, q + dq]
                        weights[p, q] += taps[0, dp + reach, dq + reach] * max(values)
                        weights[p, q] += taps[1, dp + reach, dq + reach] * sum(values) / depth
    weights = (weights - norm.running_mean) / torch.sqrt(norm.running_var + 1e-5) * norm.weight + norm.bias
    return 1 / (1 + torch.exp(-weights))


def paper(module: TripletAttention, x: Tensor) -> Tensor:
    """The paper's equations, in loops over planes."""
    y = []
    for image in x:
        turned = image.permute(1, 0, 2)  # (h, c, w)
        first = (turned * gate(module.width, turned)).permute(1, 0, 2)
        turned = image.permute(2, 1, 0)  # (w, h, c)
        second = (turned * gate(module.height, turned)).permute(2, 1, 0)
        y.append((first + second + image * gate(module.spatial, image)) / 3)
    return torch.stack(y)


@torch.no_grad()
def test_equals_the_paper_in_loops():
    module, x = lively(4, kernel_size=3), torch.randn(2, 4, 3, 5, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_follows_a_transposed_map_only_if_its_gates_are_transposed_too():
    module, x = lively(), torch.randn(2, 64, 5, 7, dtype=torch.double)
    assert not torch.allclose(module(x.mT), module(x).mT)
    with torch.no_grad():
        module.height.load_state_dict(module.width.state_dict())
        module.height.conv.weight.copy_(module.width.conv.weight.mT)
        module.spatial.conv.weight.add_(module.spatial.conv.weight.mT.clone())
    torch.testing.assert_close(module(x.mT), module(x).mT)


def test_sees_where_things_are_and_the_order_of_channels():
    module, x = lively(), torch.randn(2, 64, 5, 7, dtype=torch.double)
    order = torch.randperm(64)
    assert not torch.allclose(module(x[:, order]), module(x)[:, order])
    torch.testing.assert_close(module.attend(x[:, order]).spatial, module.attend(x).spatial)
    order = [2, 0, 4, 6, 1, 3, 5]
    assert not torch.allclose(module(x[..., order]), module(x)[..., order])
    torch.testing.assert_close(module.attend(x[..., order]).height, module.attend(x).height)


def test_zero_weights_halve_the_map():
    module, x = TripletAttention(64), torch.randn(2, 64, 5, 7)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(module(x), x / 2, rtol=2e-7, atol=0)


def test_weights_fall_below_one_half_as_they_would_not_after_a_relu():
    assert all(weights.min() < 0.5 for weights in lively().attend(torch.randn(2, 64, 5, 7, dtype=torch.double)))


@pytest.mark.parametrize("weights_apart", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
def test_gradients_equal_those_of_plain_operations(weights_apart, batch, monkeypatch):
    module = TripletAttention(64).double()
    x = torch.randn(batch, 64, 40, 41, dtype=torch.double).round(decimals=1).requires_grad_()  # with ties

    def gradients() -> tuple[Tensor, ...]:
        y = module.read(x, weights=module.attend(x)) if weights_apart else module(x)
        return torch.autograd.grad(y, [x, *module.parameters()], torch.linspace(-1, 1, y.numel()).view_as(y).double())

    ours = gradients()
    monkeypatch.setattr(cbam, "plain", lambda x: True)
    for mine, expected in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_gradients_can_be_differentiated_again():
    module, x = lively(3, kernel_size=3), torch.randn(1, 3, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, x)


@pytest.mark.parametrize("kernel_size", [-1, 4])
def test_refuses_a_kernel_without_a_middle(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd and positive, got {kernel_size}"):
        TripletAttention(64, kernel_size=kernel_size)
