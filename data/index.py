"""Which pairs a folder lists: the layouts that people's folders have, and what is wrong in them.

    prompt.json      {"target": "target/0.png", "source": "source/0.png", "prompt": "..."}
    metadata.jsonl   {"file_name": "0.png", "conditioning_image": "conditions/0.png", "text": "..."}
    metadata.csv     the same columns
    train.jsonl      {"image": "0.png", "conditioning_image": "conditions/0.png", "text": "..."}
    *.parquet        the same columns, the pictures inside (`data/parquet.py`)
    none             pictures in images/ or target/, conditions of the same names beside that folder

The JSON files hold an object per line, or one array. File names are relative to the folder. Where
no row has a prompt it is the text file beside the picture: 0.txt for 0.png.
"""

import csv
import io
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.parquet import parquet_files, unpacked

LAYOUTS = {  # index file -> its own keys for the picture, the condition and the prompt
    "prompt.json": ("target", "source", "prompt"),
    "metadata.jsonl": ("file_name", "conditioning_image", "text"),
    "metadata.csv": ("file_name", "conditioning_image", "text"),
    "train.jsonl": ("image", "conditioning_image", "text"),
}
TARGETS = ("target", "file_name", "image")
CONDITIONS = ("source", "conditioning_image", "conditioning_image_file_name", "condition",
              "guide")
CAPTIONS = ("text", "caption", "prompt")
TARGET_FOLDERS = ("images", "target", "image")  # of a folder without an index
CONDITION_FOLDERS = ("conditioning_images", "conditions", "source", "conditioning", "condition")
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
Row = tuple[str, dict]  # where it stands, what it says


class Pair(NamedTuple):
    files: list[Path]  # of picture and condition; of edges the picture's
    prompt: str
    where: str         # in the index


def index_of(folder: Path) -> Path | None:
    """The file that lists a folder's pairs, if it has one."""
    names = [folder / name for name in LAYOUTS if (folder / name).is_file()]
    return next(iter(names or parquet_files(folder)), None)


def read_pairs(folder: Path, edges: bool = False,
               caption_column: str | None = None) -> tuple[list[Pair], dict[str, str]]:
    """The pairs of a folder, and by their place in the index those that are wrong, with what is.
    With `edges` no conditions are needed. Raises ValueError for what is no such folder."""
    if folder.is_file():
        raise ValueError(f"expected a folder, {folder} is a file: give {folder.parent}")
    index = index_of(folder)
    if index is None:
        keys, rows = LAYOUTS["train.jsonl"], list(_beside_each_other(folder, edges))
    elif index.suffix == ".parquet":
        return read_pairs(unpacked(folder), edges, caption_column)
    else:
        keys, rows = LAYOUTS[index.name], list(_rows(index))
    if not rows:
        raise ValueError(f"expected one JSON object per line, {index} is empty")
    pairs, wrong = [], {}
    column = _caption_column(rows, keys[2], caption_column, index or folder)
    for where, row in rows:
        try:
            pairs.append(_pair(folder, row, keys, column, where, edges))
        except ValueError as problem:
            wrong[where] = str(problem)
    if column is None and pairs:
        pairs = [pair._replace(prompt=_text_beside(pair.files[0])) for pair in pairs]
        if not any(pair.prompt for pair in pairs):
            found = ", ".join(dict.fromkeys(key for _, row in rows for key in row))
            warnings.warn(f"no row of {index or folder} has a prompt: expected a column "
                          f"{', '.join(CAPTIONS)} (another: --caption-column), or text files "
                          f"beside the pictures; it has {found}", stacklevel=2)
    return pairs, wrong


def _caption_column(rows: list[Row], own: str, asked: str | None, index: Path) -> str | None:
    """The column of the prompts; None: no row has any."""
    columns = {key for _, row in rows for key in row}
    if asked:
        if asked not in columns:
            raise ValueError(f"expected the column {asked!r} of --caption-column, {index} has "
                             f"{', '.join(sorted(columns))}")
        return asked
    found = [name for name in dict.fromkeys((own, *CAPTIONS))
             if name in columns and any(row.get(name) for _, row in rows)]
    if len(found) > 1:
        warnings.warn(f"{index} has {' and '.join(found)}: the prompts are its {found[0]}; choose "
                      "with --caption-column", stacklevel=3)
    return found[0] if found else None


