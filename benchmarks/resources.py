"""What does each network take, to train and to sample with? python -m benchmarks.resources

Parameters, file, memory and speed of the ControlNet and of every student: on the tiny model with
times, at Stable Diffusion 1.5's size with the work in their place. Memory is counted from tensor
sizes (`training/memory.py`), on a GPU measured. *Alone* is L_d without a teacher, *with a teacher*
all three losses. The networks take turns, and on a CPU the times are this process's own on one
core, so that other work on the machine counts little. In brackets: relative to the ControlNet.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import NamedTuple

from common.cli import Parser, add_device_option, answer, positive, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--repeats", type=positive, default=9,
                   help="runs that a time is the median of (default: 9)")
    p.add_argument("--out", type=Path, help="JSON file to write (default: print only)")
    add_device_option(p)
    args = p.parse_args(argv)
    from common.devices import device
    args.device = device(args.device)
    return args


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.costs import BASES, NETWORKS, build, count
from benchmarks.memory import TEXT_PARAMETERS, peaks
from benchmarks.training import Setting, Steps
from common.devices import tune
from common.files import atomic_write
from controlnet.sampling import Control, controlled
from evaluation.costs import count_macs, dummy_inputs
from evaluation.report import table
from training.memory import AllocatedBytes, LiveBytes, empty_copy
from unet import UNet

NONE = "no control"  # the base model alone, for sampling
ALONE, DISTILLED, SAMPLING = "training alone", "training with a teacher", "a guided step"


class Protocol(NamedTuple):
    """What a base is measured with."""

    title: str
    batch_size: int      # of a training step
    options: str         # of train.py
    dtype: torch.dtype   # of sampling


PROTOCOLS = {
    "tiny": Protocol("Tiny model, 64 x 64 pixels, float32, 16 pictures in a training step", 16, "",
                     torch.float32),
    "sd15": Protocol("Stable Diffusion 1.5's size, 512 x 512 pixels, bf16, one picture in a "
                     "training step", 1, "--precision bf16", torch.bfloat16)}
SIZES = {"parameters, M": ("parameters stored", 1e6), "file, fp16 MB": ("bytes in fp16", 1e6)}
COLUMNS = {  # base -> title -> key in a network's results, unit
    "tiny": SIZES | {
        "training alone, MiB": (f"bytes of {ALONE}", 2**20),
        "ms a step": (f"seconds of {ALONE}", 1e-3),
        "with a teacher, MiB": (f"bytes of {DISTILLED}", 2**20),
        "ms a step, with a teacher": (f"seconds of {DISTILLED}", 1e-3),
        "sampling, MiB": (f"bytes of {SAMPLING}", 2**20),
        "ms a guided step": (f"seconds of {SAMPLING}", 1e-3)},
    "sd15": SIZES | {
        "training alone, GiB": (f"bytes of {ALONE}", 2**30),
        "10^9 MACs a step": ("MACs of training", 1e9),
        "with a teacher, GiB": (f"bytes of {DISTILLED}", 2**30),
        "sampling, GiB": (f"bytes of {SAMPLING}", 2**30),
        "10^9 MACs a guided step": ("MACs of a guided step", 1e9)},
}


def options_of(name: str, has_teacher: bool) -> str | None:
    """Of train.py; None if the network is not trained so."""
    if name == NONE or name == "controlnet" and has_teacher:
        return None
    if name == "controlnet":
        return ""
    return f"--student {name}" + ("" if has_teacher else " --teacher none")


def sampling_bytes(base: str, name: str, dtype: torch.dtype) -> int:
    """The most that is alive while one picture is made: E(c), a guided step, decoding, and all
    weights."""
    size = BASES[base][-1]
    with torch.device("meta"):
        unet, vae, net = build(base, "controlnet" if name == NONE else name)
        text = nn.Linear(TEXT_PARAMETERS[base], 1, bias=False)
        networks = [(unet, dtype), (vae, torch.float32), (text, dtype)]
        networks += [] if name == NONE else [(net.for_inference(), dtype)]
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    counter = AllocatedBytes() if on_cuda else LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True) if not on_cuda else counter, counter:
        unet, vae, _, *nets = [empty_copy(network, device, own) for network, own in networks]
        with torch.no_grad(), device:
            latents, condition, timesteps, context = dummy_inputs(unet, size, batch=2)
            controls = [Control(net, condition[:1]).encoded(latents) for net in nets]
            controlled(unet, controls)(latents, timesteps, context)
            vae.decode(latents[:1].float())
        return counter.peak


def guided_step(unet: UNet, name: str, size: int) -> Callable[[], object]:
    """A function that takes one, with E(c) computed already."""
    latents, condition, timesteps, context = dummy_inputs(unet, size, batch=2)
    controls = []
    if name != NONE:
        net = build("tiny", name)[-1].to(latents).for_inference().requires_grad_(False)
        with torch.no_grad():
            controls = [Control(net, condition[:1]).encoded(latents)]
    step = controlled(unet, controls)

    def work() -> None:
        with torch.no_grad():
            step(latents, timesteps, context)

    return work


def times(repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """What is done -> network -> seconds, of the tiny model."""
    size = BASES["tiny"][-1]
    steps = Steps("tiny", size, PROTOCOLS["tiny"].batch_size, device)
    students = [None if name == "controlnet" else name for name in NETWORKS]
    settings = {work: [Setting(name or "controlnet", name, has_teacher) for name in students
                       if name or not has_teacher]
                for work, has_teacher in ((ALONE, False), (DISTILLED, True))}
    works = {work: {setting.name: steps.of(setting) for setting in group}
             for work, group in settings.items()}
    works[SAMPLING] = {name: guided_step(steps.unet, name, size) for name in (NONE, *NETWORKS)}
    return {work: medians(functions, repeats, device) for work, functions in works.items()}


def medians(functions: Mapping[str, Callable], repeats: int,
            device: torch.device) -> dict[str, float]:
    """Median seconds of each function; they take turns, after one run to warm up."""
    clock = process_time if device.type == "cpu" else perf_counter
    durations: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            durations[name].append(clock() - start)
    return {name: median(values[1:]) for name, values in durations.items()}


def measure(base: str) -> dict[str, dict[str, float]]:
    """Network -> its parameters, memory and work."""
    _, batch_size, options, dtype = PROTOCOLS[base]
    size, networks = BASES[base][-1], {}
    for name in (NONE, *NETWORKS):
        row = networks[name] = {f"bytes of {SAMPLING}": sampling_bytes(base, name, dtype)}
        for work, has_teacher in ((ALONE, False), (DISTILLED, True)):
            own = options_of(name, has_teacher)
            if own is not None:
                row[f"bytes of {work}"] = peaks(base, f"{own} {options}", batch_size)[0]
        row |= count(base, name, size) if name != NONE else {
            "MACs of a guided step": uncontrolled_macs(base, size)}
    return networks


def uncontrolled_macs(base: str, size: int) -> int:
    """Of a guided step of the base model alone."""
    with torch.device("meta"), torch.no_grad():
        unet, *_ = build(base, "controlnet")
        latents, _, timesteps, context = dummy_inputs(unet, size, batch=2)
        return count_macs(lambda: unet(latents, timesteps, context))


def markdown(results: Mapping) -> str:
    """A table for each base."""
    lines = []
    for base, networks in results["networks"].items():
        lines += ["", f"{PROTOCOLS[base].title}:", ""]
        columns = COLUMNS[base]
        rows = [[name, *(_cell(row, networks["controlnet"], *column)
                         for column in columns.values())] for name, row in networks.items()]
        lines += table(["", *columns], rows)
    return "\n".join([results["machine"], *lines]) + "\n"


def _cell(row: Mapping, reference: Mapping, key: str, unit: float) -> str:
    """A time or work with its ratio to the ControlNet's."""
    if key not in row:
        return "-"
    has_ratio = key.startswith(("seconds", "MACs")) and reference.get(key)
    ratio = f" ({row[key] / reference[key]:.2f})" if has_ratio else ""
    return f"{row[key] / unit:,.1f}{ratio}"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    tune(BASES["tiny"][-1])
    networks = {base: measure(base) for base in PROTOCOLS}
    for work, seconds in times(args.repeats, args.device).items():
        for name, value in seconds.items():
            networks["tiny"][name][f"seconds of {work}"] = value
    machine = f"{args.device.type.upper()}, {torch.get_num_threads()} thread"
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    results = {"machine": f"Times on {machine}, medians of {args.repeats}; "
                          f"torch {torch.__version__}.", "networks": networks}
    print(markdown(results), end="")
    if args.out:
        with atomic_write(args.out) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run(main))
