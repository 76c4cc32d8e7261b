"""The picture under a map: what the model saw, as bytes."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor


def as_photo(image: Image.Image | ndarray) -> UInt8[ndarray, "h w 3"]:
    """Return an image as RGB bytes.

    Args:
        image: A PIL image, or an array of uint8, shaped (h, w), (h, w, 1) or (h, w, 3).

    Raises:
        ValueError: If an array is none of these.

    Example:
        >>> as_photo(np.zeros((4, 6), np.uint8)).shape
        (4, 6, 3)
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(f"image must be uint8 of (h, w), (h, w, 1) or (h, w, 3), got {image.dtype} of {image.shape}")
    flat = image if image.ndim == 3 else image[:, :, None]
    return np.ascontiguousarray(np.broadcast_to(flat, (*flat.shape[:2], 3)))


def denormalise(x: Float[Tensor, "c h w"], mean: Sequence[float], std: Sequence[float]) -> UInt8[ndarray, "h w 3"]:
    """Return the picture a normalised tensor was made from: the cropped view that the model saw.

    Other than three channels are shown as their mean, in grey.

    Args:
        x: One image as the model takes it.
        mean: What was taken from each channel.
        std: What each channel was divided by.

    Example:
        >>> import torch
        >>> denormalise(torch.zeros(3, 2, 2), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))[0, 0]
        array([128, 128, 128], dtype=uint8)
    """
    values = x.detach().float().cpu()
    values = values * values.new_tensor(std)[:, None, None] + values.new_tensor(mean)[:, None, None]
    if values.shape[0] != 3:
        values = values.mean(0, keepdim=True)
    return as_photo((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
