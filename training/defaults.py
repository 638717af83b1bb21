"""The settings that a run gets where its command line gives none: they depend on the base model, on
what is trained, and on the graphics card. Each is printed with its reason."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from common.devices import default_precision
from common.files import in_bytes
from controlnet import ControlNetwork
from kd import build_student
from kd.from_teacher import why_not_from
from training import parallel
from training.memory import RESERVE, peak_bytes
from training.settings import Settings
from weights.stable_diffusion import StableDiffusion

PICTURES_PER_STEP = 16
SD_WIDTH = 320            # of the UNet's first level in every Stable Diffusion; less: a small model
LAYER_ONLY_SHARE = 13 / 16  # of the steps: the cheap phase first (docs/experiments.md)
Choices = dict[str, tuple[object, str]]  # setting -> value, reason


def with_recipe(settings: Settings, sd: StableDiffusion,
                teacher: ControlNetwork | None) -> Settings:
    """Everything but the batch. Raises ValueError for settings that do not go together."""
    student, is_small = settings.student, sd.unet.config.model_channels < SD_WIDTH
    size = "a small base model" if is_small else "Stable Diffusion's size"
    choices: Choices = {}
    choices["precision"] = default_precision(settings.device)
    choices["init"] = default_init(settings, sd, teacher)
    if is_small:
        choices["steps"] = 800, size
    elif student:
        choices["steps"] = 10_000, f"{size}, a student"
    else:
        choices["steps"] = 20_000, f"{size}: ControlNets converge after 3,000 to 7,000"
    rate = sd.lr if is_small or not student else 10 * sd.lr
    choices["lr"] = rate, "the base's" if rate == sd.lr else "ten times the base's: a student"
    cannot_follow = student == "mlp"  # whose other losses L_layer spoils, docs/experiments.md
    choices["loss_layer"] = (0.0, "mlp has no layers like its teacher's") if cannot_follow else (
        1.0, "")
    settings = _fill(settings, choices)
    warn_of_schedule(settings)

    if settings.init == "teacher" and not teacher:
        raise ValueError("--init teacher needs a --student and its --teacher")
    has_layer_loss = teacher and settings.loss_layer > 0
    share = LAYER_ONLY_SHARE if has_layer_loss else 0
    choices = {"layer_only_steps": (
        round(share * settings.steps), f"{share:.0%} of --steps, and cheaper" if share else "")}
    settings = _fill(settings, choices)
    if settings.layer_only_steps and not has_layer_loss:
        raise ValueError("--layer-only-steps needs a teacher and a --loss-layer above 0")
    if settings.unlock_at is None or settings.mode != "large":
        return replace(settings, unlock_at=settings.layer_only_steps)
    if settings.unlock_at < settings.layer_only_steps:
        raise ValueError("--unlock-at must not come before the end of --layer-only-steps, "
                         f"{settings.layer_only_steps}: L_layer does not reach the SD decoder")
    return settings


def warn_of_schedule(settings: Settings) -> None:
    """The learning rate never is --lr in a run that is shorter than its rise and fall."""
    if settings.warmup + settings.decay > settings.steps and parallel.rank() == 0:
        parts = [f"--{name} {getattr(settings, name)}" for name in ("warmup", "decay")
                 if getattr(settings, name)]
        warnings.warn(f"{' and '.join(parts)} take longer than --steps {settings.steps}: the "
                      "learning rate never reaches --lr", stacklevel=2)


def default_init(settings: Settings, sd: StableDiffusion,
                 teacher: ControlNetwork | None) -> tuple[str, str]:
    if not settings.student:
        return "base", ""
    if not teacher:
        return "random", "no teacher"
    with torch.device("meta"):
        problem = why_not_from(build_student(settings.student, sd.unet), teacher)
    return ("random", problem) if problem else ("teacher", "saves most of the training")


def with_batch(settings: Settings, sd: StableDiffusion, net: ControlNetwork,
               teacher: ControlNetwork | None, forward_backward: Callable) -> Settings:
    """The batch of a forward pass: on a GPU what its free memory has room for. Raises ValueError if
    it has none for a single picture."""
    total = PICTURES_PER_STEP // settings.processes or 1
    if settings.batch_size:
        return _fill(settings, {"accumulate": (1, "")})
    if settings.device.type == "cpu":
        is_small = sd.unet.config.model_channels < SD_WIDTH
        batch = total if is_small else 1
        return _fill(settings, {"batch_size": (batch, ""), "accumulate": (total // batch, "")})
    if settings.accumulate:
        total = max(1, total // settings.accumulate)
    free = torch.cuda.mem_get_info()[0]
    batch, checkpointing, need = fitting_batch(settings, sd, net, teacher, forward_backward, total,
                                               free)
    if not batch:
        raise ValueError(f"{settings.name} needs {need / 2**30:.1f} GiB for a single picture, this "
                         f"GPU has {free / 2**30:.1f} GiB free: try a lighter --student, "
                         "--precision bf16, or a lower --resolution")
    reason = f"{need / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"
    if checkpointing and not settings.checkpointing:
        tell({"checkpointing": (True, "without it the memory is not enough")})
        settings = replace(settings, checkpointing=True)
    return _fill(settings, {"batch_size": (batch, reason),
                            "accumulate": (total // batch, f"{total} pictures per step")})


def fitting_batch(settings: Settings, sd: StableDiffusion, net: ControlNetwork,
                  teacher: ControlNetwork | None, forward_backward: Callable, largest: int,
                  free: int) -> tuple[int, bool, int]:
    """The largest batch, halved from `largest`, whose step has room in `free` bytes; whether that
    takes checkpointing, which is tried for a single picture only; and the bytes it needs. A batch
    of 0: not even that has room, and the bytes are what it would need."""
    size = settings.resolution or sd.resolution

    def need(batch: int, checkpointing: bool) -> int:
        setting = replace(settings, checkpointing=checkpointing)
        return RESERVE + max(peak_bytes(forward_backward, setting, sd.unet, sd.vae, sd.text, net,
                                        teacher, size, batch))

    batch, given = largest, settings.checkpointing
    while batch:
        if (needed := need(batch, given)) <= free:
            return batch, given, needed
        batch //= 2
    needed = need(1, True)
    return int(needed <= free), True, needed


def what_fits(settings: Settings, sd: StableDiffusion, net: ControlNetwork,
              teacher: ControlNetwork | None, forward_backward: Callable) -> str:
    """After a step has run out of memory: the options that would not have."""
    if settings.device.type == "cpu":
        return "try a smaller --batch-size with a larger --accumulate, or --checkpointing"
    memory = torch.cuda.get_device_properties(settings.device).total_memory
    batch, checkpointing, needed = fitting_batch(
        settings, sd, net, teacher, forward_backward, max(1, settings.batch_size // 2), memory)
    if not batch:
        return (f"a single picture needs {needed / 2**30:.1f} GiB, the card has "
                f"{memory / 2**30:.1f} GiB: try a lighter --student or a lower --resolution")
    accumulate = settings.batch_size * settings.accumulate // batch
    return (f"--batch-size {batch} --accumulate {accumulate}"
            f"{' --checkpointing' if checkpointing else ''} needs {needed / 2**30:.1f} of this "
            f"card's {memory / 2**30:.1f} GiB, also for a --resume")


def check_disk(settings: Settings, sd: StableDiffusion, net: ControlNetwork,
               trained: list[nn.Parameter]) -> None:
    """Say how much a run writes, all in float32. Raises OSError if there is no room."""
    def in_float32(*networks: nn.Module) -> int:
        return 4 * sum(p.numel() for network in networks for p in network.parameters())

    averaged = 0 if settings.ema is None else in_float32(net)
    state = 12 * sum(p.numel() for p in trained) + averaged  # weights, two moments, their average
    networks = in_float32(net) + averaged
    if settings.mode == "large":  # sd.safetensors is a whole base model
        networks += in_float32(sd.unet, sd.vae, sd.text)
    whole = settings.keep * state + networks
    folder = settings.out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    print(f"disk: {in_bytes(whole)} in {settings.out}, of which a state of {in_bytes(state)} is "
          f"written every {settings.save_every} steps; {in_bytes(free)} are free")
    held = sum(path.stat().st_size for path in settings.out.rglob("*") if path.is_file())
    if free < whole + state - held:  # a new state is written before the one before it goes
        raise OSError(f"expected {in_bytes(whole + state)} of free disk for {settings.out}, "
                      f"there are {in_bytes(free)}")


def _fill(settings: Settings, choices: Choices) -> Settings:
    """Take those of the choices that the command line left open, and print the others' reasons."""
    choices = {name: choice for name, choice in choices.items() if getattr(settings, name) is None}
    tell(choices)
    return replace(settings, **{name: value for name, (value, _) in choices.items()})


def tell(choices: Choices) -> None:
    for name, (value, reason) in choices.items():
        if reason and parallel.rank() == 0:
            option = f"--{name.replace('_', '-')} {'' if value is True else value}"
            print(f"default {option:28} {reason}")
