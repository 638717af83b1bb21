"""Write generated circles in the layout of Fill50k, ControlNet's tutorial set (`data/folder.py`).

    python -m data.fill50k --out DIR --count 1000 --size 512
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, answer, non_negative, picture_side, positive, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    p.add_argument("--count", type=positive, default=1000, help="number of pairs (default: 1000)")
    p.add_argument("--size", type=picture_side, default=512, help="side in pixels (default: 512)")
    p.add_argument("--seed", type=non_negative, default=0)
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

from tqdm import tqdm

from common.files import atomic_write
from data.circles import Circles
from data.pictures import to_image, write_png


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"expected a new or empty folder, {args.out} has files in it")
    circles, lines = Circles(args.size, args.count, args.seed), []
    for i in tqdm(range(args.count), desc=str(args.out)):
        sample = circles[i]
        entry = {"source": f"source/{i}.png", "target": f"target/{i}.png"}
        write_png(args.out / entry["source"], to_image(sample["condition"]))
        write_png(args.out / entry["target"], to_image(sample["target"] / 2 + 0.5))
        lines.append(json.dumps(entry | {"prompt": sample["prompt"]}))
    # It comes last: a folder that has it is complete.
    with atomic_write(args.out / "prompt.json") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run(main))
