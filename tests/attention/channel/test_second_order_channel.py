import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import SecondOrderChannelAttention
from visattn.attention.channel.second_order_channel import root

CASES = [
    Case(
        SecondOrderChannelAttention,
        {},
        lambda c: c * c // 8 + c // 16 + c,
        (580, 8464),
        macs=lambda c, h, w: c * c * h * w + 10 * c**3 + 3 * c * c + c * c // 8,
    ),
]


def lively(channels: int = 64, **options) -> SecondOrderChannelAttention:
    module = SecondOrderChannelAttention(channels, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def newton_schulz(matrix: Tensor, iterations: int) -> Tensor:
    """Section 3.3 of the paper, as it stands."""
    trace, identity = sum(matrix[i, i] for i in range(len(matrix))), torch.eye(len(matrix), dtype=matrix.dtype)
    y, z = matrix / trace, identity
    for _ in range(iterations):
        y, z = y @ (3 * identity - z @ y) / 2, (3 * identity - z @ y) @ z / 2
    return trace.sqrt() * y


def paper(module: SecondOrderChannelAttention, x: Tensor, iterations: int) -> Tensor:
    """Sections 3.2 and 3.3 of the paper, in loops."""
    y, channels, n = torch.empty_like(x), x.shape[1], x[0, 0].numel()
    for b in range(x.shape[0]):
        values = x[b].flatten(1)
        mean = [sum(row) / n for row in values]
        covariance = torch.empty(channels, channels, dtype=x.dtype)
        for i in range(channels):
            for j in range(channels):
                covariance[i, j] = sum((values[i, p] - mean[i]) * (values[j, p] - mean[j]) for p in range(n)) / n
        matrix = newton_schulz(covariance, iterations)
        z = torch.stack([sum(matrix[:, c]) / channels for c in range(channels)])
        hidden = (module.squeeze.weight @ z + module.squeeze.bias).clamp(min=0)
        y[b] = x[b] / (1 + torch.exp(-(module.excite.weight @ hidden + module.excite.bias)))[:, None, None]
    return y


@pytest.mark.parametrize("iterations", [2, 3, 5])
def test_equals_the_paper_in_loops(iterations):
    module = lively(6, reduction=2, iterations=iterations)
    x = torch.randn(2, 6, 3, 5, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, iterations), rtol=0, atol=1e-12)


def test_the_root_squared_gives_the_matrix_back():
    x = torch.randn(3, 8, 40, dtype=torch.double)
    matrix, identity = torch.bmm(x, x.mT) / 40, torch.eye(8, dtype=torch.double).expand(3, -1, -1)
    by = {n: root(matrix, identity, n) for n in (3, 5, 12)}
    errors = [(y @ y - matrix).abs().max() for y in by.values()]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4
    exact = torch.linalg.eigh(matrix)
    exact = exact.eigenvectors * exact.eigenvalues.sqrt()[:, None] @ exact.eigenvectors.mT
    torch.testing.assert_close(by[12], exact, rtol=0, atol=1e-4)


def test_root_of_vectors_is_that_of_the_matrix_times_them():
    x, vectors = torch.randn(1, 8, 40, dtype=torch.double), torch.randn(1, 8, 3, dtype=torch.double)
    matrix = torch.bmm(x, x.mT)
    expected = newton_schulz(matrix[0], 5) @ vectors[0]
    torch.testing.assert_close(root(matrix, vectors, 5)[0], expected, rtol=1e-12, atol=1e-12)


def test_does_not_see_where_things_are_nor_what_all_positions_share():
    module, x = lively(), torch.randn(2, 64, 5, 7, dtype=torch.double)
    shuffled = x.flatten(2)[..., torch.randperm(35)].view_as(x)
    shifted = shuffled + torch.randn(1, 64, 1, 1, dtype=torch.double)
    torch.testing.assert_close(module.attend(shifted), module.attend(x))


def test_sees_how_channels_go_together_where_their_means_and_variances_are_the_same():
    module, x = lively(), torch.randn(1, 64, 5, 7, dtype=torch.double)
    apart = x.clone()
    apart[:, ::2] = apart[:, ::2].roll(3, 3)
    torch.testing.assert_close(apart.var((2, 3)), x.var((2, 3)))
    assert not torch.allclose(module.attend(apart), module.attend(x), atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("dtype", [torch.float, torch.double], ids=str)
def test_a_flat_map_weighs_as_without_any_variance_and_has_a_gradient(value, dtype):
    module, x = lively().to(dtype), torch.full((2, 64, 5, 7), value, dtype=dtype, requires_grad=True)
    weights = module.attend(x)
    bias = module.excite(module.squeeze.bias.relu()).sigmoid()
    torch.testing.assert_close(weights[0, :, 0, 0], bias, rtol=0, atol=1e-3)
    gradients = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
    assert all(g.isfinite().all() for g in gradients)


def test_covariance_is_not_lowered_by_autocast():
    module, x = lively().float(), torch.randn(2, 64, 5, 7)
    seen = []
    module.squeeze.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    module(x)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    assert torch.equal(*seen)


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        SecondOrderChannelAttention(64, reduction=reduction)


def test_refuses_fewer_than_two_iterations():
    with pytest.raises(ValueError, match="iterations must be two or more, got 1"):
        SecondOrderChannelAttention(64, iterations=1)
