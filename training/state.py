"""A training run on disk, so that nothing is lost when it dies.

RUN/state/state.pt is the commit point: the settings are written before it, the networks, the log
and the sample grids after it and, if a run dies in between, again from it. A run killed at any
moment resumes from its last state and ends in the same bytes as one that never was.
With --keep N the last N states stay, as RUN/state/STEP.pt; copied to state.pt, one is resumed.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from common.cli import flag
from common.files import atomic_write, fingerprint
from training.run_folder import remove_leftovers, remove_unfinished
from training.settings import LEFT_OPEN, Settings

MAY_CHANGE = {"out", "resume", "device", "steps", "save_every", "keep", "sample_every", "log_every",
              "sample_steps", "guidance", "spacing", "fidelity_samples", "report_samples", "cache",
              "no_cache", "checkpointing", "compile", "held_out", "tensorboard", "precision",
              "caption_column", "skip_broken"}
ONCE = {  # what older versions, which do not name these, did
    "buckets": False, "unlock": "decoder", "timesteps": "uniform", "weighting": "noise",
    "layer_statistics": "layer", "vae": None}
SAME_PRODUCT = ("batch_size", "accumulate", "processes")  # each may change: pictures per step
SCHEDULE = {"lr", "warmup", "decay", "cosine"}
# What learns, how, and every random number to come, by name.
Parts = dict[str, nn.Module | torch.optim.Optimizer | torch.Generator]


def as_json(settings: Settings) -> dict:
    """The settings as JSON stores them; a weights file by name and fingerprint, so that it may move
    but not change."""
    values = {name: value if isinstance(value, (int, float, str, type(None))) else str(value)
              for name, value in asdict(settings).items()}
    for name in ("checkpoint", "vae", "teacher", "init"):
        if values[name] and Path(values[name]).is_file():
            values[name] = f"{Path(values[name]).name} ({fingerprint(values[name])})"
    return values


def write_settings(settings: Settings) -> None:
    with atomic_write(settings.out / "settings.json") as temporary:
        values = as_json(settings) | {"torch": torch.__version__}
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def require_same(settings: Settings, step: int) -> None:
    """Raises ValueError if a setting that the first `step` steps depended on has changed.

    What lies ahead may change: the learning rate and its schedule, L_layer alone for longer.
    """
    before = ONCE | json.loads((settings.out / "settings.json").read_text())
    now = as_json(settings)
    if before.get("prediction") == "noise":  # what older versions called it
        before["prediction"] = "epsilon"
    may_change = MAY_CHANGE | {name for name in LEFT_OPEN if before.get(name) is None}
    if before.get("data_fingerprint") and now["data_fingerprint"]:  # older versions had none
        may_change |= {"data", "data_fingerprint"}
        if before["data_fingerprint"] != now["data_fingerprint"]:
            raise ValueError(f"expected the data that {settings.out} was begun with: pictures, "
                             f"conditions or prompts in {settings.data} have changed, or their "
                             "order. To train on with them, begin a new run with --init "
                             f"{settings.out / 'controlnet.safetensors'}")
    if pictures_per_step(before) == pictures_per_step(now):
        may_change |= set(SAME_PRODUCT)
    if (before.get("mode"), now["mode"]) == ("small", "default"):  # as in the paper
        may_change |= {"mode"}
    may_change |= SCHEDULE
    new_schedule = {name for name in SCHEDULE if step and before[name] != now[name]}
    # A decay counts from the last step, so it fixes --steps once it has begun.
    if step <= min(s["steps"] - s["decay"] if s["decay"] else step for s in (before, now)):
        new_schedule -= {"decay", "cosine"}  # as if the run had been begun so
    elif before["decay"] == now["decay"]:
        may_change -= {"steps"}
    # In the first phase the other losses do not count.
    other_losses = {name for name in now if name.startswith("loss_")} - {"loss_layer"}
    for name, others in (("layer_only_steps", other_losses), ("unlock_at", set())):
        if step <= min(before.get(name, 0), now[name]):
            may_change |= {name} | others
    changes = [f"{flag(name)} was {before[name]}, is {now[name]}"
               for name in sorted(now.keys() & before.keys() - may_change)
               if before[name] != now[name]]
    if changes:
        text = "; ".join(changes).replace("--processes", "torchrun's processes")
        raise ValueError(f"expected the settings that {settings.out} was begun with: {text}")
    changed = [flag(name) for name in (*SAME_PRODUCT, "precision", *sorted(SCHEDULE))
               if before[name] != now[name] and name not in SCHEDULE - new_schedule]
    if changed:
        warnings.warn(f"{', '.join(changed)} changed: the run continues, but not to the same bits "
                      "as it would have had", stacklevel=2)


def pictures_per_step(settings: dict) -> int:
    return math.prod(settings[name] for name in SAME_PRODUCT)


def begin(settings: Settings, writes: bool = True) -> tuple[int, None, dict]:
    """Make a new run's folder, which is `claimed`; returns 0, the step it begins at, and nothing
    logged. One of several processes `writes`."""
    if writes:
        settings.out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(settings.out)
        write_settings(settings)
    return 0, None, {}


def read_state(settings: Settings) -> dict:
    """The last saved state, on the CPU. Raises ValueError if there is none, if it is damaged, or if
    a setting that the result depends on has changed."""
    folder = settings.out
    state_file = folder / "state" / "state.pt"
    if not state_file.exists():
        raise ValueError(f"expected a saved run to resume, {state_file} does not exist")
    with _damage_explained(state_file):
        # On the CPU: beside what is on the device already, there may be no room for it.
        state = torch.load(state_file, weights_only=True, map_location="cpu")
        step = int(state["step"])
    if (folder / "settings.json").exists():
        require_same(settings, step)
    if step > settings.steps:
        raise ValueError(f"expected --steps of at least {step}, the saved step of {folder}, "
                         f"got {settings.steps}")
    return state


def resume(settings: Settings, state: dict, parts: Parts,
           writes: bool = True) -> tuple[int, dict | None, dict[str, Tensor]]:
    """Restore `parts` from a state, in place; returns its step, its line of the log if it has one,
    and what the next line begins with. Raises ValueError if it is another kind of run's."""
    folder, step = settings.out, int(state["step"])
    state_file, log_file = folder / "state" / "state.pt", folder / "log.jsonl"
    with _damage_explained(state_file):
        for name, part in parts.items():
            if isinstance(part, torch.Generator):
                part.set_state(state[name])
            elif name != "scaler" or name in state:  # --precision fp16 may be new
                part.load_state_dict(state[name])
    if writes:
        remove_unfinished(folder)
        write_settings(settings)
        # Steps after the saved state will be run and logged again.
        with atomic_write(log_file) as temporary:
            temporary.write_text("".join(_log_lines(log_file, step)))
    sums = {name: value.to(settings.device) for name, value in state.get("sums", {}).items()}
    return step, state.get("entry"), sums if writes else {}  # older versions have neither


