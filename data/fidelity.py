"""Control fidelity: does the picture obey its condition and its prompt? For generated circles in closed form, for photos by their edges."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.circles import COLORS, Circle


def overlap(picture: Tensor, circle: Circle, own_colors: bool = False) -> float:
    """Intersection over union of the true disc and the pixels nearer to the circle's colour than to the background's. 1 is perfect.

    `picture`: (3, S, S) in [0, 1]. `own_colors`: the two colours are the picture's own, its means inside and outside the true disc,
    for a picture whose prompt did not name any.
    """
    pixels = _pixels(picture)
    inside = circle.distance(pixels.shape[0]) < 0
    color, background = _colors(pixels, circle, own_colors)
    painted = np.linalg.norm(pixels - color, axis=-1) < np.linalg.norm(pixels - background, axis=-1)
    return float((inside & painted).sum() / (inside | painted).sum())


def color_error(picture: Tensor, circle: Circle, own_colors: bool = False) -> float:
    """Mean absolute difference from the prompt's colours, of 255, inside and outside the disc, one pixel at its edge left out.

    With `own_colors` from the picture's own mean inside and outside: how far each is from one plain colour.
    """
    pixels = _pixels(picture)
    distance = circle.distance(pixels.shape[0])[..., None]
    truth = np.where(distance < 0, *_colors(pixels, circle, own_colors))
    return float(np.abs(pixels - truth)[(np.abs(distance) > 1)[..., 0]].mean())


def _colors(pixels: np.ndarray, circle: Circle, own: bool) -> tuple[np.ndarray, np.ndarray]:
    """The circle's colour and the background's: the prompt's, or the picture's own means."""
    if not own:
        return np.array(COLORS[circle.color]), np.array(COLORS[circle.background])
    distance = circle.distance(pixels.shape[0])
    return pixels[distance < -1].mean(axis=0), pixels[distance > 1].mean(axis=0)


def _pixels(picture: Tensor) -> np.ndarray:
    return picture.mul(255).round().permute(1, 2, 0).cpu().double().numpy()


def fidelity(pictures: Tensor, circles: Sequence[Circle], own_colors: bool = False) -> dict[str, float]:
    """Mean overlap and colour error of pictures (B, 3, S, S) in [0, 1] against what they should show; `own_colors` as in `overlap`."""
    pictures = pictures.to(torch.float32)
    return {
        "overlap": float(np.mean([overlap(p, c, own_colors) for p, c in zip(pictures, circles, strict=True)])),
        "color_error": float(np.mean([color_error(p, c, own_colors) for p, c in zip(pictures, circles, strict=True)])),
    }


def edge_f1(found: Tensor, expected: Tensor, tolerance: int = 1) -> float:
    """F1 of lines (3, H, W) in [0, 1], white on black: a pixel counts as found if there is a line within `tolerance` pixels. 1 is perfect.

    `expected`: the condition. `found`: what the same annotator sees in the picture. Two empty ones agree.
    """
    lines = [(picture.mean(dim=0) > 0.5).float()[None, None] for picture in (found, expected)]
    near = [F.max_pool2d(line, 2 * tolerance + 1, stride=1, padding=tolerance) for line in lines]
    if not any(line.any() for line in lines):
        return 1.0
    precision, recall = ((line * other).sum() / line.sum().clamp_min(1) for line, other in ((lines[0], near[1]), (lines[1], near[0])))
    return float(2 * precision * recall / (precision + recall).clamp_min(1e-12))
