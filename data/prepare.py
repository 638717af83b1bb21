"""From a folder of pictures to pairs that train.py reads: target, condition and prompt.

    python -m data.prepare PICTURES --out DIR --annotator canny --caption blip
    python train.py --data DIR

A picture's prompt is the .txt file beside it (photo.jpg: photo.txt), else what --caption says of
it. The same command goes on where it was killed, and adds pictures that are new or have changed.
PICTURES is only read. DIR gets pictures/, conditions/, metadata.jsonl when all are done
(`data/folder.py`), and prepared.jsonl, which remembers what is done.
"""

import json
import os
import random
import shlex
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

from common.cli import Parser, answer, picture_side, positive, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("pictures", type=Path, help="folder of pictures, also in folders inside it")
    p.add_argument("--out", type=Path, required=True, help="folder to write, new or its own")
    p.add_argument("--annotator", default="canny",
                   help="what makes the conditions: canny, lines (dark ones of a drawing), or by "
                        "controlnet_aux hed, lineart, openpose, depth, normal, mlsd or another "
                        "name that it has (default: canny)")
    p.add_argument("--caption", metavar="blip|MODEL",
                   help="describe pictures without a .txt file by BLIP, or by another BLIP model: "
                        "a name on the hub or a folder (default: empty prompts)")
    p.add_argument("--size", type=picture_side, default=512,
                   help="side of the squares: scaled, and the longer side cropped around the "
                        "centre (default: 512)")
    p.add_argument("--buckets", action="store_true",
                   help="keep the pictures' aspect ratios, as train.py --buckets does at a "
                        "--resolution of --size")
    p.add_argument("--processes", type=positive, default=min(4, os.cpu_count() or 1),
                   help="each has its own copy of annotator and BLIP; the files are the same for "
                        "any number (default: one a core, at most 4)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import zlib
from functools import partial

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from common.files import atomic_write, named
from common.processes import in_processes
from data.annotators import annotate
from data.buckets import bucket_shapes, nearest_shape
from data.captions import BLIP, caption
from data.journal import INDEX, JOURNAL, LOCK, check_own, files_of, remembered
from data.pictures import read_target, shape_of, to_image, write_png

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".jp2",
            ".avif", ".heic", ".heif"}  # what Pillow cannot read of these is reported


# --- One picture ---


def caption_file(picture: Path) -> Path:
    return picture.with_suffix(".txt")


def stamp(picture: Path) -> list[int]:
    """Size and time of change of a picture and of its caption."""
    status = [path.stat() for path in (picture, caption_file(picture)) if path.is_file()]
    return [number for s in status for number in (s.st_size, s.st_mtime_ns)]


def make(args: Namespace, name: str) -> dict:
    """Write the two files of a picture and return its line of the journal, or with "fault" why
    there are none. What is wrong with all pictures, such as a missing package, is raised."""
    source = args.pictures / name
    row = {"source": name}
    try:
        row["stamp"] = stamp(source)  # before it is read, to notice a change meanwhile
        name.encode()  # others cannot be listed, nor written under a longer name
        if "\\" in name or len(os.fsencode(source.name)) > 230:
            raise ValueError(f"{name}: expected at most 230 bytes and no backslash in its name")
        words = caption_file(source)
        text = " ".join(words.read_text("utf-8-sig").split()) if words.is_file() else ""
        shape = args.size, args.size
        if args.buckets:
            shape = nearest_shape(*shape_of(source), bucket_shapes(args.size))
        target = read_target(source, shape) / 255
    except UnicodeDecodeError:
        return row | {"fault": f"{words}: expected a caption in UTF-8"}
    except MemoryError:
        raise
    except Exception as fault:  # damaged files make Pillow raise nearly anything
        return row | {"fault": str(fault) or type(fault).__name__}
    random.seed(zlib.crc32(name.encode()))  # for annotators that draw, as shuffle does
    np.random.seed(zlib.crc32(name.encode()))
    condition = annotate(args.annotator, target)
    model = args.caption if not text else None
    if model:
        text = caption(target, BLIP if model == "blip" else model)
    for file, picture in zip(files_of(name), (target, condition), strict=True):
        write_png(args.out / file, to_image(picture))
    return row | {"text": text, "caption": model, "blank": bool(condition.min() == condition.max())}


# --- The folder ---


