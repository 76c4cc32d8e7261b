from functools import partial

import pytest
import torch
from timm.layers import GlobalContext as TimmGlobalContext
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import GlobalContext, SimplifiedNonLocal
from visattn.attention.channel import core

FUSIONS = ["add", "scale"]
CASES = [
    Case(
        GlobalContext,
        {},
        lambda c: c + 1 + c * c // 8 + 3 * (c // 16) + c,
        (653, 8753),
        macs=lambda c, h, w: 2 * c * h * w + c * c // 8,
        sums_to_one=(2, 3),
    ),
    Case(
        GlobalContext,
        {"reduction": 8, "fusion": "scale"},
        lambda c: c + 1 + c * c // 4 + 3 * (c // 8) + c,
        (1177, 16_993),
        macs=lambda c, h, w: 2 * c * h * w + c * c // 4,
        sums_to_one=(2, 3),
    ),
    Case(
        SimplifiedNonLocal,
        {},
        lambda c: c + c * c,
        (4160, 65_792),
        macs=lambda c, h, w: 2 * c * h * w + c * c,
        sums_to_one=(2, 3),
    ),
]

either_fusion = pytest.mark.parametrize("fusion", FUSIONS)


def lively(channels: int = 64, **options) -> GlobalContext:
    """In double precision, with nothing zero."""
    return enliven(GlobalContext(channels, **options))


