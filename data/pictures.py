"""Reading and writing pictures: RGB in [0, 1], PNG with text chunks, labelled grids."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from PIL.Image import Resampling
from torch import Tensor

from common.files import atomic_write

ORIENTATION = 0x0112  # of EXIF: which side of a phone's photo is up; above 4 it lies on its side


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"expected a picture, {path} does not exist") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected a picture, {path} is not one or is damaged: {error}") from None


def _open(path: str | Path) -> Image.Image:
    with _explained(path), Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, as depth maps are: PIL would clip it
            pixels = (np.asarray(image) / 257).round().clip(0, 255)
            image = Image.fromarray(pixels.astype(np.uint8))
        if image.has_transparency_data:  # as it is seen on a white page
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def _upright_size(path: str | Path) -> tuple[int, int]:
    """Width and height of what `_open` returns, from the file's header alone."""
    with _explained(path), Image.open(path) as image:
        # Of a PNG, `getexif` would decode the pixels to look for an entry that comes after them.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        width, height = image.size
        return (height, width) if exif.get(ORIENTATION, 1) > 4 else (width, height)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB (3, H, W) in [0, 1]."""
    return to_bytes(image).float() / 255


def to_bytes(image: Image.Image) -> Tensor:
    """RGB bytes (3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))


def _to_square(image: Image.Image, size: int) -> Tensor:
    """RGB bytes (3, size, size), scaled, and the longer side cropped around the centre."""
    return to_bytes(ImageOps.fit(image, (size, size), Resampling.LANCZOS))


def read_picture(path: str | Path) -> Tensor:
    """A picture file as RGB (3, H, W) in [0, 1]. Raises ValueError if it is missing or damaged."""
    return to_tensor(_open(path))


def read_target(path: str | Path, size: int) -> Tensor:
    """A picture file as RGB bytes (3, size, size), scaled, and the longer side cropped around the
    centre. Raises ValueError if it is missing or damaged."""
    return _to_square(_open(path), size)


def read_condition(path: str | Path, target: str | Path, size: int) -> Tensor:
    """A condition file as RGB bytes (3, size, size), scaled and cropped as its target is: one of
    another size is first brought to the target's. Raises ValueError likewise."""
    image = _open(path).resize(_upright_size(target), Resampling.LANCZOS)
    return _to_square(image, size)


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture (3, H, W) in [0, 1] scaled by PIL's Lanczos filter, as diffusers' conditions."""
    if picture.shape[1:] == (height, width):
        return picture
    return to_tensor(to_image(picture).resize((width, height), Resampling.LANCZOS))


def to_image(picture: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> 8-bit picture, rounded (the original truncates, diffusers rounds)."""
    pixels = picture.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


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


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = font.getlength(longer) <= width or not lines[-1]
        lines = [*lines[:-1], longer] if fits else [*lines, word]
    return "\n".join(lines)


def grid(titles: list[str], rows: list[list[Tensor | str]], cell: int = 128) -> Image.Image:
    """A table with titles. A cell is a text, or a picture (3, H, W) in [0, 1], scaled to `cell`."""
    font = ImageFont.load_default(size=13)
    gap, head = 4, 24
    pitch = cell + gap
    canvas = Image.new("RGB", (len(titles) * pitch + gap, head + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        x = gap + column * pitch
        draw.text((x + cell / 2, head / 2), title, fill="black", font=font, anchor="mm")
        for i, row in enumerate(rows):
            y = head + i * pitch
            if isinstance(row[column], str):
                text = _wrap(row[column], cell - 8, font)
                draw.multiline_text((x + 4, y + 4), text, fill="black", font=font)
            else:
                image = to_image(row[column])
                method = Resampling.NEAREST if image.width < cell else Resampling.LANCZOS
                canvas.paste(image.resize((cell, cell), method), (x, y))
    return canvas


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
