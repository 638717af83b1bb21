"""The paper's prompt settings by name: which prompt sample.py and evaluate.py use, and what they
record of it."""

import json
import sys

import numpy as np
import pytest
from conftest import TWO_LEVELS, randomize, two_levels_file
from PIL import Image

import evaluate
import sample
from common.cli import run
from controlnet import ControlNet
from data import captions
from data.circles import HELD_OUT, Circles
from data.pictures import read_text, write_png
from evaluation import protocol
from evaluation.protocol import AUTOMATIC, DEFAULT, EMPTY, RIGHT, EvaluationSet
from text.prompts import DEFAULT_PROMPT
from weights import save_controlnet

SUFFIX = "best quality, extremely detailed"
base_file = two_levels_file  # a fixture in place of conftest's


@pytest.fixture
def seen(monkeypatch) -> list:
    """What BLIP was shown; it calls everything a cat."""
    shown = []
    monkeypatch.setattr(captions, "require_blip", lambda: None)
    for module in (captions, protocol):
        monkeypatch.setattr(module, "caption", lambda picture: shown.append(picture) or "a cat")
    return shown


@pytest.fixture
def draw(base_file, tmp_path):
    """Run sample.py with one step; returns the picture and its text chunks."""
    write_png(tmp_path / "condition.png", Image.new("RGB", (32, 32), "navy"))
    save_controlnet(tmp_path / "net.safetensors", randomize(ControlNet(TWO_LEVELS), seed=12))

    def draw(*more: str, condition: bool = True) -> tuple[np.ndarray, dict[str, str]]:
        out = tmp_path / "out.png"
        given = ["--condition", str(tmp_path / "condition.png")] if condition else []
        sample.main(["--checkpoint", str(base_file), "--controlnet",
                     str(tmp_path / "net.safetensors"), *given, "--steps", "2", "--precision",
                     "float32", "--out", str(out), *more])
        return np.asarray(Image.open(out)), read_text(out)

    return draw


@pytest.mark.parametrize(("options", "prompt"), [
    (["none"], ""),
    (["default"], DEFAULT_PROMPT),
    (["default", "--prompt-suffix", SUFFIX], f"{DEFAULT_PROMPT}, {SUFFIX}"),
    (["user", "--prompt", "a dog", "--prompt-suffix", SUFFIX], f"a dog, {SUFFIX}")])
def test_a_setting_is_the_same_as_its_prompt_typed_out(draw, options, prompt):
    picture, text = draw("--prompt-setting", *options)
    typed, other = draw("--prompt", prompt)
    assert np.array_equal(picture, typed) and text["prompt"] == prompt
    assert text["prompt_setting"] == options[0] and "prompt_setting" not in other
    assert text["arguments"] == other["arguments"]  # what makes it again is the whole prompt


def test_automatic_is_the_caption_of_what_the_default_prompt_makes_of_the_condition(draw, seen):
    picture, text = draw("--prompt-setting", "automatic", "--prompt-suffix", SUFFIX)
    first, = seen
    by_default, _ = draw("--prompt-setting", "default")
    assert np.array_equal((first.permute(1, 2, 0) * 255).round().byte().numpy(), by_default)
    assert text["prompt"] == f"a cat, {SUFFIX}" and text["prompt_setting"] == "automatic"
    assert np.array_equal(picture, draw("--prompt", f"a cat, {SUFFIX}")[0])


def test_automatic_with_a_photo_is_the_caption_of_the_photo(draw, seen, tmp_path):
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "photo.png")
    _, text = draw("--canny", str(tmp_path / "photo.png"), "--prompt-setting", "automatic",
                   condition=False)
    assert text["prompt"] == "a cat" and [p[:, 0, 0].tolist() for p in seen] == [[1, 0, 0]]


