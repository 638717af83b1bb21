"""Generated circles: data like Fill50k, ControlNet's tutorial set, without a download.

A sample is a *condition* (a circle's outline, white on black), a *target* (the filled circle on a
plain background) and a *prompt* ("tomato circle with lightseagreen background"). Sample i of a seed
is always the same picture, at any size, on any machine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

from data.dataset import Dataset
from data.fidelity import fidelity

# The 148 CSS colour names without second spellings (gray, aqua, ...): 139, as in Fill50k's prompts.
COLORS: dict[str, tuple[int, int, int]] = {}
for _name in sorted(ImageColor.colormap):
    if ImageColor.getrgb(_name) not in COLORS.values():
        COLORS[_name] = ImageColor.getrgb(_name)
_NAMES = list(COLORS)
_RGB = np.array(list(COLORS.values()), dtype=np.float64)
HELD_OUT = 2**31  # samples from this index on are never trained on
MIN_COLOR_DISTANCE = 100  # in RGB of 255: nearer colours would hide the circle from any measure


@dataclass(frozen=True)
class Circle:
    """What a picture shows, in units of the picture's side."""

    x: float
    y: float
    radius: float
    color: str
    background: str

    @property
    def prompt(self) -> str:
        return f"{self.color} circle with {self.background} background"

    def colors(self) -> tuple[np.ndarray, np.ndarray]:
        """RGB in [0, 255] of the circle and of the background."""
        return np.array(COLORS[self.color]), np.array(COLORS[self.background])

    def distance(self, size: int) -> np.ndarray:
        """(size, size): pixels from each pixel's centre to the circle's line, negative inside."""
        centers = np.arange(size) + 0.5
        x, y = centers[None, :] - self.x * size, centers[:, None] - self.y * size
        return np.hypot(x, y) - self.radius * size

    def target(self, size: int) -> np.ndarray:
        """The filled circle, (size, size, 3) in [0, 255], anti-aliased."""
        inside = np.clip(0.5 - self.distance(size), 0, 1)[..., None]  # share of the pixel
        color, background = self.colors()
        return inside * color + (1 - inside) * background

    def condition(self, size: int) -> np.ndarray:
        """The outline, (size, size, 3) in [0, 255], white on black."""
        half_width = max(0.75, size / 512)  # 2 pixels at 512, as in Fill50k, and at least 1.5
        line = np.clip(half_width + 0.5 - np.abs(self.distance(size)), 0, 1)
        return np.repeat(255 * line[..., None], 3, axis=-1)


def random_circle(index: int, seed: int = 0) -> Circle:
    """Circle `index` of `seed`: inside the picture, in a colour unlike the background's."""
    rng = np.random.default_rng([seed, index])
    radius = rng.uniform(0.15, 0.4)
    x, y = rng.uniform(radius + 0.02, 0.98 - radius, size=2)
    color, background = rng.integers(len(_NAMES), size=2)
    while np.linalg.norm(_RGB[color] - _RGB[background]) < MIN_COLOR_DISTANCE:
        color, background = rng.integers(len(_NAMES), size=2)
    return Circle(x, y, radius, _NAMES[color], _NAMES[background])


def _to_bytes(pixels: np.ndarray) -> Tensor:
    """(S, S, 3) in [0, 255] -> (3, S, S), rounded: a generated sample equals the same sample read
    from a PNG."""
    return torch.from_numpy(np.rint(pixels).astype(np.uint8)).permute(2, 0, 1)


class Circles(Dataset):
    """`count` circles of `seed`, from index `first` on."""

    def __init__(self, size: int, count: int, seed: int = 0, first: int = 0):
        self.size, self.count = size, count
        self.seed, self.first = seed, first

    def __len__(self) -> int:
        return self.count

    def circle(self, i: int) -> Circle:
        return random_circle(self.first + i, self.seed)

    def target(self, i: int) -> Tensor:
        return _to_bytes(self.circle(i).target(self.size))

    def condition(self, i: int) -> Tensor:
        return _to_bytes(self.circle(i).condition(self.size))

    def prompt(self, i: int) -> str:
        return self.circle(i).prompt

    def sources(self, i: int) -> list[Path | str]:
        return [f"circle {self.first + i} of seed {self.seed}"]

    def preview(self, count: int) -> "Circles":
        return Circles(self.size, count, first=HELD_OUT)  # the same ones for every seed

    def fidelity(self, pictures: Tensor, conditions: Sequence[int],
                 prompts: Sequence[int] | None) -> dict[str, float]:
        circles = [self.circle(i) for i in conditions]
        if prompts is not None:
            circles = [replace(circle, color=named.color, background=named.background)
                       for circle, named in zip(circles, map(self.circle, prompts), strict=True)]
        return fidelity(pictures, circles, own_colors=prompts is None)
