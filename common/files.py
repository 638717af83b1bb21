"""Files that are whole or not there: a file is written under a temporary name, then renamed."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it if the block ends well, else remove it.
    An OSError names `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path):
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # the name must not point to data that a power cut can lose
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """An OSError in the block names `path`: that of writing to a full disk names nothing."""
    try:
        yield
    except OSError as problem:
        if problem.errno and problem.filename is None:
            problem.filename = str(path)
        raise


def in_bytes(number: float) -> str:
    """A number of bytes, as people read it."""
    if number >= 1e9:
        return f"{number / 1e9:.1f} GB"
    return f"{number / 1e6:.0f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"


def fingerprint(path: str | Path) -> str:
    """A short hash of a file's size and its first and last megabyte, quick for gigabytes; of a
    folder, of the names and hashes of its files."""
    if Path(path).is_dir():
        parts = (f"{file.relative_to(path)} {fingerprint(file)}"
                 for file in sorted(Path(path).rglob("*")) if file.is_file())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
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


def require_writable(path: str | Path) -> None:
    """Find out before hours of work whether a file can be written there. Leaves nothing behind.
    Raises OSError."""
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is no folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        raise type(problem)(f"{path} cannot be written: {problem.strerror}") from None


def next_free(path: str | Path) -> Path:
    """The path, or if something is there NAME-1, NAME-2, ...: the first that is free."""
    path = Path(path)
    names = (path.with_stem(f"{path.stem}-{i}") for i in count(1))
    return next(name for name in chain([path], names) if not os.path.lexists(name))
