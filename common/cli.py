"""What the command lines share: errors of one line, and numbers that are checked where they are typed."""

import argparse
import math
import sys
import warnings
from collections.abc import Callable

import torch


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as help, and a wrong command line answered in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def run(main: Callable[[], None]) -> int:
    """Run a program and return its exit code: 0 done, 2 wrong input, 1 an internal failure; failures and warnings are one line on stderr."""
    warnings.formatwarning = lambda message, *_, **__: "warning: " + " ".join(str(message).split()) + "\n"
    try:
        main()
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError) as problem:
        print("error: " + " ".join(str(problem).split()), file=sys.stderr)
        return 2
    except (OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as problem:  # a full disk, a NaN loss, no memory
        print("error: " + " ".join(str(problem).split()), file=sys.stderr)
        return 1
    except RuntimeError as problem:  # how PyTorch says that the CPU's memory is full
        if "can't allocate memory" not in str(problem):
            raise
        print("error: " + " ".join(str(problem).split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def tune_cpu(resolution: int) -> None:
    """Two settings of PyTorch on the CPU that decide its speed on small pictures."""
    torch.set_flush_denormal(True)  # on some CPUs numbers near zero make a step eight times slower
    if resolution <= 64:
        torch.set_num_threads(1)  # 8 x 8 latents are too little work to share: threads would mostly wait for each other


def _number(kind: type, low: float, high: float, what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse


def device(text: str) -> torch.device:
    """auto, cpu or cuda -> the device."""
    if text not in ("auto", "cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected auto, cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("expected a CUDA device, this machine (or this build of PyTorch) has none")
    return torch.device("cuda" if text != "cpu" and torch.cuda.is_available() else "cpu")


positive = _number(int, 1, 2**53, "a positive whole number")
non_negative = _number(int, 0, 2**53, "a whole number of at least 0")
positive_float = _number(float, sys.float_info.min, sys.float_info.max, "a positive number")
non_negative_float = _number(float, 0, sys.float_info.max, "a number of at least 0")
fraction = _number(float, 0, 1, "a number from 0 to 1")
