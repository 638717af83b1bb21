"""Training steps of `benchmarks.speed`: ours are those of train.py's loop, on prepared data."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import train
from benchmarks import speed_diffusers
from benchmarks.costs import BASES
from benchmarks.speed_measure import (
    CHANNELS_LAST,
    Side,
    channels_last,
    compare,
    dtype_of,
    name_compiled,
    random_base,
    random_control,
    random_inputs,
    twin,
)
from common.devices import DTYPES
from controlnet import ControlNet
from diffusion import q_sample
from kd.students import BUILDERS
from text import CLIP_VIT_L, CLIPText
from text.clip import TINY_TEXT
from training.memory import peak_bytes
from training.settings import Settings, parse
from unet import UNet
from vae import VAE, sample_latents
from weights import StableDiffusion


def training(args: Namespace) -> None:
    for batch in args.batch_sizes:
        training_task(f"training step, a ControlNet, batch {batch}", None, False, args, batch)


def distillation(args: Namespace) -> None:
    for batch in args.batch_sizes:
        for losses, layer_only in (("all losses", False), ("L_layer alone", True)):
            training_task(f"training step, {args.student}, {losses}, batch {batch}", args.student,
                          layer_only, args, batch)


def training_task(title: str, student: str | None, layer_only: bool, args: Namespace,
                  batch: int) -> None:
    """Ours is what train.py's loop does between two log lines, with prepared data."""
    precision = "float32" if args.precision == "tf32" else args.precision
    options = ["--device", args.device.type, *(
        ["--student", student, "--teacher", "tiny"] if student else [])]
    settings = replace(parse(options), precision=precision, accumulate=1, loss_layer=1.0)
    sd, net = random_base(args), random_control(student or "controlnet", args)
    teacher = random_control("controlnet", args, seed=4) if student else None
    data = random_inputs(args, batch)
    with torch.no_grad():
        moments = torch.stack(sd.vae.encode(data["pixels"]), dim=1)
        data |= {"moments": moments, "mean": moments[:, 0], "std": (moments[:, 1] / 2).exp()}
        data["context"] = sd.text(data["tokens"])
    train.freeze(sd.unet, sd.vae, sd.text, teacher)
    train.set_up(settings, sd, net, teacher)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    dtype = DTYPES[precision]
    theirs = [speed_diffusers.converted(network, dtype) for network in (sd.unet, sd.vae, sd.text)]
    theirs += [speed_diffusers.converted(net, torch.float32),
               teacher and speed_diffusers.converted(teacher, dtype)]
    ours = {"ours": ([sd.unet, net, teacher], optimizer)}
    if args.channels_last:
        copies = [network and channels_last(network) for network in (sd.unet, net, teacher)]
        own = torch.optim.AdamW(copies[1].parameters(), lr=1e-5, fused=True)
        ours[CHANNELS_LAST] = copies, own
    step = partial(our_step, sd=sd, data=data, layer_only=layer_only)
    diffusers = partial(diffusers_step, data=data, optimizer=optimizer, args=args,
                        layer_only=layer_only)
    sides = [step(name, settings, *networks) for name, networks in ours.items()]
    sides += [diffusers("diffusers", theirs, cached=False),
              diffusers("diffusers, cached", theirs, cached=True)]
    if args.compile:
        torch._dynamo.reset()
        compiled = [step("", replace(settings, compile=True), twins(networks), own)
                    for networks, own in ours.values()]
        name_compiled(compiled, sides)
        networks = twins(theirs)
        for network in filter(None, (networks[0], *networks[3:])):
            network.compile()
        compiled.append(diffusers("", networks, cached=True))
        name_compiled(compiled[-1:], sides[-1:])
        sides += compiled
    compare(title, sides, args)
    if args.device.type == "cuda":
        report_memory(settings, args, student, layer_only, batch)


def twins(networks: list[nn.Module | None]) -> list[nn.Module | None]:
    return [network and twin(network) for network in networks]


def our_step(name: str, settings: Settings, networks: list[nn.Module | None],
             optimizer: torch.optim.Optimizer, sd: StableDiffusion, data: dict[str, Tensor],
             layer_only: bool) -> Side:
    unet, net, teacher = networks
    sd = replace(sd, unet=unet)
    student, teacher_unet, trained = train.set_up(settings, sd, net, teacher)
    scaler = train.gradient_scaler(settings)
    empty_prompt, dropped = data["context"][0], torch.zeros_like(data["timesteps"]).bool()

    def backward() -> None:
        latents = sample_latents(*data["moments"].unbind(dim=1), data["sampling_noise"])
        noisy_latents = q_sample(latents, data["timesteps"], data["noise"])
        context = train.drop_prompts(data["context"], empty_prompt, dropped)
        inputs = noisy_latents, data["condition"], data["timesteps"], context
        train.forward_backward(settings, sd.unet, student, teacher_unet, inputs, data["noise"],
                               scaler, layer_only)

    def step() -> None:
        backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    modules = [module for module in (sd.unet, sd.vae, sd.text, net, teacher) if module]
    return Side(name, step, lambda: gradients(backward, optimizer), modules, optimizer)


def diffusers_step(name: str, networks: list[nn.Module], data: dict[str, Tensor],
                   optimizer: torch.optim.Optimizer, args: Namespace, layer_only: bool,
                   cached: bool) -> Side:
    composed = speed_diffusers.Training(networks, dtype_of(args), args.device, cached, layer_only)
    trained = optimizer.param_groups[0]["params"]

    def step() -> None:
        composed.backward(data)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    unet, vae, text, net, teacher = networks
    modules = [unet, net, *([] if cached else [vae, text]), *([teacher] if teacher else [])]
    return Side(name, step, lambda: gradients(lambda: composed.backward(data), optimizer), modules,
                optimizer)


def gradients(backward: Callable[[], None], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    backward()
    found = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
    optimizer.zero_grad()
    return found


def report_memory(settings: Settings, args: Namespace, student: str | None,
                  layer_only: bool, batch: int) -> None:
    """What `benchmarks.memory` counts for the step that was measured."""
    config, vae_config, _ = BASES[args.base]
    with torch.device("meta"):
        net, teacher = (BUILDERS[student] if student else ControlNet)(config), ControlNet(config)
        text = CLIPText(TINY_TEXT if args.base == "tiny" else CLIP_VIT_L)
        networks = UNet(config), VAE(vae_config), text, net, teacher if student else None
    counted, _ = peak_bytes(train.forward_backward, settings, *networks, args.resolution, batch,
                            layer_only)
    print(f"{'ours, counted':28}{'':62}{counted / 2**30:>10.2f}", flush=True)
