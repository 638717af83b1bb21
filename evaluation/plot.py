"""Draw training runs over each other: python -m evaluation.plot runs/A runs/B --out plot.png

What the total loss hides is in the other panels: the convergence probe falls below zero when the condition is understood, and control
fidelity rises after it. A panel is drawn if any run has something to show in it.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.cli import Parser, run
from common.files import atomic_write

PANELS = {  # key in the log -> title; the rest of the keys are drawn by their own functions
    "L_d": "L_d, diffusion loss",
    "L_td": "L_td, difference to the teacher's prediction",
    "L_layer": "L_layer, difference to the teacher's 13 outputs",
    "L_d by timestep": "L_d by timestep",
    "gradient": "norm of the gradient",
    "probe": "probe: loss with the right condition - with another\nbelow zero: the condition is understood",
    "overlap": "control fidelity: overlap",
}
LOGARITHMIC = ("L_d", "L_td", "L_layer", "L_d by timestep", "gradient")
MEASURED = ("probe", "overlap")  # now and then, and not noisy: drawn as points, not smoothed
BUCKETS = {"t < 250": ":", "< 500": "-.", "< 750": "--", "< 1000": "-"}
LAYERS = [*range(12), "middle"]


def read_log(folder: Path) -> list[dict]:
    """The entries of a run's log. A last line that is not whole, which a killed run leaves, is left out. Raises ValueError for any other damage."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"expected the folder of a training run, {path} does not exist")
    lines, entries = path.read_text().splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entries.append(entry | {"step": int(entry["step"])})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}") from None
    if not entries:
        raise ValueError(f"expected a JSON object a step, {path} has none")
    return entries


def named(folders: list[Path]) -> dict[str, list[dict]]:
    """Logs by their folders' names, or by whole paths where the names are the same."""
    short = len({folder.resolve().name for folder in folders}) == len(folders)
    return {folder.resolve().name if short else str(folder): read_log(folder) for folder in folders}


def series(entries: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the entries that have a value."""
    found = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return np.array([step for step, _ in found]), np.array([[np.nan if v is None else v for v in np.atleast_1d(value)] for _, value in found])


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over a twentieth of the steps to either side, of what there is."""
    width = max(1, len(values) // 20)
    windows = [values[max(0, i - width) : i + width + 1] for i in range(len(values))]
    return np.array([np.nanmean(window) if np.isfinite(window).any() else np.nan for window in windows])


def draw_curves(axes: Axes, logs: dict[str, list[dict]], key: str) -> None:
    """One panel with a colour a run; of a loss by timestep, a line style a quarter."""
    for color, entries in zip(colors(len(logs)), logs.values(), strict=True):
        steps, values = series(entries, key)
        if key in MEASURED:
            axes.plot(steps, values, color=color, marker=".", markersize=4)
            continue
        for number in range(values.shape[1] if len(values) else 0):
            if values.shape[1] == 1:
                axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.6)
            axes.plot(steps, smoothed(values[:, number]), color=color, linestyle=list(BUCKETS.values())[number] if values.shape[1] > 1 else "-")
    axes.set_title(PANELS[key], fontsize=9)
    if key in LOGARITHMIC:
        axes.set_yscale("log")
    if key == "probe":
        axes.axhline(0, color="black", linewidth=0.8)
    if key == "L_d by timestep":
        for name, style in BUCKETS.items():
            axes.plot([], [], color="gray", linestyle=style, label=name)
        axes.legend(fontsize=7, ncols=4, handlelength=2, columnspacing=1)


def draw_shares(axes: Axes, name: str, entries: list[dict]) -> None:
    """The share of each of the 13 outputs in L_layer, one above the other: a layer that stays behind grows."""
    steps, values = series(entries, "L_layer shares")
    shares = np.stack([smoothed(column) for column in values.T])
    shades = [(0.2 + 0.06 * i, 0.35 + 0.035 * i, 0.75 - 0.03 * i) for i in range(len(shares))]
    axes.stackplot(steps, shares, colors=shades, edgecolor="white", linewidth=0.3)
    middles = np.cumsum(shares[:, -1]) - shares[:, -1] / 2
    axes.set_yticks(middles, LAYERS[: len(shares)] if len(shares) == len(LAYERS) else range(len(shares)), fontsize=6)
    axes.set_ylim(0, 1)
    axes.set_title(f"share of the 13 outputs in L_layer: {name}", fontsize=9)


def colors(count: int) -> list[str]:
    return [f"C{i}" for i in range(count)]  # matplotlib begins again after ten


def draw(logs: dict[str, list[dict]]) -> Figure:
    """All panels, two in a row; the runs' colours are explained above them."""
    keys = [key for key in PANELS if any(entry.get(key) is not None for entries in logs.values() for entry in entries)]
    shared = [name for name, entries in logs.items() if any("L_layer shares" in entry for entry in entries)]
    if not keys:
        raise ValueError("expected logs with losses, those of " + ", ".join(logs) + " have none")
    count = len(keys) + len(shared)
    figure = Figure(figsize=(11, 0.6 + 2.6 * -(-count // 2)), dpi=100, layout="constrained")
    panels = figure.subplots(-(-count // 2), 2, squeeze=False).flatten()
    for axes, key in zip(panels[: len(keys)], keys, strict=True):
        draw_curves(axes, logs, key)
    for axes, name in zip(panels[len(keys) : count], shared, strict=True):
        draw_shares(axes, name, logs[name])
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(which="both", labelsize=7)
    lines = [panels[0].plot([], [], color=color)[0] for color in colors(len(logs))]
    figure.legend(lines, list(logs), loc="outside upper center", ncols=min(4, len(logs)), fontsize=9)
    return figure


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("runs", type=Path, nargs="+", help="folders of training runs")
    p.add_argument("--out", type=Path, default=Path("plot.png"), help="PNG file to write (default: plot.png)")
    args = p.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        p.error(f"expected a .png file in --out, got {args.out}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    figure = draw(named(args.runs))
    with atomic_write(args.out) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})  # no version: the same logs, the same bytes
    print(args.out)


if __name__ == "__main__":
    sys.exit(run(main))
