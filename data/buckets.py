"""Aspect ratio bucketing: pictures that are not square keep their shape, as nearly as one of a few
sizes can have it, so that pictures of one size still make a batch."""

import math
from collections.abc import Sequence

Shape = tuple[int, int]  # height, width

STEPS = (64, 32, 16, 8)  # that sides are multiples of. 64: 8 for the autoencoder, 8 for the UNet's
                         # three halvings; of less than 512 pixels an eighth, to have some choice
LONGEST = 2              # times its shorter side: what is longer is cropped


def bucket_shapes(resolution: int) -> list[Shape]:
    """The square of `resolution`, and of every other shorter side that fits the longest longer one
    within the square's area, upright and lying: at 512 pixels 576 x 448 and 640 x 384, at 640 among
    others 768 x 512."""
    step = next((step for step in STEPS if 8 * step <= resolution), STEPS[-1])
    shapes = [(resolution, resolution)]
    for short in range(step, resolution, step):
        long = resolution**2 // short // step * step
        if short < long <= LONGEST * short:
            shapes += [(short, long), (long, short)]
    return shapes


def nearest_shape(height: int, width: int, shapes: Sequence[Shape]) -> Shape:
    """The one that least of a picture is cropped for, once it is scaled to cover it."""
    return min(shapes, key=lambda shape: abs(math.log(width * shape[0] / (height * shape[1]))))
