"""Rows of numbers by key, in a folder or in memory: what is computed once and kept.

    rows    one row after the other; read through a memory map
    keys    the key of each row, written after it: a row without its key does not count
    locks   bytes that a process locks: one for a chunk of rows that it computes, one to append them
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from tqdm import tqdm

from common.files import named

try:
    import fcntl
except ImportError:  # Windows, where a folder is for one process at a time
    fcntl = None

Item = TypeVar("Item")

KEY_BYTES = 16
CHUNK = 32         # rows that are computed and appended together: the most that a kill can lose
APPENDING = 2**40  # the byte that is locked to append; those below stand for chunks


class Rows:
    """Rows of one NumPy type, appended and never changed. Processes may share a folder: one that is
    killed at any moment leaves whole rows and no lock."""

    def __init__(self, folder: Path | None, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.numbers: dict[bytes, int] = {}  # key -> row
        self.count = 0
        self.in_memory: list[np.void] = []
        self.mapped: np.memmap | None = None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("rows", "keys"):
                (folder / name).touch()
            self.refresh()

    def fill(self, items: dict[bytes, Item], compute: Callable[[list[Item]], np.ndarray],
             title: str, show: bool = True) -> None:
        """Compute and append the rows that are missing of `items`, which are given by key. Several
        processes that fill a folder with the same items take a chunk each until none is left.

        Nobody waits for the dead: the system frees a process's locks when it ends. Raises OSError
        if rows cannot be written.
        """
        keys = list(items)
        chunks = [keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK)]
        missing = sum(key not in self.numbers for key in keys)
        if not missing:
            return
        with tqdm(total=missing, desc=title, disable=not show) as bar, self._lock_file() as locks:
            for wait in (False, True):  # first the chunks that nobody is busy with
                for number, chunk in enumerate(chunks):
                    before = self._missing(chunk)
                    if not before:
                        continue
                    with _lock(locks, number, wait) as locked:
                        self.refresh()
                        todo = self._missing(chunk)
                        if locked and todo:
                            rows = compute([items[key] for key in todo])
                            with _lock(locks, APPENDING):
                                self._append(todo, rows)
                    bar.update(len(before) - len(self._missing(chunk)))

    def __getitem__(self, key: bytes) -> np.void:
        number = self.numbers[key]
        if self.folder is None:
            return self.in_memory[number]
        if self.mapped is None or number >= len(self.mapped):
            self.mapped = np.memmap(self.folder / "rows", self.dtype, "r", shape=(self.count,))
        return self.mapped[number]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"mapped": None}  # another process maps the file itself

    def refresh(self) -> None:
        """See what other processes have appended."""
        if self.folder is None:
            return
        whole_rows = (self.folder / "rows").stat().st_size // self.dtype.itemsize
        with open(self.folder / "keys", "rb") as file:
            file.seek(self.count * KEY_BYTES)
            new = file.read(max(0, whole_rows - self.count) * KEY_BYTES)
        self._add_keys([new[i : i + KEY_BYTES] for i in range(0, len(new), KEY_BYTES)])

    def _add_keys(self, keys: list[bytes]) -> None:
        for key in keys:
            if len(key) == KEY_BYTES:
                self.numbers[key] = self.count
                self.count += 1

    def _missing(self, keys: list[bytes]) -> list[bytes]:
        return [key for key in keys if key not in self.numbers]

    def _append(self, keys: list[bytes], rows: np.ndarray) -> None:
        if self.folder is None:
            self.in_memory += list(rows)
            self._add_keys(keys)
            return
        self.refresh()
        for name, content in (("rows", rows.tobytes()), ("keys", b"".join(keys))):
            with named(self.folder / name), open(self.folder / name, "r+b") as file:
                end = self.count * len(content) // len(keys)
                file.truncate(end)  # what comes after it was not finished
                file.seek(end)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # a power cut must not lose a row and keep its key
        self.refresh()

    @contextmanager
    def _lock_file(self) -> Iterator[BinaryIO | None]:
        """Opened once: a process that closes it loses all its locks on it."""
        if self.folder is None or fcntl is None:
            yield None
            return
        with open(self.folder / "locks", "ab") as file:
            yield file


@contextmanager
def _lock(file: BinaryIO | None, byte: int, wait: bool = True) -> Iterator[bool]:
    """Whether this process has the lock of one byte, inside the block. Over NFS too."""
    if file is None:
        yield True
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
    except (BlockingIOError, PermissionError):  # POSIX allows both
        yield False
        return
    try:
        yield True
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)
