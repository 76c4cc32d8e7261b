import itertools
import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visattn
from tests.attention.case import Case
from visattn import (
    AffineTransformer,
    IsotropicTransformer,
    ProjectiveTransformer,
    SimilarityTransformer,
    SpatialTransformer,
    ThinPlateTransformer,
)
from visattn.attention.sampling.grids import folded, identity
from visattn.attention.sampling.thin_plate import ThinPlate, lattice
from visattn.attention.sampling.transforms import Affine, Composed, Isotropic
from visattn.attention.sampling.warp import sample

KINDS = [
    AffineTransformer,
    IsotropicTransformer,
    ProjectiveTransformer,
    SimilarityTransformer,
    SpatialTransformer,
    ThinPlateTransformer,
]


def looks(c: int, view: int) -> int:
    """Multiply-adds of the connected localiser."""
    return 32 * c * view**2 + 32 * 32


def weighs(c: int, view: int, p: int) -> int:
    """Parameters of the connected localiser and the layer behind it."""
    return 32 * (c * view**2 + 1) + 32 * 33 + 33 * p


CONNECTED = {"localiser": "connected", "view": 2}
CASES = [
    Case(
        AffineTransformer,
        CONNECTED,
        lambda c: weighs(c, 2, 6),
        (9_478, 34_054),
        macs=lambda c, h, w: looks(c, 2) + 32 * 6 + 6 * h * w,
        small=2,
    ),
    Case(
        AffineTransformer,
        {"view": 6, "padding": "border"},
        lambda c: 500 * c + 20 + 10_020 + 20 * (20 * 3 * 3 + 1) + 21 * 6,
        (45_786, 141_786),
        macs=lambda c, h, w: 500 * c * 6 * 6 + 10_000 * 3 * 3 + 400 * 3 * 3 + 20 * 6 + 6 * h * w,
        small=1,
    ),
    Case(
        IsotropicTransformer,
        CONNECTED,
        lambda c: weighs(c, 2, 3),
        (9_379, 33_955),
        macs=lambda c, h, w: looks(c, 2) + 32 * 3 + 6 * h * w,
        small=2,
    ),
    Case(
        SimilarityTransformer,
        {**CONNECTED, "fill": 0.5},
        lambda c: weighs(c, 2, 4),
        (9_412, 33_988),
        macs=lambda c, h, w: looks(c, 2) + 32 * 4 + 6 * h * w,
        small=2,
    ),
    Case(
        ProjectiveTransformer,
        CONNECTED,
        lambda c: weighs(c, 2, 8),
        (9_544, 34_120),
        macs=lambda c, h, w: looks(c, 2) + 32 * 8 + 9 * h * w,
        small=2,
    ),
    Case(
        ThinPlateTransformer,
        {**CONNECTED, "points": (3, 4)},
        lambda c: weighs(c, 2, 24),
        (10_072, 34_648),
        macs=lambda c, h, w: looks(c, 2) + 32 * 24 + 2 * (12 + 2) * h * w,
        small=2,
    ),
    Case(
        ThinPlateTransformer,
        {**CONNECTED, "points": (2, 2), "bounded": True, "span": 0.9, "regularisation": 0.1, "jitter": 0.1},
        lambda c: weighs(c, 2, 8),
        (9_544, 34_120),
        macs=lambda c, h, w: looks(c, 2) + 32 * 8 + 2 * (4 + 2) * h * w,
        small=2,
    ),
    Case(
        SpatialTransformer,
        {**CONNECTED, "steps": 2},
        lambda c: weighs(c, 2, 6),
        (9_478, 34_054),
        macs=lambda c, h, w: 2 * (looks(c, 2) + 32 * 6 + 6 * h * w) + 12,
        small=2,
    ),
]
every_kind = pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)


class Says(nn.Module):
    """A localiser that says what it is told, whatever it sees."""

    num_features = 1

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(len(x), 1)


def told(cls, values, **options):
    """A transformer whose parameters are moved by these values, whatever the image."""
    module = cls(3, localiser=Says(), **options).double()
    nn.init.zeros_(module.head.weight)
    with torch.no_grad():
        module.head.bias.copy_(torch.as_tensor(values, dtype=torch.double).flatten())
    return module


