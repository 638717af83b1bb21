"""Fill the tables of the stored results into README.md and docs/: python -m benchmarks.docs

A table stands between <!-- NAME --> and <!-- end -->. It is made from docs/*.json and from the
networks' own shapes, never typed. A test fails when a table is not what this program would write.
"""

import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from common.cli import Parser, answer, run


def parse(argv: list[str] | None) -> Namespace:
    return Parser(__doc__).parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch

from benchmarks import choices, resources, teacher_worth
from benchmarks.distillation_recipes import DRAWINGS
from benchmarks.distillation_results import markdown as distillation_tables
from benchmarks.turbo import as_table as turbo_table
from common.files import atomic_write
from controlnet import ControlNet
from evaluation import report
from kd.students import BUILDERS
from unet import SD15

ROOT = Path(__file__).parent.parent
BASE, TEACHER = "base", "teacher"  # as evaluate.py names them
IDEAS = {  # each network in a few words
    BASE: "Stable Diffusion without control, which is chance",
    TEACHER: "a ControlNet",
    "original": "the same architecture, from fresh weights",
    "reduced_channel": "half the channels",
    "reduced_layer": "one residual block per level instead of two",
    "modulated": "`reduced_layer` with a scale and shift before each output",
    "loha": "`modulated` with low-rank weights (LoHa)",
    "lite": "one plain convolution per block",
    "mlp": "pixel-wise layers, added inside the UNet's encoder",
}


def stored(name: str) -> dict:
    """The results in docs/NAME.json."""
    return json.loads((ROOT / "docs" / f"{name}.json").read_text())


def parameters_at_sd15(name: str) -> int:
    """Parameters of the teacher's architecture or of a student at Stable Diffusion 1.5's size."""
    with torch.device("meta"):
        network = ControlNet(SD15) if name == TEACHER else BUILDERS[name](SD15)
    return sum(parameter.numel() for parameter in network.parameters())


def headline() -> str:
    """The README's table: size and overlap with the right prompt, the largest network first."""
    networks = stored("evaluation")["networks"]
    overlaps = {
        name: row["control fidelity"]["right prompt"]["overlap"] for name, row in networks.items()
    }
    sizes = {name: parameters_at_sd15(name) for name in networks if name != BASE}
    rows = []
    for name in [BASE, TEACHER, *sorted(sizes.keys() - {TEACHER}, key=lambda n: (-sizes[n], n))]:
        size = f"{sizes[name] / 1e6:.1f} M" if name in sizes else "-"
        tiny = networks[name]["costs"].get("parameters stored")
        share = f"{mean(overlaps[name]) / mean(overlaps[TEACHER]):.1%}"
        label = name if name in (BASE, TEACHER) else f"`{name}`"
        rows.append([
            f"{label}: {IDEAS[name]}" if name in IDEAS else label, size,
            f"{tiny / 1e6:.2f} M" if tiny else "-", report.spread(overlaps[name]), share
        ])
    head = ["", "parameters, SD 1.5", "parameters, tiny", "overlap", "of the teacher's"]
    return "\n".join(report.table(head, rows)) + "\n"


# document -> mark -> the table
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"headline": headline},
    "docs/experiments.md": {
        "distillation.json": lambda: distillation_tables(stored("distillation")),
        "evaluation.json": lambda: report.markdown(stored("evaluation")),
        "choices.json": lambda: choices.markdown(stored("choices")),
    },
    "docs/turbo.md": {"turbo.json": lambda: turbo_table(stored("turbo"))},
    "docs/costs.md": {"resources.json": lambda: resources.markdown(stored("resources"))},
    "docs/drawings.md": {
        "drawings_distillation.json":
            lambda: distillation_tables(stored("drawings_distillation"), DRAWINGS),
        "teacher_worth.json": lambda: teacher_worth.markdown(stored("teacher_worth")),
        "drawings_evaluation.json": lambda: report.markdown(stored("drawings_evaluation")),
    },
}


def filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    """A document with each of its tables made again. Raises ValueError if a mark is missing."""
    for mark, make in tables.items():
        block = f"<!-- {mark} -->\n{make()}<!-- end -->"
        pattern = rf"<!-- {re.escape(mark)} -->\n.*?<!-- end -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"expected one <!-- {mark} --> ... <!-- end -->, got {count}")
    return text


def main(argv: list[str] | None = None) -> None:
    parse(argv)
    for name, tables in TABLES.items():
        text = filled((ROOT / name).read_text(encoding="utf-8"), tables)
        with atomic_write(ROOT / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run(main))
