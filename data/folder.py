"""Pairs of pictures and conditions in a folder: Fill50k's layout, or Hugging Face's imagefolder.

    prompt.json      {"target": "target/0.png", "source": "source/0.png", "prompt": "..."}                          Fill50k
    metadata.jsonl   {"file_name": "0.png", "conditioning_image": "conditions/0.png", "text": "..."}                imagefolder

Both hold one JSON object a line; file names are relative to the folder. The prompt may be missing.
"""

import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from data.annotators import canny
from data.pictures import read_pair, read_picture

LAYOUTS = {  # index file -> names of the picture, of the condition, of the prompt
    "prompt.json": (("target",), ("source",), ("prompt",)),
    "metadata.jsonl": (("file_name",), ("conditioning_image", "conditioning_image_file_name"), ("text",)),
}


class Pair(NamedTuple):
    target: Path
    condition: Path | None
    prompt: str


class Folder:
    """A folder of pairs: item i is {"target": (3, S, S) in [-1, 1], "condition": (3, S, S) in [0, 1], "prompt": str}.

    Pictures of another size than S x S are scaled and cropped around the centre, picture and condition together. With `edges` the
    condition is not read, it is the picture's Canny edges. Raises ValueError with the line's number for a line that is not such an object
    or names a file that is not there.
    """

    def __init__(self, folder: str | Path, size: int, edges: bool = False):
        self.folder, self.size, self.edges = Path(folder), size, edges
        index = next((self.folder / name for name in LAYOUTS if (self.folder / name).is_file()), None)
        if index is None:
            raise ValueError(f"expected a folder with {' or '.join(LAYOUTS)}, {self.folder} {'has neither' if self.folder.is_dir() else 'does not exist'}")
        try:
            text = index.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as problem:
            raise ValueError(f"expected UTF-8 text, {index} is not: {problem}") from None
        # Not splitlines, which also splits at rare characters inside a prompt.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        self.pairs = [self._pair(line, LAYOUTS[index.name], f"{index}, line {number}") for number, line in lines]
        if not self.pairs:
            raise ValueError(f"expected one JSON object a line, {index} is empty")

    def _pair(self, line: str, names: tuple[tuple[str, ...], ...], where: str) -> Pair:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as problem:
            raise ValueError(f"{where}: expected a JSON object, got {line[:60]!r} ({problem})") from None
        values = [next((row[name] for name in column if row.get(name) is not None), None) if isinstance(row, dict) else 0 for column in names]
        wanted = names[:1] if self.edges else names[:2]
        if not all(isinstance(value, (str, type(None))) for value in values) or None in values[: len(wanted)]:
            shape = ", ".join(f'"{column[0]}": {kind}' for column, kind in zip(names, ("file", "file", "text"), strict=True))
            raise ValueError(f"{where}: expected {{{shape}}}, got {line[:60]!r}")
        paths = [self.folder / value for value in values[: len(wanted)]]
        for column, path in zip(wanted, paths, strict=True):
            if not path.is_file():
                raise ValueError(f"{where}: {column[0]} file {path} does not exist")
        return Pair(paths[0], None if self.edges else paths[1], values[2] or "")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        pair = self.pairs[i]
        if self.edges:
            target = read_picture(pair.target, self.size)
            condition = canny(target)
        else:
            target, condition = read_pair(pair.target, pair.condition, self.size)
        return {"target": target * 2 - 1, "condition": condition, "prompt": pair.prompt}

    def preview(self, count):
        import copy
        other = copy.copy(self)
        other.pairs = self.pairs[:count]
        return other

    def fidelity(self, pictures, own_colors=False):
        return {}
