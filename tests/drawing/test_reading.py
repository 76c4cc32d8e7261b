from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from visattn import (
    DeformableConvolution,
    DynamicConvolution,
    Involution,
    IsotropicTransformer,
    SelectiveKernel,
    ThinPlateTransformer,
)
from visattn.attention.sampling.grids import identity
from visattn.drawing import Channels, Heat, Warp, drawable, of_image, read_maps

IMAGE = (64, 96)  # 4×6 at stride 16


class Two(NamedTuple):
    channel: Tensor
    spatial: Tensor


def read(weights, **options):
    (drawn,) = read_maps({"layer1/X": weights}, IMAGE, **options)
    return drawn


def reading(target, n=24, m=24):
    """Weights of which each query reads its target key alone."""
    weights = torch.zeros(1, n, m)
    weights[0, torch.arange(n), target] = 1
    return weights


def test_channel_weights_become_bars_and_never_a_map():
    weights = torch.rand(1, 64, 1, 1)
    drawn = read(weights)
    assert isinstance(drawn, Channels)
    assert np.array_equal(drawn.values, weights.flatten().numpy())
    assert drawn.note == "64 channels, bars from their mean"


def test_a_map_is_itself_and_maps_of_channels_are_their_mean_and_say_so():
    weights = torch.rand(1, 8, 4, 6)
    alone, many = read(weights[:, :1]), read(weights)
    assert isinstance(alone, Heat)
    assert np.array_equal(alone.values, weights[0, 0].numpy())
    assert (alone.note, alone.query) == ("4×6", None)
    np.testing.assert_allclose(many.values, weights[0].mean(0).numpy(), rtol=1e-6)
    assert many.note == "4×6, mean of 8 channels"


def test_a_map_of_strips_is_drawn_along_its_axis():
    assert read(torch.rand(1, 8, 4, 1)).values.shape == (4, 1)


@pytest.mark.parametrize("heads", [None, 1, 3])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_pairs_show_what_the_query_under_the_pixel_reads(heads, prefix):
    weights = reading((torch.arange(24 + prefix) + 7) % (24 + prefix), 24 + prefix, 24 + prefix)
    drawn = read(
        weights if heads is None else weights[:, None].repeat(1, heads, 1, 1), query=(20, 50)
    )  # in cell (1, 3)
    wanted = np.zeros((4, 6), np.float32)
    wanted.flat[1 * 6 + 3 + 7] = 1
    assert np.array_equal(drawn.values, wanted)
    assert drawn.query == (24, 56)
    assert drawn.note.startswith("what (1, 3) of 4×6 reads")
    assert ("mean of 3 heads" in drawn.note) == (heads == 3)
    assert ("prefix" in drawn.note) == (prefix > 0)


def test_pairs_ask_the_centre_by_default_and_keys_may_be_sub_sampled():
    drawn = read(reading(torch.full((24,), 4), 24, 6))
    assert drawn.query == (40, 56)
    assert np.array_equal(drawn.values, [[0, 0, 0], [0, 1, 0]])


def test_pairs_whose_rows_do_not_sum_to_one_need_no_heads():
    assert read(torch.rand(1, 24, 24)).values.shape == (4, 6)


def test_signed_pairs_of_several_heads_are_pairs_as_well():
    weights = torch.randn(1, 3, 24, 24)
    drawn = read(weights, query=(20, 50))
    np.testing.assert_allclose(drawn.values, weights[0, :, 9].mean(0).view(4, 6).numpy(), rtol=1e-5, atol=1e-6)
    assert drawn.note == "what (1, 3) of 4×6 reads, mean of 3 heads"


@pytest.mark.parametrize("channels", [1, 7])
def test_weighed_items_become_bars_that_say_so(channels):
    weights = torch.rand(1, 4, channels, 1, 1).softmax(1)
    drawn = read(weights)
    assert isinstance(drawn, Channels)
    np.testing.assert_allclose(drawn.values, weights[0, :, :, 0, 0].mean(1).numpy(), rtol=1e-6)
    note = "4 weighed items, bars from their mean"
    assert drawn.note == (note if channels == 1 else f"{note}, mean of 7 channels")


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_at_each_position_is_drawn_by_its_size(groups):
    weights = torch.randn(1, groups, 3, 3, 4, 6)
    drawn = read(weights)
    assert isinstance(drawn, Heat)
    sizes = np.zeros((4, 6))
    for i in range(4):
        for j in range(6):
            sizes[i, j] = sum(abs(float(w)) for w in weights[0, :, :, :, i, j].flatten()) / groups
    np.testing.assert_allclose(drawn.values, sizes, rtol=1e-5)
    note = "4×6, sum of the absolute weights of the 3×3 kernel there"
    assert drawn.note == (note if groups == 1 else f"{note}, mean of 2 groups")


