"""Reading and writing pictures: RGB in [0, 1], PNG with text chunks."""

import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from PIL.Image import Resampling
from torch import Tensor

from common.files import atomic_write

ORIENTATION = 0x0112  # of EXIF: which side of a phone's photo is up; above 4 it lies on its side
# What PIL raises for damaged files, depending on the format.
PIL_FAILURES = (OSError, SyntaxError, EOFError, IndexError, KeyError, OverflowError, TypeError,
                struct.error, zlib.error)
WHITE, BLACK = "white", "black"  # what is seen through a transparent target, condition


@contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Whatever PIL says of a file becomes one ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"expected a picture, {path} does not exist") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"expected a picture of at most {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} "
                         f"megapixels, {path} is too large: {error}") from None
    except PIL_FAILURES as error:
        raise ValueError(f"expected a picture, {path} is not one or is damaged: {error}") from None


def _open(path: str | Path, ground: str) -> Image.Image:
    """A picture as RGB, upright, what is transparent in it on a ground of that colour."""
    with explained(path), Image.open(path) as image:
        form, upright = image.format, ImageOps.exif_transpose(image)
    upright = _to_8_bits(upright, form, path)
    return _on_ground(upright, ground, path).convert("RGB")


def _to_8_bits(image: Image.Image, form: str, path: str | Path) -> Image.Image:
    """PIL would clip numbers of more than 8 bits: 16-bit grey, as depth maps are, and floats in
    [0, 1] are scaled; of others nobody knows what white is."""
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()  # not a number, if one pixel is not
    if image.mode == "F" and 0 <= low and high <= 1:
        pixels = pixels * 255
    # PIL holds 16-bit PNG and PGM files in 32 bits. No 16-bit picture ends at 255: that is 8 bits.
    elif (image.mode.startswith("I;16") or form in ("PNG", "PPM")) and not 0 < high <= 255:
        pixels = pixels / 257
    else:
        raise ValueError(f"expected 8-bit colours, 16-bit grey or floats in [0, 1], {path} has "
                         f"mode {image.mode} and values from {low:g} to {high:g}")
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _on_ground(image: Image.Image, ground: str, path: str | Path) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    seen = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    low, high = image.getchannel("A").getextrema()
    if ground == BLACK and low < high and not any(high for _, high in seen.getextrema()[:3]):
        raise ValueError(f"expected white lines, {path} has black ones on a transparent ground: on "
                         "black, as conditions are seen, nothing is left of them")
    return seen


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture when it is upright, from its header alone."""
    width, height = image.size
    return (height, width) if orientation(image) > 4 else (width, height)


def orientation(image: Image.Image) -> int:
    """EXIF's: 1 is upright."""
    # Of a PNG, `getexif` would decode the pixels to look for an entry that comes after them.
    exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
    return exif.get(ORIENTATION, 1)


def is_label_map(image: Image.Image) -> bool:
    """Whether the opened picture has a palette of colours, not only of greys: between two of them
    there is no third."""
    if image.mode != "P":
        return False
    colors = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    return bool((colors != colors[:, :1]).any())


def to_tensor(image: Image.Image) -> Tensor:
    """RGB (3, H, W) in [0, 1]."""
    return to_bytes(image).float() / 255


def to_bytes(image: Image.Image) -> Tensor:
    """RGB bytes (3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))


def _fitted(image: Image.Image, shape: tuple[int, int], method: Resampling) -> Tensor:
    """RGB bytes (3, H, W), scaled to cover `shape`, and what stands out cropped on both sides."""
    return to_bytes(ImageOps.fit(image, shape[::-1], method))


def read_picture(path: str | Path, ground: str = WHITE) -> Tensor:
    """A picture file as RGB (3, H, W) in [0, 1], upright. What is transparent in it is seen on
    `ground`: photos and targets on WHITE paper, conditions on BLACK.

    Raises ValueError if it is missing or damaged, if nobody can say what is white in it, and for a
    condition of black lines, which are gone on black."""
    return to_tensor(_open(path, ground))


def shape_of(path: str | Path) -> tuple[int, int]:
    """Height and width of a picture file when it is upright, from its header alone. Raises
    ValueError as `read_picture`."""
    with explained(path), Image.open(path) as image:
        return upright_size(image)[::-1]


def read_target(path: str | Path, shape: tuple[int, int]) -> Tensor:
    """A picture file as RGB bytes (3, H, W), scaled to cover `shape`, height and width, and cropped
    around the centre. Raises ValueError as `read_picture`."""
    return _fitted(_open(path, WHITE), shape, Resampling.LANCZOS)


def read_condition(path: str | Path, target: str | Path, shape: tuple[int, int],
                   nearest: bool | None = None) -> Tensor:
    """A condition file as RGB bytes (3, H, W), scaled and cropped as its target is: one of
    another size is first brought to the target's. `nearest`: without mixing colours, as label maps
    need it (None: if it is one, by its palette). Raises ValueError as `read_picture`."""
    size = shape_of(target)[::-1]
    if nearest is None:
        with explained(path), Image.open(path) as image:
            nearest = is_label_map(image)
    method = Resampling.NEAREST if nearest else Resampling.LANCZOS
    return _fitted(_open(path, BLACK).resize(size, method), shape, method)


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
