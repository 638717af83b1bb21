"""Files that are whole or not there: a file is written under a temporary name, then renamed."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it if the block ends well, else remove it.
    An OSError names `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the name must not point to data that a power cut can lose
        os.replace(temporary, path)
    except OSError as problem:
        if problem.errno and problem.filename is None:  # as of a full disk
            problem.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(path: str | Path) -> str:
    """A short hash of a file's size and its first and last megabyte: quick for gigabytes."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for position in (0, max(0, size - 2**20)):
            file.seek(position)
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def sha256(path: str | Path) -> str:
    """Of a file's content, or of a folder's files in the order of their names."""
    digest = hashlib.sha256()
    for part in sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]:
        if part.is_file():
            with open(part, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()
