"""Sampling agrees with diffusers: the schedule, every step of DDIM, and the whole of `sample.py`, pixel for pixel."""

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from diffusers import StableDiffusionControlNetPipeline
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import sample
from controlnet import ControlNet
from diffusion import ALPHA_BAR, ddim_sample, ddim_timesteps, guided
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import StableDiffusion, save_controlnet, save_stable_diffusion
from weights.clip import CLIPText, TextConfig

pytestmark = pytest.mark.usefixtures("no_grad")


def test_schedule_has_the_published_values():
    assert ALPHA_BAR[0].item() == pytest.approx(0.99915, rel=1e-12)
    assert ALPHA_BAR[999].item() == pytest.approx(0.0046601, rel=1e-5)
    assert relative_error(ALPHA_BAR.float(), oracle.scheduler().alphas_cumprod) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 20, 30, 48, 50, 77, 333, 600, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_are_those_of_diffusers(spacing, steps):
    scheduler = oracle.scheduler(spacing=spacing)
    scheduler.set_timesteps(steps)
    assert ddim_timesteps(steps, spacing) == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("spacing", "steps", "prediction", "eta"),
    [
        ("leading", 20, "noise", 0.0),
        ("leading", 20, "v", 0.0),
        ("leading", 20, "noise", 1.0),
        ("leading", 20, "v", 0.5),
        ("leading", 30, "noise", 0.0),
        ("trailing", 20, "noise", 0.0),
        ("trailing", 7, "v", 1.0),
    ],
)
def test_every_step_of_ddim_with_guidance_is_diffusers_step(spacing, steps, prediction, eta):
    generator = torch.Generator().manual_seed(0)
    start, kernel = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(4, 4, 3, 3, generator=generator) / 6
    context, negative = torch.randn(2, 2, 77, 16, generator=generator)

    def denoiser(x, t, context):  # stands for a UNet: depends on all it is given
        return torch.tanh(F.conv2d(x, kernel, padding=1) + (context.mean(dim=(1, 2)) + t / 1000)[:, None, None, None])

    predict, ours = guided(denoiser, context, negative, 7.5), []

    def recorded(x, t):
        ours.append(x)
        return predict(x, t)

    final = ddim_sample(recorded, start, ddim_timesteps(steps, spacing), eta=eta, prediction=prediction, generator=torch.Generator().manual_seed(1))

    scheduler, generator, theirs = oracle.scheduler(prediction, spacing), torch.Generator().manual_seed(1), [start]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        without, with_prompt = (denoiser(theirs[-1], t.expand(2), states) for states in (negative, context))
        theirs.append(scheduler.step(without + 7.5 * (with_prompt - without), t, theirs[-1], eta=eta, generator=generator).prev_sample)

    assert len(ours) == steps
    assert max(relative_error(a, b) for a, b in zip([*ours, final], theirs, strict=True)) < 1e-5


def random_model(family: str) -> StableDiffusion:
    """A small Stable Diffusion 1.x or 2.x (which here predicts v) with random weights."""
    heads = {"1.x": {"num_heads": 4}, "2.x": {"num_heads": None, "head_dim": 64, "linear_projections": True}}[family]
    unet = UNet(UNetConfig(model_channels=64, channel_mult=(1, 1, 1, 1), num_res_blocks=1, context_dim=64, groups=8, **heads))
    vae = VAE(VAEConfig(channels=16, channel_mult=(1, 2, 2, 2), num_res_blocks=1, groups=4))
    text = CLIPText(TextConfig(width=64, layers=3, openclip=family == "2.x"))
    for seed, network in enumerate((unet, vae, text)):
        randomize(network, seed)
    return StableDiffusion(unet, vae, text, prediction="v" if family == "2.x" else "noise")


def diffusers_pipeline(sd: StableDiffusion, net: ControlNet, checkpoint: Path, controlnet: Path, spacing: str) -> StableDiffusionControlNetPipeline:
    """diffusers with the tensors of our two files."""
    tensors = load_file(checkpoint)
    text = oracle.text(sd.text.config, tensors)
    if sd.text.config.openclip:  # as published for diffusers: without the last layer, so that the last hidden state is the penultimate one
        transformer = oracle.text_transformer(text)
        transformer.encoder.layers = transformer.encoder.layers[:-1]
    pipeline = StableDiffusionControlNetPipeline(
        vae=oracle.vae(sd.vae.config, tensors),
        text_encoder=text,
        tokenizer=oracle.tokenizer(checkpoint.parent, sd.text.config.openclip),
        unet=oracle.unet(sd.unet.config, tensors),
        controlnet=oracle.controlnet(net.config, load_file(controlnet)),
        scheduler=oracle.scheduler(sd.prediction, spacing),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("family", "steps", "guidance", "scale", "eta", "spacing", "num"),
    [
        ("1.x", 20, 5.0, 1.0, 0.0, "leading", 1),
        ("2.x", 20, 5.0, 1.0, 0.0, "leading", 1),
        ("1.x", 7, 1.0, 0.5, 1.0, "trailing", 2),
    ],
)
def test_sample_py_makes_the_picture_that_diffusers_makes(tmp_path, family, steps, guidance, scale, eta, spacing, num):
    sd = random_model(family)
    net = randomize(ControlNet(sd.unet.config), seed=3)
    checkpoint, controlnet = tmp_path / "sd.safetensors", tmp_path / "controlnet.safetensors"
    save_stable_diffusion(checkpoint, sd, dtype=torch.float32)
    save_controlnet(controlnet, net)
    condition = Image.new("RGB", (64, 64))
    ImageDraw.Draw(condition).ellipse((12, 20, 44, 52), outline="white")
    condition.save(tmp_path / "condition.png")
    prompt, negative = "red circle with blue background", "blurry, low quality"

    def ours(control) -> np.ndarray:
        options = {
            "checkpoint": checkpoint, "controlnet": control, "condition": tmp_path / "condition.png", "out": tmp_path / "out.png", "prompt": prompt,
            "negative-prompt": negative, "steps": steps, "guidance": guidance, "scale": scale, "eta": eta, "spacing": spacing, "num": num, "seed": 3,
            "device": "cpu",
        }  # fmt: skip
        sample.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
        names = ["out.png"] if num == 1 else [f"out-{i}.png" for i in range(num)]
        return np.stack([np.asarray(Image.open(tmp_path / name)) for name in names]).astype(int)

    pipeline = diffusers_pipeline(sd, net, checkpoint, controlnet, spacing)
    images = pipeline(
        prompt, condition, negative_prompt=negative, num_inference_steps=steps, guidance_scale=guidance, controlnet_conditioning_scale=scale, eta=eta,
        num_images_per_prompt=num, generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    theirs = np.stack([np.asarray(image) for image in images]).astype(int)

    picture = ours(controlnet)
    assert picture.shape == (num, 64, 64, 3)
    assert np.abs(picture - theirs).max() <= 1
    assert (picture != theirs).mean() < 0.01  # where a value falls just beside half a level, rounding errors decide
    assert picture.std() > 20 and np.isin(picture, (0, 255)).mean() < 0.2  # a picture, not black, white or grey
    assert np.abs(picture - ours("none")).mean() > 5  # the control counts
