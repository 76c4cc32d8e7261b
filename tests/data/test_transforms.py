import dataclasses
import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional

from visattn.data.transforms import Augment, Augmentation, DeviceAugmentation, Preprocess, Unfinished, as_seen

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RGB = Preprocess((3, 24, 32), MEAN, STD)


def photo(height: int = 75, width: int = 100, seed: int = 0) -> Image.Image:
    """Smooth colours, no two places alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def reopened(image: Image.Image, form: str, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("size", [(32, 32), (24, 32), (40, 24)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("shape", [(75, 100), (100, 75), (33, 20), (31, 31)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocess_is_timms_evaluation_transform(size, crop_pct, shape, interpolation):
    ours = Preprocess((3, *size), MEAN, STD, interpolation, crop_pct)
    theirs = create_transform((3, *size), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop_pct)
    assert torch.equal(ours(photo(*shape)), theirs(photo(*shape)))


def test_preprocess_passes_through_json_and_takes_arrays():
    again = Preprocess(**json.loads(json.dumps(dataclasses.asdict(RGB))))
    assert again == RGB
    assert torch.equal(again(np.array(photo())), RGB(photo()))


def test_preprocess_of_a_model_is_what_it_was_trained_with_at_its_own_channels_and_size():
    model = timm.create_model("mobilenetv2_100")
    assert Preprocess.of(model) == Preprocess((3, 224, 224), MEAN, STD, "bicubic", 0.875)
    grey = Preprocess.of(timm.create_model("vit_tiny_patch16_224", in_chans=1, img_size=64, depth=1))
    assert grey == Preprocess((1, 64, 64), (0.5,), (0.5,), "bicubic", 0.9)
    assert Preprocess.of(torch.nn.Identity()).input_size == (3, 224, 224)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_size": (2, 8, 8)}, "input_size must be .1 or 3 channels, height, width., got .2, 8, 8."),
        ({"mean": (0.5,)}, "mean must have 3 values, one a channel, got .0.5,."),
        ({"std": (1.0, 1.0, 0.0)}, "std must be positive, got"),
        ({"interpolation": "cubic"}, "interpolation must be nearest, bilinear, bicubic or lanczos, got 'cubic'"),
        ({"crop_pct": 1.5}, r"crop_pct must lie in \(0, 1\], got 1.5"),
    ],
)
def test_preprocess_refuses(fields, message, unchecked):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RGB, **fields)


@pytest.mark.parametrize("crop", [1.0, 0.8])
@pytest.mark.parametrize("photo", [(120, 90), (60, 200), (33, 77)])
def test_a_box_is_where_preprocess_puts_what_is_in_it(photo, crop):
    transform = Preprocess((1, 64, 96), mean=(0.0,), std=(1.0,), interpolation="nearest", crop_pct=crop)
    height, width = photo
    x0, y0, x1, y1 = width // 3, height // 3, width // 3 + 20, height // 3 + 15
    pixels = np.zeros(photo, np.uint8)
    pixels[y0:y1, x0:x1] = 255
    rows, columns = transform(Image.fromarray(pixels))[0].nonzero().unbind(1)
    lit = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).float()
    torch.testing.assert_close(
        transform.boxes(torch.tensor([[x0, y0, x1, y1]]).float(), photo)[0], lit, rtol=0, atol=1.5
    )


def test_a_box_that_is_cropped_away_is_left_out():
    transform = Preprocess((3, 50, 50), mean=(0.5,) * 3, std=(0.2,) * 3)
    found = transform.boxes(torch.tensor([[0.0, 0, 20, 100], [40, 10, 90, 30]]), (100, 200))
    assert found.tolist() == [[0, 5, 20, 15]]


def test_preprocess_refuses_pixels_that_are_no_bytes():
    with pytest.raises(ValueError, match=r"pixels must be uint8 of shape .*, got float32 \(8, 8\)"):
        RGB(np.zeros((8, 8), np.float32))


def test_every_kind_of_picture_is_seen_as_people_see_it():
    image = photo()
    seen = {
        "grey": as_seen(image.convert("L"), 3),
        "palette": as_seen(reopened(image.quantize(256), "PNG"), 3),
        "cmyk": as_seen(reopened(image.convert("CMYK"), "JPEG", quality=95), 3),
        "opaque": as_seen(reopened(image.convert("RGBA"), "PNG"), 3),
    }
    assert np.array_equal(seen["grey"], np.stack([np.array(image.convert("L"))] * 3, 2))
    for kind in ("palette", "cmyk", "opaque"):
        assert np.abs(np.array(seen[kind], int) - np.array(image, int)).mean() < 8, kind
    assert as_seen(image, 1).mode == "L"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_whatever_colour_hides_below(mode):
    hidden = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    picture = reopened(hidden.quantize() if mode == "P" else hidden.convert(mode), "PNG")
    assert picture.mode == mode
    assert np.array(as_seen(picture, 3)).min() == 255


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    seen = np.array(as_seen(reopened(Image.fromarray(ramp), "PNG"), 1))
    assert np.abs(seen - ramp / 257).max() <= 0.5


def test_exif_says_which_way_is_up():
    image, exif = photo(), Image.Exif()
    exif[0x0112] = 6  # lies on its left side
    turned = reopened(image.rotate(90, expand=True), "PNG", exif=exif.tobytes())
    assert turned.size == (75, 100)
    assert np.array_equal(as_seen(turned, 3), image)


def test_augmentation_follows_from_its_seed_alone():
    first, second = (Augmentation(Augment(rotate=10.0, erase=0.5), RGB) for _ in range(2))
    one = first(photo(), (0, 1, 2))
    first(photo(), (5, 5, 5))
    np.random.default_rng(3).random()
    torch.manual_seed(7)
    assert torch.equal(first(photo(), (0, 1, 2)), one)
    assert torch.equal(second(photo(), (0, 1, 2)), one)
    for other in ((1, 1, 2), (0, 0, 2), (0, 1, 3)):
        assert not torch.equal(first(photo(), other), one)


def test_steps_of_an_augmentation_draw_independent_numbers():
    """Albumentations seeds all steps alike: what is flipped would then always be the brighter, say."""
    turn = Augmentation(Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.5, jitter=0.4), RGB)
    ramp = np.tile(np.linspace(60, 120, 24, dtype=np.uint8)[None, :, None], (24, 1, 3))
    x = torch.stack([turn(ramp, (0, 0, k)) for k in range(400)])
    flipped = (x[:, 0, 12, 0] > x[:, 0, 12, -1]).double()
    brightness = x.double().mean((1, 2, 3))
    assert 0.4 < flipped.mean() < 0.6
    assert torch.corrcoef(torch.stack([flipped, brightness]))[0, 1].abs() < 0.15  # 3 / sqrt(400)


def test_without_chance_an_augmentation_is_the_evaluation():
    none = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0)
    square = Preprocess((3, 32, 32), MEAN, STD)
    image = photo(32, 32)
    assert torch.equal(Augmentation(none, square)(image, (0,)), square(image))


def test_grey_images_are_augmented_in_one_channel():
    turn = Augmentation(Augment(rotate=10.0, erase=1.0), Preprocess((1, 16, 12), (0.5,), (0.5,)))
    x = turn(photo(), (0,))
    assert x.shape == (1, 16, 12)
    assert -1 <= x.min() < x.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_device_finishes_each_image_of_a_batch_as_torchvision_does(channels):
    preprocess = Preprocess((channels, 20, 24), MEAN[:channels], STD[:channels])
    turn = DeviceAugmentation(Augment(erase=0.5), preprocess)
    batch = default_collate([turn(photo(), (0, 0, k)) for k in range(16)])
    assert isinstance(batch, Unfinished)
    assert batch.pixels.dtype == torch.uint8
    found = turn.finish(batch)
    mean, std = (torch.tensor(values)[:channels, None, None] for values in (MEAN, STD))
    for x, chance, y in zip(batch.pixels / 255, batch.chance, found, strict=True):
        x = functional.hflip(x) if chance[0] else x
        x = functional.adjust_contrast(functional.adjust_brightness(x, float(chance[1])), float(chance[2]))
        x = (functional.adjust_saturation(x, float(chance[3])) - mean) / std
        top, left, bottom, right = chance[4:].int().tolist()
        x[:, top:bottom, left:right] = 0
        torch.testing.assert_close(y, x, rtol=0, atol=2e-3)  # torchvision has rounded weights of the colours in grey
    flips, erased = batch.chance[:, 0], batch.chance[:, 6] > 0
    assert 0 < flips.mean() < 1
    assert 0 < erased.float().mean() < 1
    assert (batch.chance[:, 1:4] - 1).abs().max() <= 0.4
    assert len(batch.chance[:, 1:4].unique()) == 48
    assert (batch.chance[:, 6:] <= torch.tensor([20, 24])).all()


def test_a_device_augmentation_follows_from_its_seed_alone():
    turn = DeviceAugmentation(Augment(erase=0.5), RGB)
    one, again, other = (turn(photo(), seed) for seed in ((0, 1, 2), (0, 1, 2), (0, 1, 3)))
    assert all(map(torch.equal, one, again))
    assert not torch.equal(one.chance, other.chance)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(turn.finish(one), turn.finish(again))
        assert turn.finish(one).dtype == torch.float32


def test_without_chance_a_device_augmentation_is_the_evaluation():
    none = Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=0.0)
    square = Preprocess((3, 32, 32), MEAN, STD)
    turn = DeviceAugmentation(none, square)
    torch.testing.assert_close(turn.finish(turn(photo(32, 32), (0,))), square(photo(32, 32)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"scale": (0.5, 0.1)}, r"scale must be two shares in \(0, 1\], the lesser first, got \(0.5, 0.1\)"),
        ({"ratio": (0.0, 1.0)}, r"ratio must be two positive numbers, the lesser first, got \(0.0, 1.0\)"),
        ({"flip": 1.5}, "flip must lie between 0 and 1, got 1.5"),
        ({"rotate": -1.0}, "rotate must lie between 0 and 180, got -1.0"),
        ({"jitter": 2.0}, "jitter must lie between 0 and 1, got 2.0"),
        ({"erase": -0.5}, "erase must lie between 0 and 1, got -0.5"),
    ],
)
def test_augment_refuses(option, message):
    with pytest.raises(ValueError, match=message):
        Augment(**option)