def bilinear(image: Tensor, x: float, y: float) -> Tensor:
    """The paper's sum over all pixels, at one point of [-1, 1]²."""
    height, width = image.shape[1:]
    column, row = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
    total = torch.zeros_like(image[:, 0, 0])
    for n in range(height):
        for m in range(width):
            total += image[:, n, m] * max(0, 1 - abs(column - m)) * max(0, 1 - abs(row - n))
    return total


def loops(image: Tensor, transform, size: tuple[int, int]) -> Tensor:
    """The output, pixel by pixel, each from where ``transform`` says."""
    result = torch.empty(image.shape[0], *size, dtype=image.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            result[:, i, j] = bilinear(
                image, *transform(*((2 * k + 1) / side - 1 for k, side in ((j, size[1]), (i, size[0]))))
            )
    return result


OFFSETS = {
    IsotropicTransformer: [-0.3, 0.1, 0.2],
    SimilarityTransformer: [-0.2, 0.4, 0.1, -0.3],
    AffineTransformer: [0.1, 0.3, -0.1, -0.2, 0.2, 0.05],
    SpatialTransformer: [0.1, 0.3, -0.1, -0.2, 0.2, 0.05],
    ProjectiveTransformer: [0.1, 0.3, -0.1, -0.2, 0.2, 0.05, 0.2, -0.1],
}


def moved(cls, o):
    """Where a point comes from, as the paper writes it."""
    if cls is IsotropicTransformer:
        return lambda x, y: ((1 + o[0]) * x + o[1], (1 + o[0]) * y + o[2])
    if cls is SimilarityTransformer:
        return lambda x, y: ((1 + o[0]) * x - o[1] * y + o[2], o[1] * x + (1 + o[0]) * y + o[3])
    if cls in (AffineTransformer, SpatialTransformer):
        return lambda x, y: ((1 + o[0]) * x + o[1] * y + o[2], o[3] * x + (1 + o[4]) * y + o[5])

    def projective(x, y):
        depth = o[6] * x + o[7] * y + 1
        return ((1 + o[0]) * x + o[1] * y + o[2]) / depth, (o[3] * x + (1 + o[4]) * y + o[5]) / depth

    return projective


@pytest.mark.parametrize("cls", list(OFFSETS), ids=lambda cls: cls.__name__)
def test_is_the_paper_in_loops(cls):
    images = torch.randn(2, 3, 5, 7, dtype=torch.double)
    ours = told(cls, OFFSETS[cls])(images)
    theirs = torch.stack([loops(image, moved(cls, OFFSETS[cls]), (5, 7)) for image in images])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_thin_plate_goes_through_its_points():
    offsets = 0.2 * torch.randn(12, 2, dtype=torch.double)
    module = told(ThinPlateTransformer, offsets, points=(3, 4), span=1.0)
    points = lattice(3, 4)
    found = module.transform.points(module.locate(torch.randn(1, 3, 5, 5).double())[:, 0], points[None])
    torch.testing.assert_close(found[0], points + offsets, rtol=0, atol=1e-12)


def test_bounded_points_stay_inside():
    module = told(ThinPlateTransformer, 50 * torch.randn(16, 2), bounded=True, span=0.9)
    ends = module.locate(torch.randn(1, 3, 8, 8).double())
    assert ends.abs().max() <= 1
    assert (ends.abs() > 0.99).any()


def test_bounded_is_the_hyperbolic_tangent():
    offsets = torch.randn(4, 2, dtype=torch.double)
    module = told(ThinPlateTransformer, offsets, points=(2, 2), bounded=True, span=0.9)
    expected = (lattice(2, 2, span=0.9).atanh() + offsets).tanh()
    torch.testing.assert_close(
        module.locate(torch.zeros(1, 3, 4, 4).double())[0, 0], expected.flatten(), rtol=0, atol=1e-12
    )


@every_kind
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (1, 6), (7, 1), (33, 60), (224, 100)], ids=str)
def test_starts_as_the_identity_to_the_last_bit(cls, steps, size):
    x = torch.randn(2, 3, *size)
    module = cls(3, steps=steps, view=8)
    assert module.identity_at_init
    assert torch.equal(module(x), x)
    assert not torch.equal(sample(x, module.attend(x)[:, 0]), x) or max(size) < 3  # interpolation alone rounds


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_starts_as_the_identity_in_fewer_bits(cls, dtype):
    x = torch.randn(2, 3, 9, 30, dtype=dtype)
    assert torch.equal(cls(3, view=8).to(dtype)(x), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cls(3, view=8)(x.float()), x.float())


