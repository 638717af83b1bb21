"""From a photo or what is drawn on a canvas to a condition: Canny edges, lines, and the annotators
of the package controlnet_aux."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.Image import Resampling
from torch import Tensor

from data.pictures import resized, to_image, to_tensor

SHORT_NAMES = {  # the usual words -> controlnet_aux's
    "hed": "softedge_hed", "lineart": "lineart_realistic", "depth": "depth_midas",
    "normal": "normal_bae"}


def fit_photo(photo: Tensor, height: int | None, width: int | None, side: int) -> Tensor:
    """Scale a photo (3, H, W) to height x width. A missing one is what makes the shorter side
    `side`, rounded to a multiple of 64, as in ControlNet's own programs."""
    _, h, w = photo.shape  # 64: 8 for the autoencoder, 8 for the UNet's three halvings
    height = height or max(64, round(h * side / min(h, w) / 64) * 64)
    width = width or max(64, round(w * side / min(h, w) / 64) * 64)
    return resized(photo, height, width)


def canny(photo: Tensor, low: float = 100, high: float = 200) -> Tensor:
    """Canny edges of a photo (3, H, W) in [0, 1]: white lines on black, same shape and range.
    OpenCV's function and thresholds (of 255) as for the released Canny ControlNet."""
    import cv2  # a tenth of a second, for those who need it

    edges = cv2.Canny(np.asarray(to_image(photo)), low, high)
    return torch.from_numpy(edges).float().div(255).expand(3, -1, -1).clone()


def lines(drawing: Tensor) -> Tensor:
    """The dark lines of a drawing (3, H, W) in [0, 1], white on black: pixels with no channel above
    0.4 (chosen on 40 held-out drawings, docs/drawings.md)."""
    return (drawing.amax(dim=0, keepdim=True) < 0.4).float().expand(3, -1, -1)


def to_canvas(condition: Tensor, side: int) -> Image.Image:
    """A condition (3, H, W), white on black, as it is drawn on paper, black on white, at least
    `side` pixels large: every pixel becomes a square, so `from_canvas` gives the condition back."""
    times = max(1, -(-side // condition.shape[1]))
    return to_image(1 - condition.repeat_interleave(times, 1).repeat_interleave(times, 2))


def from_canvas(canvas: Image.Image | None, side: int) -> Tensor:
    """The condition (3, side, side) that is drawn in black on white. Raises ValueError if nothing
    is."""
    condition = 1 - to_tensor(canvas.convert("RGB")) if canvas else torch.zeros(3, 1, 1)
    if not condition.any():
        raise ValueError("expected a drawing, the canvas is empty: draw, or choose an example")
    return F.interpolate(condition[None], (side, side), mode="area")[0]


def annotate(name: str, photo: Tensor) -> Tensor:
    """The condition that an annotator makes of a photo: lines, canny, or by controlnet_aux, under
    its names or the short ones."""
    own = {"lines": lines, "canny": canny}.get(name)
    return own(photo) if own else from_controlnet_aux(SHORT_NAMES.get(name, name), photo)


def from_controlnet_aux(name: str, photo: Tensor) -> Tensor:
    """The output (3, H, W) in [0, 1] of one of controlnet_aux's annotators (openpose, depth_midas,
    ...) for a photo of this shape and range. Most fetch their weights when first used. Raises
    ValueError if the package is missing, does not know the name or cannot fetch."""
    image = to_image(photo)
    output = _processor(name)(image, to_pil=True).convert("RGB")
    return to_tensor(output.resize(image.size, Resampling.LANCZOS))


@lru_cache(maxsize=1)  # its weights are loaded once for many photos
def _processor(name: str) -> Callable:
    try:
        from controlnet_aux.processor import MODELS, Processor
    except ImportError as error:
        raise ValueError(f"annotator {name} needs controlnet_aux ({error}): "
                         'pip install -e ".[annotators]". canny and lines need nothing') from None
    if name not in MODELS:
        raise ValueError(f"expected an annotator among {', '.join(MODELS)}, got {name!r}")
    try:
        return Processor(name)
    except (OSError, ImportError) as error:
        raise ValueError(f"annotator {name} could not get what it needs: {error}") from None
