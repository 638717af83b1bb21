"""Plot the logs of training runs: python -m evaluation.plot runs/A runs/B --out plot.png

The loss hardly falls while a ControlNet converges. The convergence probe does, below zero, when the
condition is understood, and control fidelity rises. A panel is there if any run logged its values.
"""

import json
import sys
from argparse import Namespace
from math import ceil
from pathlib import Path

from common.cli import Parser, answer, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("runs", type=Path, nargs="+", help="folders of training runs")
    p.add_argument("--out", type=Path, default=Path("runs/plot.png"),
                   help="PNG (default: runs/plot.png)")
    args = p.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        p.error(f"expected a .png file in --out, got {args.out}")
    return args


if __name__ == "__main__":  # before matplotlib is imported
    answer(parse)

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from common.files import atomic_write

PANELS = {  # key in the log -> title; "L_layer shares" has its own panels
    "L_d": "L_d, diffusion loss",
    "L_td": "L_td, difference to the teacher's prediction",
    "L_layer": "L_layer, difference to the teacher's 13 outputs",
    "L_d by timestep": "L_d by timestep",
    "gradient": "norm of the gradient",
    "probe": "probe: loss with the right condition - with another\n"
             "below zero: the condition is understood",
    "overlap": "control fidelity: overlap",
}
SPARSE = ("probe", "overlap")  # logged now and then, not noisy: points, not smoothed, linear
BUCKETS = {"t < 250": ":", "< 500": "-.", "< 750": "--", "< 1000": "-"}


def read_log(folder: Path) -> list[dict]:
    """A run's log, without an incomplete last line of a killed run. ValueError if it is damaged."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"expected the folder of a training run, {path} does not exist")
    lines = path.read_text().splitlines()
    entries = []
    for i, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entries.append(entry | {"step": int(entry["step"])})
        except (ValueError, KeyError, TypeError):
            if i < len(lines):
                raise ValueError(f"{path}, line {i}: expected a JSON object with a step, "
                                 f"got {line[:60]!r}") from None
    return entries


def read_logs(folders: list[Path]) -> dict[str, list[dict]]:
    """Logs by their folders' names, or by whole paths where names are the same."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = map(str, folders)
    return {name: read_log(folder) for name, folder in zip(names, folders, strict=True)}


def series(entries: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (N,) and values (N, K) of the entries that have the key; a missing value is NaN."""
    present = [entry for entry in entries if key in entry]
    values = np.array([np.atleast_1d(entry[key]) for entry in present], dtype=float)  # None: NaN
    return np.array([entry["step"] for entry in present]), values


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over a twentieth of the values to either side, NaNs left out."""
    width = max(1, len(values) // 20)
    windows = [values[max(0, i - width) : i + width + 1] for i in range(len(values))]
    return np.array([np.nanmean(w) if np.isfinite(w).any() else np.nan for w in windows])


def plot_curves(axes: Axes, logs: dict[str, list[dict]], key: str) -> None:
    """One panel with a colour per run; for a loss by timestep, a line style per quarter."""
    for i, entries in enumerate(logs.values()):
        color = f"C{i}"  # matplotlib begins again after ten
        steps, values = series(entries, key)
        if key in SPARSE:
            axes.plot(steps, values, color=color, marker=".", markersize=4)
        elif key == "L_d by timestep":
            for column, style in zip(values.T, BUCKETS.values(), strict=False):
                axes.plot(steps, smoothed(column), color=color, linestyle=style)
        elif len(values):
            axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.6)
            axes.plot(steps, smoothed(values[:, 0]), color=color)
    axes.set_title(PANELS[key], fontsize=9)
    axes.set_yscale("linear" if key in SPARSE else "log")
    if key == "probe":
        axes.axhline(0, color="black", linewidth=0.8)
    if key == "L_d by timestep":
        for name, style in BUCKETS.items():
            axes.plot([], [], color="gray", linestyle=style, label=name)
        axes.legend(fontsize=7, ncols=4, handlelength=2, columnspacing=1)


def plot_shares(axes: Axes, name: str, entries: list[dict]) -> None:
    """Each output's share of L_layer, stacked: the share of one that falls behind grows."""
    steps, values = series(entries, "L_layer shares")
    shares = np.stack([smoothed(column) for column in values.T])
    shades = [(0.2 + 0.06 * i, 0.35 + 0.035 * i, 0.75 - 0.03 * i) for i in range(len(shares))]
    axes.stackplot(steps, shares, colors=shades, edgecolor="white", linewidth=0.3)
    labels = [*range(len(shares) - 1), "middle"]  # small mode has the middle only
    axes.set_yticks(np.cumsum(shares[:, -1]) - shares[:, -1] / 2, labels, fontsize=6)
    axes.set_ylim(0, 1)
    axes.set_title(f"share of the 13 outputs in L_layer: {name}", fontsize=9)


def plot_runs(logs: dict[str, list[dict]]) -> Figure:
    """All panels, two side by side, under a legend. Raises ValueError for logs without losses."""
    keys = [key for key in PANELS
            if any(key in entry for entries in logs.values() for entry in entries)]
    with_shares = [name for name, entries in logs.items()
                   if any("L_layer shares" in entry for entry in entries)]
    if not keys:
        raise ValueError("expected logs with losses, those of " + ", ".join(logs) + " have none")
    height = ceil((len(keys) + len(with_shares)) / 2)
    figure = Figure(figsize=(11, 0.6 + 2.6 * height), dpi=100, layout="constrained")
    panels = iter(figure.add_gridspec(height, 2))
    for key in keys:
        plot_curves(figure.add_subplot(next(panels)), logs, key)
    for name in with_shares:
        plot_shares(figure.add_subplot(next(panels)), name, logs[name])
    for axes in figure.axes:
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(which="both", labelsize=7)
    lines = [Line2D([], [], color=f"C{i}") for i in range(len(logs))]
    columns = min(4, len(logs))
    figure.legend(lines, list(logs), loc="outside upper center", ncols=columns, fontsize=9)
    return figure


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    figure = plot_runs(read_logs(args.runs))
    with atomic_write(args.out) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})  # no version in it
    print(args.out)


if __name__ == "__main__":
    sys.exit(run(main))
