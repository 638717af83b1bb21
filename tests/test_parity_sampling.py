"""Sampling agrees with diffusers: the schedule, every step of DDIM, and the whole of `sample.py`,
pixel for pixel."""

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, relative_error
from PIL import Image, ImageDraw

import sample
from controlnet import ControlNet
from diffusion import ALPHA_BAR, Sampling, classifier_free_guidance, ddim_sample, ddim_timesteps
from text import CLIPText, TextConfig
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import StableDiffusion, save_controlnet, save_stable_diffusion

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
        ("leading", 20, "epsilon", 0.0),
        ("leading", 20, "v", 0.0),
        ("leading", 20, "epsilon", 1.0),
        ("leading", 20, "v", 0.5),
        ("leading", 30, "epsilon", 0.0),
        ("trailing", 20, "epsilon", 0.0),
        ("trailing", 10, "v", 1.0),
    ],
)
def test_every_step_of_ddim_with_guidance_is_diffusers_step(spacing, steps, prediction, eta):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 4, 8, 8, generator=generator)
    kernel = torch.randn(4, 4, 3, 3, generator=generator) / 6
    context, negative = torch.randn(2, 2, 77, 16, generator=generator)

    def denoiser(x, t, context):  # stands for a UNet: depends on all its inputs
        shift = context.mean(dim=(1, 2)) + t / 1000
        return torch.tanh(F.conv2d(x, kernel, padding=1) + shift[:, None, None, None])

    predict, ours = classifier_free_guidance(denoiser, context, negative, 7.5), []

    def recorded(x, t):
        ours.append(x)
        return predict(x, t)

    final = ddim_sample(recorded, start, steps, spacing=spacing, eta=eta, prediction=prediction,
                        generator=torch.Generator().manual_seed(1))

    scheduler, theirs = oracle.scheduler(prediction, spacing), [start]
    generator = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(steps)
    # begins with the noise's own size and ends without noise, as the next test's scheduler does
    if spacing == "trailing":
        theirs = [(1 - ALPHA_BAR[999]).sqrt().item() * start]
    for t in scheduler.timesteps:
        without, with_prompt = (
            denoiser(theirs[-1], t.expand(2), states) for states in (negative, context))
        guided = without + 7.5 * (with_prompt - without)
        step = scheduler.step(guided, t, theirs[-1], eta=eta, generator=generator)
        theirs.append(step.prev_sample)

    assert len(ours) == steps
    assert max(relative_error(a, b) for a, b in zip([*ours, final], theirs, strict=True)) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_trailing_spacing_is_the_euler_scheduler_of_sd_turbo(steps, prediction):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    kernel = torch.randn(4, 4, 3, 3, generator=generator) / 6

    def denoiser(x, t):
        return torch.tanh(F.conv2d(x, kernel, padding=1) + t.view(-1, 1, 1, 1) / 1000)

    ours = ddim_sample(denoiser, noise, steps, spacing="trailing", prediction=prediction)

    scheduler = oracle.euler(prediction)
    scheduler.set_timesteps(steps)
    theirs = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noise_pred = denoiser(scheduler.scale_model_input(theirs, t), t.expand(2))
        theirs = scheduler.step(noise_pred, t, theirs).prev_sample
    assert scheduler.timesteps.tolist() == ddim_timesteps(steps, "trailing")
    assert relative_error(ours, theirs) < 1e-5


def random_model(family: str) -> StableDiffusion:
    """A small Stable Diffusion 1.x, 2.x (which here predicts v) or SD-Turbo with random weights."""
    heads = {"num_heads": 4}
    if family != "1.x":
        heads = {"num_heads": None, "head_dim": 64, "linear_projections": True}
    unet = UNet(UNetConfig(model_channels=64, channel_mult=(1, 1, 1, 1), num_res_blocks=1,
                           context_dim=64, groups=8, **heads))
    vae = VAE(VAEConfig(channels=16, channel_mult=(1, 2, 2, 2), num_res_blocks=1, groups=4))
    text = CLIPText(TextConfig(width=64, layers=3, openclip=family != "1.x"))
    for seed, network in enumerate((unet, vae, text)):
        randomize(network, seed)
    prediction = "v" if family == "2.x" else "epsilon"
    return StableDiffusion(unet, vae, text, Sampling(prediction=prediction))


