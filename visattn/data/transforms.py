"""From a picture to what a model reads: one way for evaluation and inference, one for training."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ERASED, SHAPES = (0.02, 0.33), (0.3, 3.3)  # share of an image that is erased; width over height of that
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey
ORIENTATION = 0x0112  # the tag of EXIF that says which way is up


def as_seen(image: "Image.Image | np.ndarray", channels: int) -> Image.Image:
    """Return the picture as people see it: upright, opaque (on white), 8 bit, grey or RGB.

    Args:
        image: Any picture Pillow opens, or uint8 pixels of shape (h, w), (h, w, 1) or (h, w, 3).
        channels: 1 for grey, 3 for RGB.

    Raises:
        ValueError: If an array is not uint8 or has another shape.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (1,), (3,)) or image.ndim < 2:
            raise ValueError(
                f"pixels must be uint8 of shape (h, w), (h, w, 1) or (h, w, 3), got {image.dtype} {image.shape}"
            )
        image = Image.fromarray(image.reshape(image.shape[:2]) if image.shape[2:] == (1,) else image)
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


@dataclass(frozen=True)
class Preprocess:
    """How evaluation and inference bring any picture into the form a model reads.

    The shortest side is resized so that ``crop_pct`` of it fills the input, the centre is cropped, and the pixels are
    normalised: the same pixels as from timm's evaluation transform with a centre crop. All fields are plain values.

    Args:
        input_size: Channels (1 or 3), height and width of the input.
        mean: Mean of each channel, on the scale from 0 to 1.
        std: Standard deviation of each channel.
        interpolation: How the picture is resized, always with antialiasing.
        crop_pct: Share of the resized picture's shortest side that is kept.

    Raises:
        ValueError: If a value is out of its range, or ``mean`` and ``std`` do not have one value for each channel.

    Example:
        >>> Preprocess((1, 32, 32), mean=(0.5,), std=(0.5,))(np.zeros((8, 8), np.uint8)).shape
        torch.Size([1, 32, 32])
    """

    input_size: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std"):  # lists, where they come out of JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.input_size) != 3 or self.input_size[0] not in (1, 3) or min(self.input_size) < 1:
            raise ValueError(f"input_size must be (1 or 3 channels, height, width), got {self.input_size}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.input_size[0]:
                raise ValueError(
                    f"{name} must have {self.input_size[0]} values, one a channel, got {getattr(self, name)}"
                )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if self.interpolation not in Interpolation.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"interpolation must be nearest, bilinear, bicubic or lanczos, got {self.interpolation!r}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], got {self.crop_pct}")

    def __call__(self, image: "Image.Image | np.ndarray") -> Tensor:
        channels, height, width = self.input_size
        image = as_seen(image, channels)
        tall, wide = int(height / self.crop_pct), int(width / self.crop_pct)
        whole = int if tall == wide else round  # as timm does, to the pixel
        size = max(wide, whole(tall * image.width / image.height)), max(tall, whole(wide * image.height / image.width))
        image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return self.normalise(np.array(image.crop((left, top, left + width, top + height))))

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """Return uint8 pixels of shape (h, w) or (h, w, c) as a normalised float tensor of shape (c, h, w)."""
        return self.standardise(planes(pixels).float().div_(255))

    def standardise(self, x: Tensor) -> Tensor:
        """Normalise images on the scale from 0 to 1, in place."""
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return x.sub_(mean).div_(std)

    def boxes(self, boxes: Float[Tensor, "k 4"], photo: tuple[int, int]) -> Float[Tensor, "m 4"]:
        """Return where boxes of a photo are in what a model reads of it; those of which it reads nothing are left out.

        Args:
            boxes: The first column and row and those behind the last, in pixels of the upright photo.
            photo: Its height and width.
        """
        view = torch.tensor(self.input_size[1:], dtype=boxes.dtype)
        sides = torch.tensor(photo, dtype=boxes.dtype)
        whole = sides * (view / self.crop_pct / sides).max()  # of which the middle is read
        places = boxes.view(-1, 2, 2) * (whole / sides).flip(0) - ((whole - view) / 2).flip(0)
        found = torch.minimum(places.clamp_min(0), view.flip(0)).view(-1, 4)
        return found[(found[:, 2:] > found[:, :2]).all(1)]

    @classmethod
    def of(cls, model: Any) -> "Preprocess":
        """Return what a timm model was trained to expect, at its own number of channels and its own input size."""
        from timm.data import resolve_data_config

        config = resolve_data_config(model=model)
        channels, *size = config["input_size"]
        first = getattr(model, "pretrained_cfg", {}).get("first_conv")
        if hasattr(model, "in_chans"):  # also where features_only has renamed its modules
            channels = model.in_chans
        elif isinstance(first, str):
            channels = model.get_submodule(first).weight.shape[1]
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
        return cls(
            input_size=(channels, *size),
            mean=spread(config["mean"], channels),
            std=spread(config["std"], channels),
            interpolation=config["interpolation"],
            crop_pct=float(config["crop_pct"]),
        )


