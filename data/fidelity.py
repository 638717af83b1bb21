"""Control fidelity, how well a picture obeys: of circles in closed form, of photos by edges."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from data.circles import Circle


def overlap(picture: Tensor, circle: "Circle", own_colors: bool = False) -> float:
    """Intersection over union of the true disc and the pixels nearer to the circle's colour than to
    the background's. 1 is perfect. `picture`: (3, S, S) in [0, 1]. `own_colors`: for a prompt that
    names no colours, the picture's own two, its means inside and outside the true disc."""
    pixels, distance, color, background = _compared(picture, circle, own_colors)
    inside = distance < 0
    like_circle = np.linalg.norm(pixels - color, axis=-1)
    painted = like_circle < np.linalg.norm(pixels - background, axis=-1)
    return float((inside & painted).sum() / (inside | painted).sum())


def color_error(picture: Tensor, circle: "Circle", own_colors: bool = False) -> float:
    """Mean absolute difference from the prompt's colours, of 255, without one pixel on either side
    of the disc's edge. `own_colors`, as in `overlap`: how far both sides are from plain colours."""
    pixels, distance, color, background = _compared(picture, circle, own_colors)
    truth = np.where(distance[..., None] < 0, color, background)
    return float(np.abs(pixels - truth)[np.abs(distance) > 1].mean())


def _compared(picture: Tensor, circle: "Circle", own_colors: bool) -> tuple[np.ndarray, ...]:
    """Pixels (S, S, 3) in [0, 255], their distances to the circle's line, and the two colours."""
    pixels = picture.float().mul(255).round().permute(1, 2, 0).cpu().double().numpy()
    distance = circle.distance(len(pixels))
    if not own_colors:
        return pixels, distance, *circle.colors()
    return pixels, distance, pixels[distance < -1].mean(axis=0), pixels[distance > 1].mean(axis=0)


def fidelity(pictures: Tensor, circles: list["Circle"],
             own_colors: bool = False) -> dict[str, float]:
    """Mean overlap and colour error of pictures (N, 3, S, S) and the circles they should show."""
    pairs = list(zip(pictures, circles, strict=True))
    return {"overlap": float(np.mean([overlap(*pair, own_colors) for pair in pairs])),
            "color_error": float(np.mean([color_error(*pair, own_colors) for pair in pairs]))}


def edge_f1(actual: Tensor, expected: Tensor, tolerance: int = 1) -> float:
    """F1 of a picture's lines and its condition's, (3, H, W) in [0, 1], white on black: a pixel is
    right if the other has a line within `tolerance` pixels. 1 is perfect; two empty ones agree."""
    actual, expected = ((p.mean(dim=0) > 0.5).float()[None, None] for p in (actual, expected))
    if not actual.any() and not expected.any():
        return 1.0
    near = partial(F.max_pool2d, kernel_size=2 * tolerance + 1, stride=1, padding=tolerance)
    precision = (actual * near(expected)).sum() / actual.sum().clamp_min(1)
    recall = (expected * near(actual)).sum() / expected.sum().clamp_min(1)
    return float(2 * precision * recall / (precision + recall).clamp_min(1e-12))