def enliven(module: nn.Module) -> nn.Module:
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def attended(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of one image and the sum of its positions by them, in loops."""
    at = [(p, q) for p in range(x.shape[1]) for q in range(x.shape[2])]
    e = {(p, q): torch.exp(sum(w[c] * x[c, p, q] for c in range(len(x)))) for p, q in at}
    total, alpha = sum(e.values()), torch.empty_like(x[0])
    for p, q in at:
        alpha[p, q] = e[p, q] / total
    return alpha, torch.stack([sum(alpha[p, q] * x[c, p, q] for p, q in at) for c in range(len(x))])


def paper(module: GlobalContext, x: Tensor, fusion: str) -> Tensor:
    """Equation 4 of the paper, in loops."""
    y, norm = torch.empty_like(x), module.norm
    for b in range(x.shape[0]):
        _, context = attended(x[b], module.key.weight[0])
        hidden = module.squeeze.weight @ context + module.squeeze.bias
        mean = sum(hidden) / len(hidden)
        variance = sum((v - mean) ** 2 for v in hidden) / len(hidden)
        hidden = ((hidden - mean) / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias).clamp(min=0)
        t = (module.excite.weight @ hidden + module.excite.bias)[:, None, None]
        y[b] = x[b] + t if fusion == "add" else x[b] / (1 + torch.exp(-t))
    return y


@either_fusion
def test_equals_the_paper_in_loops(fusion):
    module, x = lively(8, reduction=2, fusion=fusion), torch.randn(2, 8, 3, 5, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, fusion), rtol=0, atol=1e-12)
        alpha = torch.stack([attended(image, module.key.weight[0])[0] for image in x])
        torch.testing.assert_close(module.attend(x)[:, 0], alpha, rtol=0, atol=1e-12)


def test_simplified_non_local_equals_the_paper_in_loops():
    module, x = enliven(SimplifiedNonLocal(8)), torch.randn(2, 8, 3, 5, dtype=torch.double)
    with torch.no_grad():
        for b in range(2):
            alpha, context = attended(x[b], module.key.weight[0])
            torch.testing.assert_close(module.attend(x)[b, 0], alpha, rtol=0, atol=1e-12)
            at = [(p, q) for p in range(3) for q in range(5)]
            each = sum(alpha[p, q] * (module.value.weight @ x[b, :, p, q]) for p, q in at)  # as it was before
            torch.testing.assert_close(module(x)[b], x[b] + each[:, None, None], rtol=0, atol=1e-12)
            torch.testing.assert_close(module.value.weight @ context, each, rtol=0, atol=1e-12)


def test_simplified_non_local_is_a_non_local_block_whose_queries_are_all_the_same():
    module, x = enliven(SimplifiedNonLocal(8)), torch.randn(2, 8, 3, 5, dtype=torch.double)
    positions = x.flatten(2).mT
    query = module.key.weight.expand(2, 15, 8)
    read = nn.functional.scaled_dot_product_attention(query, positions, positions @ module.value.weight.T, scale=1.0)
    torch.testing.assert_close(module(x), x + read.mT.view_as(x))


@pytest.mark.parametrize("cls", [GlobalContext, SimplifiedNonLocal])
def test_changes_every_position_alike_and_follows_them(cls):
    module, x, order = enliven(cls(64)), torch.randn(2, 64, 5, 7, dtype=torch.double), torch.randperm(35)
    change = module(x) - x
    torch.testing.assert_close(change, change[:, :, :1, :1].expand_as(x))
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module(shuffled), module(x).flatten(2)[..., order].view_as(x))
    channels = torch.randperm(64)
    assert not torch.allclose(module(x[:, channels]), module(x)[:, channels])


def test_without_a_key_the_context_is_the_mean():
    module, x = lively(), torch.randn(2, 64, 5, 7, dtype=torch.double)
    nn.init.zeros_(module.key.weight)
    torch.testing.assert_close(module.attend(x), torch.full((2, 1, 5, 7), 1 / 35, dtype=torch.double))
    t = module.excite(module.norm(module.squeeze(x.mean((2, 3)))).relu())
    torch.testing.assert_close(module(x), x + t[:, :, None, None])


def test_reads_the_position_that_dominates():
    module, x = lively(), torch.randn(1, 64, 5, 7, dtype=torch.double)
    nn.init.ones_(module.key.weight)
    x[:, :, 2, 3] += 2
    expected = torch.zeros(1, 1, 5, 7, dtype=torch.double)
    expected[..., 2, 3] = 1
    torch.testing.assert_close(module.attend(x), expected)


def test_a_fresh_module_adds_nothing_or_halves():
    x = torch.randn(2, 64, 5, 7)
    assert torch.equal(GlobalContext(64)(x), x)
    assert torch.equal(GlobalContext(64, fusion="scale")(x), x / 2)
    assert torch.equal(SimplifiedNonLocal(64)(x), x)


@either_fusion
def test_equals_timm_after_copying_weights(fusion):
    ours = lively(reduction=8, fusion=fusion).float()
    theirs = TimmGlobalContext(64, fuse_add=fusion == "add", fuse_scale=fusion == "scale")
    its = theirs.mlp_add if fusion == "add" else theirs.mlp_scale
    with torch.no_grad():
        for mine, other in ((ours.key, theirs.conv_attn), (ours.squeeze, its.fc1), (ours.excite, its.fc2)):
            other.weight.copy_(mine.weight[:, :, None, None])
            other.bias.copy_(mine.bias)
        its.norm.load_state_dict(ours.norm.state_dict())
    its.norm.eps = ours.norm.eps
    x = torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_weights_of_halves_are_made_in_single_precision():
    module, x = lively().half(), torch.randn(1, 64, 56, 56).half()
    nn.init.ones_(module.key.weight)
    wide = x.float().sum(1).flatten(1).softmax(1).view(1, 1, 56, 56)
    torch.testing.assert_close(module.attend(x).float(), wide, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        GlobalContext(64, reduction=reduction)


def test_refuses_an_unknown_fusion(unchecked):
    with pytest.raises(ValueError, match="fusion must be 'add' or 'scale', got 'mul'"):
        GlobalContext(64, fusion="mul")


# What is read, and the product, compute their own gradients; plain operations say what these should be.

MODULES = {
    "add": GlobalContext,
    "scale": partial(GlobalContext, fusion="scale"),
    "simplified": SimplifiedNonLocal,
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=list(MODULES))


def gradients(module: nn.Module, x: Tensor, **options) -> list[Tensor]:
    y = module(x)
    return list(
        torch.autograd.grad(y, [x, *module.parameters()], torch.linspace(-1, 1, y.numel()).view_as(y), **options)
    )


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "expanded": lambda x: x[:, :, :, :1].expand_as(x),
}


@every_module
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_gradients_equal_those_of_plain_operations(make, layout, monkeypatch):
    module = enliven(make(64))
    x = layout(torch.randn(3, 64, 5, 7, dtype=torch.double)).requires_grad_()
    ours = gradients(module, x)
    monkeypatch.setattr(core, "plain", lambda x: True)
    for mine, expected in zip(ours, gradients(module, x), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@every_module
def test_gradients_can_be_differentiated_again(make):
    module = enliven(make(4) if make is SimplifiedNonLocal else make(4, reduction=2))
    x = torch.randn(2, 4, 2, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)
    assert torch.autograd.gradgradcheck(module, x)


@every_module
def test_works_under_the_transforms_of_torch_func(make, unchecked):
    module, x = enliven(make(64)), torch.randn(2, 64, 5, 7, dtype=torch.double)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: module(x).square().sum())(x), expected)
    torch.testing.assert_close(torch.func.vmap(lambda image: module(image[None])[0])(x), module(x))


@every_module
def test_a_second_backward_through_the_same_graph_gives_the_same(make):
    module, x = enliven(make(64)), torch.randn(2, 64, 5, 7, dtype=torch.double, requires_grad=True)
    y = module(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(y, x)[0], first)


@every_module
def test_keeps_no_map_for_the_gradient(make):
    module, x = make(64), torch.randn(8, 64, 28, 28, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    maps = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() >= x.numel()}
    assert maps == {x.untyped_storage().data_ptr()}


@every_module
def test_learns_from_a_map_without_a_gradient(make, monkeypatch):
    module, x = enliven(make(64)), torch.randn(2, 64, 5, 7, dtype=torch.double)
    ours = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    monkeypatch.setattr(core, "plain", lambda x: True)
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@every_module
def test_takes_an_empty_batch(make):
    x = torch.randn(0, 64, 5, 7, requires_grad=True)
    y = make(64)(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