def test_offsets_are_drawn_by_their_length():
    weights = torch.zeros(1, 1, 3, 3, 2, 4, 6)
    weights[0, 0, :, :, 0, 1, 2], weights[0, 0, :, :, 1, 1, 2] = -3, 4
    weights[0, 0, 2, 1, 0, 3, 5] = 9
    drawn = read(weights)
    wanted = np.zeros((4, 6), np.float32)
    wanted[1, 2], wanted[3, 5] = 5, 1
    np.testing.assert_allclose(drawn.values, wanted, rtol=1e-6)
    assert drawn.note == "4×6, mean length of the offsets of the 3×3 taps there"


def test_what_kernel_modules_return_is_drawable():
    x = torch.randn(1, 16, 4, 6)
    modules = (
        SelectiveKernel(16, groups=1),
        DynamicConvolution(16),
        Involution(16, kernel_size=3),
        DeformableConvolution(16, modulated=True),
    )
    maps = {type(module).__name__: module.eval().attend(x) for module in modules}
    assert [type(one).__name__ for one in read_maps(maps, IMAGE)] == ["Channels", "Channels", "Heat", "Heat", "Heat"]
    mask = maps["DeformableConvolution"].mask
    np.testing.assert_allclose(read_maps(maps, IMAGE)[-1].values, mask[0, 0].sum((0, 1)).detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("size", [(4, 6), (28, 28), (3, 1), (1, 2)])
def test_a_grid_of_any_size_is_a_warp(size):
    grids = torch.rand(1, 2, *size, 2)
    drawn = read(grids)
    assert isinstance(drawn, Warp)
    assert np.array_equal(drawn.grid, grids[0].numpy())
    assert drawn.note.startswith(f"{size[0]}×{size[1]}, 2 heads, ")


def test_the_note_of_a_warp_says_what_it_does():
    still = identity((8, 12))[None]
    assert read(still).note == "8×12, nothing moves"
    assert read(0.5 * still).note == "8×12, 0% folded over, magnified 2×"
    assert read(still.flip(3)).note == "8×12, mirrored"
    assert read(torch.cat((still, still.flip(2)), 1)).note == "8×12, 2 heads, 50% folded over"
    assert read(still + torch.tensor([1.0, 0])).note == "8×12, 0% folded over, 50% outside"
    assert read(0 * still).note == "8×12, 0% folded over, magnified inf×"


def test_what_spatial_transformers_return_is_drawable():
    x = torch.randn(1, 3, 20, 30)
    modules = IsotropicTransformer(3, scale=0.5, heads=4), ThinPlateTransformer(3, output_size=(10, 15))
    maps = {type(module).__name__: module.attend(x) for module in modules}
    assert [one.grid.shape for one in read_maps(maps, (20, 30))] == [(4, 20, 30, 2), (1, 20, 30, 2)]


def test_one_query_without_a_place_has_no_cross():
    drawn = read(torch.rand(1, 2, 1, 25).softmax(-1))
    assert (drawn.values.shape, drawn.query, drawn.note) == (
        (4, 6),
        None,
        "4×6, mean of 2 heads, 1 prefix token left out",
    )


def test_a_grid_that_the_image_does_not_tell_is_given():
    weights = reading(torch.arange(21) - 1, 21, 21)
    with pytest.raises(ValueError, match=r"layer1/X: no grid of the aspect of an image of 64×96 has 21 positions"):
        read(weights)
    drawn = read(weights, grids={"layer1/X": (2, 10)}, query=(0, 95))
    assert drawn.values.shape == (2, 10)
    assert drawn.values[0, 8] == 1
    with pytest.raises(ValueError, match=r"grids must name a grid of at most 21 positions, got 5×6"):
        read(weights, grids={"layer1/X": (5, 6)})


def test_a_tuple_gives_one_drawing_for_each_field():
    drawn = read_maps({"layer1/CBAM": Two(torch.rand(1, 8, 1, 1), torch.rand(1, 1, 4, 6))}, IMAGE)
    assert [(one.name, type(one)) for one in drawn] == [
        ("layer1/CBAM.channel", Channels),
        ("layer1/CBAM.spatial", Heat),
    ]


def test_one_image_of_a_batch():
    maps = {"a/CBAM": Two(torch.rand(3, 8, 1, 1), torch.rand(3, 1, 4, 6))}
    assert torch.equal(of_image(maps, 2)["a/CBAM.spatial"], maps["a/CBAM"].spatial[2:])
    with pytest.raises(ValueError, match=r"a/CBAM.channel: weights must be of one image, got 3 images or windows"):
        read_maps(maps, IMAGE)


def test_equal_weights_are_called_so():
    assert read(torch.full((1, 1, 4, 6), 0.5)).note == "4×6, all the same"
    assert read(torch.full((1, 8, 1, 1), 0.5)).note.endswith("all the same")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision(dtype):
    assert read(torch.rand(1, 2, 24, 24).softmax(-1).to(dtype)).values.shape == (4, 6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.rand(1, 24), r"weights must be \(1, c, 1, 1\), .* got \(1, 24\)"),
        (torch.rand(1, 0, 4, 6), r"weights must be .* got \(1, 0, 4, 6\)"),
        (torch.full((1, 1, 4, 6), torch.nan), "weights must be finite"),
        (torch.full((1, 1, 4, 6, 2), torch.inf), "weights must be finite"),
        (torch.rand(2, 1, 4, 6, 2), "weights must be of one image, got 2"),
        (torch.rand(1, 1, 4, 6, 3), r"weights must be .* got \(1, 1, 4, 6, 3\)"),
        (torch.rand(1, 4, 8, 2, 1), r"weights must be .* got \(1, 4, 8, 2, 1\)"),
        (torch.rand(1, 1, 3, 5, 4, 6), r"weights must be .* got \(1, 1, 3, 5, 4, 6\)"),
        (torch.rand(1, 1, 3, 3, 3, 4, 6), r"weights must be .* got \(1, 1, 3, 3, 3, 4, 6\)"),
        (torch.rand(1, 1, 3, 3, 64, 6), "a map of 64×6 does not lie on an image of 64×96"),
        (torch.rand(1, 1, 64, 6), "a map of 64×6 does not lie on an image of 64×96"),
    ],
)
def test_refuses_what_has_no_picture_and_names_it(weights, message):
    with pytest.raises(ValueError, match=f"layer1/X: {message}"):
        read(weights)
    good, bad = drawable({"layer1/X": weights, "layer2/X": torch.rand(1, 8, 1, 1)}, IMAGE)
    assert list(good) == ["layer2/X"]
    assert list(bad) == ["layer1/X"]