def found(folder: Path) -> tuple[list[str], Counter]:
    """Names of a folder's pictures, sorted, and how many other files it has, by suffix."""
    if not folder.is_dir():
        raise ValueError(f"expected a folder of pictures, {folder} is none")
    files = [path for path in folder.rglob("*") if path.is_file() and not any(
        part.startswith(".") for part in path.relative_to(folder).parts)]
    names = sorted(path.relative_to(folder).as_posix() for path in files
                   if path.suffix.lower() in SUFFIXES)
    others = Counter(path.suffix.lower() or path.name for path in files
                     if path.suffix.lower() not in SUFFIXES | {".txt"})
    if not names:
        raise ValueError(f"expected pictures in {folder}, found none")
    return names, others


def fill(args: Namespace, names: list[str], settings: dict) -> list[dict]:
    """Make what is missing, and return the lines of all pictures in their order."""
    done = remembered(args.out, settings, args.caption)
    for path in check_own(args.out, {*names, *done}):
        path.unlink()
    whole = {name for name in names if name in done
             and done[name]["stamp"] == stamp(args.pictures / name)
             and (done[name]["text"] or not args.caption)
             and all((args.out / file).is_file() for file in files_of(name))}
    with atomic_write(args.out / JOURNAL) as temporary:
        lines = map(json.dumps, (settings, *done.values()))
        temporary.write_text("\n".join(lines) + "\n", "utf-8")
    todo = [name for name in names if name not in whole]
    with (named(args.out / JOURNAL), open(args.out / JOURNAL, "ab") as journal,
          tqdm(total=len(names), initial=len(whole), desc=str(args.out)) as bar):
        for row in in_processes(partial(make, args), todo, args.processes,
                                ["data.captions", "filelock", "tqdm"]):
            done[row["source"]] = row
            if "fault" not in row:  # those are tried again, and are soon tried
                journal.write(json.dumps(row).encode() + b"\n")
                journal.flush()
            bar.update()
    return [done[name] for name in names]


def warn(message: str) -> None:
    print("warning:", message.encode(errors="backslashreplace").decode(), file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    names, others = found(args.pictures)
    out, pictures = args.out.resolve(), args.pictures.resolve()
    if pictures in (out, *out.parents) or args.out.is_file():
        raise ValueError(f"expected --out to be a folder outside {args.pictures}, got {args.out}")
    settings = {key: getattr(args, key) for key in ("annotator", "size")}
    if args.buckets:
        settings["buckets"] = True
    # Before anything is written.
    check_own(args.out, {*names, *remembered(args.out, settings, args.caption)})
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(args.out / LOCK).acquire(timeout=0):
            rows = fill(args, names, settings)
            good = [row for row in rows if "fault" not in row]
            lines = [json.dumps({"file_name": files_of(row["source"])[0],
                                 "conditioning_image": files_of(row["source"])[1],
                                 "text": row["text"], "source": row["source"]}) for row in good]
            if lines:  # it comes last: a folder that has it is complete
                with atomic_write(args.out / INDEX) as temporary:
                    temporary.write_text("\n".join(lines) + "\n", "utf-8")
    except Timeout:
        raise ValueError(f"another data.prepare is writing {args.out}") from None
    for row in rows:
        if "fault" in row:
            warn(f"{row['source']} left out: {row['fault']}")
    if others:
        warn(f"files of {args.pictures} that are no pictures by their names are not used: "
             + ", ".join(f"{n} {suffix}" for suffix, n in sorted(others.items())))
    if not good:
        raise ValueError(f"none of the {len(rows)} pictures in {args.pictures} can be read")
    blank = [row["source"] for row in good if row["blank"]]
    if blank:
        warn(f"{args.annotator} found nothing in {len(blank)} of {len(good)} pictures, whose "
             f"conditions are one colour: {', '.join(blank[:3])}{', ...' * (len(blank) > 3)}")
    if silent := sum(not row["text"] for row in good):
        warn(f"{silent} of {len(good)} pictures have an empty prompt: write a .txt file beside "
             "them, or use --caption blip")
    print(f"{len(good)} pairs, {len(rows) - len(good)} left out. To train on them:\n"
          f"python train.py --data {shlex.quote(str(args.out))}{' --buckets' * args.buckets}")


if __name__ == "__main__":
    sys.exit(run(main))
