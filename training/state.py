"""A training run on disk, so that nothing is lost when it dies: RUN/state/state.pt, settings.json, log.jsonl, controlnet.safetensors.

The state is the commit point: everything else is written before it or can be made from it again, so that a run killed at any moment
resumes from its last state and ends in the same bytes as one that was never killed.
"""

import json
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import nn

from common.files import atomic_write, fingerprint

# Settings that a resumed run may have otherwise.
MAY_CHANGE = {"out", "resume", "device", "steps", "save_every", "sample_every", "cache", "checkpointing", "tensorboard"}
Parts = dict[str, nn.Module | torch.optim.Optimizer | torch.Generator]  # what learns, how, and every random number to come, by name


def settings_of(args: Namespace) -> dict:
    """The command line as JSON has it; a weights file by name and fingerprint, so that it may move but not change."""
    settings = {name: value if isinstance(value, (int, float, str, bool, type(None))) else str(value) for name, value in vars(args).items()}
    for name in ("checkpoint", "teacher", "init"):
        if settings[name] and Path(settings[name]).is_file():
            settings[name] = f"{Path(settings[name]).name} ({fingerprint(settings[name])})"
    return settings


def write_settings(folder: Path, settings: dict) -> None:
    with atomic_write(folder / "settings.json") as temporary:
        temporary.write_text(json.dumps(settings | {"torch": torch.__version__}, indent=1) + "\n")


def require_same(folder: Path, before: dict, now: dict, step: int) -> None:
    """Raises ValueError if a setting that the first `step` steps depended on has changed. What lies ahead may: L_layer alone for longer, a later decay."""
    may_change = set(MAY_CHANGE)
    if (before.get("mode"), now["mode"]) == ("small", "default"):  # the disconnected outputs are connected again, as the paper does
        may_change |= {"mode"}
    falls = [settings["steps"] - settings["decay"] if settings["decay"] else step for settings in (before, now)]  # a decay counts from the last step
    may_change |= {"decay", "cosine"} if step <= min(falls) else set()
    may_change -= {"steps"} if step > min(falls) else set()
    for name, more in (("layer_only_steps", {"loss_d", "loss_td"}), ("unlock_at", set())):  # until then the other losses do not count
        may_change |= {name} | more if step <= min(before.get(name, 0), now.get(name, 0)) else set()
    names = [name for name in sorted(now.keys() & before.keys() - may_change) if before[name] != now[name]]
    if names:
        words = {name: "torchrun's processes" if name == "processes" else f"--{name.replace('_', '-')}" for name in names}
        changed = "; ".join(f"{words[name]} was {before[name]}, is {now[name]}" for name in names)
        raise ValueError(f"expected the settings that {folder} was begun with: {changed}")


def _clean(folder: Path) -> None:
    for unfinished in folder.rglob(".*.tmp"):  # what was being written when a run was killed
        unfinished.unlink()


def begin(folder: Path, args: Namespace, writes: bool = True) -> int:
    """Make a new run's folder; returns 0, the step it begins at. Of several processes one `writes`. Raises ValueError if it holds a run already."""
    if (folder / "state" / "state.pt").exists():
        raise ValueError(f"{folder} holds a run already: continue it with --resume, or choose another --out")
    if not writes:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    for left in (folder / "log.jsonl", *folder.glob("samples/*.png")):  # of a run that ended before it saved anything
        left.unlink(missing_ok=True)
    write_settings(folder, settings_of(args))
    return 0


def resume(folder: Path, args: Namespace, parts: Parts, writes: bool = True) -> int:
    """Put everything back as it was at the last saved state, in place; returns its step. Of several processes one `writes`.

    Raises ValueError if there is no state, if it is damaged, or if a setting that the result depends on is another one.
    """
    state_file, log_file, settings_file = folder / "state" / "state.pt", folder / "log.jsonl", folder / "settings.json"
    if not state_file.exists():
        raise ValueError(f"expected a saved run to resume, {state_file} does not exist")
    with _whole(state_file):
        state = torch.load(state_file, weights_only=True, map_location=args.device)
        step = int(state["step"])
    now = settings_of(args)
    if settings_file.exists():
        require_same(folder, json.loads(settings_file.read_text()), now, step)
    with _whole(state_file):
        for name, part in parts.items():
            if isinstance(part, torch.Generator):
                part.set_state(state[name].cpu())
            else:
                part.load_state_dict(state[name])
    if step > args.steps:
        raise ValueError(f"expected --steps of at least {step}, where {folder} stands, got {args.steps}")
    if not writes:
        return step
    _clean(folder)
    write_settings(folder, now)
    lines = log_file.read_text().splitlines() if log_file.exists() else []
    with atomic_write(log_file) as temporary:  # steps after the saved state will be run and logged again; there is one line a step
        temporary.write_text("".join(line + "\n" for line in lines[:step]))
    return step


@contextmanager
def _whole(state_file: Path) -> Iterator[None]:
    """Whatever is wrong with a state becomes one ValueError."""
    try:
        yield
    except (RuntimeError, UnpicklingError, KeyError, TypeError, IndexError, AttributeError, ValueError, EOFError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ValueError(f"{state_file} is damaged or of another kind of run (another --student or --checkpoint?): {reason}") from None


def save(folder: Path, step: int, parts: Parts) -> None:
    """Write the state under a temporary name and rename it: at any moment there is one whole state. Raises OSError if it cannot be written."""
    state: dict[str, object] = {"step": step}
    for name, part in parts.items():
        state[name] = part.get_state() if isinstance(part, torch.Generator) else dict(part.state_dict())
    state = _interned(state)
    with atomic_write(folder / "state" / "state.pt") as temporary:
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
    """RUN/log.jsonl, one object a step, with the seconds since the run began (of a resumed run without the pause); `tensorboard`: event files too."""

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        path = folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        self.begun = time.time() - (json.loads(lines[-1])["seconds"] if lines else 0.0)
        self.file = open(path, "a")
        self.events = event_writer()(str(folder / "tensorboard"), purge_step=step + 1) if tensorboard else None

    def write(self, entry: dict) -> None:
        self.file.write(json.dumps(entry | {"seconds": round(time.time() - self.begun, 3)}) + "\n")
        self.file.flush()
        if self.events:
            for name, value in entry.items():
                for i, number in enumerate(value if isinstance(value, list) else [value]):
                    if number is not None and name != "step":
                        self.events.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, number, entry["step"])
            self.events.flush()

    def close(self) -> None:
        self.file.close()
        if self.events:
            self.events.close()


def event_writer() -> type:
    """TensorBoard's writer of event files. Raises ValueError if the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    return SummaryWriter


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
