import pytest
import torch
from timm.layers.cbam import CbamModule
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import CBAM, ChannelGate, SpatialGate
from visattn.attention.spatial import cbam

CASES = [
    Case(ChannelGate, {}, lambda c: c * c // 8 + c // 16 + c, (580, 8464), macs=lambda c, h, w: c * c // 4),
    *(
        Case(
            SpatialGate,
            {"kernel_size": k} if k != 7 else {},
            lambda c, k=k: 2 * k * k + 2,
            (2 * k * k + 2,) * 2,
            macs=lambda c, h, w, k=k: 2 * k * k * h * w,
            norm_over="positions",
        )
        for k in (7, 3)
    ),
    *(
        Case(
            CBAM,
            options,
            lambda c: c * c // 8 + c // 16 + c + 2 * 7 * 7 + 2,
            (680, 8564),
            macs=lambda c, h, w: c * c // 4 + 2 * 7 * 7 * h * w,
            norm_over="positions",
        )
        for options in ({}, {"order": "spatial-channel"}, {"zero_init": True})
    ),
]

ORDERS = ["channel-spatial", "spatial-channel"]


def logistic(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


def perceptron(gate: ChannelGate, z: list[Tensor]) -> list[Tensor]:
    first, second = gate.squeeze, gate.excite
    hidden = [
        sum((first.weight[o, i] * v for i, v in enumerate(z)), first.bias[o]).clamp(min=0)
        for o in range(first.out_features)
    ]
    return [
        sum((second.weight[o, i] * v for i, v in enumerate(hidden)), second.bias[o]) for o in range(second.out_features)
    ]


def channel_gate(gate: ChannelGate, x: Tensor) -> Tensor:
    """Section 3, "Channel attention module", of one image, in loops."""
    values = [[v for row in channel for v in row] for channel in x]
    mean = perceptron(gate, [sum(each) / len(each) for each in values])
    highest = perceptron(gate, [max(each) for each in values])
    return torch.stack([x[c] * logistic(mean[c] + highest[c]) for c in range(len(x))])


def spatial_gate(gate: SpatialGate, x: Tensor) -> Tensor:
    """Section 3, "Spatial attention module", of one image, in loops; with the norm of the released code."""
    channels, height, width = x.shape
    taps, reach, norm = gate.conv.weight[0], gate.conv.kernel_size[0] // 2, gate.norm
    pools = [
        [[max(x[:, p, q]) for q in range(width)] for p in range(height)],
        [[sum(x[:, p, q]) / channels for q in range(width)] for p in range(height)],
    ]
    y = torch.empty_like(x)
    for p in range(height):
        for q in range(width):
            logit = torch.zeros((), dtype=x.dtype)
            for i in range(2):
                for dp in range(-reach, reach + 1):
                    for dq in range(-reach, reach + 1):
                        if 0 <= p + dp < height and 0 <= q + dq < width:
                            logit = logit + taps[i, dp + reach, dq + reach] * pools[i][p + dp][q + dq]
            logit = (logit - norm.running_mean[0]) / torch.sqrt(norm.running_var[0] + 1e-5)
            y[:, p, q] = x[:, p, q] * logistic(logit * norm.weight[0] + norm.bias[0])
    return y


def lively(module: nn.Module) -> nn.Module:
    """The module in eval, with a norm that has seen something."""
    norm = module.spatial.norm if isinstance(module, CBAM) else module.norm
    for tensor, value in ((norm.weight.data, 1.3), (norm.bias.data, -0.2), (norm.running_mean, 0.1)):
        nn.init.constant_(tensor, value)
    nn.init.constant_(norm.running_var, 0.6)
    return module.eval()


@pytest.mark.parametrize("order", ORDERS)
def test_equals_the_paper_in_loops(order):
    module = lively(CBAM(6, reduction=2, kernel_size=3, order=order)).double()
    x = torch.randn(2, 6, 3, 5, dtype=torch.double)
    steps = [(channel_gate, module.channel), (spatial_gate, module.spatial)]
    expected = []
    for image in x:
        for step, gate in steps if order == "channel-spatial" else reversed(steps):
            image = step(gate, image)
        expected.append(image)
    torch.testing.assert_close(module(x), torch.stack(expected), rtol=0, atol=1e-12)


def test_gates_alone_equal_the_paper_in_loops():
    x = torch.randn(2, 6, 3, 5, dtype=torch.double)
    channel, spatial = ChannelGate(6, reduction=2).double(), lively(SpatialGate(6)).double()
    torch.testing.assert_close(channel(x), torch.stack([channel_gate(channel, i) for i in x]), rtol=0, atol=1e-12)
    torch.testing.assert_close(spatial(x), torch.stack([spatial_gate(spatial, i) for i in x]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_is_one_gate_after_the_other(order):
    module, x = lively(CBAM(64, order=order)), torch.randn(2, 64, 5, 7)
    gates = [module.channel, module.spatial]
    expected = nn.Sequential(*(gates if order == "channel-spatial" else gates[::-1]))(x)
    torch.testing.assert_close(module(x), expected)


def test_channel_weights_do_not_see_where_things_are_but_spatial_weights_do():
    module, x, order = lively(CBAM(64)), torch.randn(2, 64, 5, 7), torch.randperm(35)
    shuffled = x.flatten(2)[..., order].view_as(x)
    before, after = module.attend(x), module.attend(shuffled)
    torch.testing.assert_close(after.channel, before.channel)
    assert not torch.allclose(after.spatial, before.spatial.flatten(2)[..., order].view_as(before.spatial))


def test_follows_the_map_around_a_torus():
    module, x = lively(CBAM(64)), torch.randn(2, 64, 9, 11)
    module.spatial.conv.padding_mode = "circular"
    module.spatial.conv._reversed_padding_repeated_twice = [3, 3, 3, 3]
    torch.testing.assert_close(module(x.roll((2, 3), (2, 3))), module(x).roll((2, 3), (2, 3)))


def test_a_flat_map_counts_its_perceptron_twice():
    gate, x = ChannelGate(64), torch.randn(2, 64, 1, 1).expand(2, 64, 5, 7)
    logits = gate.excite(gate.squeeze(x[..., 0, 0]).relu())
    torch.testing.assert_close(gate.attend(x)[..., 0, 0], (2 * logits).sigmoid())


@pytest.mark.parametrize("order", ORDERS)
def test_zero_weights_make_a_quarter_of_the_map(order):
    module, x = CBAM(64, order=order), torch.randn(2, 64, 5, 7)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(module(x), x / 4)


def test_zero_init_starts_at_one_half_everywhere():
    module, x = CBAM(64, zero_init=True), torch.randn(2, 64, 5, 7)
    assert torch.equal(module.attend(x).spatial, torch.full((2, 1, 5, 7), 0.5))
    assert not torch.equal(CBAM(64).attend(x).spatial, torch.full((2, 1, 5, 7), 0.5))


@pytest.mark.parametrize(("channels", "count"), [(64, 680), (256, 8564)])
def test_has_the_parameters_of_the_released_code(channels, count):
    formula = 2 * channels**2 // 16 + channels // 16 + channels + 2 * 7**2 + 2
    assert sum(p.numel() for p in CBAM(channels).parameters()) == formula == count


def test_equals_timm_after_copying_weights():
    ours, theirs, x = lively(CBAM(64)), CbamModule(64, mlp_bias=True).eval(), torch.randn(2, 64, 5, 7)
    with torch.no_grad():
        for mine, its in ((ours.channel.squeeze, theirs.channel.fc1), (ours.channel.excite, theirs.channel.fc2)):
            its.weight.copy_(mine.weight[:, :, None, None])
            its.bias.copy_(mine.bias)
        theirs.spatial.conv.conv.weight.copy_(ours.spatial.conv.weight.flip(1))  # theirs: the mean comes first
        theirs.spatial.conv.bn.load_state_dict(ours.spatial.norm.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


# The pools and the product compute their own gradients; plain operations say what these should be.


def gradients(module: CBAM, x: Tensor, weights_apart: bool, **options) -> list[Tensor]:
    y = module.read(x, weights=module.attend(x)) if weights_apart else module(x)
    return list(
        torch.autograd.grad(y, [x, *module.parameters()], torch.linspace(-1, 1, y.numel()).view_as(y), **options)
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weights_apart", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 9])
def test_gradients_equal_those_of_plain_operations(order, weights_apart, training, batch, monkeypatch):
    module = CBAM(64, order=order).double().train(training)
    x = torch.randn(batch, 64, 40, 41, dtype=torch.double, requires_grad=True)  # more than one tile, the last smaller
    ours = gradients(module, x, weights_apart)
    monkeypatch.setattr(cbam, "plain", lambda x: True)
    for mine, expected in zip(ours, gradients(module, x, weights_apart), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_those_that_tie_share_the_gradient_of_the_maximum(order, monkeypatch):
    module = CBAM(64, order=order).double()
    x = torch.randn(2, 64, 5, 7, dtype=torch.double).round().relu().requires_grad_()
    assert (x.flatten(2) == x.flatten(2).amax(2, keepdim=True)).sum(2).max() > 1
    ours = gradients(module, x, False)
    monkeypatch.setattr(cbam, "plain", lambda x: True)
    for mine, expected in zip(ours, gradients(module, x, False), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weights_apart", [False, True])
def test_gradients_can_be_differentiated_again(order, weights_apart):
    module = CBAM(4, reduction=2, kernel_size=3, order=order).double().eval()
    x = torch.randn(2, 4, 3, 5, dtype=torch.double, requires_grad=True)
    call = (lambda x: module.read(x, weights=module.attend(x))) if weights_apart else module
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


def test_works_under_the_transforms_of_torch_func_and_under_tracers(unchecked):
    module, x = lively(CBAM(64)), torch.randn(2, 64, 5, 7)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).square().sum())(x), expected)
    torch.testing.assert_close(torch.func.vmap(lambda image: module(image[None])[0])(x), module(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), module(x))


def test_a_second_backward_through_the_same_graph_gives_the_same():
    module, x = CBAM(64), torch.randn(2, 64, 5, 7, requires_grad=True)
    y = module(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(y, x)[0], first)


def test_keeps_no_map_for_the_gradient():
    module, x = CBAM(64), torch.randn(8, 64, 28, 28, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    maps = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() >= x.numel()}
    assert maps == {x.untyped_storage().data_ptr()}


def test_takes_an_empty_batch():
    assert CBAM(64).eval()(torch.randn(0, 64, 5, 7)).shape == (0, 64, 5, 7)


def test_training_on_one_position_says_what_the_norm_lacks():
    for module in (CBAM(64), SpatialGate(64)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            module(torch.randn(1, 64, 1, 1))
        assert module.eval()(torch.randn(1, 64, 1, 1)).shape == (1, 64, 1, 1)


@pytest.mark.parametrize("cls", [CBAM, ChannelGate])
@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(cls, reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        cls(64, reduction=reduction)


@pytest.mark.parametrize("cls", [CBAM, SpatialGate])
@pytest.mark.parametrize("kernel_size", [-1, 4])
def test_refuses_a_kernel_without_a_middle(cls, kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd and positive, got {kernel_size}"):
        cls(64, kernel_size=kernel_size)


def test_refuses_an_unknown_order(unchecked):
    with pytest.raises(ValueError, match="order must be 'channel-spatial' or 'spatial-channel', got 'parallel'"):
        CBAM(64, order="parallel")
