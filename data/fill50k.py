"""Fill50k, the data set of the ControlNet tutorial, and any folder in its layout; as a program, write such a folder.

A folder holds `prompt.json`, one JSON object a line: {"source": "source/0.png", "target": "target/0.png", "prompt": "..."}.

    python -m data.fill50k --out DIR --count 1000 --size 512
"""

import json
import sys
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from data.circles import Circles
from data.cli import Parser, not_negative, positive, run
from data.files import replacing
from data.pictures import read_picture, to_image, write_png


class Fill50k:
    """A folder of pairs: item i is {"target": (3, S, S) in [-1, 1], "condition": (3, S, S) in [0, 1], "prompt": str}.

    Pictures of another size than S x S are scaled and cropped around the centre, target and condition alike. Raises ValueError with
    the line's number for a line that is not such an object or names a file that is not there.
    """

    def __init__(self, folder: str | Path, size: int):
        self.folder, self.size = Path(folder), size
        index = self.folder / "prompt.json"
        if not index.is_file():
            raise ValueError(f"expected a folder with prompt.json, source/ and target/, {index} does not exist")
        self.rows: list[dict[str, str]] = []
        try:
            text = index.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as problem:
            raise ValueError(f"expected UTF-8 text, {index} is not: {problem}") from None
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines, which also splits at rare characters inside a prompt
            if line.strip():
                self.rows.append(self._row(line, f"{index}, line {number}"))
        if not self.rows:
            raise ValueError(f"expected one JSON object a line, {index} is empty")

    def _row(self, line: str, where: str) -> dict[str, str]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{where}: expected a JSON object, got {line[:60]!r} ({problem})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("source", "target", "prompt")):
            raise ValueError(f'{where}: expected {{"source": file, "target": file, "prompt": text}}, got {line[:60]!r}')
        for key in ("source", "target"):
            if not (self.folder / row[key]).is_file():
                raise ValueError(f"{where}: {key} file {self.folder / row[key]} does not exist")
        return row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        row = self.rows[i]
        target, condition = (read_picture(self.folder / row[key], self.size) for key in ("target", "source"))
        return {"target": target * 2 - 1, "condition": condition, "prompt": row["prompt"]}


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
    with replacing(out / "prompt.json") as temporary:
        temporary.write_text("\n".join(rows) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--count", type=positive, default=1000, help="number of pairs (default: 1000)")
    parser.add_argument("--size", type=positive, default=512, help="side of the pictures in pixels, divisible by 8 (default: 512)")
    parser.add_argument("--seed", type=not_negative, default=0)
    args = parser.parse_args(argv)
    write_folder(args.out, args.count, args.size, args.seed)


if __name__ == "__main__":
    sys.exit(run(main))