def planes(pixels: np.ndarray) -> Tensor:
    """Return pixels of shape (h, w) or (h, w, c) as a tensor of shape (c, h, w)."""
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()


def spread(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one value a channel: the given ones, or their mean everywhere where the channels are others."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


@dataclass(frozen=True)
class Augment:
    """What chance does to a training image.

    Args:
        scale: Least and greatest share of the image's area that a random crop keeps before it is resized.
        ratio: Least and greatest width over height of that crop.
        flip: Probability of a mirror image; left out, 0.5, and 0 for sets known to be of digits or letters. Use 0 where
            left and right mean something.
        rotate: Greatest angle of a random rotation, in degrees.
        jitter: Strength of random changes of brightness, contrast and saturation (0.4: factors from 0.6 to 1.4).
        erase: Probability of filling a random rectangle with the mean colour.

    Raises:
        ValueError: If a value is out of its range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float | None = None
    rotate: float = 0.0
    jitter: float = 0.4
    erase: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two shares in (0, 1], the lesser first, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be two positive numbers, the lesser first, got {self.ratio}")
        for name, most in (("flip", 1), ("rotate", 180), ("jitter", 1), ("erase", 1)):
            if (value := getattr(self, name)) is not None and not 0 <= value <= most:
                raise ValueError(f"{name} must lie between 0 and {most}, got {value}")


class Augmentation:
    """The training transform: :class:`Augment` by Albumentations, then the normalisation of a :class:`Preprocess`.

    Args:
        augment: What chance does.
        preprocess: Size, interpolation and normalisation of what comes out.

    Example:
        >>> turn = Augmentation(Augment(), Preprocess((3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3))
        >>> turn(np.zeros((8, 8, 3), np.uint8), seed=(0, 1, 2)).shape
        torch.Size([3, 32, 32])
    """

    def __init__(self, augment: Augment, preprocess: Preprocess):
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer version
        import albumentations as A
        import cv2

        cv2.setNumThreads(0)  # workers are the parallelism
        channels, height, width = preprocess.input_size
        interpolation = {
            "nearest": cv2.INTER_NEAREST,
            "bilinear": cv2.INTER_LINEAR,
            "bicubic": cv2.INTER_CUBIC,
            "lanczos": cv2.INTER_LANCZOS4,
        }[preprocess.interpolation]
        factors = 1 - augment.jitter, 1 + augment.jitter
        steps: list[A.BasicTransform] = []
        if augment.rotate:
            steps += [A.Rotate(augment.rotate, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE, p=1)]
        steps += [
            A.RandomResizedCrop(
                (height, width), augment.scale, augment.ratio, interpolation, area_for_downscale="image", p=1
            )
        ]
        if augment.flip != 0:
            steps += [A.HorizontalFlip(p=0.5 if augment.flip is None else augment.flip)]
        if augment.jitter:
            saturation = factors if channels == 3 else (1, 1)
            steps += [A.ColorJitter(brightness=factors, contrast=factors, saturation=saturation, hue=(0, 0), p=1)]
        if augment.erase:
            steps += [A.Erasing(fill=tuple(255 * m for m in preprocess.mean), p=augment.erase)]
        self.preprocess = preprocess
        self.steps = A.Compose(steps)

    def __call__(self, image: "Image.Image | np.ndarray", seed: Sequence[int]) -> Tensor:
        """Return the image under the chance that ``seed``, a few non-negative whole numbers, stands for."""
        return self.preprocess.normalise(self.pixels(image, np.random.default_rng(seed)))

    def pixels(self, image: "Image.Image | np.ndarray", chance: np.random.Generator) -> np.ndarray:
        """Return the uint8 pixels of the image under chance."""
        # one stream for all steps: seeded by themselves they would all draw the same numbers
        self.steps.set_random_state(chance, random.Random(int(chance.integers(2**63))))
        return self.steps(image=np.array(as_seen(image, self.preprocess.input_size[0])))["image"]


class Unfinished(NamedTuple):
    """Images that are cropped and turned, and what chance still does to each."""

    pixels: UInt8[Tensor, "*b c h w"]
    chance: Float[Tensor, "*b 8"]
    """1 if mirrored; factors of brightness, contrast and saturation; top, left, bottom and right of what is erased."""


class DeviceAugmentation:
    r"""The training transform in two parts: a worker crops, the device finishes all images of a batch at once.

    As :class:`Augmentation`, but the colours change in a fixed order and are not rounded in between:

    .. math:: x_1 = b x, \quad x_2 = \bar g(x_1) + c\,(x_1 - \bar g(x_1)), \quad x_3 = g(x_2) + s\,(x_2 - g(x_2))

    each kept within [0, 1], with :math:`g` the grey of a pixel, and :math:`\bar g` its mean over the image.

    Args:
        augment: What chance does.
        preprocess: Size, interpolation and normalisation of what comes out.

    Example:
        >>> turn = DeviceAugmentation(Augment(), Preprocess((3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3))
        >>> turn.finish(turn(np.zeros((8, 8, 3), np.uint8), seed=(0, 1, 2))).shape
        torch.Size([3, 32, 32])
    """

    def __init__(self, augment: Augment, preprocess: Preprocess):
        self.augment = augment
        self.crop = Augmentation(replace(augment, flip=0.0, jitter=0.0, erase=0.0), preprocess)
        self.preprocess = preprocess

    def __call__(self, image: "Image.Image | np.ndarray", seed: Sequence[int]) -> Unfinished:
        """Return the image, cropped under the chance that ``seed`` stands for, and what else that does to it."""
        chance = np.random.default_rng(seed)
        x = planes(self.crop.pixels(image, chance))
        flip = 0.5 if self.augment.flip is None else self.augment.flip
        drawn = [chance.random() < flip, *(1 + self.augment.jitter * chance.uniform(-1, 1, 3))]
        drawn += self.erased(chance) if chance.random() < self.augment.erase else [0] * 4
        return Unfinished(x, torch.tensor(drawn, dtype=torch.float32))

    def erased(self, chance: np.random.Generator) -> list[int]:
        """Draw a rectangle of at most a third of the image, which lies within it."""
        _, height, width = self.preprocess.input_size
        area, ratio = chance.uniform(*ERASED) * height * width, np.exp(chance.uniform(*np.log(SHAPES)))
        tall, wide = min(height, round((area / ratio) ** 0.5)), min(width, round((area * ratio) ** 0.5))
        top, left = int(chance.integers(height - tall + 1)), int(chance.integers(width - wide + 1))
        return [top, left, top + tall, left + wide]

    def finish(self, images: Unfinished) -> Float[Tensor, "*b c h w"]:
        """Return images as a network reads them, on the device where they lie."""
        with torch.autocast(images.pixels.device.type, enabled=False):
            return self.finished(images.pixels.float() / 255, images.chance)

    def finished(self, x: Float[Tensor, "*b c h w"], chance: Float[Tensor, "*b 8"]) -> Float[Tensor, "*b c h w"]:
        each = chance[..., None, None, None].unbind(-4)
        mirrored, brightness, contrast, saturation, top, left, bottom, right = each
        x = torch.where(mirrored > 0, x.flip(-1), x)
        if self.augment.jitter:
            x = (brightness * x).clamp(0, 1)
            x = torch.lerp(self.grey(x).mean((-1, -2), keepdim=True), x, contrast).clamp(0, 1)
            x = torch.lerp(self.grey(x), x, saturation).clamp(0, 1)
        x = self.preprocess.standardise(x)
        if self.augment.erase:
            rows, columns = (torch.arange(size, device=x.device) for size in x.shape[-2:])
            rows = rows[:, None]
            x = x.masked_fill((top <= rows) & (rows < bottom) & (left <= columns) & (columns < right), 0.0)
        return x

    @staticmethod
    def grey(x: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b 1 h w"]:
        """Return the brightness of each pixel."""
        return x if x.shape[-3] == 1 else (x * x.new_tensor(LUMA)[:, None, None]).sum(-3, keepdim=True)