@pytest.mark.parametrize("query", [(64, 0), (0, -1)])
def test_refuses_a_query_outside_the_image(query):
    with pytest.raises(ValueError, match=r"query must lie inside the image of 64×96, got"):
        read(torch.rand(1, 24, 24), query=query)


def test_open_gates_along_an_axis_are_no_queries():
    strips = {"CoordinateAttention": torch.ones(1, 4, 7, 1)}
    (heat,) = read_maps(strips, (224, 224))
    assert heat.query is None
    assert heat.values.shape == (7, 1)


def test_the_signature_of_a_module_says_what_its_weights_are():
    weights = torch.rand(1, 2, 16, 16)  # of 4×4 positions, or a map at stride 8
    pairs, unknown, fields = (
        read_maps({name: weights}, (128, 128))[0]
        for name in ("layer4/HaloAttention", "layer4/Attention", "layer4/AxialAttention.height")
    )
    assert (pairs.values.shape, fields.values.shape, unknown.values.shape) == ((4, 4), (4, 4), (16, 16))
    assert (pairs.query is None, unknown.query is None) == (False, True)
    (heat,) = read_maps({"layer4/LargeKernelAttention": weights / weights.sum(-1, keepdim=True)}, (128, 128))
    assert heat.values.shape == (16, 16)
    (second,) = read_maps({"layer4/LambdaAttention.2": weights}, (128, 128))
    assert second.values.shape == (4, 4)
