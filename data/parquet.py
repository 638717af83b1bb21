"""Parquet files with embedded pictures, as the hub's data sets are stored, unpacked once into files
that everything else can read."""

import hashlib
import json
from pathlib import Path

from common.files import atomic_write

UNPACKED = ".light_controlnet/unpacked"  # inside the folder, which is ours
SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}


def parquet_files(folder: Path) -> list[Path]:
    """Those of a folder, or of its data/; of several splits the training split's."""
    files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    return [file for file in files if file.name.startswith("train")] or files


def unpacked(folder: Path) -> Path:
    """The folder with the pictures of the parquet files in `folder` and a metadata.jsonl. Raises
    ValueError without pyarrow, and for files that are damaged or hold no pictures."""
    files = parquet_files(folder)
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{files[0]} needs a package that is not installed: pip install pyarrow"
                         ) from None
    stamps = repr([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    target = folder / UNPACKED / hashlib.sha256(stamps.encode()).hexdigest()[:16]
    if (target / "metadata.jsonl").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    try:
        for file in files:
            for batch in ParquetFile(file).iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    entry = {key: _in_file(value, target, f"{len(lines):06}-{key}")
                             for key, value in row.items()}
                    lines.append(json.dumps(entry, default=str))
    except ArrowException as error:
        raise ValueError(f"expected a parquet file, {file} is not one or is damaged: {error}"
                         ) from None
    # It comes last: a folder that has it is complete.
    with atomic_write(target / "metadata.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
    return target


def _in_file(value: object, folder: Path, name: str) -> object:
    """A value of a row; a picture, {"bytes": ...} or the bytes themselves, as its file's name."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        return value
    start = next((start for start in SUFFIXES if content.startswith(start)), None)
    file = folder / f"{name}{SUFFIXES.get(start, '.img')}"
    file.write_bytes(content)
    return file.name
