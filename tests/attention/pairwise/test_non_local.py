import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import peak
from tests.attention.case import Case
from visattn import NonLocal

EMBEDDED = (lambda c: 2 * c * c + 3 * c // 2 + 3 * c, (8480, 132_224))


def halves(h: int, w: int) -> int:
    return -(-h // 2) * -(-w // 2)


CASES = [
    *(
        Case(NonLocal, options, *EMBEDDED, macs, grid, -1, "positions")
        for options, macs, grid in (
            ({}, lambda c, h, w: 2 * c * c * h * w + c * (h * w) ** 2, (5, 7)),
            ({}, lambda c, h, w: 2 * c * c * h * w + c * (h * w) ** 2, (7,)),
            ({}, lambda c, h, w: 2 * c * c * h * w + c * (h * w) ** 2, (2, 5, 7)),
            ({"scale": True}, lambda c, h, w: 2 * c * c * h * w + c * (h * w) ** 2, (5, 7)),
            ({"subsample": "pre"}, lambda c, h, w: c * c * (h * w + halves(h, w)) + c * h * w * halves(h, w), (5, 7)),
            ({"subsample": "post"}, lambda c, h, w: 2 * c * c * h * w + c * h * w * halves(h, w), (5, 7)),
        )
    ),
    Case(
        NonLocal,
        {"affinity": "gaussian"},
        lambda c: c * c + c // 2 + 3 * c,
        (4320, 66_432),
        macs=lambda c, h, w: c * c * h * w + 3 * c * (h * w) ** 2 // 2,
        sums_to_one=-1,
        norm_over="positions",
    ),
    Case(
        NonLocal,
        {"affinity": "dot"},
        *EMBEDDED,
        macs=lambda c, h, w: 2 * c * c * h * w + 2 * h * w * (c // 2) ** 2,  # linear in the positions
        norm_over="positions",
    ),
    Case(
        NonLocal,
        {"affinity": "concatenation"},
        lambda c: 2 * c * c + 5 * c // 2 + 3 * c,
        (8544, 132_480),
        macs=lambda c, h, w: 2 * c * c * h * w + c * (h * w) ** 2 // 2,  # and a score for each query and key
        norm_over="positions",
    ),
    Case(
        NonLocal,
        {"norm": False},
        lambda c: 2 * c * c + 5 * c // 2,
        (8352, 131_712),
        macs=lambda c, h, w: 2 * c * c * h * w + c * (h * w) ** 2,
        sums_to_one=-1,
    ),
]

AFFINITIES = ["embedded", "gaussian", "dot", "concatenation"]


def lively(channels: int = 6, **options) -> NonLocal:
    """In double precision, with nothing zero."""
    module = NonLocal(channels, **options).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def project(layer: nn.Module, x: list[float]) -> list[float]:
    if isinstance(layer, nn.Identity):
        return x
    weight, bias = layer.weight[:, :, 0].tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def pool(grid: dict[tuple[int, int], list[float]]) -> dict[tuple[int, int], list[float]]:
    cells: dict[tuple[int, int], list[list[float]]] = {}
    for (i, j), features in grid.items():
        cells.setdefault((i // 2, j // 2), []).append(features)
    return {at: [max(column) for column in zip(*members, strict=True)] for at, members in cells.items()}


def paper(module: NonLocal, x: Tensor, affinity: str, scale: bool, subsample: str | None) -> Tensor:
    """Equations 1 to 6 of the paper, in loops."""
    y = torch.empty_like(x)
    w_z, b_z = module.out.weight[:, :, 0].tolist(), module.out.bias.tolist()
    norm = module.norm
    for b in range(x.shape[0]):
        grid = {(i, j): x[b, :, i, j].tolist() for i in range(x.shape[2]) for j in range(x.shape[3])}
        source = pool(grid) if subsample == "pre" else grid
        keys = {at: project(module.key, features) for at, features in source.items()}
        values = {at: project(module.value, features) for at, features in source.items()}
        if subsample == "post":
            keys, values = pool(keys), pool(values)
        for (i, j), features in grid.items():
            theta = project(module.query, features)
            f = {}
            for at, phi in keys.items():
                if affinity == "concatenation":
                    w_f = module.affinity.join.weight[0].tolist()
                    f[at] = max(0.0, sum(w * v for w, v in zip(w_f, theta + phi, strict=True)))
                else:
                    f[at] = sum(p * q for p, q in zip(theta, phi, strict=True))
                    f[at] /= math.sqrt(len(theta)) if scale else 1
            if affinity in ("embedded", "gaussian"):
                f = {at: math.exp(v) for at, v in f.items()}
                total = sum(f.values())
            else:
                total = len(keys)
            g = [sum(f[at] * values[at][k] for at in keys) / total for k in range(len(b_z) // 2)]
            for c in range(x.shape[1]):
                z = sum(w * v for w, v in zip(w_z[c], g, strict=True)) + b_z[c]
                z = (z - norm.running_mean[c]) / torch.sqrt(norm.running_var[c] + norm.eps)
                y[b, c, i, j] = x[b, c, i, j] + norm.weight[c] * z + norm.bias[c]
    return y


@pytest.mark.parametrize("subsample", [None, "pre", "post"])
@pytest.mark.parametrize(
    ("affinity", "scale"), [*((affinity, False) for affinity in AFFINITIES), ("embedded", True), ("gaussian", True)]
)
def test_equals_the_paper_in_loops(affinity, scale, subsample):
    module, x = lively(affinity=affinity, scale=scale, subsample=subsample), 2 * torch.randn(2, 6, 3, 5).double()
    with torch.no_grad():
        assert module.attend(x).std() > 0.01
        torch.testing.assert_close(module(x), paper(module, x, affinity, scale, subsample), rtol=0, atol=1e-12)


def test_embedded_is_torch_s_attention_on_projections():
    module, x = lively(), torch.randn(2, 6, 5, 7, dtype=torch.double)
    query, key, value = (layer(x.flatten(2)).mT for layer in (module.query, module.key, module.value))
    y = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
    z = module.norm(module.out(y.mT)).view_as(x)
    torch.testing.assert_close(module(x), x + z, rtol=0, atol=1e-12)


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("subsample", [None, "pre", "post"])
def test_does_not_see_where_things_are_unless_it_pools(affinity, subsample):
    module, x = lively(affinity=affinity, subsample=subsample), 2 * torch.randn(2, 6, 4, 6, dtype=torch.double)
    order = torch.randperm(24)

    def shuffle(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].view_as(x)

    assert torch.allclose(module(shuffle(x)), shuffle(module(x)), rtol=0, atol=1e-11) == (subsample is None)


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("subsample", [None, "pre", "post"])
def test_counts_keys_so_tiling_the_map_tiles_the_result(affinity, subsample):
    module, x = lively(affinity=affinity, subsample=subsample), 2 * torch.randn(2, 6, 4, 6, dtype=torch.double)
    torch.testing.assert_close(module(x.repeat(1, 1, 2, 3)), module(x).repeat(1, 1, 2, 3), rtol=0, atol=1e-11)


@pytest.mark.parametrize("affinity", AFFINITIES)
def test_a_clip_of_one_frame_is_an_image_is_a_sequence(affinity):
    module, x = lively(affinity=affinity), torch.randn(2, 6, 5, 7, dtype=torch.double)
    for space in ((1, 5, 7), (35,)):
        same = module(x.view(2, 6, *space))
        assert same.shape == (2, 6, *space)
        torch.testing.assert_close(same.view_as(x), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("subsample", ["pre", "post"])
def test_never_pools_time(subsample):
    module, x = lively(subsample=subsample), torch.randn(2, 6, 3, 5, 7, dtype=torch.double)
    assert module.attend(x).shape == (2, 3 * 5 * 7, 3 * 3 * 4)
    order = [2, 0, 1]
    torch.testing.assert_close(module(x[:, :, order]), module(x)[:, :, order], rtol=0, atol=1e-11)


@pytest.mark.parametrize("affinity", ["embedded", "gaussian"])
def test_gaussian_logits_are_symmetric(affinity):
    weights = lively(affinity=affinity).attend(torch.randn(2, 6, 3, 4, dtype=torch.double))
    skew = weights.log() - weights.log().mT  # for symmetric logits, of row totals alone
    around = skew[:, :, :, None] + skew[:, None] + skew.mT[:, :, None]
    assert torch.allclose(around, torch.zeros_like(around), atol=1e-10) == (affinity == "gaussian")


def test_pooling_before_and_after_projection_are_not_equal():
    pre, post = lively(subsample="pre"), lively(subsample="post")
    post.load_state_dict(pre.state_dict())
    x = torch.randn(2, 6, 4, 6, dtype=torch.double)
    assert not torch.allclose(pre(x), post(x))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_learns_in_the_second_step_though_it_starts_as_the_identity(norm, training):
    module, x = NonLocal(64, norm=norm).train(training), torch.randn(2, 64, 5, 7)
    assert module.identity_at_init
    assert torch.equal(module(x), x)
    for _ in range(2):
        module.zero_grad()
        (module(x) - 1).square().sum().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 1e-3 * parameter.grad
    still = {name for name, parameter in module.named_parameters() if not parameter.grad.any()}
    assert still <= {"out.bias"} if norm and training else not still  # a norm in training takes its input's mean away


def test_holds_as_much_as_a_few_maps_in_training_where_the_matrix_takes_gibibytes():
    module, x = NonLocal(64), torch.randn(1, 64, 48, 48, requires_grad=True)  # one matrix of it takes 20 MiB

    def train() -> None:
        module(x).sum().backward()

    assert peak(train) < 8 * x.nbytes


@pytest.mark.slow
def test_trains_on_a_map_of_128_by_128_within_32_mib():
    module, x = NonLocal(64), torch.randn(1, 64, 128, 128, requires_grad=True)

    def train() -> None:
        module(x).sum().backward()

    assert peak(train) < 32 * 2**20


def test_refuses_an_unknown_affinity(unchecked):
    with pytest.raises(ValueError, match="affinity must be embedded, gaussian, dot or concatenation, got 'cosine'"):
        NonLocal(64, affinity="cosine")


@pytest.mark.parametrize("reduction", [0, 65])
def test_refuses_a_reduction_out_of_range(reduction):
    with pytest.raises(ValueError, match=f"reduction must lie between 1 and channels=64, got {reduction}"):
        NonLocal(64, reduction=reduction)


def test_refuses_an_unknown_subsample(unchecked):
    with pytest.raises(ValueError, match="subsample must be None, pre or post, got 'mid'"):
        NonLocal(64, subsample="mid")


@pytest.mark.parametrize("affinity", ["dot", "concatenation"])
def test_refuses_a_scale_without_a_softmax(affinity):
    with pytest.raises(ValueError, match=f"scale needs the affinity embedded or gaussian, got '{affinity}'"):
        NonLocal(64, affinity=affinity, scale=True)
