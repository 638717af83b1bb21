"""The sampling program: sizes, seeds, metadata, errors. That its pictures are right is test_parity_sampling.py's."""

import numpy as np
import pytest
import torch
from conftest import randomize
from PIL import Image

import sample
from controlnet import ControlNet
from data.cli import run
from data.pictures import write_png
from unet import TINY
from weights import save_controlnet


@pytest.fixture(scope="module")
def controlnet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("controlnet") / "controlnet.safetensors"
    save_controlnet(path, randomize(ControlNet(TINY), seed=12))
    return path


@pytest.fixture
def draw(base_file, controlnet_file, tmp_path):
    """Run sample.py with two steps; returns its first picture."""

    def draw(*arguments: str) -> Image.Image:
        sample.main(["--checkpoint", str(base_file), "--controlnet", str(controlnet_file), "--steps", "2", "--out", str(tmp_path / "out.png"), *arguments])
        with Image.open(next(tmp_path.glob("out*.png"))) as image:
            image.load()
            return image

    return draw


def write_condition(path, width: int, height: int) -> str:
    write_png(path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)))
    return str(path)


def test_without_condition_a_held_out_circle_is_drawn(draw, sd):
    picture = draw()
    assert picture.size == (sd.resolution, sd.resolution) and "circle with" in picture.text["prompt"]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 40), (136, 88)])
def test_any_size_divisible_by_8_works_and_is_the_conditions(draw, tmp_path, width, height):
    assert draw("--condition", write_condition(tmp_path / "c.png", width, height)).size == (width, height)


def test_a_condition_is_scaled_to_the_size_asked_for(draw, tmp_path):
    assert draw("--condition", write_condition(tmp_path / "c.png", 100, 50), "--width", "96", "--height", "48").size == (96, 48)


def test_the_same_seed_makes_the_same_picture_and_the_control_counts(draw):
    def pixels(*arguments):
        return np.array(draw("--prompt", "x", *arguments)).astype(int)

    first = pixels("--seed", "1")
    assert (first == pixels("--seed", "1")).all()
    for other in (["--seed", "2"], ["--seed", "1", "--scale", "0"], ["--seed", "1", "--controlnet", "none"], ["--seed", "1", "--guidance", "1"],
                  ["--seed", "1", "--eta", "1"], ["--seed", "1", "--negative-prompt", "y"]):  # fmt: skip
        assert (first != pixels(*other)).any(), other
    assert (pixels("--scale", "0") == pixels("--controlnet", "none")).all()


def test_several_pictures_are_written_to_numbered_files_that_say_how_they_were_made(draw, tmp_path):
    draw("--num", "2", "--seed", "3", "--prompt", "größe")
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["out-0.png", "out-1.png"]
    with Image.open(tmp_path / "out-0.png") as a, Image.open(tmp_path / "out-1.png") as b:
        assert (np.array(a) != np.array(b)).any()
        assert (a.text["prompt"], a.text["seed"], a.text["steps"], b.text["index"]) == ("größe", "3", "2", "1")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--condition", "odd.png"], "expected a height and width divisible by 8, got 50 x 100"),
    (["--condition", "nowhere.png"], "nowhere.png does not exist"),
    (["--condition", "broken.png"], "broken.png is not one or is damaged"),
    (["--steps", "0"], "expected a positive whole number"),
    (["--steps", "1001"], "expected 1 to 1000 sampling steps"),
    (["--num", "-2"], "expected a positive whole number"),
    (["--guidance", "nan"], "expected a number of at least 0"),
    (["--height", "60"], "divisible by 8"),
    (["--controlnet", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    (["--spacing", "sideways"], "invalid choice"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(draw, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_condition(tmp_path / "odd.png", 100, 50)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    try:
        code = run(lambda: draw(*arguments))
    except SystemExit as leaving:  # argparse
        code = leaving.code
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and message in errors[0] and "Traceback" not in err
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


def test_torch_draws_the_initial_noise_as_documented():
    latents = sample.initial_latents(2, 64, 48, torch.Generator().manual_seed(7))
    assert torch.equal(latents, torch.randn((2, 4, 8, 6), generator=torch.Generator("cpu").manual_seed(7)))
