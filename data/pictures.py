"""Reading and writing pictures: RGB in [0, 1], PNG with text chunks, labelled grids."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from common.files import atomic_write


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)  # a phone's photo says which side is up
            if image.mode.startswith("I"):  # 16-bit grey, as depth maps are: PIL would clip it to white
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"expected a picture, {path} does not exist") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as problem:
        raise ValueError(f"expected a picture, {path} is not one or is damaged: {problem}") from None


def _fitted(image: Image.Image, size: int | None) -> Tensor:
    """As (3, H, W) in [0, 1]; with `size`, scaled, and the longer side cropped around the centre, to size x size."""
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def read_picture(path: str | Path, size: int | None = None) -> Tensor:
    """A picture file as RGB (3, H, W) in [0, 1]; with `size`, fitted to size x size (scaled, the longer side cropped around the centre).

    Raises ValueError if the file is missing or not a whole picture.
    """
    return _fitted(_open(path), size)


def read_pair(path: str | Path, condition: str | Path, size: int) -> tuple[Tensor, Tensor]:
    """A picture and its condition, both (3, size, size) in [0, 1], scaled and cropped together: a condition of another size is brought to the
    picture's first, so that what lies above each other stays so. Raises ValueError as `read_picture` does.
    """
    picture, image = _open(path), _open(condition)
    if image.size != picture.size:
        image = image.resize(picture.size, Image.Resampling.LANCZOS)
    return _fitted(picture, size), _fitted(image, size)


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture (3, H, W) in [0, 1] scaled to height x width by PIL's Lanczos filter, as diffusers scales a condition."""
    if picture.shape[1:] == (height, width):
        return picture
    return _fitted(to_image(picture).resize((width, height), Image.Resampling.LANCZOS), None)


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8-bit picture, rounded (the original code truncates, diffusers rounds)."""
    return Image.fromarray(picture.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def write_png(path: str | Path, image: Image.Image, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG, whole or not at all, with `text` as its text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


def read_text(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG. Raises ValueError if the file is missing or not a picture."""
    read_picture(path)
    with Image.open(path) as image:
        return dict(getattr(image, "text", {}))


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width or not lines[-1] else [*lines, word]
    return "\n".join(lines)


def grid(titles: Sequence[str], rows: Sequence[Sequence[Tensor | str]], cell: int = 128) -> Image.Image:
    """A picture of rows under column titles. A cell is a picture (3, H, W) in [0, 1] or a text; pictures are scaled to the cell's size."""
    font, gap, head = ImageFont.load_default(size=13), 4, 24
    canvas = Image.new("RGB", (len(titles) * (cell + gap) + gap, head + len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((gap + column * (cell + gap) + cell / 2, head / 2), title, fill="black", font=font, anchor="mm")
        for line, row in enumerate(rows):
            x, y = gap + column * (cell + gap), head + line * (cell + gap)
            if isinstance(row[column], str):
                draw.multiline_text((x + 4, y + 4), _wrapped(row[column], cell - 8, font), fill="black", font=font)
            else:
                image = to_image(row[column])
                canvas.paste(image.resize((cell, cell), Image.Resampling.NEAREST if image.width < cell else Image.Resampling.LANCZOS), (x, y))
    return canvas
