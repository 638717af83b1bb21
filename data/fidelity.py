"""Control fidelity, how well a picture obeys: of circles in closed form, of drawings and photos by
the lines and edges that are found in it."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from data.circles import Circle


def overlap_and_color_error(picture: Tensor, circle: "Circle",
                            own_colors: bool = False) -> tuple[float, float]:
    """The overlap of the true disc and the pixels nearer to the circle's colour than to the
    background's, as intersection over union: 1 is perfect. And the mean absolute difference from
    these colours, of 255, without one pixel on either side of the disc's edge.

    `picture`: (3, S, S) in [0, 1]. `own_colors`, for a prompt that names none: the colours are the
    picture's own two, its means inside and outside the true disc."""
    pixels = picture.float().mul(255).round().permute(1, 2, 0).cpu().double().numpy()
    distance = circle.distance(len(pixels))  # to the circle's line
    color, background = circle.colors()
    if own_colors:
        color, background = pixels[distance < -1].mean(axis=0), pixels[distance > 1].mean(axis=0)
    inside = distance < 0
    like_circle = np.linalg.norm(pixels - color, axis=-1)
    painted = like_circle < np.linalg.norm(pixels - background, axis=-1)
    overlap = (inside & painted).sum() / (inside | painted).sum()
    truth = np.where(inside[..., None], color, background)
    error = np.abs(pixels - truth)[np.abs(distance) > 1].mean()
    return float(overlap), float(error)


def fidelity(pictures: Tensor, circles: list["Circle"],
             own_colors: bool = False) -> dict[str, float]:
    """Mean overlap and colour error of pictures (N, 3, S, S) and the circles they should show."""
    measures = [overlap_and_color_error(picture, circle, own_colors)
                for picture, circle in zip(pictures, circles, strict=True)]
    overlaps, errors = zip(*measures, strict=True)
    return {"overlap": float(np.mean(overlaps)), "color_error": float(np.mean(errors))}


def edge_f1(actual: Tensor, expected: Tensor) -> float:
    """F1 of a picture's lines and its condition's, (3, H, W) in [0, 1], white on black: a pixel is
    right if the other has a line at most one pixel away. 1 is perfect; two empty ones agree."""
    actual, expected = ((p.mean(dim=0) > 0.5).float()[None, None] for p in (actual, expected))
    if not actual.any() and not expected.any():
        return 1.0
    near = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
    precision = (actual * near(expected)).sum() / actual.sum().clamp_min(1)
    recall = (expected * near(actual)).sum() / expected.sum().clamp_min(1)
    return float(2 * precision * recall / (precision + recall).clamp_min(1e-12))


def color_error(picture: Tensor, truth: Tensor, condition: Tensor) -> float:
    """Mean absolute difference of a drawing from the true one, of 255, where the nearest line of
    its condition is more than two pixels away; all (3, H, W) in [0, 1]."""
    near_line = F.max_pool2d((condition.amax(dim=0) > 0.25).float()[None, None], 5, 1, 2)[0, 0] > 0
    return float(255 * (picture - truth).abs().mean(dim=0)[~near_line].mean())
