import numpy as np
import pytest
import torch

from visattn.attention.sampling.affine_glimpse import AffineGlimpse
from visattn.attention.sampling.retina import Retina
from visattn.drawing import Fixations, draw_fixations
from visattn.drawing.fixations import CELLS

SIZE = (9, 14)


def windows(count, steps):
    """Finest patches of a retina, and of windows that are turned."""
    square = Retina(4).corners(2 * torch.rand(count * steps, 2) - 1, SIZE)[:, 0]
    turned = AffineGlimpse(4).corners(0.6 * torch.randn(count * steps, 6), SIZE)[:, 0]
    return torch.where(torch.rand(count * steps, 1, 1) < 0.5, square, turned).unflatten(0, (count, steps))


def added(images, corners, targets, taken, classes):
    """The same by loops over cells."""
    maps = np.zeros((classes, corners.shape[1], *SIZE))
    rollouts, each = len(corners) // len(images), targets.reshape(len(images), -1)
    for row, path in enumerate(corners.double().numpy()):
        for step, patch in enumerate(path[: taken[row]]):
            one = np.zeros(SIZE)
            sides = np.stack((patch[1] - patch[0], patch[3] - patch[0]), 1)
            for y in range(SIZE[0]):
                for x in range(SIZE[1]):
                    place = np.linalg.solve(sides, (x + 0.5, y + 0.5) - patch[0])
                    one[y, x] = ((place >= 0) & (place < 1)).all()
            if not one.any():
                y, x = np.indices(SIZE) + 0.5
                centre = patch.mean(0)
                one.flat[((x - centre[0]) ** 2 + (y - centre[1]) ** 2).argmin()] = 1
            told = each[row // rollouts, step // (corners.shape[1] // each.shape[1])]
            maps[told, step] += one / one.sum()
    return maps


@pytest.mark.parametrize(("rollouts", "targets"), [(1, 1), (2, 1), (1, 2)])
def test_maps_are_those_of_loops_and_sum_to_the_number_of_glimpses_of_each_class(rollouts, targets):
    fixations, wanted, shown = Fixations(3, 4, (1, *SIZE)), 0, torch.zeros(3, 1, *SIZE)
    for _ in range(2):
        images, labels = torch.rand(5, 1, *SIZE), torch.randint(2, (5, targets) if targets > 1 else (5,))
        corners, taken = windows(5 * rollouts, 4), torch.randint(1, 5, (5 * rollouts,))
        fixations.add(images, corners, labels, taken)
        wanted = wanted + added(images, corners, labels, taken, 3)
        for image, told in zip(images, labels.reshape(5, -1), strict=True):
            for k in told:
                shown[k] += image
    np.testing.assert_allclose(fixations.maps, wanted, atol=1e-5)
    torch.testing.assert_close(fixations.maps.sum((2, 3)), fixations.counts)
    assert fixations.counts.sum() > 10 * rollouts
    assert not fixations.counts[2].any()
    torch.testing.assert_close(fixations.images, shown)
    assert fixations.shown.sum() == 10 * targets


def test_a_glimpse_of_nothing_is_in_the_nearest_cell():
    fixations, far = Fixations(1, 2, (1, *SIZE)), torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    flat = torch.tensor([5.4, 3.6]).expand(4, 2)
    fixations.add(torch.rand(1, 1, *SIZE), torch.stack((far + 100, flat))[None], torch.tensor([0]))
    assert fixations.maps.nonzero().tolist() == [[0, 0, 8, 13], [0, 1, 3, 5]]


def test_maps_of_large_images_are_coarser():
    fixations = Fixations(1, 1, (3, 200, 300))
    assert fixations.cells == (40, 60)
    assert max(fixations.cells) <= CELLS
    image = torch.zeros(1, 3, 200, 300)
    image[..., 50:100, 150:200] = 1
    corners = Retina(50).corners(torch.tensor([[175 / 150 - 1, 75 / 100 - 1]]), (200, 300))
    fixations.add(image, corners, torch.tensor([0]))
    assert torch.equal(fixations.maps[0, 0] * 100, fixations.images[0, 0])


def drawn(classes, counts, glimpses=2, **options):
    fixations = Fixations(classes, glimpses, (1, *SIZE))
    targets = torch.arange(classes).repeat_interleave(torch.tensor(counts))
    fixations.add(torch.rand(len(targets), 1, *SIZE), windows(len(targets), glimpses), targets)
    return fixations, draw_fixations(fixations, **options)


def test_a_column_for_all_and_each_class_that_there_is_and_its_mean_image_below():
    fixations, figure = drawn(4, [3, 1, 0, 2], labels=["cat", "dog", "none", "hippopotamus"], title="step 7")
    columns = [figure.axes[first : first + 4] for first in range(0, 16, 4)]
    assert [column[0].get_title() for column in columns] == ["all", "cat", "dog", "hippopotamus"]
    names = ["glimpse 1", "glimpse 2", "all glimpses", "mean image", "step 7"]
    assert [text.get_text() for text in figure.texts] == names
    for column, kinds in zip(columns, ([0, 1, 2, 3], [0], [1], [3]), strict=True):
        shown = [np.asarray(axes.images[0].get_array()) for axes in column]
        count = fixations.shown[kinds].sum()
        maps = fixations.maps[kinds].sum(0) / count * SIZE[0] * SIZE[1]
        for step in range(2):
            np.testing.assert_allclose(shown[step], maps[step], rtol=1e-5)
            assert shown[step].mean() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(shown[2], maps.mean(0), rtol=1e-4, atol=1e-6)
        wanted = (fixations.images[kinds].sum(0)[0] / count * 255).round()
        assert np.abs(shown[3][..., 0] - wanted.numpy()).max() <= 1
    limits = {axes.images[0].get_clim() for column in columns for axes in column[:3]}
    assert len(limits) == 1


@pytest.mark.parametrize(("counts", "glimpses"), [([40], 1), ([2] * 4, 3)])
def test_nothing_is_written_outside_or_over_other_things(counts, glimpses):
    _, figure = drawn(len(counts), counts, glimpses, title="step 100000")
    figure.canvas.draw()
    boxes = [each.get_tightbbox() for each in (*figure.axes, *figure.texts)]
    whole = figure.bbox
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_of_many_classes_those_with_most_images_have_columns():
    _, figure = drawn(5, [1, 3, 2, 3, 1], columns=3)
    assert [axes.get_title() for axes in figure.axes[:16:4]] == ["all", "1", "2", "3"]


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"classes, glimpses and size must be at least 1, got 0, 2 and \(1, 9, 14\)"):
        Fixations(0, 2, (1, *SIZE))
    fixations, image = Fixations(2, 4, (1, *SIZE)), torch.rand(2, 1, *SIZE)
    with pytest.raises(ValueError, match="images must be of 9 × 14 with 4 glimpses, got 9 × 14 with 3 glimpses"):
        fixations.add(image, windows(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="images must be of 9 × 14 with 4 glimpses, got 9 × 13 with 4 glimpses"):
        fixations.add(image[..., 1:], windows(2, 4), torch.tensor([0, 1]))
    for corners, targets in ((windows(3, 4), torch.tensor([0, 1])), (windows(2, 4), torch.zeros(2, 3).long())):
        with pytest.raises(ValueError, match=r"corners and targets must fit 2 images, got \(\d, 4, 4, 2\) and \(2"):
            fixations.add(image, corners, targets)
    with pytest.raises(ValueError, match="fixations must be of at least one image, got none"):
        draw_fixations(fixations)
