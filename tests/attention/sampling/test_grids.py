import pytest
import torch
from torch.nn import functional as F

from visattn.attention.sampling.grids import arrange, centres, combine, folded, folding, identity, jacobian, product


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (5, 7), (32, 100)], ids=str)
def test_is_the_grid_of_the_library(size):
    theirs = F.affine_grid(torch.eye(2, 3, dtype=torch.double)[None], [1, 1, *size], align_corners=False)
    torch.testing.assert_close(identity(size, dtype=torch.double), theirs, rtol=0, atol=1e-15)
    assert (centres(size)[2] == 1).all()


@pytest.mark.parametrize("size", [(0, 3), (3, -1)], ids=str)
def test_refuses_an_output_without_pixels(size):
    with pytest.raises(ValueError, match=rf"size must be a positive height and width, got \({size[0]}, {size[1]}\)"):
        identity(size)


def test_area_is_the_determinant_of_an_affine_map():
    matrix = torch.tensor([[[1.2, 0.3], [-0.1, 0.7]]], dtype=torch.double)
    grid = identity((5, 7), dtype=torch.double) @ matrix.mT
    torch.testing.assert_close(jacobian(grid), torch.full((1, 4, 6), 1.2 * 0.7 + 0.03, dtype=torch.double))


def test_tells_what_share_is_folded_over():
    grid = identity((5, 9)).repeat(3, 1, 1, 1)
    grid[1, ..., 0] = grid[1, ..., 0].abs()  # the left half lies over the right
    grid[2] = grid[2].flip(1, 2)  # turned, not mirrored
    assert folded(grid).tolist() == [0, 0.5, 0]
    torch.testing.assert_close(folding(grid), torch.tensor([0.0, 0.5, 0.0]))
    torch.testing.assert_close(folding(grid, margin=3.0), torch.tensor([2.0, 3.0, 2.0]))


def test_penalty_unfolds():
    grid = identity((5, 9)).clone()
    grid[:, :, 4, 0] = grid[:, :, 6, 0]
    before = folded(grid).item()
    grid.requires_grad_()
    for _ in range(300):
        (gradient,) = torch.autograd.grad(folding(grid, margin=0.1).sum(), grid)
        grid.data -= 0.05 * gradient
    assert before > 0
    assert folded(grid) == 0


@pytest.mark.parametrize("shape", [(2, 1, 4, 2), (2, 4, 1, 2), (0, 4, 4, 2)], ids=str)
def test_nothing_to_fold(shape):
    grid = torch.zeros(shape)
    assert folded(grid).tolist() == folding(grid, margin=1.0).tolist() == [0] * shape[0]


def test_penalty_has_the_right_gradient():
    assert torch.autograd.gradcheck(folding, identity((3, 4), dtype=torch.double).clone().requires_grad_())
    grid = torch.randn(2, 3, 4, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda grid: folding(grid, margin=0.5), grid)


def test_gradient_of_a_product_read_in_pairs_is_that_of_planes():
    size = (3, 4)
    basis = centres(size, dtype=torch.double)
    many = torch.randn(24, 2, 3, dtype=torch.double, requires_grad=True)
    ours, plain = combine(many, basis, size), arrange(product(many, basis), size)
    assert "Combine" in ours.grad_fn.next_functions[0][0].next_functions[0][0].name()
    assert torch.equal(ours, plain)
    g = torch.randn_like(ours)
    (mine,), (other,) = (torch.autograd.grad(each, many, g) for each in (ours, plain))
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda ends: combine(ends, basis, size), many)
    assert torch.autograd.gradgradcheck(lambda ends: combine(ends, basis, size).square(), many)