def test_a_setting_replaces_the_prompt_of_a_picture_that_is_made_again(draw, tmp_path):
    draw("--prompt", "a dog")
    (tmp_path / "out.png").rename(tmp_path / "dog.png")
    like = ["--like", str(tmp_path / "dog.png")]
    assert draw(*like, "--prompt-suffix", SUFFIX)[1]["prompt"] == f"a dog, {SUFFIX}"
    assert draw(*like, "--prompt-setting", "none")[1]["prompt"] == ""


def refused(capsys, work) -> str:
    try:
        code = run(work)
    except SystemExit as leaving:
        code = leaving.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error:") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(("options", "message"), [
    (["none", "--prompt", "a"], "--prompt-setting none goes without --prompt"),
    (["automatic", "--prompt", ""], "--prompt-setting automatic goes without --prompt"),
    (["user"], "--prompt-setting user needs a --prompt"),
    (["none", "--prompt-suffix", SUFFIX], "--prompt-suffix does not go with it"),
    (["automatic"], 'pip install -e ".[captions]"')])
def test_what_does_not_go_together_or_is_missing_is_one_line(
        draw, capsys, monkeypatch, tmp_path, options, message):
    monkeypatch.setitem(sys.modules, "transformers", None)
    captions._blip.cache_clear()
    assert message in refused(capsys, lambda: draw("--prompt-setting", *options))
    assert not (tmp_path / "out.png").exists()


def test_an_evaluation_is_of_one_setting_or_of_five(seen):
    circles = Circles(32, 3, first=HELD_OUT)
    prompts = [circles[i]["prompt"] for i in range(3)]
    assert list(EvaluationSet(circles).prompts)[:3] == [RIGHT, EMPTY, DEFAULT] and not seen
    for setting, expected in (("none", {EMPTY: [""] * 3}), ("user", {RIGHT: prompts}),
                              ("default", {DEFAULT: [DEFAULT_PROMPT] * 3}),
                              ("automatic", {AUTOMATIC: ["a cat"] * 3})):
        samples = EvaluationSet(circles, setting)
        assert samples.prompts == expected and samples.settings == (*expected,)
    assert len(seen) == 3 and seen[1].equal(samples.truth[1])
    assert EvaluationSet(circles, "user", SUFFIX).prompts == {
        RIGHT: [f"{prompt}, {SUFFIX}" for prompt in prompts]}
    assert EvaluationSet(circles, suffix=SUFFIX).prompts[EMPTY] == [""] * 3
    # a caption names no colours that could be measured
    assert samples.fidelity(samples.truth, AUTOMATIC).keys() == samples.fidelity(
        samples.truth, DEFAULT).keys()


def test_results_of_one_setting_are_all_of_it_and_say_so(
        base_file, tmp_path, monkeypatch, uncounted, capsys):
    monkeypatch.setattr("evaluation.metrics.load_state_dict_from_url",
                        lambda *_, **__: (_ for _ in ()).throw(OSError("offline")))
    net = tmp_path / "net.safetensors"
    save_controlnet(net, randomize(ControlNet(TWO_LEVELS), seed=12))
    command = ["--checkpoint", str(base_file), "--teacher", str(net), "--controlnet", str(net),
               "--steps", "1", "--resolution", "32", "--images", "3", "--seeds", "0",
               "--out", str(tmp_path / "out")]
    evaluate.main([*command, "--prompt-setting", "default", "--prompt-suffix", SUFFIX])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["protocol"]["prompt_setting"] == "default"
    assert results["protocol"]["prompt_suffix"] == SUFFIX
    assert results["protocol"]["references"].endswith("teacher's pictures with the default prompt")
    for row in (*results["networks"].values(), *results["bounds"].values()):
        assert list(row["control fidelity"]) == [DEFAULT]
    text = (tmp_path / "out/results.md").read_text()
    assert f"prompt setting 'default', prompt suffix '{SUFFIX}'." in text
    assert "| overlap | default prompt |" in text and "right prompt" not in text
    capsys.readouterr()
    assert "--prompt-suffix does not go with it" in refused(capsys, lambda: evaluate.main(
        [*command, "--prompt-setting", "none", "--prompt-suffix", SUFFIX]))
