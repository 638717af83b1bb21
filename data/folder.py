"""Pairs of pictures and conditions in a folder: Fill50k's layout, or Hugging Face's imagefolder.

    prompt.json      {"target": "target/0.png", "source": "source/0.png", "prompt": "..."}
    metadata.jsonl   {"file_name": "0.png", "conditioning_image": "conditions/0.png", "text": "..."}

Both hold one JSON object per line; file names are relative to the folder; a prompt may be missing.
"""

import json
from collections.abc import Sequence
from copy import copy
from pathlib import Path

from torch import Tensor

from data.annotators import annotate, canny
from data.dataset import Dataset
from data.fidelity import measure_of
from data.pictures import read_condition, read_target

LAYOUTS = {  # index file -> its keys for the picture, the condition and the prompt
    "prompt.json": ("target", "source", "prompt"),
    "metadata.jsonl": ("file_name", "conditioning_image", "text"),
}


def _edges(target: Tensor) -> Tensor:
    return canny(target / 255).mul(255).byte()


def index_of(folder: Path) -> Path | None:
    """The file that lists a folder's pairs, if it is there."""
    return next((folder / name for name in LAYOUTS if (folder / name).is_file()), None)


class Folder(Dataset):
    """A folder's pairs, scaled and cropped around the centre. With `edges` the condition is not
    read, it is the picture's Canny edges. Raises ValueError for a folder without pairs, and for a
    line that is no such object or names a file that does not exist, with the line's number.

    `annotator`: what made the conditions, for pictures' obedience to be measured by what it finds
    in them. `held_out`: pairs that are never trained on; without, the first are the preview."""

    def __init__(self, folder: str | Path, size: int, edges: bool = False,
                 annotator: str | None = None, held_out: "Folder | None" = None):
        self.folder = Path(folder)
        self.size, self.keeps_conditions = size, edges
        self.annotator = "canny" if edges else annotator
        self.held_out = held_out
        index = index_of(self.folder)
        if index is None:
            fault = "has neither" if self.folder.is_dir() else "does not exist"
            raise ValueError(f"expected a folder with {' or '.join(LAYOUTS)}, {folder} {fault}")
        lines = enumerate(index.read_bytes().splitlines(), start=1)
        self.pairs = [self._pair(line, LAYOUTS[index.name], f"{index}, line {number}")
                      for number, line in lines if line.strip()]
        if not self.pairs:
            raise ValueError(f"expected one JSON object per line, {index} is empty")

    def _pair(self, line: bytes, keys: tuple[str, str, str], where: str) -> tuple[list[Path], str]:
        """The files of picture and condition (of edges the picture's), and the prompt."""
        start = line[:60].decode(errors="replace")
        try:
            entry = json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{where}: expected a JSON object, got {start!r} ({error})") from None
        entry = entry if isinstance(entry, dict) else {}
        values = [entry.get(key) for key in keys]
        if values[1] is None:  # imagefolder's other name for it
            values[1] = entry.get("conditioning_image_file_name")
        files = values[:1] if self.keeps_conditions else values[:2]
        if None in files or not all(isinstance(value, str | None) for value in values):
            target, condition, prompt = keys
            raise ValueError(f'{where}: expected {{"{target}": file, "{condition}": file, '
                             f'"{prompt}": text}}, got {start!r}')
        paths = [self.folder / name for name in files]
        for key, path in zip(keys, paths, strict=False):
            if not path.is_file():
                raise ValueError(f"{where}: {key} file {path} does not exist")
        return paths, values[2] or ""

    def __len__(self) -> int:
        return len(self.pairs)

    def target(self, i: int) -> Tensor:
        return read_target(self.pairs[i][0][0], self.size)

    def condition(self, i: int) -> Tensor:
        if self.keeps_conditions:
            return _edges(self.target(i))
        target, condition = self.pairs[i][0]
        return read_condition(condition, target, self.size)

    def pair(self, i: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        target = self.target(i)  # opened once, also for its edges
        return target, _edges(target) if self.keeps_conditions else self.condition(i)

    def prompt(self, i: int) -> str:
        return self.pairs[i][1]

    def sources(self, i: int) -> list[Path | str]:
        return self.pairs[i][0][:1]

    def preview(self, count: int) -> "Folder":
        first = copy(self.held_out or self)
        first.pairs = first.pairs[:count]
        return first

    def fidelity(self, pictures: Tensor, conditions: Sequence[int],
                 prompts: Sequence[int] | None) -> dict[str, float]:
        measure = self.annotator and measure_of(self.annotator)
        if not measure:
            return {}
        name, compare = measure
        scores = [compare(annotate(self.annotator, picture), self.condition(i) / 255)
                  for picture, i in zip(pictures, conditions, strict=True)]
        return {name: sum(scores) / len(scores)}