# Family, control networks, options of sample.py, and the same for diffusers besides steps and
# guidance.
CASES = {
    "defaults": ("1.x", 1, "--steps 20 --guidance 5", {}),
    "SD 2.x, v": ("2.x", 1, "--steps 20 --guidance 5", {}),
    "SD-Turbo": ("turbo", 1, "--steps 2 --guidance 0 --spacing trailing", {}),
    "eta, scale, a seed per picture": (
        "1.x", 1, "--steps 7 --guidance 1 --eta 1 --scale 0.5 --num 2",
        {"eta": 1.0, "controlnet_conditioning_scale": 0.5, "num_images_per_prompt": 2}),
    "guess mode": ("1.x", 1, "--steps 4 --guidance 5 --guess", {"guess_mode": True}),
    "guess mode without guidance": (
        "1.x", 1, "--steps 4 --guidance 1 --guess", {"guess_mode": True}),
    "a part of the steps": (
        "1.x", 1, "--steps 7 --guidance 3 --start 0.25 --end 0.75",
        {"control_guidance_start": 0.25, "control_guidance_end": 0.75}),
    "a condition of another size": (
        "1.x", 1, "--steps 3 --guidance 3 --width 96 --height 48", {"width": 96, "height": 48}),
    "two control networks": (
        "1.x", 2, "--steps 6 --guidance 3 --scale 0.8 0.4 --start 0.0 0.3 --end 0.6 1.0",
        {"controlnet_conditioning_scale": [0.8, 0.4], "control_guidance_start": [0.0, 0.3],
         "control_guidance_end": [0.6, 1.0]}),
    "two control networks, guess mode": (
        "1.x", 2, "--steps 4 --guidance 3 --guess --scale 0.8 0.4",
        {"controlnet_conditioning_scale": [0.8, 0.4], "guess_mode": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_sample_py_makes_the_picture_that_diffusers_makes(tmp_path, case):
    family, networks, options, theirs_options = CASES[case]
    options = options.split()
    theirs_options = theirs_options | {"num_inference_steps": int(options[1]),
                                       "guidance_scale": float(options[3])}
    sd = random_model(family)
    nets = [randomize(ControlNet(sd.unet.config), seed=3 + i) for i in range(networks)]
    checkpoint, controlnets, pictures = tmp_path / "sd.safetensors", [], []
    save_stable_diffusion(checkpoint, sd, dtype=torch.float32)
    for i, net in enumerate(nets):
        controlnets.append(tmp_path / f"controlnet-{i}.safetensors")
        save_controlnet(controlnets[-1], net)
        condition = Image.new("RGB", (64, 64))
        ImageDraw.Draw(condition).ellipse((12 + 9 * i, 20, 44, 52 - 9 * i), outline="white")
        condition.save(tmp_path / f"condition-{i}.png")
        pictures.append(condition)
    prompt, negative = "red circle with blue background", "blurry, low quality"

    def ours(*changes) -> np.ndarray:
        conditions = [tmp_path / f"condition-{i}.png" for i in range(networks)]
        arguments = ["--checkpoint", checkpoint, "--controlnet", *controlnets,
                     "--condition", *conditions, "--out", tmp_path / "out.png",
                     "--prompt", prompt, "--negative-prompt", negative,
                     "--seed", 3, "--device", "cpu", *options, *changes]
        sample.main([str(argument) for argument in arguments])
        paths = sorted(tmp_path.glob("out*.png"))
        return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)

    scheduler = oracle.euler() if family == "turbo" else oracle.scheduler(sd.sampling.prediction)
    theirs = oracle.pipeline(sd, checkpoint, controlnets, scheduler)
    num = theirs_options.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(num)]
    condition = pictures if networks > 1 else pictures[0]
    images = theirs(prompt, condition, negative_prompt=negative, generator=generators,
                    **theirs_options).images
    theirs = np.stack([np.asarray(image) for image in images]).astype(int)

    picture = ours()
    height, width = theirs_options.get("height", 64), theirs_options.get("width", 64)
    assert picture.shape == theirs.shape == (num, height, width, 3)
    assert np.abs(picture - theirs).max() <= 1
    # where a value falls just beside half a level, rounding errors decide
    assert (picture != theirs).mean() < 0.01
    # a picture, not black, white or grey
    assert picture.std() > 20 and np.isin(picture, (0, 255)).mean() < 0.2
    assert np.abs(picture - ours("--scale", 0)).mean() > 2  # the control counts
