import numpy as np
import pytest
import torch
from PIL import Image

from visattn.drawing import as_photo, denormalise

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def test_bytes_stay_as_they_are_and_grey_becomes_three_equal_channels():
    assert np.array_equal(as_photo(PIXELS), PIXELS)
    assert np.array_equal(as_photo(Image.fromarray(PIXELS)), PIXELS)
    grey = PIXELS[:, :, 0]
    for image in (grey, grey[:, :, None], Image.fromarray(grey)):
        assert np.array_equal(as_photo(image), np.stack([grey] * 3, 2))


@pytest.mark.parametrize("image", [PIXELS / 255, PIXELS[:, :, :2], PIXELS[None]])
def test_refuses_what_is_no_picture(image):
    with pytest.raises(ValueError, match=r"image must be uint8 of \(h, w\), \(h, w, 1\) or \(h, w, 3\), got"):
        as_photo(image)


def test_denormalise_gives_back_the_bytes_that_were_normalised():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = torch.from_numpy((PIXELS / 255 - mean) / std).permute(2, 0, 1).float()
    assert np.array_equal(denormalise(x, mean, std), PIXELS)
    assert np.array_equal(denormalise(x[:1], mean[:1], std[:1])[:, :, 2], PIXELS[:, :, 0])
