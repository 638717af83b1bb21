"""A run's folder: what a run writes into it, and that it belongs to one run at a time.

Whatever else is in a folder was not made by this program, and is neither removed nor written over.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.files import named

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

NETWORKS = ("controlnet.safetensors", "controlnet_ema.safetensors", "sd.safetensors")
WRITTEN = {  # folder -> the names of the files that a run writes into it
    ".": re.compile(r"log\.jsonl|settings\.json|" + "|".join(map(re.escape, NETWORKS))),
    "samples": re.compile(r"\d{6,}\.png|condition\.png"),
    "state": re.compile(r"state\.pt|\d{6,}\.pt|lock"),
    "tensorboard": re.compile(r"events\.out\.tfevents\..*"),
}
UNFINISHED = re.compile(r"\.(.*)\.\d+\.tmp")  # as `atomic_write` names them


def is_own(folder: Path, path: Path) -> bool:
    """Whether a run writes a file or folder of this name."""
    if path.is_dir() and not path.is_symlink():
        return str(path.relative_to(folder)) in WRITTEN
    names = WRITTEN.get(str(path.parent.relative_to(folder)))
    unfinished = UNFINISHED.fullmatch(path.name)
    return bool(names and names.fullmatch(unfinished[1] if unfinished else path.name))


def require_free(folder: Path) -> None:
    """Raises ValueError unless a new run may begin in the folder: it is missing, empty, or holds
    only what a run left that ended before it saved anything."""
    if (folder / "state" / "state.pt").exists():
        raise ValueError(f"{folder} holds a run already: continue it with --resume, or choose "
                         "another --out")
    for name in NETWORKS:
        if (folder / name).exists():
            raise ValueError(f"{folder} holds {name}, which a new run would write over: choose "
                             "another --out")
    begun = _is_begun(folder)
    for path in folder.rglob("*"):
        beginning = path.is_dir() or path.name == "lock" or UNFINISHED.fullmatch(path.name)
        if not (is_own(folder, path) and (begun or beginning)):
            raise ValueError(f"expected a new or empty folder in --out, {folder} holds "
                             f"{path.relative_to(folder)}, which no run wrote: choose another")


def _is_begun(folder: Path) -> bool:
    """Whether settings.json is a run's."""
    try:
        settings = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and {"torch", "processes", "save_every"} <= settings.keys()


def remove_unfinished(folder: Path) -> None:
    """What was being written when a run was killed."""
    for path in list(folder.rglob(".*.tmp")):
        if is_own(folder, path) and UNFINISHED.fullmatch(path.name):
            path.unlink()


def remove_leftovers(folder: Path) -> None:
    """What a run may have left that ended before it saved anything."""
    remove_unfinished(folder)
    for path in (folder / "log.jsonl", *folder.glob("samples/*.png")):
        if is_own(folder, path):
            path.unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path, resume: bool, writes: bool = True) -> Iterator[None]:
    """Inside the block no other run can begin or resume in the folder, which one of several
    processes `writes`. The system ends the claim with the process, however that ends. Raises
    ValueError if another run has it, or if it is not free for a new one."""
    if not resume:
        require_free(folder)
    elif not (folder / "state" / "state.pt").exists():
        raise ValueError(f"expected a saved run to resume, {folder / 'state' / 'state.pt'} does "
                         "not exist")
    if not writes:
        yield
        return
    (folder / "state").mkdir(parents=True, exist_ok=True)
    with open(folder / "state" / "lock", "a+b", buffering=0) as file:
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):  # POSIX allows both
            file.seek(0)
            raise ValueError(f"another run is writing to {folder} ("
                             f"{file.read(100).decode(errors='replace').strip()}): wait for it, or "
                             "choose another --out") from None
        except OSError as problem:  # some network drives
            warnings.warn(f"{folder} cannot be locked ({problem}): start no second run in it",
                          stacklevel=3)
        with named(file.name):
            file.truncate(0)
            file.write(f"process {os.getpid()}\n".encode())
        if not resume:  # what another one did since
            require_free(folder)
        try:
            yield
        finally:
            file.truncate(0)


def _lock(file: BinaryIO) -> None:
    """Raises an OSError if another process has the lock."""
    if fcntl:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        file.seek(2**20)  # a byte that nobody reads: on Windows a locked one cannot be
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
