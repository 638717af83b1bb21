"""OpenMoji's drawings as pairs for a ControlNet: python -m data.openmoji RELEASE --out DIR

RELEASE is an unpacked release with color/svg, black/svg and data/openmoji.json: the folder
`package` of the npm package (npm pack openmoji@17.0.0) or the project's own zip. DIR gets train/
and held_out/, both in the layout that --data reads: metadata.jsonl, picture and line art (white
on black). Pictures in train/ are transparent, for data/drawings.py to put on grounds; those in
held_out/ have theirs. Needs resvg-py: pip install -e ".[drawings]".

OpenMoji is the work of the OpenMoji project, under CC BY-SA 4.0: so is what this makes of it."""

import hashlib
import json
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from common.cli import Parser, answer, picture_side, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("release", type=Path, help="folder of an unpacked OpenMoji release")
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--size", type=picture_side, default=128, help="pixels (default: 128)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before NumPy is imported
    answer(parse)

import numpy as np
from PIL import Image
from PIL.Image import Resampling
from tqdm import tqdm

from common.files import atomic_write
from data.drawings import STORED_SIZE, place, prompt, random_placement
from data.palette import PALETTE, PALETTE_RGB

RENDERED = 512     # pixels: everything is made from this and scaled down once
MIN_FILL = 0.02    # of the square: less coloured area is no colour drawing
MIN_LINES = 0.01   # likewise for line art
SAME_LINES = 0.93  # cosine of two line arts from which on they count as one drawing
HELD_OUT = 9       # one group in nine is never trained on
MAIN_COLORS, MAIN_SHARE = 3, 0.08  # colours in a prompt: at most, and each one's part of the fill
KINDS = {  # the first that a drawing's subgroup, else its group, begins with
    "face": "face", "cat-face": "face", "monkey-face": "animal", "heart": "heart",
    "hand": "hand", "body-parts": "hand", "person": "person", "people": "person",
    "family": "person", "animal": "animal", "plant": "plant", "gardening": "plant",
    "drink": "drink", "food": "food", "transport": "vehicle", "place": "place",
    "sky-weather": "sky", "time": "clock", "travel-places": "place", "clothing": "clothing",
    "tool": "tool", "musical": "instrument", "computer": "device", "phone": "device",
    "technology": "device", "light-video": "device", "sport": "game", "game": "game",
    "activities": "game", "objects": "object", "healthcare": "object", "smileys": "face",
}  # fmt: skip
SKIN_TONES = {f"1F3F{digit}" for digit in "BCDEF"}
MODIFIERS = SKIN_TONES | {"200D", "FE0F", "2640", "2642", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}
PERSONS = {  # man and woman, boy and girl, ... -> person, child, ...
    "1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3",
    "1F475": "1F9D3"}


@dataclass
class Drawing:
    entry: dict           # of openmoji.json
    picture: Image.Image  # RGBA, RENDERED pixels, the drawing in STORED_SIZE of it
    lines: Image.Image    # L, white on black
    colors: list[str]     # main colours, largest first

    @property
    def code(self) -> str:
        return self.entry["hexcode"]

    @property
    def kind(self) -> str:
        words = self.entry["subgroups"], self.entry["group"]
        return next((kind for word in words for start, kind in KINDS.items()
                     if word.startswith(start)), "symbol")


def reason_to_leave_out(entry: dict) -> str | None:
    """Why a drawing is of no use, as far as its description says."""
    group, subgroup = entry["group"], entry["subgroups"]
    if entry["skintone"] or subgroup == "skin-tone":
        return "skin-tone variants, near duplicates"
    if "flag" in group or "flag" in subgroup:
        return "flags, whose line art is a bare rectangle"
    if subgroup == "brand":
        return "brands, which are trademarks"
    if subgroup in ("alphanum", "keycap", "regional-indicator"):
        return "letters and keycaps"
    return None


def render(path: Path) -> Image.Image:
    """An SVG as RGBA, RENDERED pixels wide. Raises ValueError if it is missing or damaged."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ValueError('expected the package resvg-py: pip install -e ".[drawings]"') from None
    if not path.is_file():
        raise ValueError(f"expected an OpenMoji release, {path} does not exist")
    try:
        content = svg_to_bytes(svg_path=str(path), width=RENDERED, skip_system_fonts=True)
    except ValueError as problem:
        raise ValueError(f"expected an SVG, {path} is damaged: {problem}") from None
    return Image.open(BytesIO(bytes(content))).convert("RGBA")


def main_colors(picture: np.ndarray, lines: np.ndarray) -> tuple[list[str], float]:
    """RGBA and lines in [0, 255] -> names of the main colours of the fill, and the fill's part of
    the square. The fill is what is opaque and no line."""
    filled = picture[(picture[..., 3] > 250) & (lines < 10)][:, :3].astype(float)
    if not len(filled):
        return [], 0.0
    values, counts = np.unique(filled, axis=0, return_counts=True)
    nearest = np.linalg.norm(values[:, None] - PALETTE_RGB, axis=-1).argmin(1)
    areas = np.bincount(nearest, counts, len(PALETTE))
    largest = [i for i in np.argsort(-areas, kind="stable")[:MAIN_COLORS]
               if areas[i] >= MAIN_SHARE * len(filled)]
    return [list(PALETTE)[i] for i in largest], len(filled) / lines.size


def draw(release: Path, entry: dict) -> Drawing | str:
    """Render a drawing and its line art, centred; or the reason to leave it out."""
    name = f"{entry['hexcode']}.svg"
    picture, black = render(release / "color/svg" / name), render(release / "black/svg" / name)
    alpha, box = black.getchannel("A"), picture.getchannel("A").getbbox()
    on_white = Image.composite(black.convert("L"), Image.new("L", black.size, 255), alpha)
    lines = on_white.point(lambda value: 255 - value)
    if box is None or lines.getbbox() is None:
        return "no line art"
    box = [f(pair) for f, pair in zip((min, min, max, max),
                                      zip(box, lines.getbbox(), strict=True), strict=True)]
    half = max(box[2] - box[0], box[3] - box[1]) / STORED_SIZE / 2
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    area = (x - half, y - half, x + half, y + half)
    size = (RENDERED, RENDERED)
    picture = picture.convert("RGBa").transform(
        size, Image.Transform.EXTENT, area, Resampling.BICUBIC).convert("RGBA")
    lines = lines.transform(size, Image.Transform.EXTENT, area, Resampling.BICUBIC)
    colors, fill = main_colors(np.asarray(picture), np.asarray(lines))
    if fill < MIN_FILL:
        return "no fill"
    if np.asarray(lines).mean() / 255 < MIN_LINES:
        return "no line art"
    return Drawing(entry, picture, lines, colors)


def base_code(code: str) -> str:
    """A drawing's code without skin tone, gender and hair: 1F468-200D-1F52C -> 1F9D1-1F52C."""
    parts = [part for part in code.split("-") if part not in MODIFIERS]
    return "-".join(PERSONS.get(part, part) for part in parts) or code


