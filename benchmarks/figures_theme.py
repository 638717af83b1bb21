"""What the figures share: colours on light and on dark pages, boxes and arrows."""

from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


@dataclass(frozen=True)
class Theme:
    """Colours. The backgrounds are GitHub's."""

    name: str
    background: str
    text: str
    frozen: str
    trained: str
    zero: str
    others: tuple[str, str, str, str]


THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#d0d7de", "#ffc680", "#ff9bb3",
          ("#ffe0a3", "#b6e3a8", "#a5d3ff", "#d8b9ff")),
    Theme("dark", "#0d1117", "#e6edf3", "#3d444d", "#9a5b00", "#a8324f",
          ("#6e5600", "#2b6a3a", "#1f5a96", "#6b3fa0")),
)


def blank(theme: Theme, width: float, height: float, x: tuple[float, float],
          y: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure to draw boxes on, in coordinates from x[0] to x[1] and, downwards, y[1] to y[0]."""
    figure = Figure(figsize=(width, height), facecolor=theme.background)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=x, ylim=y)
    axes.axis("off")
    return figure, axes


def chart(theme: Theme, width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with two axes to plot in."""
    figure = Figure(figsize=(width, height), facecolor=theme.background, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(theme.background)
    axes.tick_params(colors=theme.text, labelsize=8)
    for name, spine in axes.spines.items():
        spine.set_color(theme.text)
        spine.set_visible(name in ("left", "bottom"))
    axes.xaxis.label.set_color(theme.text)
    axes.yaxis.label.set_color(theme.text)
    return figure, axes


def box(theme: Theme, axes: Axes, x: float, y: float, width: float, height: float, text: str,
        color: str, fontsize: float = 7.5) -> None:
    """A box from x on, with its middle at the height y."""
    axes.add_patch(Rectangle((x, y - height / 2), width, height, facecolor=color,
                             edgecolor=theme.text, linewidth=0.6, zorder=3))
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=fontsize,
              color=theme.text, zorder=4)


def arrow(theme: Theme, axes: Axes, start: tuple[float, float], end: tuple[float, float],
          color: str | None = None, width: float = 0.7) -> None:
    axes.annotate("", end, start, arrowprops={
        "arrowstyle": "->", "color": color or theme.text, "linewidth": width, "shrinkA": 0,
        "shrinkB": 0, "mutation_scale": 7})


def legend(theme: Theme, axes: Axes, y: float, colors: Mapping[str, str], left: float = 12,
           step: float = 26, height: float = 0.5) -> None:
    """A row of coloured boxes and what they stand for."""
    for i, (name, color) in enumerate(colors.items()):
        box(theme, axes, left + step * i, y, 2.4, height, "", color)
        axes.text(left + step * i + 3.2, y, name, va="center", fontsize=7.5, color=theme.text)
