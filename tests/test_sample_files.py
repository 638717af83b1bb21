"""What sample.py does with the files that are there and the words that people bring: nothing of
theirs is touched, and what is hardly meant is said."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from test_sample import write_condition

import sample
from common import cli
from data.pictures import write_png
from diffusion import Sampling
from text import windows_for
from text.prompts import taken_literally
from text.tokenizer import tokenizer

# --- What is there stays ---


def small(tmp_path, *arguments: str) -> None:
    sample.main(["--steps", "1", "--spacing", "trailing", "--height", "32", "--width", "32",
                 "--out", str(tmp_path / "out.png"), *arguments])


@pytest.mark.parametrize("option", ["--condition", "--canny", "--annotator"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_an_output_that_is_an_input_is_refused(tmp_path, option, more):
    path = write_condition(tmp_path / "out.png", 64, 64)
    before = (tmp_path / "out.png").read_bytes()
    with pytest.raises(ValueError, match="another name in --out, .*out.png is what the picture is"):
        small(tmp_path, option, *(["lines"] if option == "--annotator" else []), path, *more)
    assert (tmp_path / "out.png").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


def test_what_sample_py_did_not_make_stays_unless_told_to_overwrite(tmp_path):
    holiday = tmp_path / "out.png"
    before = Image.new("RGB", (8, 8), "red")
    before.save(holiday)
    with pytest.warns(UserWarning, match="out.png stays as it is, the picture will be .*out-1.png"):
        small(tmp_path)
    with Image.open(holiday) as now, Image.open(tmp_path / "out-1.png") as made:
        assert now.tobytes() == before.tobytes() and made.size == (32, 32)
    small(tmp_path, "--overwrite")
    with Image.open(holiday) as now:
        assert now.size == (32, 32)
    small(tmp_path, "--seed", "1")  # its own picture is replaced
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out-1.png", "out.png"]


def test_the_picture_of_like_stays_where_no_other_name_is_given(tmp_path):
    small(tmp_path)
    before = (tmp_path / "out.png").read_bytes()
    small(tmp_path, "--like", str(tmp_path / "out.png"), "--seed", "3")
    assert (tmp_path / "out.png").read_bytes() == before and (tmp_path / "out-1.png").exists()


def test_another_condition_beside_the_output_stays_and_the_same_one_is_written_once(tmp_path):
    photo = write_condition(tmp_path / "photo.png", 64, 64)
    mine = write_condition(tmp_path / "out-condition.png", 8, 8)
    before = (tmp_path / "out-condition.png").read_bytes()
    small(tmp_path, "--canny", photo)
    small(tmp_path, "--canny", photo)
    assert (tmp_path / "out-condition.png").read_bytes() == before, mine
    assert sorted(file.name for file in tmp_path.glob("*condition*")) == [
        "out-condition-1.png", "out-condition.png"]


def test_an_output_that_cannot_be_written_is_found_out_before_anything_is_loaded(
        tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sample, "load", None)
    with pytest.raises(NotADirectoryError, match="out.png cannot be written: .*file is no folder"):
        sample.main(["--out", str(tmp_path / "file" / "out.png")])
    with pytest.raises(OSError, match="out.png cannot be written"):
        sample.main(["--out", "/proc/1/out.png"])


# --- How a picture remembers ---


def test_other_programs_read_how_a_picture_was_made_as_a1111_writes_it(tmp_path):
    small(tmp_path, "--prompt", "a, red: circle", "--negative-prompt=-blurry", "--seed", "5")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.text["parameters"] == (
            "a, red: circle\nNegative prompt: -blurry\nSteps: 1, Sampler: DDIM, CFG scale: 2.0, "
            "Seed: 5, Size: 32x32, Model: sd")


def test_like_reads_a_picture_of_a1111_and_says_what_it_does_not_take(tmp_path):
    text = ("a house, (blue:1.2)\nby the sea\nNegative prompt: people\ncars\nSteps: 3, Sampler: "
            'Euler a, CFG scale: 7.5, Seed: 41, Size: 48x32, Model hash: abc, Model: "a, b"')
    write_png(tmp_path / "theirs.png", Image.new("RGB", (8, 8)), {"parameters": text})
    with pytest.warns(UserWarning, match=r'are taken, .* is not \(Model "a, b", Sampler Euler a\)'):
        settings, _ = sample.parse(["--like", str(tmp_path / "theirs.png"), "--seed", "2"])
    assert (settings.prompt, settings.negative_prompt) == (
        "a house, (blue:1.2)\nby the sea", "people\ncars")
    assert (settings.sample_steps, settings.guidance, settings.seed) == (3, 7.5, 2)
    assert (settings.width, settings.height) == (48, 32)


@pytest.mark.parametrize(("chunks", "message"), [
    ({"prompt": "{}", "workflow": "{}"}, "holds a ComfyUI workflow, which is not read"),
    ({"parameters": "a house"}, "has no line of settings"),
])
def test_like_refuses_text_that_it_cannot_read(tmp_path, chunks, message):
    write_png(tmp_path / "theirs.png", Image.new("RGB", (8, 8)), chunks)
    with pytest.raises(ValueError, match=message):
        sample.parse(["--like", str(tmp_path / "theirs.png")])


def test_like_finds_files_from_another_folder(tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "runs").mkdir(parents=True)
    elsewhere.mkdir()
    write_condition(project / "c.png", 64, 64)
    Image.new("RGB", (64, 64)).save(elsewhere / "c.png")  # another one of that name
    monkeypatch.chdir(project)
    small(project / "runs", "--condition", "c.png")
    monkeypatch.chdir(elsewhere)
    settings, _ = sample.parse(["--like", "../project/runs/out.png"])
    assert settings.condition == [str(project / "c.png")]
    settings, _ = sample.parse(["--like", "../project/runs/out.png", "--condition", "d.png"])
    assert settings.condition == ["d.png"]


# --- Options ---


def test_a_text_may_begin_with_a_dash_and_a_missing_one_is_noticed(capsys):
    settings, _ = sample.parse(["--negative-prompt", "-blurry", "--prompt", "--x", "--seed", "3"])
    assert (settings.negative_prompt, settings.prompt, settings.seed) == ("-blurry", "--x", 3)
    with pytest.raises(SystemExit):
        sample.parse(["--prompt", "--seed", "3"])
    assert "expected one argument" in capsys.readouterr().err


def test_a_random_seed_is_printed_and_remembered(tmp_path, capsys):
    small(tmp_path, "--seed", "-1")
    seed = capsys.readouterr().out.split()[1]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.text["seed"] == seed and f"--seed={seed}" in picture.text["arguments"]
    with pytest.raises(SystemExit):
        sample.parse(["--seed", "-2"])


def test_a_condition_of_black_lines_on_white_is_noticed_and_turned_round(tmp_path):
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[20:24] = 255
    Image.fromarray(lines).save(tmp_path / "lines.png")
    Image.fromarray(255 - lines).save(tmp_path / "dark.png")
    with pytest.warns(UserWarning, match="94% of the condition .*dark.png is white: .*--invert"):
        dark = sample.read_condition(tmp_path / "dark.png", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = sample.read_condition(tmp_path / "lines.png", False)
        assert torch.equal(sample.read_condition(tmp_path / "dark.png", True), right)
    assert torch.equal(1 - dark, right)


def test_a_transparent_condition_is_seen_on_black_and_turned_round_on_white(tmp_path):
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[20:24] = 255  # white lines; what is transparent holds no colour
    Image.fromarray(layer).save(tmp_path / "white.png")
    layer[20:24, :, :3] = 0
    Image.fromarray(layer).save(tmp_path / "black.png")
    expected = torch.zeros(3, 64, 64)
    expected[:, 20:24] = 1
    assert torch.equal(sample.read_condition(tmp_path / "white.png", False), expected)
    assert torch.equal(sample.read_condition(tmp_path / "black.png", True), expected)
    with pytest.raises(ValueError, match="black.png has black ones on a transparent ground"):
        sample.read_condition(tmp_path / "black.png", False)


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--steps", "1"], "begins at timestep 1 of 999"),
    (["--steps", "334"], "begins at timestep 667 of 999"),
    (["--steps", "501"], "begins at timestep 501 of 999"),
    (["--steps", "1", "--spacing", "trailing"], None),
    (["--steps", "20", "--start", "0.51", "--end", "0.6"], None),
    (["--steps", "20", "--start", "0.51", "--end", "0.54"],
     "never controls: no whole step of --steps 20 lies between --start 0.51 and --end 0.54"),
])  # fmt: skip
def test_settings_that_are_hardly_meant_are_noticed(arguments, expected):
    settings, _ = sample.parse(arguments)
    sampling = Sampling(**cli.sampling_given(settings))
    found = list(sample.warnings_of(settings, sampling))
    assert expected in found[0] if expected else not found


@pytest.mark.parametrize(("prompt", "parts"), [
    ("a (red:1.3) house, BREAK ((blue)) <lora:x:0.5>",
     ["(red:1.3)", "BREAK", "((blue))", "<lora:x:0.5>"]),
    ("[cat:dog:0.5], (sea : 0.8), embedding:easynegative",
     ["[cat:dog:0.5]", "(sea : 0.8)", "embedding:easynegative"]),
    ("a house (built 1920), do not break it [sic]: at 10:30", []),
])
def test_what_other_programs_understand_in_a_prompt_is_named_and_read_as_words(prompt, parts):
    assert taken_literally(prompt) == parts
    settings, _ = sample.parse([f"--negative-prompt={prompt}"])
    found = list(sample.warnings_of(settings, Sampling()))
    assert bool(found) == bool(parts) and all(repr(part) in found[0] for part in parts)


@torch.no_grad()
def test_a_long_prompt_is_read_in_windows_of_75_tokens(sd):
    words = [f"word{i % 7}" for i in range(100)]  # two tokens each
    text = " ".join(words)
    assert windows_for([text, "x"]) == 3 and windows_for(["", ""]) == 1
    tokens = sd.text.tokenize([text, "x"], 3)
    ids = sd.text.tokenize([text], 3)[:, 1:-1].flatten().tolist()
    assert tokens.shape == (6, 77) and ids[:200] == tokenizer().encode(text)
    states = sd.text.encode([text, "x"], 3)
    assert states.shape == (2, 231, sd.text.config.width)
    assert torch.allclose(states[0], sd.text(tokens[:3]).flatten(0, 1), atol=1e-5)
    assert torch.allclose(states[1], sd.text.encode(["x", "", ""]).flatten(0, 1), atol=1e-5)
    assert torch.equal(sd.text.encode(["x"], 1), sd.text.encode(["x"]))
