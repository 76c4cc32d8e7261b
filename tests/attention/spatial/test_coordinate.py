import pytest
import torch
from timm.layers.coord_attn import CoordAttn
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import CoordinateAttention
from visattn.attention.spatial import coordinate

CASES = [
    Case(
        CoordinateAttention,
        options,
        lambda c, inner=inner: 3 * c * inner(c) + 3 * inner(c) + 2 * c,
        golden,
        macs=lambda c, h, w, inner=inner: 2 * c * inner(c) * (h + w),
    )
    for options, inner, golden in (
        ({}, lambda c: max(8, c // 32), (1688, 6680)),
        ({"reduction": 4}, lambda c: max(8, c // 4), (3248, 49_856)),
    )
]


def lively(channels: int = 6, **options) -> CoordinateAttention:
    """In double precision and eval, with a norm that has seen something."""
    module = CoordinateAttention(channels, **options).double().eval()
    for tensor in (module.norm.weight.data, module.norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    for tensor in (module.norm.bias.data, module.norm.running_mean):
        nn.init.normal_(tensor)
    return module


def dense(layer: nn.Conv1d, z: list[Tensor]) -> list[Tensor]:
    weight = layer.weight[:, :, 0]
    return [sum((weight[o, i] * v for i, v in enumerate(z)), layer.bias[o]) for o in range(len(weight))]


def gates(module: CoordinateAttention, layer: nn.Conv1d, z: list[Tensor]) -> list[Tensor]:
    """The weights of all channels from the means of one row or column."""
    norm, hidden = module.norm, []
    for i, v in enumerate(dense(module.squeeze, z)):
        v = (v - norm.running_mean[i]) / torch.sqrt(norm.running_var[i] + 1e-5) * norm.weight[i] + norm.bias[i]
        hidden.append(v * (v + 3).clamp(0, 6) / 6)
    return [1 / (1 + torch.exp(-v)) for v in dense(layer, hidden)]


def paper(module: CoordinateAttention, x: Tensor) -> Tensor:
    """Section 3.2 of the paper, in loops."""
    y = torch.empty_like(x)
    batch, channels, height, width = x.shape
    for b in range(batch):
        rows = [gates(module, module.height, [sum(x[b, c, p]) / width for c in range(channels)]) for p in range(height)]
        columns = [
            gates(module, module.width, [sum(x[b, c, :, q]) / height for c in range(channels)]) for q in range(width)
        ]
        for c in range(channels):
            for p in range(height):
                for q in range(width):
                    y[b, c, p, q] = x[b, c, p, q] * rows[p][c] * columns[q][c]
    return y


@pytest.mark.parametrize("min_width", [1, 8])
def test_equals_the_paper_in_loops(min_width):
    module, x = lively(reduction=2, min_width=min_width), torch.randn(2, 6, 3, 5, dtype=torch.double)
    assert module.squeeze.out_channels == max(3, min_width)
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_does_not_see_the_order_of_rows_and_of_columns_but_does_see_that_of_positions():
    module, x = lively(64), torch.randn(2, 64, 5, 7, dtype=torch.double)
    rows, columns, order = [2, 0, 4, 1, 3], [2, 0, 4, 6, 1, 3, 5], torch.randperm(35)
    torch.testing.assert_close(module(x[:, :, rows][..., columns]), module(x)[:, :, rows][..., columns])
    shuffled = x.flatten(2)[..., order].view_as(x)
    assert not torch.allclose(module(shuffled), module(x).flatten(2)[..., order].view_as(x))


def test_follows_a_transposed_map_only_if_rows_and_columns_share_their_layer():
    module, x = lively(64), torch.randn(2, 64, 5, 7, dtype=torch.double)
    assert not torch.allclose(module(x.mT), module(x).mT)
    module.height.load_state_dict(module.width.state_dict())
    torch.testing.assert_close(module(x.mT), module(x).mT)


def test_the_weights_of_a_channel_have_rank_one():
    module, x = lively(64), torch.rand(2, 64, 5, 7, dtype=torch.double) + 1
    largest, second, *_ = torch.linalg.svdvals(module(x) / x).unbind(-1)
    assert (second < 1e-12 * largest).all()


def test_one_norm_sees_rows_and_columns_together():
    module, x = CoordinateAttention(64), torch.randn(2, 64, 5, 7)
    seen = module.squeeze(torch.cat([x.mean(3), x.mean(2)], 2)).mean((0, 2))
    module(x)
    assert module.norm.num_batches_tracked == 1
    torch.testing.assert_close(module.norm.running_mean, 0.1 * seen)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [64, 256])
def test_equals_timm_after_copying_weights(channels, training):
    ours, x = lively(channels).float().train(training), torch.randn(2, channels, 5, 7)
    theirs = CoordAttn(channels, rd_channels=8, bias=True).train(training)
    pairs = [(ours.squeeze, theirs.conv1), (ours.height, theirs.conv_h), (ours.width, theirs.conv_w)]
    with torch.no_grad():
        for mine, its in pairs:
            its.weight.copy_(mine.weight[..., None])
            its.bias.copy_(mine.bias)
    theirs.bn1.load_state_dict(ours.norm.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


# The means and the product compute their own gradients; plain operations say what these should be.


def gradients(module: nn.Module, x: Tensor, weights_apart: bool) -> tuple[Tensor, ...]:
    y = module.read(x, weights=module.attend(x)) if weights_apart else module(x)
    return torch.autograd.grad(y, [x, *module.parameters()], torch.linspace(-1, 1, y.numel()).view_as(y))


@pytest.mark.parametrize("weights_apart", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 5])
def test_gradients_equal_those_of_plain_operations(weights_apart, training, layout, batch, monkeypatch):
    module = lively(64).train(training)
    x = torch.randn(batch, 64, 40, 41, dtype=torch.double).to(memory_format=layout).requires_grad_()  # several tiles
    ours = gradients(module, x, weights_apart)
    monkeypatch.setattr(coordinate, "plain", lambda x: True)
    for mine, expected in zip(ours, gradients(module, x, weights_apart), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_the_gradient_is_as_exact_where_backward_runs_under_autocast():
    module, x = lively(64).float(), torch.randn(2, 64, 5, 7, requires_grad=True)
    rows, columns = (w.detach().requires_grad_() for w in module.attend(x))
    expected = torch.autograd.grad((x * rows * columns).square().sum(), (x, rows, columns))
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(coordinate.weigh(x, rows, columns).square().sum(), (x, rows, columns))
    for mine, its in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights_apart", [False, True])
def test_gradients_can_be_differentiated_again(weights_apart):
    module = lively(3, min_width=2)
    x = torch.randn(1, 3, 2, 4, dtype=torch.double, requires_grad=True)
    call = (lambda x: module.read(x, weights=module.attend(x))) if weights_apart else module
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


def test_works_under_the_transforms_of_torch_func_and_under_tracers(unchecked):
    module, x = lively(64), torch.randn(2, 64, 5, 7, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).square().sum())(x), expected)
    torch.testing.assert_close(torch.func.vmap(lambda image: module(image[None])[0])(x), module(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), module(x))


def test_a_second_backward_through_the_same_graph_gives_the_same():
    module, x = CoordinateAttention(64), torch.randn(2, 64, 5, 7, requires_grad=True)
    y = module(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(y, x)[0], first)


def test_keeps_no_map_for_the_gradient():
    module, x = CoordinateAttention(64), torch.randn(8, 64, 28, 28, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    maps = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() >= x.numel()}
    assert maps == {x.untyped_storage().data_ptr()}


def test_takes_an_empty_batch():
    assert CoordinateAttention(64).eval()(torch.randn(0, 64, 5, 7)).shape == (0, 64, 5, 7)


@pytest.mark.parametrize("option", ["reduction", "min_width"])
def test_refuses_widths_that_are_not_positive(option):
    with pytest.raises(ValueError, match=f"{option} must be positive, got 0"):
        CoordinateAttention(64, **{option: 0})
