import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from tests.attention.loops import chain, interpolate, lively, logistic
from visattn import ResidualAttention


def unit(c: int) -> int:
    """Multiply-adds of a bottleneck at one position; it has 3 c parameters more, in its norms."""
    return c * c // 2 + 9 * (c // 4) ** 2


def macs(c: int, h: int, w: int) -> int:
    """The trunk and the mask at full size, three units at half of it, two at a quarter."""
    halves = ((h + 1) // 2) * ((w + 1) // 2)
    quarters = ((h + 3) // 4) * ((w + 3) // 4)
    return h * w * (4 * unit(c) + 2 * c * c) + (3 * halves + 2 * quarters) * unit(c)


CASES = [
    Case(
        ResidualAttention,
        {},
        lambda c: 9 * (unit(c) + 3 * c) + 2 * c * c + 5 * c,
        (49_408, 765_952),
        macs=macs,
        norm_over="positions",
        small=4,
    ),
]


def residual(layers: nn.Sequential, x: Tensor) -> Tensor:
    return x + chain(layers, x)


def halve(x: Tensor) -> Tensor:
    """The largest of 3 × 3 pixels around every second one."""
    (channels, height, width), y = x.shape, []
    for p in range(0, height, 2):
        for q in range(0, width, 2):
            y.append(x[:, max(p - 1, 0) : p + 2, max(q - 1, 0) : q + 2].flatten(1).max(1).values)
    return torch.stack(y, 1).view(channels, -(-height // 2), -(-width // 2))


def paper(module: ResidualAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3 of the paper in loops: the mask, and the map between the trunk and the last unit."""
    entered = residual(module.before, x)
    levels = [entered]
    for layers in module.down:
        levels.append(residual(layers, halve(levels[-1])))
    y = residual(module.up[-1], levels.pop())
    for level in reversed(range(len(module.skip))):
        skipped = levels.pop()
        y = residual(module.up[level], interpolate(y, *skipped.shape[1:]) + residual(module.skip[level], skipped))
    logits = chain(module.mask, interpolate(y, *x.shape[1:]))
    mask = logistic(logits) if module.activation == "sigmoid" else logits.tanh()
    trunk = residual(module.trunk[1], residual(module.trunk[0], entered))
    return mask, (1 + mask) * trunk


@pytest.mark.parametrize(
    ("depth", "size", "activation"), [(1, (4, 6), "sigmoid"), (2, (3, 5), "tanh"), (3, (5, 9), "sigmoid")]
)
@torch.no_grad()
def test_equals_the_paper_in_loops(depth, size, activation):
    module = lively(ResidualAttention(4, depth=depth, reduction=2, activation=activation))
    x = torch.randn(1, 4, *size, dtype=torch.double)
    mask, stressed = paper(module, x[0])
    torch.testing.assert_close(module.attend(x)[0], mask, rtol=0, atol=1e-11)
    torch.testing.assert_close(module(x)[0], residual(module.after, stressed), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (7, 7), (8, 13), (57, 3)])
@pytest.mark.parametrize("depth", [1, 3])
def test_takes_any_size(depth, size):
    module, x = lively(ResidualAttention(8, depth=depth)), torch.randn(1, 8, *size, dtype=torch.double)
    assert module.attend(x).shape == module(x).shape == x.shape


@pytest.mark.parametrize(("depth", "count"), [(1, 35_776), (2, 49_408), (3, 63_040)])
def test_has_a_unit_more_on_each_side_and_each_skip(depth, count):
    formula = (4 + 3 * depth - 1) * (unit(64) + 3 * 64) + 2 * 64**2 + 5 * 64
    assert sum(p.numel() for p in ResidualAttention(64, depth=depth).parameters()) == formula == count


def test_no_mask_leaves_the_trunk_and_a_full_one_doubles_it():
    module, x = lively(ResidualAttention(8)), torch.randn(2, 8, 5, 7, dtype=torch.double)
    trunk = module.trunk(module.before(x))
    torch.testing.assert_close(module.read(x, weights=torch.zeros_like(x)), module.after(trunk), rtol=0, atol=1e-12)
    torch.testing.assert_close(module.read(x, weights=torch.ones_like(x)), module.after(2 * trunk), rtol=0, atol=1e-12)


def test_only_ever_stresses_the_trunk_unless_the_mask_has_two_signs():
    x = torch.randn(2, 8, 5, 7, dtype=torch.double)
    for activation, least in (("sigmoid", 0), ("tanh", -1)):
        module = lively(ResidualAttention(8, activation=activation))
        mask = module.attend(x)
        assert ((mask > least) & (mask < 1)).all()
        assert (mask.min() < 0) == (activation == "tanh")


def test_the_mask_does_not_see_the_trunk():
    module, x = lively(ResidualAttention(8)), torch.randn(2, 8, 5, 7, dtype=torch.double)
    before = module.attend(x)
    for parameter in module.trunk.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(module.attend(x), before)


def test_sees_the_further_the_deeper():
    seen = []
    for depth in (1, 2, 3):
        module = lively(ResidualAttention(8, depth=depth))
        x = torch.randn(1, 8, 64, 3, dtype=torch.double, requires_grad=True)
        module.attend(x)[..., 32, 1].sum().backward()
        seen.append((x.grad != 0).any(3).any(1).sum().item())
    assert seen[0] < seen[1] < seen[2]


def test_turns_with_the_map_if_its_kernels_do():
    module, x = lively(ResidualAttention(8)), torch.randn(2, 8, 6, 9, dtype=torch.double)
    y = module(x)
    assert not torch.allclose(module(x.mT), y.mT)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.mT
    torch.testing.assert_close(module(x.mT), y.mT, rtol=0, atol=1e-11)


def test_follows_the_map_by_the_step_of_its_hourglass_only():
    module = lively(ResidualAttention(4, depth=1))
    x = torch.zeros(1, 4, 40, 6, dtype=torch.double)
    x[:, :, 18:22] = torch.randn(4, 4, 6, dtype=torch.double)
    y = module.attend(x)[:, :, 8:32]
    by_two, by_one = (module.attend(x.roll(step, 2))[:, :, 8 + step : 32 + step] for step in (2, 1))
    torch.testing.assert_close(by_two, y, rtol=0, atol=1e-11)
    assert not torch.allclose(by_one, y)


def test_refuses_an_hourglass_without_depth():
    with pytest.raises(ValueError, match="depth must be positive, got 0"):
        ResidualAttention(64, depth=0)


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        ResidualAttention(64, reduction=reduction)


def test_refuses_an_unknown_activation(unchecked):
    with pytest.raises(ValueError, match="activation must be 'sigmoid' or 'tanh', got 'softmax'"):
        ResidualAttention(64, activation="softmax")


@pytest.mark.parametrize("size", [(1, 1), (1, 6)])
def test_training_on_one_position_says_what_the_norm_lacks(size):
    module, x = ResidualAttention(64, depth=3), torch.randn(1, 64, *size)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(x)
    assert module.eval()(x).shape == x.shape
