"""What the command lines share: one-line errors, options that are checked as they are read.

A program first says what its options are, and has them answered (`answer`); then it imports
PyTorch. So this file does without it.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any

BAD_INPUT = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError,
             PermissionError)
FAILURES = (OSError, FloatingPointError, MemoryError)  # of the machine
# The ControlNet paper's (first version, section 4): the empty prompt; one that describes nothing;
# a caption that BLIP writes; the user's
PROMPT_SETTINGS = ("none", "default", "automatic", "user")
FULL_MEMORY = ("out of memory", "can't allocate memory")  # how PyTorch reports a GPU's, a CPU's


class Parser(argparse.ArgumentParser):
    """argparse with a module's docstring as help, and one line for a wrong command line."""

    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter)

    def error(self, message: str) -> None:
        sys.exit(_fail(message, 2))


def option(help: str, default: object = None, type: Callable | None = None, *,
           choices: Sequence[str] | None = None, nargs: int | str | None = None,
           metavar: str | tuple[str, ...] | None = None) -> Any:
    """A dataclass field that is an option of the same name; a default of False makes a switch."""
    if default is not None and default is not False and "(default: " not in help:
        help = f"{help} (default: {default})"
    settings = {"help": help, "default": default, "action": "store_true"}
    if default is not False:
        settings |= {"action": "store", "type": type, "choices": choices, "nargs": nargs,
                     "metavar": metavar}
    return field(metadata=settings)


def flag(name: str) -> str:
    """The option of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def add_options(p: Parser, settings: type) -> None:
    """An option for every field of a dataclass that was declared by `option`."""
    for f in fields(settings):
        if f.metadata:
            p.add_argument(flag(f.name), **f.metadata)


def add_base_options(p: Parser, checkpoint: Path, steps: Sequence[str] = ("--steps",)) -> None:
    """The options that train.py, sample.py and evaluate.py have in common. `steps`: other names of
    --sample-steps."""
    p.add_argument("--checkpoint", type=Path, default=checkpoint,
                   help="Stable Diffusion, a file in the original naming or a folder of diffusers "
                        "(default: the tiny model)")
    add_sampling_options(p, steps)
    add_device_option(p)


def add_sampling_options(p: Parser, steps: Sequence[str] = ()) -> None:
    """How a base model makes pictures, if not as its file says or as Stable Diffusion does."""
    p.add_argument("--prediction", type=prediction, metavar="{epsilon,v}",
                   help="what the checkpoint predicts; v: SD 2.1 at 768 pixels (default: as the "
                        "file's metadata has it, else epsilon)")
    p.add_argument("--sample-steps", *steps, type=sampling_steps, metavar="N",
                   help="DDIM steps of a picture (default: the checkpoint's, else 20)")
    p.add_argument("--guidance", type=non_negative_float, metavar="SCALE",
                   help="guidance scale; 1 or less = none (default: the checkpoint's, else 9)")
    p.add_argument("--spacing", choices=["leading", "trailing"],
                   help="of the timesteps; trailing: SD-Turbo (default: the checkpoint's, else "
                        "leading)")


def sampling_given(settings: Any) -> dict[str, object]:
    """What a command line says about sampling, by the fields of `diffusion.Sampling`."""
    given = {"steps": settings.sample_steps, "guidance": settings.guidance,
             "spacing": settings.spacing, "prediction": settings.prediction}
    return {name: value for name, value in given.items() if value is not None}


def add_device_option(p: Parser) -> None:
    """`common.devices.device` makes a device of it, when all else is right: it imports PyTorch."""
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                   help="where to compute (default: auto, CUDA if there is a GPU)")


def prompt_conflict(setting: str | None, suffix: str | None) -> str | None:
    if setting == "none" and suffix:
        return "--prompt-setting none is the empty prompt: --prompt-suffix does not go with it"
    return None


def join_texts(p: Parser, argv: Sequence[str], options: Sequence[str]) -> list[str]:
    """The arguments with a value that begins with a dash joined to its option, if the option takes
    any text: argparse would look for an option of that name."""
    joined = []
    for word in argv:
        known = word.partition("=")[0] in p._option_string_actions  # then the value is missing
        if joined and joined[-1] in options and word.startswith("-") and not known:
            joined[-1] += "=" + word
        else:
            joined.append(word)
    return joined


def answer(parse: Callable[[None], object]) -> None:
    """Read the command line before the program imports PyTorch, which takes two seconds: --help,
    a wrong option and options that do not go together are answered at once, and the program ends.
    If all is well, `main` reads it again."""
    if code := run(lambda: parse(None)):
        sys.exit(code)


def run(main: Callable[[], None]) -> int:
    """Run a program and return its exit code: 0 done, 2 wrong input, 1 an internal failure.

    Failures and warnings are one line on stderr.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_one_line(message)}\n"
    try:
        main()
        return 0
    except BAD_INPUT as problem:
        return _fail(problem, 2)
    except FAILURES as problem:
        return _fail(problem, 1)
    except RuntimeError as problem:
        if not any(words in str(problem) for words in FULL_MEMORY):
            raise
        return _fail(problem, 1)
    except KeyboardInterrupt:
        return 130


def _fail(problem: Exception | str, code: int) -> int:
    print(f"error: {_one_line(problem)}", file=sys.stderr)
    return code


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _number(kind: type, low: float, high: float, what: str, step: int = 0) -> Callable:
    """An argparse type: a number from `low` to `high`, with `step` a multiple of it."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or step and value % step:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse


def _word(words: dict[str, str]) -> Callable[[str], str]:
    """An argparse type: one of the keys, which may be older spellings of the value."""

    def parse(text: str) -> str:
        if text not in words:
            choices = ", ".join(dict.fromkeys(words.values()))
            raise argparse.ArgumentTypeError(f"expected one of {choices}, got {text!r}")
        return words[text]

    return parse


sampling_steps = _number(int, 1, 1000, "1 to 1000 sampling steps")  # diffusion.TIMESTEPS
positive = _number(int, 1, 2**53, "a positive whole number")
non_negative = _number(int, 0, 2**53, "a whole number of at least 0")
seed = _number(int, -1, 2**53, "a whole number of at least 0, or -1 for a random one")
positive_float = _number(float, sys.float_info.min, sys.float_info.max, "a positive number")
non_negative_float = _number(float, 0, sys.float_info.max, "a number of at least 0")
fraction = _number(float, 0, 1, "a number from 0 to 1")
picture_side = _number(int, 8, 2**20, "a number of pixels divisible by 8", step=8)  # vae.DOWNSCALE


def timesteps(text: str) -> str:
    """An argparse type: `uniform`, or SPACING:N, the timesteps of a sampling run."""
    spacing, _, steps = text.partition(":")
    if text != "uniform":
        if spacing not in ("leading", "trailing"):
            raise argparse.ArgumentTypeError("expected uniform, leading:N or trailing:N, got "
                                             f"{text!r}")
        sampling_steps(steps)
    return text


prediction = _word({"epsilon": "epsilon", "v": "v", "noise": "epsilon"})
precision = _word({"float32": "float32", "bf16": "bf16", "fp16": "fp16", "bfloat16": "bf16",
                   "float16": "fp16"})