def _pair(folder: Path, row: dict, keys: tuple[str, str, str], column: str | None, where: str,
          edges: bool) -> Pair:
    """Raises ValueError for a row that is none."""
    files = []
    for own, names in ((keys[0], TARGETS), (keys[1], CONDITIONS))[: 1 if edges else 2]:
        key = own
        if row.get(own) is None:
            key = next((name for name in names if row.get(name) is not None), own)
        name = row.get(key)
        if not isinstance(name, str):
            fault = (f"no {own!r} but {list(row)}" if name is None
                     else f"{key!r}: {_short(name)}")
            raise ValueError(f"{where}: expected {_expected(keys)}, got {fault}")
        path = folder / name
        if "\\" in name and not path.is_file():  # as Windows writes it
            path = folder / name.replace("\\", "/")
        files.append(path)
    prompt = row.get(column) if column else ""
    if not isinstance(prompt, str | None):
        raise ValueError(f"{where}: expected {_expected(keys)}, got {column!r}: {_short(prompt)}")
    _require_text(prompt or "", where)
    return Pair(files, prompt or "", where)


def _expected(keys: tuple[str, str, str]) -> str:
    return '{{"{}": file, "{}": file, "{}": text}}'.format(*keys)


def _require_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: expected a text, got half a character (an emoji cut in two?) "
                         f"at {error.start}: {text[:error.start][-40:]!r}...") from None


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text_beside(picture: Path) -> str:
    file = picture.with_suffix(".txt")
    return _decoded(file).strip() if file.is_file() else ""


def _decoded(file: Path) -> str:
    """A text file. Raises ValueError unless it is UTF-8."""
    content = file.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"expected UTF-8, {file} is UTF-16: convert it, as by "
                         "iconv -f UTF-16 -t UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"expected UTF-8, {file}, line {line} is in another encoding, such as GBK "
                         "or Latin-1: convert it, as by iconv -f GBK -t UTF-8") from None


def _rows(index: Path) -> Iterator[Row]:
    """The objects of an index. Raises ValueError for what is none."""
    text = _decoded(index)
    if index.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            yield (f"{index}, line {reader.line_num}",
                   {key: value for key, value in row.items() if key and value})
        return
    if text.lstrip().startswith("[") and (array := _array(text)) is not None:
        lines = ((f"{index}, entry {number}", entry) for number, entry in enumerate(array, 1))
    else:
        lines = ((f"{index}, line {number}", _parsed(line, f"{index}, line {number}"))
                 for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for where, entry in lines:
        if not isinstance(entry, dict):
            keys = ", ".join(f'"{key}": ...' for key in LAYOUTS[index.name])
            raise ValueError(f"{where}: expected {{{keys}}}, got {_short(entry)}")
        yield where, entry


def _array(text: str) -> list | None:
    try:
        value = json.loads(text)
    except ValueError:  # line by line, each with its own mistake
        return None
    is_array = isinstance(value, list) and any(isinstance(row, dict) for row in value)
    return value if is_array else None


def _parsed(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        around = line[max(0, error.pos - 40) :][:60].strip()
        raise ValueError(f"{where}: expected a JSON object, got {around!r} ({error})") from None


def _beside_each_other(folder: Path, edges: bool) -> Iterator[Row]:
    """Of a folder without an index: its pictures, and the conditions of the same names."""
    expected = (f"expected a folder with {', '.join(LAYOUTS)}, *.parquet, or with images/ and "
                "conditions/")
    if not folder.is_dir():
        raise ValueError(f"{expected}, {folder} does not exist")
    targets = [folder / name for name in TARGET_FOLDERS if (folder / name).is_dir()]
    conditions = [folder / name for name in CONDITION_FOLDERS if (folder / name).is_dir()]
    if edges and not targets:
        targets = [folder]
    if len(targets) != 1 or (len(conditions) != 1 and not edges):
        fault = "has several of them" if targets and conditions else "has none of them"
        raise ValueError(f"{expected}, {folder} {fault}")
    pictures = sorted(path for path in targets[0].iterdir() if path.suffix.lower() in PICTURES)
    by_stem: dict[str, list[str]] = {}
    for path in [] if edges else sorted(conditions[0].iterdir()):
        if path.suffix.lower() in PICTURES:
            by_stem.setdefault(path.stem, []).append(str(path.relative_to(folder)))
    if not pictures:
        raise ValueError(f"{expected}, {targets[0]} has no pictures")
    for path in pictures:
        row = {"image": str(path.relative_to(folder))}
        found = by_stem.get(path.stem, [])
        if len(found) == 1:
            row["conditioning_image"] = found[0]
        elif found:
            row["conditioning_image"] = found  # which one? No file name: refused
        yield str(path), row
