"""Files that are whole or not there: every file this project writes goes to a temporary name first and is renamed when complete."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it to `path` when the block ends well, remove it when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the name must not point to data that a power cut can still lose
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(path: str | Path) -> str:
    """A short word that changes with a file: from its size and its first and last megabyte, so that gigabytes need not be read."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        found = hashlib.sha256(str(size).encode())
        for position in (0, max(0, size - 2**20)):
            file.seek(position)
            found.update(file.read(2**20))
    return found.hexdigest()[:16]


def sha256(path: str | Path) -> str:
    """Of a file's content, or of a folder's files in the order of their names."""
    found = hashlib.sha256()
    for part in sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]:
        if part.is_file():
            with open(part, "rb") as file:
                while block := file.read(2**20):
                    found.update(block)
    return found.hexdigest()
