"""From prompt and conditions to pictures: DDIM under guidance and control."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor
from tqdm import tqdm

from common.devices import CudaGraph
from controlnet.network import ControlNetwork
from diffusion import Sampling, classifier_free_guidance, ddim_sample
from unet import Features, UNet
from vae import DOWNSCALE, LATENT_CHANNELS, VAE


@dataclass
class Control:
    """One control network at work: its condition, its strength, and when it is on."""

    net: ControlNetwork
    condition: Tensor    # (B, 3, H, W) in [0, 1], or its E(c)
    scale: float = 1.0   # its 13 outputs are multiplied by this
    start: float = 0.0   # it is on from this fraction of the steps ...
    end: float = 1.0     # ... to this one

    def encoded(self, latents: Tensor) -> "Control":
        """With E(c) in the condition's place: the same in every step and both halves of guidance.
        Of the latents' dtype."""
        return replace(self, condition=self.net.hint(self.condition.to(latents.dtype), latents))


def is_on(i: int, steps: int, start: float, end: float) -> bool:
    """Whether step i lies wholly between these fractions of the steps."""
    return i / steps >= start and (i + 1) / steps <= end


def initial_latents(num: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """The noise that sampling starts from, (num, 4, height/8, width/8), on the CPU in float32: the
    same seed gives the same picture as in diffusers."""
    shape = (num, LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE)
    return torch.randn(shape, generator=generator)


def second_half(features: Features) -> Features:
    """The half of a guided batch that has the prompt."""
    skips = [skip.chunk(2)[1] for skip in features.skips]
    return Features(skips, *(tensor.chunk(2)[1] for tensor in features[1:]))


@lru_cache
def guess_scales(outputs: int) -> list[float]:
    """Guess mode's, from 0.1 (the finest output) to 1 (the middle), evenly in the logarithm."""
    return torch.logspace(-1, 0, outputs).tolist()


def replaces_features(control: Control, guess: bool) -> bool:
    """Whether the decoder gets the encoder's outputs as a network has changed them, because nothing
    scales their differences. It spares an encoder-connected network the second encoder."""
    return control.net.connects_to == "encoder" and control.scale == 1 and not guess


def repeated(condition: Tensor, x: Tensor) -> Tensor:
    """For each half of a guided batch, in its dtype."""
    return condition.to(x.dtype).repeat(len(x) // len(condition), 1, 1, 1)


def controlled(unet: UNet, controls: Sequence[Control], guess: bool = False) -> Callable:
    """The denoiser under control: a function of latents (kB, 4, H, W), timesteps (kB,) and text
    states (kB, N, D).

    Guidance doubles the batch (k = 2), and both halves get the same condition. The outputs of
    several control networks are summed. `guess` is guess mode by diffusers' rule: the unconditional
    half gets no control, so that guidance amplifies the control itself and not only the prompt, and
    the 13 outputs are scaled.
    """

    def predict(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        if len(controls) == 1 and replaces_features(controls[0], guess):
            c, = controls
            condition = repeated(c.condition, x)
            return unet.decode(c.net.changed_features(x, condition, timesteps, context, unet))
        features = unet.encode(x, timesteps, context)
        if not controls:
            return unet.decode(features)
        outputs = len(features.skips) + 1
        scales = guess_scales(outputs) if guess else [1.0] * outputs
        prompted = features
        only_prompted = guess and len(x) == 2 * len(controls[0].condition)
        if only_prompted:
            prompted = second_half(features)
            x, timesteps = x.chunk(2)[1], timesteps.chunk(2)[1]
        total = [0.0] * outputs
        for c in controls:
            control = c.net.control(x, repeated(c.condition, x), timesteps, prompted.context, unet,
                                    prompted)
            total = [before if output is None else before + c.scale * scale * output
                     for before, scale, output in zip(total, scales, control, strict=True)]
        if only_prompted:
            total = [torch.cat([torch.zeros_like(output), output]) for output in total]
        return unet.decode(features, total)

    return predict


def batch_size_for(height: int, width: int) -> int:
    """How many pictures to work on at once when nothing is trained: at most the memory of 32
    pictures of 64 x 64, so that measuring never needs more than a training step does."""
    return max(1, 32 * 64**2 // (height * width))


@torch.no_grad()
def generate(
    unet: UNet, vae: VAE, controls: Sequence[Control], noise: Tensor, context: Tensor,
    negative_context: Tensor, sampling: Sampling, *, guess: bool = False, eta: float = 0.0,
    generator: torch.Generator | None = None, step_done: Callable[[], object] | None = None,
    predicted: Callable[[Tensor], object] | None = None, cuda_graph: bool = False,
) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] from noise (B, 4, H/8, W/8) and text states (B, N, D), under
    `controls` (none: the base model alone).

    `negative_context`: the text states that guidance moves away from. UNet and control run in the
    UNet's dtype, the sampler in the noise's. `step_done` is called after every step,
    `predicted` with the clean latents as each step predicts them. `cuda_graph`: record a step on
    the GPU and play it back, faster for a little more memory.
    """
    dtype = next(unet.parameters()).dtype
    controls = [c.encoded(noise.to(dtype)) for c in controls]
    step_index = count()

    @lru_cache
    def denoiser(active: tuple[int, ...]) -> Callable:
        function = controlled(unet, [controls[i] for i in active], guess)
        return CudaGraph(function) if cuda_graph else function

    def predict(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        i = next(step_index)
        active = tuple(number for number, c in enumerate(controls)
                       if is_on(i, sampling.steps, c.start, c.end))
        noise_pred = denoiser(active)(x.to(dtype), timesteps, context)
        if step_done:
            step_done()
        return noise_pred.to(x.dtype)

    predict_guided = classifier_free_guidance(predict, context, negative_context, sampling.guidance)
    latents = ddim_sample(predict_guided, noise, sampling.steps, spacing=sampling.spacing, eta=eta,
                          prediction=sampling.prediction, generator=generator, predicted=predicted)
    return vae.to_images(latents.to(next(vae.parameters()).dtype)).float()


def sample_picture(
    sd, controls: Sequence[Control], height: int, width: int, context: Tensor,
    negative_context: Tensor, *, seed: int, guess: bool = False, eta: float = 0.0,
    step_done: Callable[[], object] | None = None,
    predicted: Callable[[Tensor], object] | None = None, cuda_graph: bool = False,
) -> Tensor:
    """The picture (3, H, W) in [0, 1] that belongs to a seed, from text states (1, N, D).

    `sd`: a base model (.unet, .vae, .sampling). The rest is as in `generate`. Raises
    FloatingPointError if values overflowed: they would be written as black.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = initial_latents(1, height, width, generator).to(context.device)
    picture = generate(
        sd.unet, sd.vae, controls, noise, context, negative_context, sd.sampling, guess=guess,
        eta=eta, generator=generator, step_done=step_done, predicted=predicted,
        cuda_graph=cuda_graph)[0]
    if not picture.isfinite().all():
        raise FloatingPointError("the picture has values that are not numbers: try a guidance "
                                 f"below {sd.sampling.guidance:g}, or --precision float32")
    return picture


@torch.no_grad()
def restored(vae: VAE, images: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] on the CPU: what the autoencoder makes of images in [-1, 1],
    the best that any denoiser of its latents can do."""
    batches = images.split(batch_size_for(*images.shape[-2:]))
    decoded = [vae.decode(vae.encode(batch.to(next(vae.parameters())))[0]).float().cpu()
               for batch in batches]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def sample_pictures(sd, net: ControlNetwork | None, conditions: Tensor, prompts: Sequence[str], *,
                    seed: int, name: str = "") -> Tensor:
    """Pictures (N, 3, H, W) in [0, 1] on the CPU, one for each condition (N, 3, H, W) and prompt.

    `sd`: a base model (.unet, .vae, .text, .sampling). `net` None: without control. There is no
    guidance for empty prompts. The noise that picture i starts from depends
    on `seed` and i alone.
    """
    height, width = conditions.shape[-2:]
    batch_size = batch_size_for(height, width)
    device = next(sd.unet.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    merged = net and net.for_inference()
    pictures = []
    for i in tqdm(range(0, len(prompts), batch_size), desc=f"sampling {name}", leave=False):
        batch = list(prompts[i : i + batch_size])
        condition = conditions[i : i + batch_size].to(device)
        noise = initial_latents(len(batch), height, width, generator).to(device)
        context = sd.text.encode(batch)
        pictures.append(generate(
            sd.unet, sd.vae, [Control(merged, condition)] if net else [], noise, context,
            sd.text.encode([""]).expand_as(context),
            sd.sampling if any(batch) else replace(sd.sampling, guidance=0.0)).cpu())
    return torch.cat(pictures)
