"""Write generated circles as Fill50k does, the data set of the ControlNet tutorial; `data/folder.py` reads such a folder.

It holds `prompt.json`, one JSON object a line: {"source": "source/0.png", "target": "target/0.png", "prompt": "..."}.

    python -m data.fill50k --out DIR --count 1000 --size 512
"""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from common.cli import Parser, non_negative, positive, run
from common.files import atomic_write
from data.circles import Circles
from data.pictures import to_image, write_png


def write_folder(out: Path, count: int, size: int, seed: int) -> None:
    """Write generated circles in Fill50k's layout. prompt.json comes last: a folder that has it is complete."""
    if size % 8:
        raise ValueError(f"expected a --size divisible by 8, got {size}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"expected a new or empty folder, {out} has files in it")
    circles, rows = Circles(size, count, seed), []
    for i in tqdm(range(count), desc=str(out)):
        sample, row = circles[i], {"source": f"source/{i}.png", "target": f"target/{i}.png"}
        write_png(out / row["source"], to_image(sample["condition"]))
        write_png(out / row["target"], to_image(sample["target"] / 2 + 0.5))
        rows.append(json.dumps(row | {"prompt": sample["prompt"]}))
    with atomic_write(out / "prompt.json") as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--count", type=positive, default=1000, help="number of pairs (default: 1000)")
    parser.add_argument("--size", type=positive, default=512, help="side of the pictures in pixels, divisible by 8 (default: 512)")
    parser.add_argument("--seed", type=non_negative, default=0)
    args = parser.parse_args(argv)
    write_folder(args.out, args.count, args.size, args.seed)


if __name__ == "__main__":
    sys.exit(run(main))
