"""The samples of a run at some of its steps, side by side, as the ControlNet paper shows "sudden
convergence": the same prompt, condition and noise at every step.

    python train.py --steps 2000 --sample-every 100 --out runs/mine
    python -m evaluation.strip runs/mine --steps 100 500 1000 2000 --out strip.png

It is cut out of the grids in RUN/samples, so it works on any run, also on one that is going on.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, answer, positive, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("run", type=Path, help="folder of a training run")
    p.add_argument("--steps", type=positive, nargs="+",
                   help="whose samples to show (default: all that there are)")
    p.add_argument("--out", type=Path, default=Path("runs/strip.png"),
                   help="PNG (default: runs/strip.png)")
    args = p.parse_args(argv)
    if args.out.suffix.lower() != ".png":
        p.error(f"expected a .png file in --out, got {args.out}")
    return args


if __name__ == "__main__":  # before what takes longer is imported
    answer(parse)

from PIL import Image

from common.files import require_writable
from data.grids import cells, grid
from data.pictures import read_text, write_png

BEFORE = ["Prompt", "Control", "Reconstruction", "Samples"]  # grids that do not say their columns
MARK = "strip of samples"  # the text chunk by which this program knows its own pictures


def grids_of(folder: Path) -> dict[int, Path]:
    """Step -> sample grid of a run. Raises ValueError if there are none."""
    grids = {int(path.stem): path for path in sorted((folder / "samples").glob("*.png"))
             if path.stem.isdecimal()}
    if not grids:
        raise ValueError(f"expected the folder of a training run with sample grids, "
                         f"{folder / 'samples'} has none")
    return grids


def table_of(path: Path) -> list[dict[str, Image.Image]]:
    """The rows of a sample grid, by title. Raises ValueError if it is not one."""
    titles = json.loads(read_text(path).get("columns", json.dumps(BEFORE)))
    try:
        with Image.open(path) as picture:
            return [dict(zip(titles, row, strict=True))
                    for row in cells(picture.convert("RGB"), len(titles))]
    except ValueError as problem:
        raise ValueError(f"{path} is no sample grid: {problem}") from None


def strip(folder: Path, steps: list[int] | None = None) -> Image.Image:
    """Prompt, control, and the samples at these steps (None: at all). Raises ValueError if there is
    no grid of one, and if the grids are not of the same prompts and conditions."""
    grids = grids_of(folder)
    if missing := [step for step in steps or [] if step not in grids]:
        raise ValueError(f"{folder / 'samples'} has no grid of step {', '.join(map(str, missing))}"
                         f"; there are {', '.join(map(str, grids))}")
    tables = {step: table_of(grids[step]) for step in steps or grids}
    first = next(iter(tables.values()))

    def shown(table: list[dict[str, Image.Image]]) -> list[bytes]:
        return [row[title].tobytes() for row in table for title in ("Prompt", "Control")]

    for step, table in tables.items():
        if shown(table) != shown(first):
            raise ValueError(f"the grid of step {step} in {folder / 'samples'} has other prompts "
                             f"or conditions than that of step {next(iter(tables))}: the run went "
                             "on with another --held-out")
    rows = [[first[i]["Prompt"], first[i]["Control"],
             *(table[i]["Samples"] for table in tables.values())] for i in range(len(first))]
    titles = ["Prompt", "Control", *(f"step {step:,}" for step in tables)]
    return grid(titles, rows, cell=first[0]["Control"].width)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    require_writable(args.out)
    if args.out.exists() and not is_strip(args.out):
        raise ValueError(f"expected another name in --out, {args.out} was not made by this program")
    write_png(args.out, strip(args.run, args.steps), {MARK: str(args.run)})
    print(args.out)


def is_strip(path: Path) -> bool:
    try:
        return MARK in read_text(path)
    except ValueError:  # not a picture
        return False


if __name__ == "__main__":
    sys.exit(run(main))
