"""Labelled grids of pictures."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.Image import Resampling
from torch import Tensor

from data.pictures import to_image

FONT_SIZE = 13
LINE = 16  # pixels from one line of a text to the next
GAP, HEAD = 4, 24  # pixels of a table between its cells, and for its titles
NOT_A_CHARACTER = "\uffff"  # what a font shows for letters that it does not have


def _font_for(text: str) -> tuple[ImageFont.FreeTypeFont, str]:
    """A font, and the text with what the font cannot show by its number: \\u5706. PIL's own font
    has Latin letters, DejaVu, which comes with matplotlib, most other alphabets."""
    font = ImageFont.load_default(size=FONT_SIZE)
    if _missing(text, font) and (file := _dejavu()):
        font = ImageFont.truetype(file, FONT_SIZE)
    missing = _missing(text, font)
    return font, "".join(letter.encode("ascii", "backslashreplace").decode()
                         if letter in missing else letter for letter in text)


def _missing(text: str, font: ImageFont.FreeTypeFont) -> set[str]:
    box = font.getmask(NOT_A_CHARACTER)
    return {letter for letter in set(text) if not letter.isascii()
            and (font.getmask(letter).size, bytes(font.getmask(letter))) == (box.size, bytes(box))}


def _dejavu() -> str | None:
    try:
        package = find_spec("matplotlib")
    except ValueError:
        return None
    file = package and Path(package.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    return str(file) if file and file.is_file() else None


def _wrap(text: str, width: int, height: int, font: ImageFont.FreeTypeFont) -> str:
    """A text in lines of `width` pixels, cut off with ... below `height`."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = font.getlength(longer) <= width or not lines[-1]
        lines = [*lines[:-1], longer] if fits else [*lines, word]
        while font.getlength(lines[-1]) > width:  # a long word, or a language without spaces
            part = next(n for n in range(len(lines[-1]), 0, -1)
                        if n == 1 or font.getlength(lines[-1][:n]) <= width)
            lines = [*lines[:-1], lines[-1][:part], lines[-1][part:]]
            if not lines[-1]:
                break
    if len(lines) > height // LINE:
        lines = lines[: max(1, height // LINE)]
        while lines[-1] and font.getlength(f"{lines[-1]}...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return "\n".join(lines)


def grid(titles: list[str], rows: list[list[Tensor | Image.Image | str]],
         cell: int = 128) -> Image.Image:
    """A table with titles. A cell is a text, or a picture, a tensor (3, H, W) in [0, 1] or of PIL,
    whose longer side is scaled to `cell`."""
    font = ImageFont.load_default(size=FONT_SIZE)
    pitch = cell + GAP
    canvas = Image.new("RGB", (len(titles) * pitch + GAP, HEAD + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        x = GAP + column * pitch
        draw.text((x + cell / 2, HEAD / 2), title, fill="black", font=font, anchor="mm")
        for i, row in enumerate(rows):
            y = HEAD + i * pitch
            if isinstance(row[column], str):
                font_of_text, text = _font_for(row[column])
                text = _wrap(text, cell - 8, cell - 8, font_of_text)
                draw.multiline_text((x + 4, y + 4), text, fill="black", font=font_of_text)
            else:
                image = row[column] if isinstance(row[column], Image.Image) else to_image(
                    row[column])
                scale = cell / max(image.size)
                method = Resampling.NEAREST if scale > 1 else Resampling.LANCZOS
                width, height = (round(scale * side) for side in image.size)
                corner = x + (cell - width) // 2, y + (cell - height) // 2
                canvas.paste(image.resize((width, height), method), corner)
    return canvas


def cells(table: Image.Image, columns: int) -> list[list[Image.Image]]:
    """The rows of what `grid` made with so many titles. Raises ValueError for other sizes."""
    pitch, rest = divmod(table.width - GAP, columns)
    rows, more = divmod(table.height - HEAD, max(pitch, 1))
    if rest or more or pitch <= GAP or rows < 1:
        raise ValueError(f"expected a table of {columns} columns of square cells, got a picture of "
                         f"{table.width} x {table.height}")
    side = pitch - GAP
    return [[table.crop((x, y, x + side, y + side)) for x in range(GAP, table.width, pitch)]
            for y in range(HEAD, table.height, pitch)]


def sheet(captions: list[str], pictures: Iterable[Tensor], columns: int = 7,
          cell: int = 104) -> Image.Image:
    """Pictures (3, H, W) in [0, 1] in rows of `columns`, each under its caption."""
    pictures = list(pictures)
    starts = range(0, len(pictures), columns)
    rows = [grid(captions[i : i + columns], [pictures[i : i + columns]], cell) for i in starts]
    canvas = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        canvas.paste(row, (0, i * rows[0].height))
    return canvas
