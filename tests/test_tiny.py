"""The shipped model does what the README says of it, and the README's commands are ones the
programs understand."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import train
from data.circles import HELD_OUT, Circles
from evaluation.fidelity import control_fidelity
from unet import TINY
from weights import StableDiffusion, load_controlnet, load_stable_diffusion

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return load_stable_diffusion(train.TINY / "sd.safetensors")


def test_the_shipped_files_are_small(tiny):
    assert tiny.unet.config == TINY
    assert (train.TINY / "sd.safetensors").stat().st_size < 35e6 and (
        train.TINY / "controlnet.safetensors").stat().st_size < 10e6


@torch.no_grad()
def test_the_autoencoder_restores_held_out_pictures(tiny):
    circles = Circles(64, 16, first=HELD_OUT + 1000)
    images = torch.stack([circles[i]["target"] for i in range(16)])
    mse = ((tiny.vae.decode(tiny.vae.encode(images)[0]).clamp(-1, 1) - images) / 2).square().mean(
        (1, 2, 3))
    assert (-10 * torch.log10(mse)).mean() > 28


def test_the_shipped_teacher_obeys_its_condition_and_its_prompt(tiny):
    teacher = load_controlnet(train.TINY / "controlnet.safetensors", tiny.unet)
    result, chance = (control_fidelity(tiny, net, count=8, steps=10) for net in (teacher, None))
    assert result["overlap"] > 0.85 and result["color_error"] < 25
    assert chance["overlap"] < 0.6


def commands() -> list[tuple[str, list[str]]]:
    """Every Python command of the README: the module's name and the arguments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    lines = [
        part.strip() for language, block in blocks if not language for line in block.splitlines()
        for part in line.split("&&")
    ]
    words = [line[1:] for line in map(shlex.split, lines) if line[0].endswith("python")]
    return [(line[1], line[2:]) if line[0] == "-m" else (line[0].removesuffix(".py"), line[1:])
            for line in words if line[1] != "venv"]


def test_every_command_of_the_readme_is_understood():
    assert len(commands()) >= 10
    for module, arguments in commands():
        importlib.import_module(module).parse(arguments)


def test_every_file_the_readme_names_exists():
    assert (ROOT / re.search(r"!\[.*?\]\((.*?)\)", README)[1]).exists()
    assert not [line for line in README.splitlines() if line and line.isupper()]
    for name in set(
            re.findall(r"`((?:unet|vae|data|controlnet|kd|weights|tests|docs)/[\w./]*)`", README)):
        assert (ROOT / name).exists(), name
