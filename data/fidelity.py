"""Control fidelity, how well a picture obeys: of circles in closed form, of drawings and photos by
the edges, depth, normals or poses that are found in them."""

from collections.abc import Callable
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


def pose_f1(actual: Tensor, expected: Tensor) -> float:
    """F1 of the lines of two skeletons, whose limbs have different colours: all count the same."""
    lines = [pose.amax(dim=0, keepdim=True).expand(3, -1, -1) for pose in (actual, expected)]
    return edge_f1(*lines)


def depth_rmse(actual: Tensor, expected: Tensor) -> float:
    """Root mean square difference of two depth maps (3, H, W) in [0, 1], after the scale and shift
    of the first that make it least, as relative depth has neither (Ranftl et al. 2020, MiDaS)."""
    x, y = (depth.double().mean(dim=0).flatten() for depth in (actual, expected))
    scale = ((x - x.mean()) * (y - y.mean())).mean() / x.var(correction=0).clamp_min(1e-12)
    # A map that is turned inside out is wrong, not scaled.
    residual = scale.clamp_min(0) * (x - x.mean()) - (y - y.mean())
    return residual.square().mean().sqrt().item()


def normal_rmse(actual: Tensor, expected: Tensor) -> float:
    """Root mean square length of the difference of two maps (3, H, W) of unit vectors, of which
    [0, 1] is [-1, 1]: 0 for equal ones, 2 for opposite ones."""
    a, b = (F.normalize(2 * normals.double() - 1, dim=0) for normals in (actual, expected))
    return (a - b).square().sum(dim=0).mean().sqrt().item()


# What a condition's maker is called -> how the picture's own map is compared with it.
MEASURES: dict[str, tuple[str, Callable[[Tensor, Tensor], float]]] = {
    "lines": ("line F1", edge_f1), "depth": ("depth RMSE", depth_rmse),
    "normal": ("normal RMSE", normal_rmse), "openpose": ("pose F1", pose_f1),
    "dwpose": ("pose F1", pose_f1)}


def measure_of(annotator: str) -> tuple[str, Callable[[Tensor, Tensor], float]] | None:
    """The name of a measure of obedience and its function of two maps (3, H, W) in [0, 1]; of
    anything that draws lines it is the F1 of edges. None for what no picture can be held to."""
    if annotator == "shuffle":  # at random, every time another
        return None
    kind = next((kind for kind in MEASURES if annotator.startswith(kind)), "")
    return MEASURES.get(kind, ("edge F1", edge_f1))


def color_error(picture: Tensor, truth: Tensor, condition: Tensor) -> float:
    """Mean absolute difference of a drawing from the true one, of 255, where the nearest line of
    its condition is more than two pixels away; all (3, H, W) in [0, 1]."""
    near_line = F.max_pool2d((condition.amax(dim=0) > 0.25).float()[None, None], 5, 1, 2)[0, 0] > 0
    return float(255 * (picture - truth).abs().mean(dim=0)[~near_line].mean())
