import pytest
import torch
from timm.layers.selective_kernel import SelectiveKernel as TimmSelectiveKernel
from torch import Tensor
from torch.nn import functional as F

from tests.attention.case import Case
from visattn import SelectiveKernel


def case(options: dict, golden: tuple[int, int], small: int) -> Case:
    groups, branches, least = options["groups"], options.get("branches", 2), options.get("min_width", 32)

    def parameters(channels: int) -> int:
        width = max(channels // 16, least)
        convolutions = branches * (9 * channels**2 // groups + 2 * channels)
        return convolutions + channels * width + 2 * width + branches * width * channels

    def macs(channels: int, height: int, width: int) -> int:
        inner = max(channels // 16, least)
        return height * width * branches * 9 * channels**2 // groups + (1 + branches) * inner * channels

    return Case(SelectiveKernel, options, parameters, golden, macs, sums_to_one=1, norm_over="samples", small=small)


CASES = [
    case({"groups": 8}, (15_680, 173_120), 8),
    case({"groups": 4, "branches": 3, "min_width": 4}, (29_064, 460_320), 4),
]


def lively(channels: int = 8, **options) -> SelectiveKernel:
    """In double precision and evaluation, with norms that do something."""
    module = SelectiveKernel(channels, **{"groups": 2, "min_width": 4, **options}).double().eval()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith(("1.weight", "1.bias", "running_var")):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith((".0.weight", "select.weight")):
            torch.nn.init.normal_(tensor)
    return module


def paper(module: SelectiveKernel, x: Tensor, stride: int = 1, groups: int = 2) -> Tensor:
    """Section 3.1 of the paper, in loops."""

    def normed(norm, values, c):
        scale = norm.weight[c] / (norm.running_var[c] + norm.eps) ** 0.5
        return (values - norm.running_mean[c]) * scale + norm.bias[c]

    outputs = []
    for image in x:
        maps = []
        for m, (convolution, norm, _) in enumerate(module.branches, 1):
            u = F.conv2d(image[None], convolution.weight, None, stride, m, m, groups)[0]
            maps.append([normed(norm, u[c], c).clamp(min=0) for c in range(len(u))])
        s = torch.stack([sum(u[c].sum() / u[c].numel() for u in maps) for c in range(len(maps[0]))])
        linear, norm, _ = module.squeeze
        z = torch.stack([normed(norm, row @ s, d).clamp(min=0) for d, row in enumerate(linear.weight)])
        rows = module.select.weight.view(len(maps), len(s), -1)
        y = []
        for c in range(len(s)):
            e = [torch.exp(rows[m, c] @ z) for m in range(len(maps))]
            y.append(sum(e[m] / sum(e) * maps[m][c] for m in range(len(maps))))
        outputs.append(torch.stack(y))
    return torch.stack(outputs)


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize(("stride", "out_channels"), [(1, None), (2, 12)])
def test_equals_the_paper_in_loops(branches, stride, out_channels):
    module = lively(branches=branches, stride=stride, out_channels=out_channels)
    x = torch.randn(2, 8, 5, 7, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(module(x), paper(module, x, stride), rtol=0, atol=1e-10)
    torch.testing.assert_close(module(x), module.read(x, weights=module.attend(x)), rtol=0, atol=1e-12)


def test_equals_timm_s_without_its_split_of_the_input():
    ours = SelectiveKernel(64, groups=8).eval()
    theirs = TimmSelectiveKernel(64, groups=8, rd_channels=32, split_input=False).eval()
    mine = list(ours.state_dict().values())
    assert len(mine) == len(theirs.state_dict())
    theirs.load_state_dict({key: mine[i].view_as(value) for i, (key, value) in enumerate(theirs.state_dict().items())})
    x = torch.randn(2, 64, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_equal_branches_are_one():
    module, x = lively(branches=2), torch.randn(2, 8, 5, 7, dtype=torch.double)
    module.branches[1].load_state_dict(module.branches[0].state_dict())
    module.branches[1][0].dilation, module.branches[1][0].padding = (1, 1), (1, 1)
    torch.testing.assert_close(module(x), module.branches[0](x), rtol=0, atol=1e-12)


def test_the_second_branch_sees_five_by_five_in_nine_taps():
    module, x = lively(branches=2), torch.zeros(1, 8, 9, 9, dtype=torch.double)
    x[:, :, 4, 4] = 1
    moved = module.branches[1][0](x).any(1)[0].nonzero()
    assert {tuple(place) for place in moved.tolist()} == {(i, j) for i in (2, 4, 6) for j in (2, 4, 6)}


def test_all_channels_of_a_branch_trade_with_the_other_branch_and_not_with_each_other():
    module, x = lively(), torch.randn(2, 8, 5, 7, dtype=torch.double)
    weights = module.attend(x)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    assert (weights.sum(2) - 1).abs().min() > 0.1  # a softmax over channels


def test_the_choice_moves_with_the_map_but_does_not_survive_a_shuffle():
    module, x = lively(), torch.zeros(2, 8, 9, 9, dtype=torch.double)
    x[:, :, 3:5, 3:5] = torch.randn(2, 8, 2, 2)
    torch.testing.assert_close(module(x.roll((1, 2), (2, 3))), module(x).roll((1, 2), (2, 3)), rtol=0, atol=1e-11)
    x = torch.randn_like(x)
    shuffled = x.flatten(2)[..., torch.randperm(81)].view_as(x)
    assert not torch.allclose(module.attend(shuffled), module.attend(x))


@pytest.mark.parametrize(("channels", "count"), [(64, 8768), (128, 22_080), (256, 62_528)])
def test_has_the_parameters_of_the_paper_s_setting_by_default(channels, count):
    assert sum(p.numel() for p in SelectiveKernel(channels).parameters()) == count


@pytest.mark.parametrize("option", ["branches", "reduction", "min_width"])
def test_refuses_an_option_that_is_not_positive(option):
    with pytest.raises(ValueError, match=f"{option} must be positive, got 0"):
        SelectiveKernel(64, **{option: 0})


@pytest.mark.parametrize(("groups", "out_channels"), [(0, 64), (5, 64), (32, 48)])
def test_refuses_groups_that_do_not_divide_the_channels(groups, out_channels):
    with pytest.raises(
        ValueError, match=f"groups must divide channels=64 and out_channels={out_channels}, got {groups}"
    ):
        SelectiveKernel(64, out_channels=out_channels, groups=groups)