def _log_lines(log_file: Path, last: int) -> Iterator[str]:
    """The log up to step `last`, without the part of a line that a killed run may have left."""
    for line in log_file.read_text().splitlines(keepends=True) if log_file.exists() else []:
        if line.endswith("\n") and json.loads(line)["step"] <= last:
            yield line


@contextmanager
def _damage_explained(state_file: Path) -> Iterator[None]:
    """Whatever is wrong with a state becomes one ValueError."""
    try:
        yield
    except (RuntimeError, UnpicklingError, KeyError, TypeError, IndexError, AttributeError,
            ValueError, EOFError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ValueError(f"{state_file} is damaged or of another kind of run (another --student or "
                         f"--checkpoint?): {reason}") from None


def save(settings: Settings, step: int, entry: dict | None, sums: dict[str, Tensor],
         parts: Parts) -> None:
    """Write the state after a step under a temporary name and rename it: at any moment there is one
    whole state. `entry`: its line of the log, if it has one; else `sums`, what the next line begins
    with. Raises OSError if it cannot be written."""
    folder = settings.out / "state"
    state: dict[str, object] = {"step": step, "entry": entry, "sums": {} if entry else sums}
    for name, part in parts.items():
        is_generator = isinstance(part, torch.Generator)
        state[name] = part.get_state() if is_generator else dict(part.state_dict())
    state = _interned(state)
    with atomic_write(folder / "state.pt") as temporary:
        try:
            # Given a name, torch.save would write that name into the file.
            with open(temporary, "wb") as file:
                torch.save(state, file)
        except RuntimeError as problem:  # how torch reports a failed write
            raise OSError(f"the state of step {step} could not be written to {folder}, is the disk "
                          f"full? The one before is kept ({problem})") from None
    if settings.keep > 1:
        kept = folder / f"{step:06}.pt"
        kept.unlink(missing_ok=True)
        os.link(folder / "state.pt", kept)  # a second name, which costs nothing
        states = [path for path in folder.glob("*.pt") if path.stem.isdigit()]
        for old in sorted(states, key=lambda path: int(path.stem))[: -settings.keep]:
            old.unlink()


def _interned(part: object) -> object:
    """The same nest of dicts and lists with one object for equal strings: without that, the pickle
    of a resumed run has other bytes than that of an uninterrupted one."""
    if isinstance(part, dict):
        return {_interned(key): _interned(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_interned(value) for value in part]
    return sys.intern(part) if isinstance(part, str) else part
