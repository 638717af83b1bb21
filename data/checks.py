"""Every picture of a folder looked at before anything is trained on it: by its header and its end,
so that fifty thousand pairs take seconds.

What was found is kept by path, size and time of change, so that the next start only compares."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from common.files import atomic_write
from data.pictures import explained, orientation, read_picture, upright_size

SHOWN_FROM = 5000   # pictures on: below, a bar would be gone before it is read
ENDS = {            # format -> what whole files end with
    "PNG": b"IEND\xaeB`\x82",
    "JPEG": b"\xff\xd9",
}
AT_ONCE = 50        # files that a thread gets: one by one, handing them over would cost more time
EDGE = 4096         # bytes of such a file's head and end that its digest is of. A PNG's end has a
                    # checksum of all its pixels.


class Header(NamedTuple):
    width: int
    height: int
    orientation: int
    digest: str     # of the content
    fault: str      # "" if there is none


def look_at(files: Iterable[Path], ground: str, decode: bool, cache: Path | None = None,
            title: str = "pictures") -> dict[Path, Header]:
    """The headers of picture files. `decode`: all of them are decoded too; else only those whose
    ends do not show that they are whole. `ground` as for `read_picture`. `cache`: a folder."""
    files = list(dict.fromkeys(files))
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        stamps = dict(zip(files, chain.from_iterable(pool.map(_stamps, _parts(files))),
                          strict=True))
        kept_in = cache and cache / f"headers-{ground}{'-decoded' * decode}.json"
        kept = _kept(kept_in) if kept_in else {}
        found = {path: Header(*kept[stamp]) for path, stamp in stamps.items() if stamp in kept}
        new = [path for path in files if path not in found]
        headers = chain.from_iterable(pool.map(
            lambda part: [_header(path, ground, decode) for path in part], _parts(new)))
        found |= zip(new, tqdm(headers, desc=title, total=len(new), disable=len(new) < SHOWN_FROM),
                     strict=True)
    if kept_in and new:
        # A broken file may be mended within a tick of the clock that its time is from.
        whole = {stamps[path]: header for path, header in found.items() if not header.fault}
        _keep(kept_in, whole)
    return found


def _parts(files: list[Path]) -> list[list[Path]]:
    return [files[start : start + AT_ONCE] for start in range(0, len(files), AT_ONCE)]


def _stamps(files: list[Path]) -> list[str]:
    here, stamps = os.getcwd(), []
    for file in map(os.fspath, files):
        try:
            status = os.stat(file)
            stamp = f"{os.path.join(here, file)} {status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):  # a name with a zero byte
            stamp = f"{file} is gone"
        stamps.append(stamp)
    return stamps


def _kept(file: Path) -> dict[str, list]:
    try:
        return json.loads(file.read_text("utf-8", "surrogateescape"))
    except (OSError, ValueError):
        return {}


def _keep(file: Path, headers: dict[str, Header]) -> None:
    try:
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(headers), "utf-8", "surrogateescape")
    except OSError:
        pass  # then they are looked at again: this saves time, and nothing else


def _header(path: Path, ground: str, decode: bool) -> Header:
    try:
        with explained(path), open(path, "rb") as file, Image.open(file) as image:
            size, turned, form = upright_size(image), orientation(image), image.format
            file.seek(0)
            head, length = file.read(EDGE), file.seek(0, os.SEEK_END)
            file.seek(max(0, length - EDGE))
            end = file.read()
            whole = form in ENDS and end.endswith(ENDS[form])
            content = head + end
            if not whole:
                file.seek(0)
                content = file.read()
            # A 16-bit picture may hold what nobody can say the white of.
            if decode or not whole or image.mode.startswith(("I", "F")):
                read_picture(path, ground)
    except (ValueError, MemoryError) as problem:
        return Header(0, 0, 1, "", str(problem))
    digest = hashlib.sha256(f"{length} ".encode() + content).hexdigest()[:32]
    return Header(*size, turned, digest, "")


# --- Whether a condition is its picture's ---


def why_not_a_pair(target: Header, condition: Header) -> str:
    """Why two pictures cannot show the same scene: their shapes differ by more than rounding. ""
    if they can."""
    if _same_shape(target[:2], condition[:2]):
        return ""
    sizes = f"is {condition.width} x {condition.height}, its picture {target.width} x " \
            f"{target.height}"
    if _same_shape(target[:2], condition[1::-1]):
        how = " by its EXIF data" if target.orientation > 4 else ""
        return f"the condition {sizes}: the picture is turned{how} and the condition is not"
    return f"the condition {sizes}: expected the same shape, up to rounding to 8 or 64 pixels"


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return _rounded_from(a, b) or _rounded_from(b, a)


def _rounded_from(whole: tuple[int, int], rounded: tuple[int, int]) -> bool:
    """Whether one scale brings `whole` to `rounded`, whose sides were rounded to 64 or 8 pixels, as
    annotators do, or to single ones."""
    step = next(step for step in (64, 8, 1) if all(side % step == 0 for side in rounded))
    error = {64: 32, 8: 8, 1: 1}[step]      # to 64 they round to the nearest, to 8 also down
    error = max(1, min(error, min(rounded) / 16))
    low = max((side - error) / full for side, full in zip(rounded, whole, strict=True))
    high = min((side + error) / full for side, full in zip(rounded, whole, strict=True))
    return low <= high


def first_fault(faults: dict[str, str], count: int, skip: bool,
                say: Callable[[str], None] = print) -> None:
    """Raises ValueError with the first of the faulty rows of `count`; with `skip` says how many
    there are, and goes on unless all are."""
    if not faults:
        return
    first = next(iter(faults.values()))
    others = f" (and {len(faults) - 1} more rows)" if len(faults) > 1 else ""
    if not skip:
        hint = "; --skip-broken leaves them out" if len(faults) < count else ""
        raise ValueError(f"{first}{others}{hint}")
    if len(faults) == count:
        raise ValueError(f"none of {count} rows is a pair: {first}")
    say(f"{len(faults)} of {count} rows are left out; the first: {first}")
