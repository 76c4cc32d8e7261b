import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.attention.case import Case
from tests.attention.pairwise.test_core import Largest
from visattn import GeneralizedAttention
from visattn.attention.pairwise import core

TERMS = ["".join(digits) for digits in itertools.product("01", repeat=4)][1:]


def parameters(terms: str, c: int) -> int:
    content, relative, salient, prior = (int(digit) for digit in terms)
    layers = (content | relative) + (content | salient) + (relative | prior) + 2
    return layers * c * c + (salient + prior + 1) * c + 1


def paper_macs(terms: str, c: int, h: int, w: int, stride: int) -> int:
    """As the released code does it: each pair of a row of queries and one of keys has its own position."""
    content, relative, salient, prior = (int(digit) for digit in terms)
    g, v = -(-h // stride), -(-w // stride)
    n, m = h * w, g * v
    if terms == "0010":
        return 2 * m * c * c + 2 * m * c
    layers = ((content | relative) + 1) * n + ((content | salient) + 1) * m
    positions = (relative | prior) * (h * g + w * v) * c * c // 2 + relative * n * (g + v) * c
    alone = (salient & ~content) * m * c + (prior & ~relative) * (h * g + w * v) * c
    return layers * c * c + positions + alone + (content + 1) * n * m * c


def macs(terms: str, heads: int, c: int, h: int, w: int, stride: int = 1) -> int:
    """As ours does it: each distance has its position once, and rows and columns of keys are features of them."""
    content, relative, salient, prior = (int(digit) for digit in terms)
    g, v = -(-h // stride), -(-w // stride)
    n, m = h * w, g * v
    saliency = heads * m * c + c * c  # a projection of the map
    if terms == "0010":
        return saliency + heads * m + heads * m * c + 2 * c * c
    layers = ((content | relative) + 1) * n + (content + 1) * m
    distances = (h + w - 1 + (g + v - 2) * stride + 1) * c * c // 2
    asked = (n * (g + v) if relative else h * g + w * v) * c
    features = content * c + heads * ((relative | prior) * (g + v) + (salient & ~content))
    positions = (relative | prior) * (distances + asked)
    return layers * c * c + (salient & ~content) * saliency + positions + n * m * (features + c)


CASES = [
    Case(
        GeneralizedAttention,
        {"terms": terms, "heads": 8, "key_stride": stride, **options},
        lambda c, terms=terms: parameters(terms, c),
        golden,
        macs=lambda c, h, w, terms=terms, stride=stride: macs(terms, 8, c, h, w, stride),
        sums_to_one=-1,
        small=8,
    )
    for terms, stride, options, golden in (
        ("1111", 1, {}, (20_673, 328_449)),
        ("0010", 2, {}, (12_417, 197_121)),
        ("0110", 2, {"spatial_range": 3}, (20_609, 328_193)),
    )
]


def lively(channels: int = 8, heads: int = 2, **options: int | str) -> GeneralizedAttention:
    """In double precision, with nothing small."""
    module = GeneralizedAttention(channels, heads=heads, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def wave(distance: int, count: int) -> Tensor:
    angles = [distance / 1000 ** (4 * i / count) for i in range(count // 4)]
    angles = torch.tensor(angles, dtype=torch.double)
    return torch.cat((angles.sin(), angles.cos()))


def paper_weights(module: GeneralizedAttention, x: Tensor, mistake: bool = False) -> Tensor:
    """The normalised energies of section 3.2 of the paper, in loops, over queries and keys that are there."""
    content, relative, salient, prior = (digit == "1" for digit in module.terms)
    (height, width), channels, d = x.shape[2:], x.shape[1], x.shape[1] // module.heads
    queries = list(itertools.product(range(0, height, module.query_stride), range(0, width, module.query_stride)))
    keys = list(itertools.product(range(0, height, module.key_stride), range(0, width, module.key_stride)))
    weights = torch.zeros(x.shape[0], module.heads, len(queries), len(keys), dtype=torch.double)
    within = None if module.rows is None else module.rows.spatial_range
    for b, head in itertools.product(range(x.shape[0]), range(module.heads)):
        part = slice(head * d, (head + 1) * d)
        for i, (y, z) in enumerate(queries):
            energies = torch.full((len(keys),), -torch.inf, dtype=torch.double)
            for k, (p, q) in enumerate(keys):
                if within is not None and max(abs(p - y), abs(q - z)) > within:
                    continue
                energies[k] = 0
                if content or relative:
                    query = module.query.weight[part, :, 0] @ x[b, :, y, z]
                    turned = module.query.weight[part, :, 0] @ x[b, :, z, y] if mistake else query
                if content or salient:
                    key = module.key.weight[part, :, 0] @ x[b, :, p, q]
                if relative or prior:
                    vertical = module.rows.project.weight[part] @ wave(p - y, channels) / 2**0.5
                    horizontal = module.columns.project.weight[part] @ wave(q - z, channels) / 2**0.5
                energies[k] += query @ key if content else 0
                energies[k] += turned @ vertical + query @ horizontal if relative else 0
                energies[k] += module.saliency[head] @ key if salient else 0
                energies[k] += module.prior[head] @ (vertical + horizontal) if prior else 0
            weights[b, head, i] = energies.softmax(0)
    return weights


def paper_read(module: GeneralizedAttention, x: Tensor, weights: Tensor) -> Tensor:
    """Equation 1 of the paper: the sum over heads of what each projects from its values."""
    keys = x[:, :, :: module.key_stride, :: module.key_stride].flatten(2)
    d = x.shape[1] // module.heads
    y = module.out.bias[:, None].expand(x.shape[0], -1, weights.shape[2]).clone()
    for head in range(module.heads):
        part = slice(head * d, (head + 1) * d)
        value = module.value.weight[part, :, 0] @ keys
        y += module.out.weight[:, part, 0] @ (value @ weights[:, head].mT)
    size = [-(-side // module.query_stride) for side in x.shape[2:]]
    return x + module.gamma * F.interpolate(y.unflatten(2, size), x.shape[2:], mode="bilinear")


@pytest.mark.parametrize("terms", TERMS)
def test_equals_the_paper_in_loops(terms):
    module, x = lively(terms=terms), torch.randn(2, 8, 2, 3, dtype=torch.double)
    with torch.no_grad():
        weights = paper_weights(module, x)
        torch.testing.assert_close(module.attend(x).expand_as(weights), weights, rtol=0, atol=1e-10)
        torch.testing.assert_close(module(x), paper_read(module, x, weights), rtol=0, atol=1e-10)


STRIDES = [
    {"key_stride": 2},
    {"query_stride": 2},
    {"query_stride": 2, "key_stride": 3},
    {"spatial_range": 1},
    {"key_stride": 2, "spatial_range": 1},
]


@pytest.mark.parametrize("options", STRIDES, ids=str)
@pytest.mark.parametrize("terms", ["1111", "0010", "0100"])
def test_equals_the_paper_in_loops_with_strides_and_a_range(terms, options):
    module, x = lively(terms=terms, **options), torch.randn(1, 8, 4, 3, dtype=torch.double)
    with torch.no_grad():
        weights = paper_weights(module, x)
        torch.testing.assert_close(module.attend(x).expand_as(weights), weights, rtol=0, atol=1e-10)
        torch.testing.assert_close(module(x), paper_read(module, x, weights), rtol=0, atol=1e-10)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("options", [{}, {"key_stride": 2, "spatial_range": 2}], ids=str)
def test_reads_the_same_without_the_matrix(terms, options, monkeypatch):
    module, x = lively(terms=terms, **options), torch.randn(2, 8, 5, 7, dtype=torch.double)
    y = module(x)
    monkeypatch.setattr(core, "SMALL", 0)
    torch.testing.assert_close(module(x), y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("terms", ["1111", "0100", "0010"])
def test_holds_no_matrix_of_a_large_map(terms, monkeypatch):
    monkeypatch.setattr(core, "SMALL", 0)  # nor of this one then
    module, x = GeneralizedAttention(8, terms=terms, heads=2), torch.randn(1, 8, 20, 30, requires_grad=True)
    with Largest() as largest:
        module(x).sum().backward()
    assert largest.elements <= 2 * 20 * 30 * (2 * 4 + 20 + 30)  # the matrix has 2 * 20 * 30 * 20 * 30


def test_rows_are_not_columns_where_the_second_term_is_without_the_fourth():
    x = torch.randn(1, 8, 3, 3, dtype=torch.double)
    with torch.no_grad():
        for terms in ("0100", "0110", "1100", "1110"):
            module = lively(terms=terms)
            right, wrong = paper_weights(module, x), paper_weights(module, x, mistake=True)
            torch.testing.assert_close(module.attend(x), right, rtol=0, atol=1e-10)
            assert (wrong - right).abs().max() > 0.1


def test_content_alone_is_unscaled_dot_product_attention():
    module, x = lively(terms="1000", heads=4), torch.randn(2, 8, 3, 5, dtype=torch.double)
    query, key, value = (
        layer(x.flatten(2)).unflatten(1, (4, -1)).mT for layer in (module.query, module.key, module.value)
    )
    y = F.scaled_dot_product_attention(query, key, value, scale=1.0).mT.flatten(1, 2)
    torch.testing.assert_close(module(x), x + module.gamma * module.out(y).view_as(x), rtol=0, atol=1e-11)


def test_content_alone_costs_the_same_with_one_four_and_eight_heads():
    def cost(heads: int) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            GeneralizedAttention(64, terms="1000", heads=heads)(torch.randn(1, 64, 5, 7))
        return counter.get_total_flops()

    assert cost(1) == cost(4) == cost(8) == 2 * paper_macs("1000", 64, 5, 7, 1)


def test_saliency_adds_the_same_everywhere():
    x = torch.randn(2, 8, 4, 6, dtype=torch.double)
    for terms in ("0010", "0001"):
        delta = lively(terms=terms)(x) - x
        assert torch.allclose(delta, delta[:, :, :1, :1].expand_as(delta)) == (terms == "0010")


def test_saliency_does_not_depend_on_the_query_nor_on_what_all_keys_share():
    module, x = lively(terms="0010", spatial_range=9), torch.randn(1, 8, 3, 4, dtype=torch.double)
    weights = module.attend(x)
    torch.testing.assert_close(weights, weights[:, :, :1].expand_as(weights), rtol=0, atol=1e-12)
    torch.testing.assert_close(module.attend(x + torch.ones(8, 1, 1)), weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(lively_twin(module)(x), module(x), rtol=0, atol=1e-12)


def lively_twin(module: GeneralizedAttention) -> GeneralizedAttention:
    """The same without the range."""
    twin = lively(terms=module.terms)
    twin.load_state_dict(module.state_dict())
    return twin


def test_the_prior_of_a_key_depends_on_its_distance_alone():
    energies = lively(terms="0001").attend(torch.randn(1, 8, 4, 5, dtype=torch.double))[0].log().view(2, 4, 5, 4, 5)
    energies = energies - torch.einsum("hijij->hij", energies)[..., None, None]  # from that of a position to itself
    torch.testing.assert_close(energies[:, 1, 2, :3, 1:4], energies[:, 2, 3, 1:, 2:], rtol=0, atol=1e-11)
    assert (energies[:, 1, 2, :3, 1:4] - energies[:, 1, 2, 1:, 2:]).abs().max() > 0.1


def test_queries_that_are_the_same_everywhere_ask_for_positions_as_a_prior_does():
    asked, prior = lively(terms="0100"), lively(terms="0001")
    x = torch.randn(1, 8, 1, 1, dtype=torch.double).expand(-1, -1, 4, 5)
    with torch.no_grad():
        for ours, theirs in ((prior.rows, asked.rows), (prior.columns, asked.columns)):
            ours.project.weight.copy_(theirs.project.weight)
        prior.prior.copy_((asked.query.weight[:, :, 0] @ x[0, :, 0, 0]).view(2, 4))
    torch.testing.assert_close(asked.attend(x), prior.attend(x), rtol=0, atol=1e-12)


def test_sees_where_things_are_by_positions_alone():
    x, order = torch.randn(2, 8, 4, 6, dtype=torch.double), torch.randperm(24)

    def shuffle(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].view_as(x)

    for terms in TERMS:
        module = lively(terms=terms)
        moved = torch.allclose(module(shuffle(x)), shuffle(module(x)), rtol=0, atol=1e-10)
        assert moved == (terms[1] == terms[3] == "0")


GOLDEN = {
    **{"1111": 328_449, "0111": 328_449, "0110": 328_193, "1100": 327_937, "0011": 262_913, "1010": 262_657},
    **{"1000": 262_401, "0100": 262_401, "0010": 197_121, "0001": 197_121},
}


@pytest.mark.parametrize(("terms", "golden"), GOLDEN.items())
def test_has_the_parameters_of_the_released_code(terms, golden):
    assert sum(p.numel() for p in GeneralizedAttention(256, terms=terms).parameters()) == golden


def test_leaves_out_channels_beyond_a_multiple_of_the_heads():
    module = GeneralizedAttention(256, heads=9)
    assert module.query.out_channels == module.out.in_channels == 252
    assert module.attend(torch.randn(1, 256, 2, 3)).shape == (1, 9, 6, 6)


GIGA_MACS = {
    **{"1111": 10.99, "1100": 10.99, "1010": 9.95, "1000": 9.95, "0111": 8.01, "0110": 8.01},
    **{"0100": 7.61, "0011": 6.18, "0001": 5.78, "0010": 0.80},
}
SITES = [(6, 256, 52), (3, 512, 26)]  # resnet50's last two stages, at an image of 832×832


@pytest.mark.parametrize(("terms", "giga"), GIGA_MACS.items())
def test_multiply_adds_are_those_of_the_released_code_but_for_where_ours_differs(terms, giga):
    assert sum(count * paper_macs(terms, c, side, side, 2) for count, c, side in SITES) / 1e9 == pytest.approx(
        giga, abs=0.005
    )
    positions = "1" in (terms[1], terms[3])
    for _, c, side in SITES:
        with torch.device("meta"):
            module, x = GeneralizedAttention(c, terms=terms, key_stride=2), torch.randn(1, c, side, side)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            weights = module.attend(x)
            module.query = module.key = None  # read needs neither
            module.read(x, weights=weights)
        ours = counter.get_total_flops() // 2
        assert ours == macs(terms, 8, c, side, side, 2)
        placing = positions * 8 * side**2 * (side // 2) ** 2 * side  # rows and columns as features of keys
        fewer = positions or terms[0] + terms[2] == "01"
        assert (ours - placing < paper_macs(terms, c, side, side, 2)) == fewer
    if terms == "0010":
        assert sum(count * macs(terms, 8, c, side, side, 2) for count, c, side in SITES) < 0.07e9


@pytest.mark.parametrize("terms", ["111", "0000", "1112", "11110"])
def test_refuses_terms_that_are_not_four_digits(terms):
    with pytest.raises(ValueError, match=f"terms must be four digits 0 or 1 and not all 0, got '{terms}'"):
        GeneralizedAttention(64, terms=terms)


@pytest.mark.parametrize("heads", [0, 65])
def test_refuses_heads_out_of_range(heads):
    with pytest.raises(ValueError, match=f"heads must lie between 1 and channels=64, got {heads}"):
        GeneralizedAttention(64, heads=heads)


@pytest.mark.parametrize("name", ["query_stride", "key_stride"])
def test_refuses_a_stride_of_nothing(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        GeneralizedAttention(64, **{name: 0})


def test_refuses_a_range_that_leaves_a_query_without_a_key():
    with pytest.raises(ValueError, match=r"spatial_range must be at least key_stride - 1 = 2, .*, got 1"):
        GeneralizedAttention(64, key_stride=3, spatial_range=1)


def test_refuses_positions_of_channels_that_do_not_split_in_four():
    with pytest.raises(ValueError, match="channels must be a multiple of 4 for terms='0001', got 66"):
        GeneralizedAttention(66, terms="0001", heads=2)
    assert GeneralizedAttention(66, terms="1010", heads=2).identity_at_init
