import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from tests.attention.loops import convolve, lively, logistic, normalise
from visattn import AttentionBranch

CASES = [
    Case(
        AttentionBranch,
        {"classes": 10} | options,
        lambda c, k=k: 2 * c + 10 * c + 10**2 + 10 * k * k + 2 * (10 + 1),
        golden,
        macs=lambda c, h, w, k=k: h * w * (10 * c + 10 * k * k),
        norm_over="positions",
    )
    for options, k, golden in (({}, 1, (900, 3204)), ({"kernel_size": 3}, 3, (980, 3284)))
]


def branch(**options) -> AttentionBranch:
    return lively(AttentionBranch(6, classes=4, **options))


def paper(module: AttentionBranch, x: Tensor) -> tuple[Tensor, Tensor]:
    """The map and the logits of the branch for one image, in loops."""
    norm, narrow, after, _ = module.classes
    maps = normalise(after, convolve(narrow, normalise(norm, x)))
    maps = maps * (maps > 0)
    weights = logistic(normalise(module.map[1], convolve(module.map[0], maps)))
    means = [sum(v for row in one for v in row) / one.numel() for one in maps]
    logits = [sum(module.classifier.weight[k, i] * means[i] for i in range(4)) for k in range(4)]
    return weights, torch.stack(logits)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_equals_the_paper_in_loops(kernel_size):
    module, x = branch(kernel_size=kernel_size), torch.randn(2, 6, 3, 5, dtype=torch.double)
    weights, logits = module.look(x)
    for b in range(2):
        m, z = paper(module, x[b])
        torch.testing.assert_close(weights[b], m, rtol=0, atol=1e-12)
        torch.testing.assert_close(logits[b], z, rtol=0, atol=1e-12)
        torch.testing.assert_close(module(x)[b], x[b] * m + x[b], rtol=0, atol=1e-12)
    torch.testing.assert_close(module.attend(x), weights, rtol=0, atol=0)


def test_stresses_by_one_to_two():
    x = torch.randn(2, 6, 3, 5, dtype=torch.double)
    ratio = branch()(x) / x
    assert ((ratio > 1) & (ratio < 2)).all()


def test_positions_move_with_the_map_as_under_a_wider_convolution_they_do_not():
    x, order = torch.randn(2, 6, 3, 5, dtype=torch.double), torch.randperm(15)

    def moved(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].view_as(x)

    point, window = branch(), branch(kernel_size=3)
    torch.testing.assert_close(point(moved(x)), moved(point(x)), rtol=0, atol=1e-12)
    assert not torch.allclose(window(moved(x)), moved(window(x)))


def test_a_stage_comes_before_and_may_have_other_channels():
    stage = nn.Conv2d(6, 9, 3, padding=1)
    module, x = branch(stage=stage, features=9), torch.randn(2, 6, 3, 5, dtype=torch.double)
    alone = branch(features=9)
    alone.load_state_dict({name: t for name, t in module.state_dict().items() if not name.startswith("stage.")})
    torch.testing.assert_close(module.look(x), alone.look(stage(x)))


def test_the_classes_are_learned_by_the_loss_of_the_branch_alone():
    module, x = branch(), torch.randn(2, 6, 3, 5, dtype=torch.double)
    module(x).sum().backward()
    assert module.classifier.weight.grad is None
    module.look(x)[1].square().sum().backward()
    assert module.classifier.weight.grad.any()


def test_says_what_does_not_fit():
    with pytest.raises(ValueError, match="classes must be positive, got 0"):
        AttentionBranch(64, classes=0)
    with pytest.raises(ValueError, match="kernel_size must be odd and positive, got 2"):
        AttentionBranch(64, kernel_size=2)
