"""Annotators: from a photo to the condition that a ControlNet was trained on. Canny edges are here, the others in the package controlnet_aux."""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from data.pictures import resized, to_image


def fit_photo(photo: Tensor, height: int | None, width: int | None, side: int) -> Tensor:
    """Scale a photo (3, H, W) to height x width; what is not given follows from the shorter side becoming `side`, rounded to multiples of 64.

    64 is what ControlNet's own programs round to: 8 for the autoencoder, 8 for the UNet's three halvings.
    """
    _, h, w = photo.shape
    return resized(photo, *(given or max(64, round(length * side / min(h, w) / 64) * 64) for given, length in ((height, h), (width, w))))


def canny(photo: Tensor, low: float = 100, high: float = 200) -> Tensor:
    """Canny's edges of a photo (3, H, W) in [0, 1]: white lines on black, the same shape and range.

    The thresholds are those of the released Canny ControlNet, in the gradient of 8-bit values, through the same OpenCV function.
    """
    edges = cv2.Canny(np.asarray(to_image(photo)), low, high)
    return torch.from_numpy(edges).float().div(255).expand(3, -1, -1).clone()


def annotate(name: str, photo: Tensor) -> Tensor:
    """What another annotator sees in a photo (3, H, W) in [0, 1], same shape: a name of controlnet_aux's Processor (openpose, depth_midas, ...).

    Most of them fetch their weights when first used. Raises ValueError if the package is missing, does not know the name or cannot fetch.
    """
    try:
        from controlnet_aux.processor import MODELS, Processor
    except ImportError as problem:
        raise ValueError(f'annotator {name} needs controlnet_aux ({problem}): pip install -e ".[annotators]". canny needs nothing') from None
    if name not in MODELS:
        raise ValueError(f"expected an annotator among {', '.join(MODELS)}, got {name!r}")
    try:
        processor = _made(Processor, name)
    except (OSError, ImportError) as problem:
        raise ValueError(f"annotator {name} could not get what it needs: {problem}") from None
    image = to_image(photo)
    condition = np.array(processor(image, to_pil=True).convert("RGB"))
    return resized(torch.from_numpy(condition).permute(2, 0, 1).float() / 255, image.height, image.width)


@lru_cache(maxsize=1)
def _made(processor: type, name: str) -> Callable:
    """The annotator with its weights, once for many photos."""
    return processor(name)