@every_kind
def test_learns_from_the_identity(cls):
    x, wanted = torch.randn(8, 3, 12, 12), torch.randn(8, 3, 12, 12)
    module = cls(3, view=8)
    assert module.head.weight.count_nonzero() == 0
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(module(x), wanted).backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


@every_kind
def test_gradient_at_the_identity_is_that_of_the_samples(cls):
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    module, g = cls(3, view=8), torch.randn(2, 3, 6, 6)
    ours = torch.autograd.grad(module(x), (x, *module.head.parameters()), g)
    samples = sample(x, module.attend(x)[:, 0])
    for a, b in zip(ours, torch.autograd.grad(samples, (x, *module.head.parameters()), g), strict=True):
        torch.testing.assert_close(a, b)


def test_fewer_bits_do_not_move_coordinates():
    module = told(AffineTransformer, [0.01, 0, 0.003, 0, 0.02, 0.001]).float()
    x = torch.randn(1, 3, 16, 16)
    plain = module.attend(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module.attend(x)
    assert cast.dtype == torch.float
    torch.testing.assert_close(cast, plain, rtol=0, atol=1e-6)


def test_jitter_disturbs_the_start():
    torch.manual_seed(0)
    module = AffineTransformer(3, jitter=0.1)
    x = torch.randn(1, 3, 9, 9)
    assert not module.identity_at_init
    assert not torch.equal(module(x), x)
    assert 0.02 < module.locate(x).sub(module.start).std() < 0.3


def test_half_of_an_output_is_averaged():
    x = torch.randn(2, 3, 12, 8, dtype=torch.double)
    module = told(AffineTransformer, torch.zeros(6), output_size=(6, 4))
    torch.testing.assert_close(module(x), F.avg_pool2d(x, 2), rtol=0, atol=1e-12)
    assert not module.identity_at_init


@pytest.mark.parametrize("output", [(12, 8), (5, 5), (24, 3), (1, 1)], ids=str)
def test_output_may_be_of_any_size(output):
    x = torch.randn(2, 3, 12, 8)
    assert ThinPlateTransformer(3, output_size=output)(x).shape == (2, 3, *output)


def test_a_quarter_turn_is_that_of_the_library():
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    turned = told(SimilarityTransformer, [-1, 1, 0, 0])(x)
    torch.testing.assert_close(turned, x.rot90(1, (2, 3)), rtol=0, atol=1e-12)
    assert not torch.allclose(turned, x.rot90(-1, (2, 3)))


def test_a_mirrored_map_is_warped_as_its_mirror():
    x = torch.randn(1, 3, 9, 9, dtype=torch.double)
    right, left = (told(AffineTransformer, [0, 0, shift, 0, 0, 0]) for shift in (0.3, -0.3))
    torch.testing.assert_close(right(x).flip(3), left(x.flip(3)))
    assert not torch.allclose(right(x).flip(3), right(x.flip(3)))


def test_heads_tile_the_map_and_are_joined_along_the_channels():
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    module = IsotropicTransformer(3, scale=0.5, heads=4, output_size=4).double()
    y = module(x)
    assert y.shape == (2, 12, 4, 4)
    quarters = [x[:, :, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
    for ours, theirs in zip(y.split(3, 1), quarters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)  # pixels of a crop are those of the map


@pytest.mark.parametrize("cls", [c for c in KINDS if c is not SpatialTransformer], ids=lambda c: c.__name__)
def test_heads_of_every_kind_start_apart(cls):
    x = torch.randn(1, 3, 12, 12)
    parts = cls(3, heads=3, view=8)(x).split(3, 1)
    assert not any(torch.allclose(a, b) for a, b in itertools.pairwise(parts))


def test_each_head_learns_by_itself():
    module = AffineTransformer(3, heads=2, view=8)
    module(torch.randn(2, 3, 12, 12))[:, :3].sum().backward()
    first, second = module.head.bias.grad.split(6)
    assert first.abs().sum() > 0
    assert second.abs().sum() == 0


def test_steps_compose_warps_and_sample_the_original_once():
    offsets = [0.1, 0.2, 0.1, -0.2, 0.1, 0.2]
    x = torch.randn(2, 3, 9, 9, dtype=torch.double)
    once, twice = told(AffineTransformer, offsets), told(AffineTransformer, offsets, steps=2)
    matrix = torch.eye(3, dtype=torch.double)
    matrix[:2] += torch.tensor(offsets, dtype=torch.double).view(2, 3)
    expected = matrix @ matrix
    torch.testing.assert_close(twice.locate(x)[0, 0], expected[:2].flatten())
    assert not torch.allclose(twice(x), once(once(x)))  # which would interpolate twice


def test_a_step_looks_at_what_the_warp_gives_so_far():
    seen = []

    class Watching(Says):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    module = AffineTransformer(3, localiser=Watching(), steps=2).double()
    with torch.no_grad():
        module.head.bias.copy_(torch.tensor([0, 0, 0.5, 0, 0, 0]))
    nn.init.zeros_(module.head.weight)
    x = torch.randn(1, 3, 8, 8, dtype=torch.double)
    module.locate(x)
    torch.testing.assert_close(seen[0], x)
    torch.testing.assert_close(seen[1], F.pad(x, (0, 2))[..., 2:])  # two pixels from the right


def test_black_stays_black_behind_a_normalisation():
    module = told(AffineTransformer, [0, 0, 1, 0, 0, 0], fill=[-1.0, -2.0, -3.0])
    y = module(torch.ones(1, 3, 4, 4, dtype=torch.double))
    torch.testing.assert_close(y[0, :, :, -1], torch.tensor([[-1.0], [-2.0], [-3.0]]).double().expand(3, 4))


def test_a_border_goes_on():
    y = told(AffineTransformer, [0, 0, 1, 0, 0, 0], padding="border")(torch.ones(1, 3, 4, 4, dtype=torch.double))
    assert torch.equal(y, torch.ones_like(y))


@every_kind
@pytest.mark.parametrize("batch", [0, 1])
def test_a_batch_may_be_empty_or_of_one(cls, batch):
    y = cls(3, view=8, steps=2)(torch.randn(batch, 3, 9, 9, requires_grad=True))
    assert y.shape == (batch, 3, 9, 9)
    y.sum().backward()


def test_folding_is_penalised_where_it_is_asked_for():
    offsets = torch.zeros(4, 4, 2)
    offsets[:, 1, 0], offsets[:, 2, 0] = 1.0, -1.0  # two columns change places
    x = torch.randn(1, 3, 16, 16, dtype=torch.double)
    module = told(ThinPlateTransformer, offsets, folding=0.5)
    grid = module.attend(x)
    assert folded(grid[:, 0]) > 0.1
    assert module.penalty(grid) > 0.01
    assert told(ThinPlateTransformer, offsets).penalty(grid) == 0
    still = told(ThinPlateTransformer, torch.zeros(32), folding=0.5)
    assert still.penalty(still.attend(x)) == 0


def test_any_network_can_be_the_localiser():
    backbone = timm.create_model("test_resnet", num_classes=0, in_chans=3)
    module = AffineTransformer(3, localiser=backbone)
    x = torch.randn(2, 3, 32, 32)
    assert module.head.in_features == backbone.num_features
    assert torch.equal(module(x), x)


def test_a_composition_warps_by_one_after_the_other():
    plate = ThinPlate(lattice(2, 2))
    module = SpatialTransformer(3, transform=Composed(Affine(), plate), localiser=Says()).double()
    offsets = 0.2 * torch.randn(14, dtype=torch.double)
    with torch.no_grad():
        module.head.bias.copy_(offsets)
        module.head.weight.zero_()
    x = torch.randn(1, 3, 7, 7, dtype=torch.double)
    pixels = identity((7, 7), dtype=torch.double).flatten(1, 2)
    bent = plate.double().points((plate.identity + offsets[6:])[None], pixels)
    matrix = torch.eye(2, 3, dtype=torch.double) + offsets[:6].view(2, 3)
    expected = (F.pad(bent, (0, 1), value=1) @ matrix.T).view(1, 1, 7, 7, 2)
    torch.testing.assert_close(module.attend(x), expected)


@pytest.mark.parametrize("at", ["input", "stages", "stages[1:3]", "head"])
def test_goes_anywhere_in_a_backbone(at):
    model = timm.create_model("test_resnet").eval()
    x = torch.randn(2, 3, 64, 96)
    before = model(x)
    visattn.insert(model, ThinPlateTransformer, at=at)
    assert all(inserted.gate is None for inserted in visattn.insertions(model))
    assert torch.equal(model(x), before)
    with visattn.record(model) as maps:
        model(x)
    assert maps
    assert all(grid.shape[:2] == (2, 1) and grid.shape[-1] == 2 for grid in maps.values())


def test_weights_are_kept_by_a_checkpoint_and_the_start_is_not():
    assert not any("start" in name or "control" in name for name in ThinPlateTransformer(3).state_dict())


@pytest.mark.parametrize(
    ("cls", "options", "error"),
    [
        (AffineTransformer, {"heads": 0}, "heads and steps must be at least 1, got 0 and 1"),
        (AffineTransformer, {"steps": 0}, "heads and steps must be at least 1, got 1 and 0"),
        (AffineTransformer, {"steps": 2, "heads": 2}, "steps must be 1 with several heads, got 2 and 2"),
        (AffineTransformer, {"jitter": -1.0}, "jitter must not be negative, got -1.0"),
        (AffineTransformer, {"view": 0}, "view must be a positive height and width, got 0"),
        (AffineTransformer, {"output_size": (3, 0)}, r"output_size must be a positive height and width, got \(3, 0\)"),
        (AffineTransformer, {"fill": [0.0, 1.0]}, "fill must have one value for each of 3 channels, got 2"),
        (AffineTransformer, {"fill": 1.0, "padding": "border"}, "fill must be None where padding is 'border', got 1.0"),
        (AffineTransformer, {"localiser": nn.Identity()}, "num_features, got a Identity without"),
        (IsotropicTransformer, {"scale": 0.0}, "scale must be positive, got 0.0"),
        (IsotropicTransformer, {"scale": 0.5, "steps": 2}, "not closed under composition"),
        (
            ThinPlateTransformer,
            {"bounded": True, "span": 1.0},
            "span must be less than 1 where points are bounded, got 1.0",
        ),
        (ThinPlateTransformer, {"folding": -1.0}, "folding must not be negative, got -1.0"),
        (ThinPlateTransformer, {"points": (1, 4)}, "rows and columns must be at least 2, got 1 and 4"),
        (SpatialTransformer, {"transform": Composed(Affine(), Isotropic()), "steps": 2}, "not closed"),
    ],
)
def test_refuses_options_out_of_range(cls, options, error):
    with pytest.raises(ValueError, match=error):
        cls(3, **options)


def test_refuses_a_kind_that_is_none(unchecked):
    with pytest.raises(ValueError, match="localiser must be convolutional, connected or a network, got 'large'"):
        AffineTransformer(3, localiser="large")
    with pytest.raises(ValueError, match="padding must be zeros or border, got 'wrap'"):
        AffineTransformer(3, padding="wrap")


@pytest.mark.parametrize("localiser", ["convolutional", "connected"])
def test_names_a_wrong_number_of_channels(localiser):
    with pytest.raises(ValueError, match="channels must be 3, got a map of 4"):
        AffineTransformer(3, localiser=localiser)(torch.randn(1, 4, 8, 8))


def test_finds_a_shift():
    """Trained to undo shifts of a blob, it learns where the blob is."""
    torch.manual_seed(0)
    module = IsotropicTransformer(1, scale=1.0, view=16)
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, 16),) * 2, indexing="ij")

    def blobs(places):
        return torch.exp(-8 * ((x - places[:, :1, None]) ** 2 + (y - places[:, 1:, None]) ** 2))[:, None]

    upright = blobs(torch.zeros(1, 2))
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(module(blobs(torch.rand(64, 2) - 0.5)), upright.expand(64, -1, -1, -1)).backward()
        optimizer.step()
    places = torch.rand(64, 2) - 0.5
    found = module.locate(blobs(places))[:, 0]
    assert math.sqrt((found - places).square().mean().item()) < 0.1
