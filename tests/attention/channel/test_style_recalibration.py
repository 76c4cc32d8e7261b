import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import StyleRecalibration
from visattn.attention.channel import core
from visattn.attention.channel.style_recalibration import moments

CASES = [
    # Two multiply-adds a channel by the paper, which are no matrix product here.
    Case(StyleRecalibration, {}, lambda c: 4 * c, (256, 1024), macs=lambda c, h, w: 0, norm_over="samples"),
]


def lively(channels: int = 64) -> StyleRecalibration:
    """In eval, with a norm that has seen something."""
    module = StyleRecalibration(channels).eval()
    for tensor in (module.weight, module.norm.weight, module.norm.bias, module.norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(module.norm.running_var, 0.5, 1.5)
    return module


def paper(module: StyleRecalibration, x: Tensor) -> Tensor:
    """Section 3 of the paper, in loops."""
    y, norm = torch.empty_like(x), module.norm
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = [v for row in x[b, c] for v in row]
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
            z = module.weight[c, 0] * mean + module.weight[c, 1] * torch.sqrt(variance + 1e-5)
            z = (z - norm.running_mean[c]) / torch.sqrt(norm.running_var[c] + norm.eps)
            y[b, c] = x[b, c] / (1 + torch.exp(-(norm.weight[c] * z + norm.bias[c])))
    return y


@pytest.mark.parametrize("size", [(3, 5), (1, 2), (1, 1)], ids=str)
def test_equals_the_paper_in_loops(size):
    module, x = lively(6).double(), torch.randn(2, 6, *size, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x), rtol=0, atol=1e-12)


def test_has_the_gradient_of_the_paper_even_of_a_flat_map():
    module = lively(6).double()
    for x in (torch.randn(2, 6, 3, 5).double(), torch.ones(2, 6, 3, 5).double(), torch.ones(2, 6, 1, 1).double()):
        ours, theirs = (
            torch.autograd.grad(call(x).square().sum(), x)[0]
            for call, x in ((f, x.clone().requires_grad_()) for f in (module, lambda x: paper(module, x)))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_neither_sees_where_things_are_nor_the_other_channels():
    module, x = lively(), torch.randn(2, 64, 5, 7)
    shuffled = x.flatten(2)[..., torch.randperm(35)].view_as(x)
    torch.testing.assert_close(module.attend(shuffled), module.attend(x))
    moved = x.clone()
    moved[:, 20] += 1
    changed = (module.attend(moved) != module.attend(x)).any(0).flatten().nonzero().flatten()
    assert changed.tolist() == [20]


def test_gate_knows_channels_by_their_weights():
    module, x, order = lively(), torch.randn(2, 64, 5, 7), torch.randperm(64)
    assert not torch.allclose(module.attend(x[:, order]), module.attend(x)[:, order])
    twin = lively()
    twin.load_state_dict({n: v[order] if v.ndim else v for n, v in module.state_dict().items()})
    torch.testing.assert_close(twin.attend(x[:, order]), module.attend(x)[:, order])


def test_sees_the_spread_and_not_only_the_mean():
    module, x = lively(), torch.randn(2, 64, 5, 7)
    wider = x + (x - x.mean((2, 3), keepdim=True))
    assert not torch.allclose(module.attend(wider), module.attend(x), atol=1e-2)


def test_a_fresh_module_halves_the_map_in_eval():
    x = torch.randn(2, 64, 5, 7)
    assert torch.equal(StyleRecalibration(64).eval()(x), x / 2)


def test_training_on_one_image_says_what_the_norm_lacks():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        StyleRecalibration(64)(torch.randn(1, 64, 5, 7))


# The moments compute their own gradient; plain operations say what it should be.


def gradients(module: StyleRecalibration, x: Tensor) -> list[Tensor]:
    y = module(x)
    return list(torch.autograd.grad(y, [x, *module.parameters()], torch.linspace(-1, 1, y.numel()).view_as(y)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_those_of_plain_operations(layout, training, monkeypatch):
    module, x = lively().double().train(training), torch.randn(3, 64, 5, 7, dtype=torch.double)
    layouts = {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.mT.contiguous().mT,
        "expanded": x[:, :, :, :1].expand_as(x),
    }
    x = layouts[layout].requires_grad_()
    ours = gradients(module, x)
    monkeypatch.setattr(core, "plain", lambda x: True)
    for mine, expected in zip(ours, gradients(module, x), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_gradients_can_be_differentiated_again():
    module, x = lively(4).double(), torch.randn(2, 4, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


def test_works_under_the_transforms_of_torch_func(unchecked):
    module, x = lively().double(), torch.randn(2, 64, 5, 7, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).square().sum())(x), expected)
    torch.testing.assert_close(torch.func.vmap(lambda image: module(image[None])[0])(x), module(x))


def test_a_second_backward_through_the_same_graph_gives_the_same():
    module, x = lively(), torch.randn(2, 64, 5, 7, requires_grad=True)
    y = module(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(y, x)[0], first)


def test_variance_of_a_map_far_from_zero_keeps_its_digits():
    x = torch.randn(2, 64, 5, 7) + 1000
    _, variance, _ = moments(x)
    torch.testing.assert_close(variance, x.double().var((2, 3), correction=0).float(), rtol=1e-4, atol=0)


def test_learns_from_a_map_without_a_gradient_and_from_none():
    module = lively()
    assert torch.autograd.grad(module(torch.randn(2, 64, 5, 7)).sum(), module.weight)[0].abs().max() > 0
    assert module(torch.randn(0, 64, 5, 7)).shape == (0, 64, 5, 7)
