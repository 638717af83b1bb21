"""Circles drawn on the fly: the same kind of data as Fill50k, the ControlNet paper's tutorial set, without a download.

A sample is a *condition* (a circle's outline, white on black), a *target* (the filled circle on a plain background) and a *prompt*
("tomato circle with lightseagreen background"). Sample i of a seed is always the same picture, at any size, on any machine.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

# The 148 CSS colour names less the spellings of the same colour (grey/gray, cyan/aqua, magenta/fuchsia): 139 names, as Fill50k's prompts have.
COLORS: dict[str, tuple[int, int, int]] = {}
for _name in sorted(ImageColor.colormap):
    _rgb = ImageColor.getrgb(_name)
    if _rgb not in COLORS.values():
        COLORS[_name] = _rgb
_NAMES = list(COLORS)
_RGB = np.array(list(COLORS.values()), dtype=np.float64)

HELD_OUT = 2**31  # samples from this index on are never trained on
MIN_COLOR_DISTANCE = 100  # between circle and background, in RGB of 255: nearer colours would hide the circle from any metric


@dataclass(frozen=True)
class Circle:
    """What a picture is drawn from, in units of the picture's side."""

    x: float
    y: float
    radius: float
    color: str
    background: str

    @property
    def prompt(self) -> str:
        return f"{self.color} circle with {self.background} background"

    def distance(self, size: int) -> np.ndarray:
        """Distance in pixels of every pixel's centre from the circle's line, negative inside: (size, size)."""
        centers = np.arange(size) + 0.5
        return np.hypot(centers[None, :] - self.x * size, centers[:, None] - self.y * size) - self.radius * size

    def target(self, size: int) -> np.ndarray:
        """The filled circle, (size, size, 3) in [0, 255], anti-aliased by the share of each pixel that is inside."""
        inside = np.clip(0.5 - self.distance(size), 0, 1)[..., None]
        return inside * COLORS[self.color] + (1 - inside) * COLORS[self.background]

    def condition(self, size: int) -> np.ndarray:
        """The outline, (size, size, 3) in [0, 255], white on black, as thick as at 512 pixels Fill50k's (about 2), and at least 1.5 pixels."""
        half_width = max(0.75, size / 512)
        line = np.clip(half_width + 0.5 - np.abs(self.distance(size)), 0, 1)
        return np.repeat(255 * line[..., None], 3, axis=-1)


def random_circle(index: int, seed: int = 0) -> Circle:
    """Sample `index` of `seed`: the circle lies inside the picture; its colour and the background's are told apart easily."""
    rng = np.random.default_rng([seed, index])
    radius = rng.uniform(0.15, 0.4)
    x, y = rng.uniform(radius + 0.02, 0.98 - radius, size=2)
    color, background = rng.integers(len(_NAMES), size=2)
    while np.linalg.norm(_RGB[color] - _RGB[background]) < MIN_COLOR_DISTANCE:
        color, background = rng.integers(len(_NAMES), size=2)
    return Circle(x, y, radius, _NAMES[color], _NAMES[background])


class Circles:
    """A data set of `count` generated circles: item i is {"target": (3, S, S) in [-1, 1], "condition": (3, S, S) in [0, 1], "prompt": str}."""

    def __init__(self, size: int, count: int, seed: int = 0, first: int = 0):
        self.size, self.count, self.seed, self.first = size, count, seed, first

    def __len__(self) -> int:
        return self.count

    def circle(self, i: int) -> Circle:
        return random_circle(self.first + i, self.seed)

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        circle = self.circle(i)
        # Rounded to 8 bits, so that a sample drawn here equals the same sample read from a PNG.
        drawn = (circle.target(self.size), circle.condition(self.size))
        target, condition = (torch.from_numpy(np.rint(a).astype(np.uint8)).permute(2, 0, 1).float() for a in drawn)
        return {"target": target / 127.5 - 1, "condition": condition / 255, "prompt": circle.prompt}

    def preview(self, count):
        return Circles(self.size, count, first=HELD_OUT)

    def fidelity(self, pictures, own_colors=False):
        from data.fidelity import fidelity
        return fidelity(pictures, [self.circle(i) for i in range(len(pictures))], own_colors)
