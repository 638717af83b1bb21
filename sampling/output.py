"""Pictures that are made: names for them that destroy nothing, and how they remember how they were
made, in PNG text chunks: this project's options, and `parameters` as A1111's web interface writes
it, which every picture browser reads."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from PIL import Image

from common.files import fingerprint, next_free, require_writable
from data.pictures import read_text, write_png

Files = dict[str, list[str]]  # option -> fingerprints of its files
A1111 = {"Seed": "seed", "Steps": "steps", "CFG scale": "guidance"}  # its name -> the option
PAIR = re.compile(r'\s*([\w /-]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')  # of its last line


def output_names(out: Path, num: int, inputs: Sequence[str | Path], like: Path | None = None,
                 overwrite: bool = False) -> list[Path]:
    """The pictures to write: `out`, with `num` above 1 NAME-0.png, NAME-1.png ... What this program
    did not make stays unless told to `overwrite`, and the picture `like` in any case: the next free
    name is taken instead, with a warning. Raises ValueError if one is among `inputs`, OSError if
    none can be written there."""
    require_writable(out)
    paths = []
    for path in [out.with_stem(f"{out.stem}-{i}") for i in range(num)] if num > 1 else [out]:
        if path.exists():
            if any(Path(name).exists() and path.samefile(name) for name in inputs):
                raise ValueError(f"expected another name in --out, {path} is what the picture is "
                                 "to be made from")
            if (like and path.samefile(like)) or not (overwrite or made_here(path)):
                path, taken = next_free(path), path
                warnings.warn(f"{taken} stays as it is, the picture will be {path}", stacklevel=2)
        paths.append(path)
    return paths


def made_here(picture: Path) -> bool:
    """Whether this program wrote the picture."""
    try:
        return "arguments" in read_text(picture)
    except ValueError:  # not a picture
        return False


def write_beside(path: Path, image: Image.Image) -> Path:
    """Write a picture under this name, or as NAME-1.png, NAME-2.png ... where another one is; one
    that is there already is not written again. Returns the name."""
    for i in count():
        name = path.with_stem(f"{path.stem}-{i}") if i else path
        if not name.exists():
            write_png(name, image)
            return name
        try:
            with Image.open(name) as other:
                if other.mode == image.mode and other.size == image.size \
                        and other.tobytes() == image.tobytes():
                    return name
        except OSError:  # not a picture
            continue


def record(settings: Mapping[str, object], arguments: list[str], files: Files) -> dict[str, str]:
    """The text chunks of a picture. `settings` to be read by people: prompt, negative_prompt, seed,
    steps, guidance, height, width, checkpoint and more; `arguments`: the options that make it
    again; `files`: fingerprints of what it was made from."""
    chunks = {key: str(value) for key, value in settings.items()}
    return {"parameters": a1111_text(chunks), **chunks, "arguments": json.dumps(arguments),
            "files": json.dumps(files)}


def a1111_text(chunks: Mapping[str, str]) -> str:
    """The same as A1111 writes it: prompt, negative prompt, and a line of settings."""
    lines = [chunks["prompt"]]
    if chunks["negative_prompt"]:
        lines.append(f"Negative prompt: {chunks['negative_prompt']}")
    model = Path(chunks["checkpoint"]).stem
    if re.search(r'[,:"\n]', model):
        model = json.dumps(model)
    lines.append(f"Steps: {chunks['steps']}, Sampler: DDIM, CFG scale: {chunks['guidance']}, "
                 f"Seed: {chunks['seed']}, Size: {chunks['width']}x{chunks['height']}, "
                 f"Model: {model}")
    return "\n".join(lines)


def remembered_by(picture: str | Path) -> tuple[list[str], Files]:
    """The options that a picture was made with, and the fingerprints of its files. Raises
    ValueError if it has neither this project's record nor A1111's."""
    text = read_text(picture)
    if "arguments" not in text:
        if "parameters" in text:
            return from_a1111(picture, text["parameters"]), {}
        found = ("holds a ComfyUI workflow, which is not read" if "workflow" in text
                 else "does not record how it was made")
        raise ValueError("expected a picture made by sample.py, or with A1111's text, in --like, "
                         f"{picture} {found}")
    try:
        arguments = list(map(str, json.loads(text["arguments"])))
        # Older pictures do not say that they are in float32, which was the default.
        return ["--precision=float32", *arguments], dict(json.loads(text["files"]))
    except (ValueError, TypeError, KeyError) as problem:
        raise ValueError(f"the record in {picture} of how it was made is damaged: "
                         f"{problem}") from None


def from_a1111(picture: str | Path, text: str) -> list[str]:
    """The options that A1111's text holds: prompts, seed, steps, guidance and size. Warns that the
    rest is not taken. Raises ValueError if the text has no settings."""
    body, _, last = text.strip().rpartition("\n")
    pairs = dict(PAIR.findall(last))
    if "Steps" not in pairs:
        raise ValueError(f"the text in {picture} of how it was made has no line of settings")
    prompt, _, negative = ("\n" + body).partition("\nNegative prompt:")
    arguments = [f"--prompt={prompt.strip()}", f"--negative-prompt={negative.strip()}"]
    arguments += [f"--{option}={pairs[name]}" for name, option in A1111.items() if name in pairs]
    if size := re.fullmatch(r"(\d+)x(\d+)", pairs.get("Size", "")):
        arguments += [f"--width={size[1]}", f"--height={size[2]}"]
    others = [f"{name} {pairs[name]}" for name in ("Model", "Sampler") if name in pairs]
    warnings.warn(f"{picture} was not made by this program: prompts, seed, steps, guidance and "
                  "size are taken, the rest is not" + (f" ({', '.join(others)})" if others else ""),
                  stacklevel=2)
    return arguments


def found_again(path: str, picture: Path, before: str | None) -> str:
    """Where a file that a picture was made from is now. A relative path is looked for here, then in
    the picture's folder and those above it; the content that is remembered comes first."""
    folders = [Path(), *picture.resolve().parents]
    there = [str(folder / path) for folder in folders if (folder / path).exists()]
    same = [place for place in there
            if before and Path(place).is_file() and fingerprint(place) == before]
    return next(iter(same + there), path)
