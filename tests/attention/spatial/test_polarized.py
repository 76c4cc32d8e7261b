import pytest
import torch
from torch import Tensor, nn

from tests.attention.case import Case
from visattn import PolarizedSelfAttention

# The papers' count of multiply-adds, n (2 c + 3 c² / 2) + c² / 2, projects the map before it sums it.
CASES = [
    *(
        Case(
            PolarizedSelfAttention,
            {"arrangement": arrangement, "form": form},
            lambda c, extra=extra: 2 * c * c + c + extra * c,
            golden,
            macs=lambda c, h, w: 3 * c * h * w + 2 * c * c,
        )
        for arrangement, form, extra, golden in (
            ("parallel", "paper", 2, (8384, 131_840)),
            ("sequential", "paper", 2, (8384, 131_840)),
            ("parallel", "released", 0, (8256, 131_328)),
        )
    ),
    Case(
        PolarizedSelfAttention,
        {"arrangement": "sequential", "form": "released"},
        lambda c: (27 * c * c + 38 * c) // 16,
        (7064, 111_200),
        macs=lambda c, h, w: h * w * (2 * c + c // 2 + c * c // 2) + c * c + 3 * c * c // 16,
    ),
]

every_form = pytest.mark.parametrize("form", ["paper", "released"])
every_arrangement = pytest.mark.parametrize("arrangement", ["parallel", "sequential"])


def lively(channels: int, arrangement: str = "parallel", form: str = "paper") -> PolarizedSelfAttention:
    module = PolarizedSelfAttention(channels, arrangement=arrangement, form=form).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def logistic(value: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-value))


def softmax(values: list[Tensor]) -> list[Tensor]:
    return [torch.exp(v) / sum(torch.exp(u) for u in values) for v in values]


def normalise(norm: nn.LayerNorm, values: Tensor) -> Tensor:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return (values - mean) / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias


def channel_weights(module: PolarizedSelfAttention, x: Tensor, arrangement: str, form: str) -> Tensor:
    """Of one image as (c, n): every position is projected, as the paper writes it."""
    asked = softmax([module.channel_query.weight[0] @ x[:, i] for i in range(x.shape[1])])
    held = sum(asked[i] * (module.channel_value.weight @ x[:, i]) for i in range(x.shape[1]))
    if form == "paper":
        layer, norm = module.channel_out
        return logistic(normalise(norm, layer.weight @ held))
    if arrangement == "parallel":
        return logistic(module.channel_out[0].weight @ held)
    first, norm, _, last = module.channel_out
    hidden = normalise(norm, first.weight @ held + first.bias).clamp(min=0)
    return logistic(last.weight @ hidden + last.bias)


def spatial_weights(module: PolarizedSelfAttention, x: Tensor, arrangement: str, form: str) -> Tensor:
    """Of one image as (c, n), likewise."""
    positions = range(x.shape[1])
    query = sum(module.spatial_query.weight @ x[:, i] for i in positions) / len(positions)
    values = [module.spatial_value.weight @ x[:, i] for i in positions]
    if form == "paper":
        query = torch.stack(softmax(list(query)))
    elif arrangement == "sequential":
        values = torch.stack([torch.stack(softmax(list(row))) for row in torch.stack(values, 1)]).unbind(1)
    logits = [sum(query[d] * value[d] for d in range(len(query))) for value in values]
    if (arrangement, form) == ("parallel", "released"):
        logits = softmax(logits)
    return logistic(torch.stack(logits))


def paper(module: PolarizedSelfAttention, x: Tensor, arrangement: str, form: str) -> Tensor:
    """The paper's equations, or its released code, in loops."""
    y = []
    for image in x.flatten(2):
        channel = channel_weights(module, image, arrangement, form)[:, None]
        if arrangement == "parallel":
            y.append(channel * image + spatial_weights(module, image, arrangement, form) * image)
        else:
            image = channel * image
            y.append(spatial_weights(module, image, arrangement, form) * image)
    return torch.stack(y).view_as(x)


@every_arrangement
@every_form
@torch.no_grad()
def test_equals_the_paper_in_loops(arrangement, form):
    module, x = lively(16, arrangement, form), torch.randn(2, 16, 3, 4, dtype=torch.double)
    torch.testing.assert_close(module(x), paper(module, x, arrangement, form), rtol=0, atol=1e-12)


@every_arrangement
@every_form
def test_does_not_see_where_things_are_but_does_see_which_channel_they_are_in(arrangement, form):
    module, x = lively(64, arrangement, form), torch.randn(2, 64, 5, 7, dtype=torch.double)
    order = torch.randperm(35)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(module(shuffled), module(x).flatten(2)[..., order].view_as(x))
    order = torch.randperm(64)
    assert not torch.allclose(module(x[:, order]), module(x)[:, order])


@every_form
def test_the_softmax_over_positions_of_the_released_code_binds_the_spatial_weights(form):
    module = PolarizedSelfAttention(64, form=form).double()
    spatial = module.attend(torch.randn(2, 64, 5, 7, dtype=torch.double)).spatial
    assert (spatial.min() > 0.5 and spatial.max() < 0.7311) == (form == "released")
    if form == "released":
        torch.testing.assert_close(torch.logit(spatial).sum((2, 3)), torch.ones(2, 1, dtype=torch.double))


@pytest.mark.parametrize(("arrangement", "factor"), [("parallel", 1), ("sequential", 1 / 4)])
def test_zero_weights_make_one_half_of_each_branch(arrangement, factor):
    module, x = PolarizedSelfAttention(64, arrangement=arrangement), torch.randn(2, 64, 5, 7)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(module(x), x * factor)


def test_refuses_an_unknown_arrangement(unchecked):
    with pytest.raises(ValueError, match="arrangement must be 'parallel' or 'sequential', got 'both'"):
        PolarizedSelfAttention(64, arrangement="both")


def test_refuses_an_unknown_form(unchecked):
    with pytest.raises(ValueError, match="form must be 'paper' or 'released', got 'port'"):
        PolarizedSelfAttention(64, form="port")


@pytest.mark.parametrize(("arrangement", "form", "least"), [("parallel", "paper", 2), ("sequential", "released", 8)])
def test_refuses_too_few_channels(arrangement, form, least):
    with pytest.raises(ValueError, match=f"channels must be at least {least}, got {least - 1}"):
        PolarizedSelfAttention(least - 1, arrangement=arrangement, form=form)
