"""What is done in a folder that data.prepare fills, and whose files it holds.

    pictures/NAME.png  conditions/NAME.png  metadata.jsonl    the pairs, for train.py
    prepared.jsonl    the settings, then one line a picture, written when its two files are

A killed program leaves a torn last line and temporary files at most."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

JOURNAL, INDEX, LOCK = "prepared.jsonl", "metadata.jsonl", ".prepare.lock"
FOLDERS = ("pictures", "conditions")
# In the folder without being ours: train.py's cache, held-out pairs, what file managers leave.
TOLERATED = {".light_controlnet", "held_out", ".DS_Store", "Thumbs.db", "desktop.ini"}


def files_of(name: str) -> list[str]:
    return [f"{folder}/{name}.png" for folder in FOLDERS]


def remembered(out: Path, settings: dict, caption: str | None) -> dict[str, dict]:
    """The journal's lines by source. Raises ValueError if it was written with other settings, or
    has captions by another model. (Pictures that have none may still get one.)"""
    journal = out / JOURNAL
    if not journal.is_file():
        return {}
    lines = journal.read_bytes().splitlines(keepends=True)
    try:  # the last line may be torn, but not the first
        first, *rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        if (first.keys() ^ settings.keys()) - {"buckets"}:  # which only buckets have
            raise ValueError
        done = {row["source"]: row for row in rows}
        differing = [(key, first.get(key, False), settings.get(key, False))
                     for key in first | settings
                     if done and first.get(key) != settings.get(key)]
        models = {row["caption"] for row in done.values()} - {None, caption}
        differing += [("caption", model, caption) for model in models]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{journal}: expected what data.prepare writes, got something else: "
                         "choose another --out") from None
    if differing:
        raise ValueError(f"{out} was made with " + ", ".join(
            f"--{key} {old}, not {new}" for key, old, new in differing)
            + ": choose another --out")
    return done


def check_own(out: Path, names: Iterable[str]) -> list[Path]:
    """Raise ValueError if `out` has a file that is not ours; return what a kill has left."""
    own = {JOURNAL, LOCK}
    if (out / JOURNAL).is_file():
        own |= {INDEX, *(file for name in names for file in files_of(name))}
    left = []
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        temporary = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
        if path.is_dir() or name in own or name.split("/")[0] in TOLERATED:
            continue
        whole = temporary and path.with_name(temporary[1]).relative_to(out).as_posix()
        if whole not in own:
            raise ValueError(f"expected a new folder or one of this program's, {out} has {name}, "
                             "which it did not write: choose another --out")
        left.append(path)
    return left
