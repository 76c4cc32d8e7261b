import math

import pytest

from visattn.drawing.grid import grid_of, key_grid_of, same_stride


@pytest.mark.parametrize("image", [(224, 224), (480, 640), (97, 33), (100, 333)])
@pytest.mark.parametrize("stride", [4, 8, 14, 16, 32])
@pytest.mark.parametrize("rounded", [math.ceil, math.floor])
def test_finds_the_grid_that_a_stride_cuts_and_not_its_transpose(image, stride, rounded):
    grid = tuple(rounded(side / stride) for side in image)
    assert same_stride(grid, image)
    if min(grid) > 3:
        assert grid_of(grid[0] * grid[1], image) == (grid, 0)
        assert image[0] == image[1] or not same_stride(grid[::-1], image)


@pytest.mark.parametrize("prefix", range(9))
def test_tells_prefix_tokens_from_positions(prefix):
    assert grid_of(196 + prefix, (224, 224)) == ((14, 14), prefix)
    assert grid_of(12 * 20 + prefix, (192, 320)) == ((12, 20), prefix)


def test_keys_stand_on_the_queries_grid_or_on_that_sub_sampled_either_way():
    assert key_grid_of(197, (14, 14), 1, (224, 224)) == ((14, 14), 1)
    assert key_grid_of(3 * 4, (7, 9), 0, (112, 144)) == ((3, 4), 0)
    assert key_grid_of(4 * 5, (7, 9), 0, (112, 144)) == ((4, 5), 0)
    assert key_grid_of(16 * 16 + 1, (8, 8), 0, (256, 256)) == ((16, 16), 1)


def test_says_so_where_no_grid_fits():
    with pytest.raises(ValueError, match=r"no grid of the aspect of an image of 224×224 has 150 positions"):
        grid_of(150, (224, 224))
