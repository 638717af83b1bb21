"""The shipped model does what the documents claim."""

import pytest
import torch

from benchmarks import mottles
from data.circles import HELD_OUT, Circles
from evaluation.fidelity import control_fidelity
from unet import TINY
from vae import LATENT_SCALE
from weights import StableDiffusion, load_controlnet, load_stable_diffusion
from weights.tiny import CONTROLNET, SD, STUDENTS


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return load_stable_diffusion(SD)


def test_the_shipped_files_are_small(tiny):
    assert tiny.unet.config == TINY
    assert SD.stat().st_size < 35e6 and CONTROLNET.stat().st_size < 10e6
    assert all(path.stat().st_size < 10e6 for path in STUDENTS.iterdir())


@torch.no_grad()
def test_the_autoencoder_adds_no_noise_that_the_denoiser_would_have_to_make(tiny):
    circles = Circles(64, 16, first=HELD_OUT + 1000)
    _, logvar = tiny.vae.encode(torch.stack([circles[i]["target"] for i in range(16)]))
    assert ((0.5 * logvar).exp() * LATENT_SCALE).mean((0, 2, 3)).max() < 0.01


def test_the_channel_that_held_the_noise_is_the_one_that_does_not_show(capsys):
    mottles.main(["--images", "4"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    errors = {line[-4]: float(line[-2]) for line in lines if "channel" in line}
    undisturbed = next(float(line[-1]) for line in lines if line[0] == "as")
    assert errors.keys() == {"0", "1", "2", "3"}
    assert errors.pop("3") == undisturbed < 0.8 * min(errors.values())


@torch.no_grad()
def test_the_autoencoder_restores_held_out_pictures(tiny):
    circles = Circles(64, 16, first=HELD_OUT + 1000)
    images = torch.stack([circles[i]["target"] for i in range(16)])
    decoded = tiny.vae.decode(tiny.vae.encode(images)[0]).clamp(-1, 1)
    mse = ((decoded - images) / 2).square().mean((1, 2, 3))
    assert (-10 * torch.log10(mse)).mean() > 28


def test_the_shipped_teacher_obeys_its_condition_and_its_prompt(tiny):
    teacher, held_out = load_controlnet(CONTROLNET, tiny.unet), Circles(64, 8, first=HELD_OUT)
    result, chance = (
        control_fidelity(tiny.sampled(10), net, held_out) for net in (teacher, None))
    assert result["overlap"] > 0.85 and result["color_error"] < 25
    assert chance["overlap"] < 0.6
