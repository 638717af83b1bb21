"""The shipped model does what the README claims, and the README's commands are understood."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from data.circles import HELD_OUT, Circles
from evaluation.fidelity import control_fidelity
from unet import TINY
from weights import StableDiffusion, load_controlnet, load_stable_diffusion
from weights.tiny import CONTROLNET, SD, STUDENTS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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
        control_fidelity(tiny, net, held_out, steps=10) for net in (teacher, None))
    assert result["overlap"] > 0.85 and result["color_error"] < 25
    assert chance["overlap"] < 0.6


def commands() -> list[tuple[str, list[str]]]:
    """Every Python command of the README: the module's name and the arguments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    result = []
    for part in (part for line in lines for part in line.split("&&")):
        program, *words = shlex.split(part)
        if program.endswith("python") and "venv" not in words:
            module, *arguments = words[1:] if words[0] == "-m" else words
            result.append((module.removesuffix(".py"), arguments))
    return result


def test_every_command_of_the_readme_is_understood():
    assert len(commands()) >= 10
    for module, arguments in commands():
        importlib.import_module(module).parse(arguments)


def test_every_file_the_readme_names_exists():
    assert (ROOT / re.search(r"!\[.*?\]\((.*?)\)", README)[1]).exists()
    assert not [line for line in README.splitlines() if line and line.isupper()]
    rooms = "unet|vae|data|controlnet|kd|weights|tests|docs"
    for name in set(re.findall(rf"`((?:{rooms})/[\w./]*)`", README)):
        assert (ROOT / name).exists(), name
