"""Draw the figures of docs/figures.md, each light and dark, as SVG and PNG:
python -m benchmarks.figures

They are drawn from the modules and from docs/evaluation.json; no number in them is typed.
"""

import sys
from argparse import Namespace
from io import BytesIO
from pathlib import Path

from common.cli import Parser, answer, run

NAMES = ("architecture", "students", "gradients", "phases", "sizes")


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("names", nargs="*", metavar="NAME",
                   help=f"of {', '.join(NAMES)} (default: all)")
    p.add_argument("--out", type=Path, default=Path("runs/figures"),
                   help="folder for NAME-light.svg and so on (default: runs/figures)")
    args = p.parse_args(argv)
    if unknown := set(args.names) - set(NAMES):
        p.error(f"expected figures among {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    return args


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import matplotlib
from PIL import Image

from benchmarks.figures_networks import architecture, students
from benchmarks.figures_theme import THEMES
from benchmarks.figures_training import gradients, phases, sizes
from common.files import atomic_write

FIGURES = dict(zip(NAMES, (architecture, students, gradients, phases, sizes), strict=True))
# Text stays text, in a font of the reader's; no date, no version and no random names in the files.
SVG = {"svg.fonttype": "none", "svg.hashsalt": "light-controlnets"}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    for name in args.names or NAMES:
        for theme in THEMES:
            figure = FIGURES[name](theme)
            path = args.out / f"{name}-{theme.name}.svg"
            with atomic_write(path) as temporary, matplotlib.rc_context(SVG):
                figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
            print(path)
            with BytesIO() as pixels:
                figure.savefig(pixels, format="png", dpi=160)
                picture = Image.open(pixels).convert("RGB").quantize(64)  # a third of the bytes
            path = path.with_suffix(".png")
            with atomic_write(path) as temporary:
                picture.save(temporary, format="PNG", optimize=True)
            print(path)


if __name__ == "__main__":
    sys.exit(run(main))
