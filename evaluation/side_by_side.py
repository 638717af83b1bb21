"""Networks side by side on one condition: their pictures, how each came about, and what they cost.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from common.devices import DTYPES, default_precision
from controlnet import ControlNetwork
from controlnet.sampling import Control, sample_picture
from weights import StableDiffusion, load_controlnet, load_stable_diffusion

NO_CONTROL = "no control"


@dataclass
class Model:
    """A base model and control networks, by name and size; None: the base without control."""

    sd: StableDiffusion
    networks: dict[str, ControlNetwork | None]


@dataclass
class Made:
    """What one network made."""

    name: str
    picture: Tensor        # (3, H, W) in [0, 1], on the CPU
    latents: list[Tensor]  # (1, 4, H/8, W/8), clean, as each step predicted them
    milliseconds: float


def load_model(checkpoint: Path, networks: dict[str, Path], where: torch.device,
               given: Mapping[str, object] | None = None) -> Model:
    """A base model and its networks by name, on a device and in its precision. `given`: how it is
    sampled, see `load_stable_diffusion`. Raises ValueError for a wrong file."""
    dtype = DTYPES[default_precision(where)[0]]
    sd = load_stable_diffusion(checkpoint, dtype, given).to(where)
    loaded: dict[str, ControlNetwork | None] = {NO_CONTROL: None}
    for name, path in networks.items():
        net = load_controlnet(path, sd.unet, dtype)
        stored = sum(parameter.numel() for parameter in net.parameters())
        loaded[f"{name}, {stored / 1e6:.2f} M"] = net.to(where).for_inference()
    return Model(sd, loaded)


@torch.no_grad()
def sample_each(model: Model, names: Sequence[str], condition: Tensor, prompt: str, *, seed: int,
                steps: int, scale: float = 1.0, start: float = 0.0, end: float = 1.0,
                step_done: Callable[[], object] | None = None) -> Iterator[Made]:
    """What each of the networks makes of a condition (3, H, W) and a prompt, one after the other:
    the picture that sample.py makes. Raises ValueError for no networks or a control that ends
    before it starts."""
    if not names:
        raise ValueError("expected a network, none is chosen")
    if start >= end:
        raise ValueError(f"expected the control to start before it ends, got {start:g} and {end:g}")
    sd = model.sd.sampled(steps)
    context, negative_context = sd.text.encode([prompt]), sd.text.encode([""])
    for name in names:
        net, latents, before = model.networks[name], [], perf_counter()
        controls = [Control(net, condition[None].to(context.device), scale, start, end)]
        picture = sample_picture(
            sd, controls if net else [], *condition.shape[1:], context, negative_context, seed=seed,
            step_done=step_done, predicted=latents.append)
        picture = picture.cpu()  # waits for a GPU
        yield Made(name, picture, latents, 1000 * (perf_counter() - before))


@torch.no_grad()
def at_step(model: Model, made: Made, step: int) -> Tensor:
    """The picture (3, H, W) that the step predicted, counted from 1; from the last one on, the
    picture itself."""
    if step >= len(made.latents):
        return made.picture
    vae = model.sd.vae
    return vae.to_images(made.latents[step - 1].to(next(vae.parameters()).dtype))[0].float().cpu()
