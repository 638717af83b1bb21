"""A training run on disk, so that nothing is lost when it dies: RUN/state/state.pt, settings.json, log.jsonl, controlnet.safetensors.

The state is the commit point: everything else is written before it or can be made from it again, so that a run killed at any moment
resumes from its last state and ends in the same bytes as one that was never killed.
"""

import json
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from data.files import fingerprint, replacing

MAY_CHANGE = {"out", "resume", "device", "steps", "save_every", "sample_every"}  # settings that a resumed run may have otherwise
Parts = tuple[nn.Module, torch.optim.Optimizer, torch.Generator]  # what learns, how, and every random number to come


def settings_of(args: Namespace) -> dict:
    """The command line as JSON has it; a weights file by name and fingerprint, so that it may move but not change."""
    settings = {name: value if isinstance(value, (int, float, str, bool, type(None))) else str(value) for name, value in vars(args).items()}
    for name in ("checkpoint", "teacher", "init"):
        if settings[name] and Path(settings[name]).is_file():
            settings[name] = f"{Path(settings[name]).name} ({fingerprint(settings[name])})"
    return settings


def _clean(folder: Path) -> None:
    for unfinished in folder.rglob(".*.tmp"):  # what was being written when a run was killed
        unfinished.unlink()


def begin(folder: Path, args: Namespace) -> int:
    """Make a new run's folder; returns 0, the step it begins at. Raises ValueError if it holds a run already."""
    if (folder / "state" / "state.pt").exists():
        raise ValueError(f"{folder} holds a run already: continue it with --resume, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    for left in (folder / "log.jsonl", *folder.glob("samples/*.png")):  # of a run that ended before it saved anything
        left.unlink(missing_ok=True)
    with replacing(folder / "settings.json") as temporary:
        temporary.write_text(json.dumps(settings_of(args) | {"torch": torch.__version__}, indent=1) + "\n")
    return 0


def resume(folder: Path, args: Namespace, parts: Parts) -> int:
    """Put everything back as it was at the last saved state, in place; returns its step.

    Raises ValueError if there is no state, if it is damaged, or if a setting that the result depends on is another one.
    """
    state_file, log_file, settings_file = folder / "state" / "state.pt", folder / "log.jsonl", folder / "settings.json"
    if not state_file.exists():
        raise ValueError(f"expected a saved run to resume, {state_file} does not exist")
    if settings_file.exists():
        before, now = json.loads(settings_file.read_text()), settings_of(args)
        may_change = MAY_CHANGE - ({"steps"} if args.decay else set())  # the decay counts from the last step
        names = [name for name in sorted(now.keys() & before.keys() - may_change) if before[name] != now[name]]
        if names:
            changed = "; ".join(f"--{name.replace('_', '-')} was {before[name]}, is {now[name]}" for name in names)
            raise ValueError(f"expected the settings that {folder} was begun with: {changed}")
    _clean(folder)
    net, optimizer, generator = parts
    try:
        state = torch.load(state_file, weights_only=True, map_location=args.device)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        step = int(state["step"])
    except (RuntimeError, UnpicklingError, KeyError, TypeError, IndexError, AttributeError, ValueError, EOFError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ValueError(f"{state_file} is damaged or of another kind of run (another --student or --checkpoint?): {reason}") from None
    if step > args.steps:
        raise ValueError(f"expected --steps of at least {step}, where {folder} stands, got {args.steps}")
    lines = log_file.read_text().splitlines() if log_file.exists() else []
    with replacing(log_file) as temporary:  # steps after the saved state will be run and logged again; there is one line a step
        temporary.write_text("".join(line + "\n" for line in lines[:step]))
    return step


def save(folder: Path, step: int, parts: Parts) -> None:
    """Write the state under a temporary name and rename it: at any moment there is one whole state. Raises OSError if it cannot be written."""
    net, optimizer, generator = parts
    state = _interned({"step": step, "net": dict(net.state_dict()), "optimizer": optimizer.state_dict(), "generator": generator.get_state()})
    with replacing(folder / "state" / "state.pt") as temporary:
        try:
            with open(temporary, "wb") as file:  # given a name, torch.save would write that name into the file
                torch.save(state, file)
        except RuntimeError as problem:  # how torch says that a write failed
            raise OSError(f"the state of step {step} could not be written to {folder}, is the disk full? The one before is kept ({problem})") from None


def _interned(part: object) -> object:
    """The same nest of dicts and lists with one object for equal strings: a pickle of a loaded state differs from a first one only in that."""
    if isinstance(part, dict):
        return {_interned(key): _interned(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_interned(value) for value in part]
    return sys.intern(part) if isinstance(part, str) else part


class Log:
    """RUN/log.jsonl, one object a step, with the seconds since the run began (of a resumed run without the pause)."""

    def __init__(self, folder: Path):
        path = folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        self.begun = time.time() - (json.loads(lines[-1])["seconds"] if lines else 0.0)
        self.file = open(path, "a")

    def write(self, entry: dict) -> None:
        self.file.write(json.dumps(entry | {"seconds": round(time.time() - self.begun, 3)}) + "\n")
        self.file.flush()


class Stop:
    """SIGTERM (of a scheduler) and Ctrl-C ask to stop: the step in progress is finished and saved. A second Ctrl-C stops at once."""

    def __enter__(self) -> "Stop":
        self.signal, self.before = None, {number: signal.signal(number, self._asked) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _asked(self, number: int, frame: object) -> None:
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
