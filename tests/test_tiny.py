"""The shipped model does what the documents claim."""

import pytest
import torch

from data.circles import HELD_OUT, Circles
from evaluation.fidelity import control_fidelity
from unet import TINY
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
