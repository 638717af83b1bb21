"""Folders of pairs as people bring them: each layout is read, or refused in one line that names
the row."""

import csv
import io
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.folder import Folder, Reading
from data.own import training_data

COUNT = 4


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures and conditions that tell their number, without an index."""
    for kind in ("target", "source"):
        (tmp_path / kind).mkdir()
        for i in range(COUNT):
            value = 50 * i + (9 if kind == "source" else 0)
            Image.new("RGB", (64, 64), (value,) * 3).save(tmp_path / kind / f"{i}.png")
    return tmp_path


def row(i: int, *keys: str) -> dict:
    return dict(zip(keys, (f"target/{i}.png", f"source/{i}.png", f"number {i}"), strict=False))


def rows(*keys: str) -> list[dict]:
    return [row(i, *keys) for i in range(COUNT)]


def write_lines(path: Path, entries: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, entries)), "utf-8")


def write_csv(path: Path, entries: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, entries[0].keys())
        writer.writeheader()
        writer.writerows(entries)


def assert_read(data: Folder, prompts: bool = True) -> None:
    assert [data.prompt(i) for i in range(len(data))] == (
        [f"number {i}" for i in range(COUNT)] if prompts else [""] * COUNT)
    for i in range(COUNT):
        assert (data.target(i) == 50 * i).all() and (data.condition(i) == 50 * i + 9).all()


@pytest.mark.parametrize(("name", "write", "keys"), [
    ("prompt.json", write_lines, ("target", "source", "prompt")),
    ("prompt.json", lambda path, entries: path.write_text(json.dumps(entries, indent=1)),
     ("target", "source", "prompt")),
    ("metadata.jsonl", write_lines, ("file_name", "conditioning_image", "text")),
    ("metadata.jsonl", write_lines, ("file_name", "conditioning_image", "caption")),
    ("metadata.jsonl", write_lines, ("file_name", "conditioning_image", "prompt")),
    ("metadata.csv", write_csv, ("file_name", "conditioning_image", "text")),
    ("train.jsonl", write_lines, ("image", "conditioning_image", "text")),
])
def test_every_layout_gives_the_same_pairs(folder, name, write, keys):
    write(folder / name, rows(*keys))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_read(Folder(folder, 64))


def test_an_imagefolders_train_split_is_found(folder):
    (folder / "train").mkdir()
    for kind in ("target", "source"):
        (folder / kind).rename(folder / "train" / kind)
    write_csv(folder / "train/metadata.csv", rows("file_name", "conditioning_image", "text"))
    assert_read(training_data(folder, 64))


def test_pictures_and_conditions_of_the_same_names_need_no_index_and_captions_are_beside(folder):
    for i in range(COUNT):
        (folder / f"target/{i}.txt").write_text(f"number {i}\n")
    assert_read(Folder(folder, 64))
    (folder / "source/2.png").rename(folder / "source/7.png")
    with pytest.raises(ValueError, match="target/2.png: expected .* got no 'conditioning_image'"):
        Folder(folder, 64)


def test_text_files_beside_the_pictures_are_the_captions_of_an_index_without(folder):
    write_lines(folder / "metadata.jsonl", rows("file_name", "conditioning_image"))
    for i in range(COUNT):
        (folder / f"target/{i}.txt").write_text(f"number {i}", "utf-8-sig")
    assert_read(Folder(folder, 64))


def test_a_folder_of_photos_is_enough_for_edges(folder):
    shutil.rmtree(folder / "source")
    for path in (folder / "target").iterdir():
        path.rename(folder / path.name)
        (folder / path.name).with_suffix(".txt").write_text(f"number {path.stem}")
    (folder / "target").rmdir()
    data = Folder(folder, 64, edges=True)
    assert [data.prompt(i) for i in range(COUNT)] == [f"number {i}" for i in range(COUNT)]


def test_parquet_with_pictures_inside_is_read(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    entries = [{"image": {"bytes": (folder / f"target/{i}.png").read_bytes(), "path": None},
                "guide": {"bytes": (folder / f"source/{i}.png").read_bytes(), "path": "x.png"},
                "text": f"number {i}"} for i in range(COUNT)]
    (folder / "data").mkdir()
    for part in range(2):
        parquet.write_table(pyarrow.Table.from_pylist(entries[2 * part : 2 * part + 2]),
                            folder / f"data/train-{part:05}-of-00002.parquet")
    for kind in ("target", "source"):
        shutil.rmtree(folder / kind)
    assert_read(training_data(folder, 64))
    assert_read(training_data(folder, 64))  # unpacked before


def test_prompts_that_are_missing_everywhere_are_a_warning_that_names_the_columns(folder):
    write_lines(folder / "metadata.jsonl", rows("file_name", "conditioning_image", "beschreibung"))
    with pytest.warns(UserWarning, match="no row of .* has a prompt: .* conditioning_image, besch"):
        assert_read(Folder(folder, 64), prompts=False)
    assert_read(Folder(folder, 64, reading=Reading(caption_column="beschreibung")))
    with pytest.raises(ValueError, match="expected the column 'x' of --caption-column"):
        Folder(folder, 64, reading=Reading(caption_column="x"))


def test_two_columns_of_prompts_are_a_warning_that_says_which_is_taken(folder):
    entries = [entry | {"caption": "other"} for entry in
               rows("file_name", "conditioning_image", "text")]
    write_lines(folder / "metadata.jsonl", entries)
    with pytest.warns(UserWarning, match="has text and caption: the prompts are its text"):
        assert_read(Folder(folder, 64))


def test_backslashes_of_windows_are_taken(folder):
    entries = [{key: value.replace("/", "\\") for key, value in entry.items()}
               for entry in rows("target", "source", "prompt")]
    write_lines(folder / "prompt.json", entries)
    assert_read(Folder(folder, 64))


LONG = "x" * 100


@pytest.mark.parametrize(("content", "message"), [
    (json.dumps(row(0, "target", "source", "prompt")).encode("utf-16"), "prompt.json is UTF-16"),
    (json.dumps({"prompt": "红色的圆"}, ensure_ascii=False).encode("gbk"),
     "prompt.json, line 1 is in another encoding, such as GBK"),
    (f'{{"prompt": "{LONG}", "target": 7, "source": "a"}}', "line 1: expected .* 'target': 7"),
    (f'{{"prompt": "{LONG}", "target": "target/0.png"}}', "no 'source' but .'prompt', 'target'."),
    (f'{{"prompt": "{LONG}", "target": zero}}', "line 1: expected a JSON object, got .*: zero"),
    ('[{"target": "target/0.png"}, 3]', "entry 2: expected .* got 3"),
    ('{"target": "target/0.png", "source": "source/0.png", "prompt": "smile \\ud83d"}',
     "line 1: expected a text, got half a character .* at 6: 'smile '"),
])
def test_an_index_that_cannot_be_read_is_called_what_it_is(folder, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "prompt.json").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        Folder(folder, 64)


def test_the_index_instead_of_its_folder_is_refused_with_the_folder(folder):
    write_lines(folder / "prompt.json", rows("target", "source", "prompt"))
    with pytest.raises(ValueError, match=f"prompt.json is a file: give {folder}"):
        training_data(folder / "prompt.json", 64)


def save_condition(folder: Path, size: tuple[int, int], **how: object) -> None:
    Image.new("RGB", size, (9,) * 3).save(folder / "source/0.png", **how)


@pytest.mark.parametrize(("target", "condition", "message"), [
    ((640, 480), (512, 512), "expected the same shape"),
    ((640, 480), (480, 640), "the picture is turned and the condition is not"),
    ((96, 64), (64, 64), "condition is 64 x 64, its picture 96 x 64"),
    ((1000, 750), (704, 512), None),  # rounded to 64
    ((1001, 667), (512, 336), None),  # rounded down to 8
    ((640, 480), (320, 240), None), ((333, 250), (1332, 1000), None),
    ((512, 384), (1000, 750), None),  # it is the picture that was rounded
])
def test_a_condition_of_another_shape_than_its_picture_is_refused(folder, target, condition,
                                                                  message):
    write_lines(folder / "prompt.json", rows("target", "source", "prompt"))
    Image.new("RGB", target).save(folder / "target/0.png")
    save_condition(folder, condition)
    if message is None:
        assert len(Folder(folder, 64)) == COUNT
        return
    with pytest.raises(ValueError, match=f"prompt.json, line 1: .*{message}"):
        Folder(folder, 64)
    assert len(Folder(folder, 64, edges=True)) == COUNT  # no condition is read


def test_a_photo_turned_by_exif_needs_an_upright_condition(folder):
    entries = [row(0, "target", "source", "prompt") | {"target": "target/0.jpg"}]
    write_lines(folder / "prompt.json", entries)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 64)).save(folder / "target/0.jpg", exif=exif)
    save_condition(folder, (64, 96))
    assert len(Folder(folder, 64)) == 1
    save_condition(folder, (96, 64))
    with pytest.raises(ValueError, match="the picture is turned by its EXIF data and"):
        Folder(folder, 64)
    Image.new("RGB", (64, 64)).save(folder / "target/0.jpg", exif=exif)
    save_condition(folder, (64, 64))
    with pytest.warns(UserWarning, match="1 pictures .* turned by their EXIF data"):
        Folder(folder, 64)


def broken(folder: Path, kind: str) -> None:
    picture = Image.effect_noise((64, 64), 99)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if kind.startswith("JPEG") else "PNG")
    content = buffer.getvalue()
    if kind == "metres":
        Image.fromarray(np.full((64, 64), 7, np.float32)).save(folder / "source/1.png", "TIFF")
        return
    (folder / "source/1.png").write_bytes({
        "empty": b"", "page": b"<html>", "JPEG cut": content[:-50], "PNG cut": content[:-50],
        "PNG rest": content + b"camera's own"}[kind])


@pytest.mark.parametrize("kind", ["empty", "page", "JPEG cut", "PNG cut", "metres"])
def test_a_broken_picture_is_named_with_its_row_or_left_out(folder, capsys, kind):
    write_lines(folder / "prompt.json", rows("target", "source", "prompt"))
    broken(folder, kind)
    with pytest.raises(ValueError, match="line 2: expected .*source/1.png .*; --skip-broken"):
        Folder(folder, 64)
    data = Folder(folder, 64, reading=Reading(skip_broken=True))
    assert [data.prompt(i) for i in range(len(data))] == ["number 0", "number 2", "number 3"]
    assert "1 of 4 rows are left out; the first: " in capsys.readouterr().out


def test_what_comes_after_a_whole_picture_does_no_harm(folder):
    write_lines(folder / "prompt.json", rows("target", "source", "prompt"))
    broken(folder, "PNG rest")
    assert len(Folder(folder, 64)) == COUNT


def test_a_picture_that_is_damaged_inside_is_found_by_decoding_it(folder):
    write_lines(folder / "prompt.json", rows("target", "source", "prompt"))
    Image.effect_noise((64, 64), 99).save(folder / "source/1.png")
    content = bytearray((folder / "source/1.png").read_bytes())
    content[1000:1010] = bytes(10)
    (folder / "source/1.png").write_bytes(content)
    assert len(Folder(folder, 64)) == COUNT  # its head and its end are whole
    assert len(Folder(folder, 64, reading=Reading(skip_broken=True))) == COUNT - 1


def test_what_was_found_is_kept_and_the_second_start_opens_nothing(folder, tmp_path, monkeypatch):
    write_lines(folder / "prompt.json", rows("target", "source", "prompt"))
    reading = Reading(cache=tmp_path / "cache")
    first = Folder(folder, 64, reading=reading)
    monkeypatch.setattr(Image, "open", None)
    assert Folder(folder, 64, reading=reading).fingerprint == first.fingerprint


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(folder, tmp_path):
    write_lines(folder / "prompt.json", rows("target", "source", "prompt"))
    before = Folder(folder, 64).fingerprint
    moved = tmp_path / "elsewhere"
    for kind in ("target", "source"):
        shutil.copytree(folder / kind, moved / kind, copy_function=shutil.copyfile)
    entries = rows("target", "source", "prompt")
    write_lines(moved / "prompt.json", entries)
    assert Folder(moved, 64).fingerprint == before
    write_lines(moved / "prompt.json", entries[::-1])
    assert Folder(moved, 64).fingerprint != before
    write_lines(moved / "prompt.json", [entries[0] | {"prompt": "another"}, *entries[1:]])
    assert Folder(moved, 64).fingerprint != before
    write_lines(moved / "prompt.json", entries)
    image = Image.open(moved / "source/3.png")
    image.putpixel((30, 30), (1, 1, 1))
    image.save(moved / "source/3.png")
    assert Folder(moved, 64).fingerprint != before


def test_a_label_map_keeps_its_colours_by_option(folder):
    write_lines(folder / "prompt.json", rows("target", "source", "prompt"))
    labels = np.kron(np.array([[0, 90], [180, 255]], np.uint8), np.ones((50, 50), np.uint8))
    Image.fromarray(labels).save(folder / "source/0.png")
    nearest = Folder(folder, 64, reading=Reading(condition_resize="nearest")).condition(0)
    assert nearest.unique().tolist() == [0, 90, 180, 255]
    assert len(Folder(folder, 64).condition(0).unique()) > 4