def groups(codes: list[str], lines: np.ndarray) -> list[str]:
    """A group's name for every drawing, the smallest base code in it. Drawings are in one group if
    they have the same base code or line arts (N, pixels) with a cosine above SAME_LINES."""
    parent = list(range(len(codes)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    bases = [base_code(code) for code in codes]
    first = {}
    same = [(first.setdefault(base, i), i) for i, base in enumerate(bases)]
    unit = lines / np.linalg.norm(lines, axis=1, keepdims=True)
    same += np.argwhere(np.triu(unit @ unit.T > SAME_LINES, k=1)).tolist()
    for a, b in same:
        parent[root(b)] = root(a)
    members = defaultdict(list)
    for i, base in enumerate(bases):
        members[root(i)].append(base)
    return [min(members[root(i)]) for i in range(len(codes))]


def is_held_out(group: str) -> bool:
    return _hash(group) % HELD_OUT == 0


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def write(folder: Path, drawing: Drawing, group: str, side: int, held_out: bool) -> dict:
    """Write a drawing's two files, and return its line of metadata.jsonl."""
    if held_out:
        placement = random_placement("held out", drawing.code)
        picture, lines = place(drawing.picture, drawing.lines, side, placement)
        picture = picture.quantize(128, Image.Quantize.MEDIANCUT, kmeans=2)
        ground = placement.ground
    else:
        picture = drawing.picture.convert("RGBa").resize((side, side), Resampling.BOX)
        picture = picture.convert("RGBA").quantize(128, Image.Quantize.FASTOCTREE)
        lines, ground = drawing.lines.resize((side, side), Resampling.BOX), "white"
    lines = lines.point(lambda value: round(value / 17) * 17).quantize(16, dither=0)  # 4 bits
    names = f"{drawing.code}.png", f"lines/{drawing.code}.png"
    for name, image in zip(names, (picture, lines), strict=True):
        with atomic_write(folder / name) as temporary:
            image.save(temporary, format="PNG", optimize=True)
    return {"file_name": names[0], "conditioning_image": names[1],
            "text": prompt(drawing.kind, drawing.colors, ground),
            "annotation": drawing.entry["annotation"], "kind": drawing.kind,
            "colors": drawing.colors, "ground": ground, "group": group,
            "author": drawing.entry["openmoji_author"]}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    index = args.release / "data" / "openmoji.json"
    if not index.is_file():
        raise ValueError(f"expected an OpenMoji release, {index} does not exist")
    entries = json.loads(index.read_text("utf-8"))
    drawings, left_out = [], Counter()
    for entry in tqdm(entries, desc="rendering", mininterval=5):
        drawing = reason_to_leave_out(entry) or draw(args.release, entry)
        if isinstance(drawing, str):
            left_out[drawing] += 1
        else:
            drawings.append(drawing)
    small = np.stack([np.asarray(d.lines.resize((64, 64), Resampling.BOX), dtype=np.float32).ravel()
                      for d in drawings])
    names = groups([d.code for d in drawings], small)
    lines = {"train": [], "held_out": []}
    # By hash, or the first held-out drawings, which previews show, would all be faces.
    shuffled = sorted(zip(drawings, names, strict=True), key=lambda pair: _hash(pair[0].code))
    for drawing, group in tqdm(shuffled, desc="writing", mininterval=5):
        held_out = is_held_out(group)
        part = "held_out" if held_out else "train"
        line = write(args.out / part, drawing, group, args.size, held_out)
        lines[part].append(json.dumps(line, ensure_ascii=False))
    for part, entries_of_part in lines.items():
        with atomic_write(args.out / part / "metadata.jsonl") as temporary:
            temporary.write_text("\n".join(entries_of_part) + "\n", "utf-8")
    print(f"{len(entries)} drawings, left out:")
    for reason, count in left_out.most_common():
        print(f"{count:6}  {reason}")
    print(f"{len(lines['train'])} to train on, {len(lines['held_out'])} held out, in "
          f"{len(set(names))} groups: {args.out}")


if __name__ == "__main__":
    sys.exit(run(main))
