"""Drawings and their line art: a data set that tells control networks apart better than circles.

A drawing has no background of its own. To train on, it is put on one: in another size and place
each time, mirrored or not, and the prompt names what a small text encoder can learn: the kind of
thing, up to three main colours, largest first, and the ground ("food, pink, light green, white
background"). `data/openmoji.py` makes the folder this reads."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageOps
from PIL.Image import Resampling
from torch import Tensor

from data.dataset import Dataset
from data.fidelity import color_error
from data.folder import Folder
from data.palette import PALETTE, PALETTE_RGB
from data.pictures import to_bytes

# Dark grounds would hide the black outlines, so: white, and a dozen light colours.
GROUNDS = {
    "white": (255, 255, 255), "cream": (255, 246, 214), "peach": (255, 222, 196),
    "rose": (255, 210, 220), "lilac": (242, 212, 246), "lavender": (222, 214, 250),
    "sky": (204, 230, 252), "aqua": (196, 244, 246), "mint": (204, 246, 218),
    "lime": (224, 248, 180), "lemon": (255, 248, 168), "sand": (236, 224, 196),
    "silver": (222, 222, 226),
}
WHITE_SHARE = 1 / 3   # of the drawings; the other grounds share the rest
SIZES = (0.72, 0.96)  # of a drawing's longer side, as a fraction of the picture's
STORED_SIZE = SIZES[1]  # in the prepared files: they only ever shrink


@dataclass(frozen=True)
class Placement:
    """How a drawing is put on its ground; `x` and `y` are 0 at the left or top edge, 1 at the
    other."""

    size: float
    x: float
    y: float
    mirrored: bool
    ground: str


def random_placement(*key: int | str) -> Placement:
    """The placement that belongs to a key, such as (seed, position): the same on any machine."""
    rng = random.Random(repr(key))  # seeded by SHA-512 of the text, in every version of Python
    ground = rng.choice(list(GROUNDS)[1:]) if rng.random() > WHITE_SHARE else "white"
    return Placement(rng.uniform(*SIZES), rng.random(), rng.random(), rng.random() < 0.5, ground)


def place(drawing: Image.Image, lines: Image.Image, side: int,
          placement: Placement) -> tuple[Image.Image, Image.Image]:
    """A drawing (RGBA) and its line art (L, white on black), both centred in STORED_SIZE of a
    square -> the picture on its ground (RGB) and the condition (L), side x side pixels."""
    p = placement
    pixels = round(side * p.size / STORED_SIZE)
    border = pixels * (1 - STORED_SIZE) / 2  # of the square, around the drawing
    free = side - pixels + 2 * border
    corner = round(p.x * free - border), round(p.y * free - border)
    if p.mirrored:
        drawing, lines = ImageOps.mirror(drawing), ImageOps.mirror(lines)
    # RGBa: colours multiplied by alpha, or transparent pixels would bleed into the edges.
    drawing = drawing.convert("RGBa").resize((pixels, pixels), Resampling.BICUBIC).convert("RGBA")
    picture, condition = Image.new("RGB", (side, side), GROUNDS[p.ground]), Image.new(
        "L", (side, side))
    picture.paste(drawing, corner, mask=drawing)
    condition.paste(lines.resize((pixels, pixels), Resampling.BICUBIC), corner)
    return picture, condition


def prompt(kind: str, colors: list[str], ground: str) -> str:
    return ", ".join([kind, *colors, f"{ground} background"])


def entries(folder: Path, *keys: str) -> list[dict]:
    """The lines of a metadata.jsonl, all of which have these keys; ValueError if one has not."""
    index = folder / "metadata.jsonl"
    found = [json.loads(line) for line in index.read_text("utf-8").splitlines()]
    for number, entry in enumerate(found, start=1):
        if not set(keys) <= entry.keys():
            raise ValueError(f"{index}, line {number}: expected {' and '.join(map(repr, keys))}, "
                             f"as data/openmoji.py writes them, got {list(entry)}")
    return found


def is_drawings(folder: Path) -> bool:
    """Whether a folder of pairs is one that data/openmoji.py has made."""
    index = folder / "metadata.jsonl"
    if not index.is_file():
        return False
    with index.open(encoding="utf-8", errors="replace") as file:
        first = file.readline()
    return '"kind": ' in first and '"colors": ' in first


class Drawings(Dataset):
    """The drawings in `folder`/train, each on `variants` grounds: sample i shows drawing i modulo
    their number, placed as (seed, i) says. Its preview is `held_out` (None: `folder`/held_out),
    which is never placed anew. Raises ValueError as `Folder` does."""

    def __init__(self, folder: str | Path, size: int, seed: int = 0, variants: int = 8,
                 held_out: Path | None = None):
        self.folder, self.size = Path(folder), size
        self.seed, self.variants = seed, variants
        self.held_out = held_out or self.folder / "held_out"
        folder = Folder(self.folder / "train", size)
        self.pairs, self.fingerprint = folder.pairs, folder.fingerprint
        self.entries = entries(self.folder / "train", "kind", "colors")

    def __len__(self) -> int:
        return len(self.pairs) * self.variants

    def pair(self, i: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        drawing, lines = self.files(i)
        picture, condition = place(_read(drawing, "RGBA"), _read(lines, "L"), self.size,
                                   random_placement(self.seed, i))
        return to_bytes(picture), to_bytes(condition.convert("RGB"))

    def target(self, i: int) -> Tensor:
        return self.pair(i)[0]

    def condition(self, i: int) -> Tensor:
        return self.pair(i)[1]

    def prompt(self, i: int) -> str:
        entry = self.entries[i % len(self.pairs)]
        return prompt(entry["kind"], entry["colors"], random_placement(self.seed, i).ground)

    def files(self, i: int) -> list[Path]:
        return self.pairs[i % len(self.pairs)][0]

    def sources(self, i: int) -> list[Path | str]:
        return [self.files(i)[0], repr(random_placement(self.seed, i))]

    def preview(self, count: int) -> Folder:
        return HeldOutDrawings(self.held_out, self.size).preview(count)


class HeldOutDrawings(Folder):
    """Drawings on their grounds, by which networks are judged. Their fidelity: the F1 of the lines;
    where the prompt is the drawing's own, the error of the colours between them; and how far the
    picture is from the colours that its prompt names."""

    def __init__(self, folder: Path, size: int):
        super().__init__(folder, size, annotator="lines")
        self.entries = entries(self.folder, "colors", "ground")

    def fidelity(self, pictures: Tensor, conditions: Sequence[int],
                 prompts: Sequence[int] | None) -> dict[str, float]:
        measures = super().fidelity(pictures, conditions, prompts)
        if prompts is not None and list(prompts) == list(conditions):
            errors = [color_error(picture, self.target(i) / 255, self.condition(i) / 255)
                      for picture, i in zip(pictures, conditions, strict=True)]
            measures["color_error"] = sum(errors) / len(errors)
        if prompts is not None:
            errors = [error for picture, i in zip(pictures, prompts, strict=True)
                      for error in named_color_errors(picture, self.entries[i])]
            measures["named_color_error"] = sum(errors) / len(errors)
        return measures


GROUND_PART = 0.25  # of the pixels at least are ground, of a drawing that fills its frame
COLOR_PART = 0.02   # of the pixels at least have a colour that the prompt names


def named_color_errors(picture: Tensor, entry: dict) -> list[float]:
    """Distances in RGB of 255 of a picture (3, H, W) in [0, 1] from the ground that a line of
    metadata.jsonl names, and from each of its colours: those within which as many pixels lie as
    such a colour has at least."""
    names = [(GROUNDS[entry["ground"]], GROUND_PART)]
    names += [(PALETTE_RGB[list(PALETTE).index(color)], COLOR_PART) for color in entry["colors"]]
    return [(255 * picture - torch.as_tensor(rgb).float()[:, None, None]).norm(dim=0).flatten()
            .quantile(part).item() for rgb, part in names]


@lru_cache(maxsize=8192)  # of 128 x 128 pixels: 64 KB and 16 KB each
def _read(path: Path, mode: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGBA").convert(mode)  # not at once: a palette may be transparent
