"""Pictures as people bring them: transparent, turned, in more than 8 bits, of labels. Each is read
as what it shows, or refused in one line."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.grids import _font_for, grid
from data.pictures import BLACK, read_condition, read_picture, read_target

LINE = np.zeros((16, 16), np.uint8)
LINE[7:9] = 255
RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def white_line(kind: str) -> tuple[Image.Image, dict]:
    """A white line on a transparent ground, and what saves it."""
    white = np.full((16, 16), 255, np.uint8)
    if kind in ("RGBA", "palette with alpha"):
        image = Image.fromarray(np.dstack([white, white, white, LINE]))
        return (image if kind == "RGBA" else image.quantize(method=2)), {}
    if kind == "LA":
        return Image.merge("LA", [Image.fromarray(white), Image.fromarray(LINE)]), {}
    if kind == "RGB":  # one colour stands for transparent
        return Image.merge("RGB", [Image.fromarray(LINE)] * 3), {"transparency": (0, 0, 0)}
    if kind == "L":
        return Image.fromarray(LINE), {"transparency": 0}
    image = Image.fromarray(LINE // 255).convert("P")
    image.putpalette([9, 200, 40, 255, 255, 255])
    return image, {"transparency": 0}


@pytest.mark.parametrize("kind", ["RGBA", "LA", "RGB", "L", "palette", "palette with alpha"])
def test_a_line_on_a_transparent_ground_is_a_condition_on_black(tmp_path, kind):
    image, how = white_line(kind)
    image.save(tmp_path / "a.png", **how)
    line = torch.from_numpy(LINE)
    assert torch.equal(read_picture(tmp_path / "a.png", BLACK) * 255, line.expand(3, -1, -1))
    condition = read_condition(tmp_path / "a.png", tmp_path / "a.png", (16, 16))
    assert torch.equal(condition, line.expand(3, -1, -1))
    assert (read_target(tmp_path / "a.png", (16, 16)) == 255).all()  # as on white paper


def test_colours_under_full_transparency_are_not_seen(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(np.dstack([noise, np.zeros_like(LINE)])).save(tmp_path / "a.png")
    assert (read_target(tmp_path / "a.png", (16, 16)) == 255).all()
    assert (read_picture(tmp_path / "a.png", BLACK) == 0).all()


def test_black_lines_on_a_transparent_ground_are_refused_as_a_condition(tmp_path):
    Image.merge("LA", [Image.new("L", (16, 16)), Image.fromarray(LINE)]).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png")[0, 8, 8] == 0
    with pytest.raises(ValueError, match="expected white lines, .*a.png has black ones"):
        read_picture(tmp_path / "a.png", BLACK)


@pytest.mark.parametrize(("name", "pixels"), [
    ("a.tiff", RAMP.astype(np.float32)),
    ("a.tiff", (RAMP * 65535).astype(np.uint16)),
    ("a.png", (RAMP * 65535).astype(np.uint16)),
])
def test_floats_up_to_one_and_16_bits_are_scaled(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    assert np.abs(read_picture(tmp_path / name)[0].numpy() - RAMP).max() < 0.0021


@pytest.mark.parametrize(("name", "pixels", "message"), [
    ("a.tiff", (RAMP * 7).astype(np.float32), "mode F and values from 0 to 7"),
    ("a.tiff", np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "mode F and values from nan"),
    ("a.tiff", (RAMP * 255).astype(np.int32), "mode I and values from 0 to 255"),
    ("a.tiff", (RAMP * 65535).astype(np.int32), "mode I and values from 0 to 65535"),
    ("a.png", (RAMP * 200).astype(np.uint16), "and values from 0 to 200"),
])
def test_numbers_whose_white_nobody_knows_are_refused(tmp_path, name, pixels, message):
    Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(ValueError, match=f"floats in .0, 1., .*{name} has .*{message}"):
        read_picture(tmp_path / name)


def label_map(path: Path, colors: list[int]) -> None:
    image = Image.fromarray(np.repeat(np.repeat(np.arange(4).reshape(2, 2), 50, 0), 50, 1)
                            .astype(np.uint8)).convert("P")
    image.putpalette(colors)
    image.save(path)


def test_a_label_map_of_another_size_keeps_its_colours(tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "target.png")
    label_map(tmp_path / "labels.png", [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    label_map(tmp_path / "grey.png", [0, 0, 0, 80, 80, 80, 160, 160, 160, 255, 255, 255])

    def colors(name: str, nearest: bool | None = None) -> int:
        condition = read_condition(tmp_path / name, tmp_path / "target.png", (64, 64), nearest)
        return len(condition.flatten(1).unique(dim=1).T)

    assert colors("labels.png") == colors("grey.png", nearest=True) == 4
    assert colors("labels.png", nearest=False) > 20 < colors("grey.png")


def empty_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


def test_a_picture_beyond_what_pil_decodes_is_called_too_large(tmp_path):
    (tmp_path / "a.png").write_bytes(empty_png(14000, 14000))
    with pytest.raises(ValueError, match="at most 179 megapixels, .*a.png is too large"):
        read_picture(tmp_path / "a.png")


def cells_outside(prompt: str) -> int:
    """Pixels that a prompt colours outside its cell of a grid, whose second row is empty."""
    rows = [[prompt], [""]]
    pixels = np.asarray(grid(["x"], rows).convert("L"))
    return int((pixels[24 + 128 :] < 255).sum())


@pytest.mark.parametrize("prompt", ["very " * 99, "x" * 300, "\u5706" * 90])
def test_a_long_prompt_stays_in_its_cell(prompt):
    assert cells_outside(prompt) == 0


def test_letters_that_no_font_here_has_are_shown_by_number():
    assert _font_for("größe, é")[1] == "größe, é"
    assert _font_for("Круг κύκλος")[1] == "Круг κύκλος"
    assert _font_for("a \u5706")[1] == "a \\u5706"
