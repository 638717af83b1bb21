"""Control fidelity on generated circles: does the picture obey its condition and its prompt? Closed forms, no network needed."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.circles import COLORS, Circle


def overlap(picture: Tensor, circle: Circle) -> float:
    """Intersection over union of the true disc and the pixels nearer to the circle's colour than to the background's. 1 is perfect.

    `picture`: (3, S, S) in [0, 1].
    """
    pixels = _pixels(picture)
    inside = circle.distance(pixels.shape[0]) < 0
    painted = np.linalg.norm(pixels - COLORS[circle.color], axis=-1) < np.linalg.norm(pixels - COLORS[circle.background], axis=-1)
    return float((inside & painted).sum() / (inside | painted).sum())


def color_error(picture: Tensor, circle: Circle) -> float:
    """Mean absolute difference from the prompt's colours, of 255, inside and outside the disc, one pixel at its edge left out."""
    pixels = _pixels(picture)
    distance = circle.distance(pixels.shape[0])[..., None]
    truth = np.where(distance < 0, COLORS[circle.color], COLORS[circle.background])
    return float(np.abs(pixels - truth)[(np.abs(distance) > 1)[..., 0]].mean())


def _pixels(picture: Tensor) -> np.ndarray:
    return picture.mul(255).round().permute(1, 2, 0).cpu().double().numpy()


def fidelity(pictures: Tensor, circles: Sequence[Circle]) -> dict[str, float]:
    """Mean overlap and colour error of pictures (B, 3, S, S) in [0, 1] against what they should show."""
    pictures = pictures.to(torch.float32)
    return {
        "overlap": float(np.mean([overlap(p, c) for p, c in zip(pictures, circles, strict=True)])),
        "color_error": float(np.mean([color_error(p, c) for p, c in zip(pictures, circles, strict=True)])),
    }
