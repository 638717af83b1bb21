"""A base that makes a picture in few steps is sampled so by every program, trained at the steps it
takes, and recognised if its file does not say what it is."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from conftest import randomize
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import evaluate
import sample
import train
from common.cli import run
from controlnet import ControlNet, sampling
from data.circles import HELD_OUT, Circles
from diffusion import (
    ALPHA_BAR,
    SD_TURBO,
    Sampling,
    classifier_free_guidance,
    ddim_sample,
    q_sample,
    x0_weights,
)
from evaluation import metrics
from evaluation.fidelity import control_fidelity
from kd.losses import diffusion_loss, teacher_loss
from text import CLIPText, TextConfig
from training.probe import Probe
from training.timesteps import error_weights, training_timesteps
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import (
    StableDiffusion,
    load_controlnet,
    load_stable_diffusion,
    save_controlnet,
    save_stable_diffusion,
    tiny,
)
from weights.convert import main as convert
from weights.tiny import few_steps

LATER = ("cond_stage_model.model.", "conditioner.embedders.0.model.")  # the code SD-Turbo came with


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    """A small model of SD-Turbo's form, its file without metadata, and a ControlNet for it."""
    folder = tmp_path_factory.mktemp("turbo")
    unet = UNet(UNetConfig(64, (1, 1, 1, 1), (True, True, True, False), 1, 64, None, 64, True))
    text = CLIPText(TextConfig(width=64, layers=2, openclip=True))
    networks = (unet, VAE(VAEConfig(32, (1, 1, 1, 1), 1)), text)
    sd = StableDiffusion(*(randomize(network, seed) for seed, network in enumerate(networks)))
    save_stable_diffusion(folder / "sd.safetensors", sd, torch.float32)
    tensors = {name.replace(*LATER): tensor
               for name, tensor in load_file(folder / "sd.safetensors").items()}
    save_file(tensors, folder / "sd.safetensors")
    save_controlnet(folder / "control.safetensors", randomize(ControlNet(sd.unet.config), seed=3))
    condition = Image.new("RGB", (64, 64))
    ImageDraw.Draw(condition).ellipse((12, 20, 44, 52), outline="white")
    condition.save(folder / "condition.png")
    return folder, sd


def in_2x_naming(file, target, metadata=None):
    save_file({name.replace(*reversed(LATER)): tensor for name, tensor in load_file(file).items()},
              target, metadata)
    return target


# --- How it is recognised ---


def test_sd_turbo_is_recognised_by_its_tensors_names(turbo):
    with pytest.warns(UserWarning, match="is taken for SD-Turbo by its tensors' names: 1 step"):
        assert load_stable_diffusion(turbo[0] / "sd.safetensors").sampling == SD_TURBO


@pytest.mark.parametrize(("name", "metadata"), [
    ("my_sd_Turbo.safetensors", None), ("x.safetensors", {"modelspec.title": "SD Turbo, fp16"})])
def test_sd_turbo_is_recognised_by_its_name(turbo, tmp_path, name, metadata):
    file = in_2x_naming(turbo[0] / "sd.safetensors", tmp_path / name, metadata)
    with pytest.warns(UserWarning, match="is taken for SD-Turbo by its name"):
        assert load_stable_diffusion(file).sampling == SD_TURBO


def test_what_the_command_line_says_counts_more(turbo):
    given = {"steps": 4, "guidance": 1.5}
    with pytest.warns(UserWarning):
        sampling = load_stable_diffusion(turbo[0] / "sd.safetensors", given=given).sampling
    assert sampling == Sampling(4, 1.5, "trailing", "epsilon")


def test_a_file_that_nothing_tells_gets_a_warning_with_the_options_for_each_kind(turbo, tmp_path):
    file = in_2x_naming(turbo[0] / "sd.safetensors", tmp_path / "sd2.safetensors")
    options = "SD-Turbo --sample-steps 1 --guidance 0 --spacing trailing"
    with pytest.warns(UserWarning, match=options):
        assert load_stable_diffusion(file).sampling == Sampling()


def test_convert_writes_into_a_file_how_it_is_sampled(turbo, tmp_path, recwarn):
    file = in_2x_naming(turbo[0] / "sd.safetensors", tmp_path / "sd2.safetensors")
    settings = ["steps=4", "guidance=0", "spacing=trailing", "prediction=epsilon", "resolution=64"]
    convert([str(file), str(tmp_path / "set.safetensors"), "--set", *settings])
    sd = load_stable_diffusion(tmp_path / "set.safetensors")
    assert (sd.sampling, sd.resolution) == (Sampling(4, 0, "trailing"), 64) and not list(recwarn)
    convert([str(tmp_path / "set.safetensors"), str(tmp_path / "folder"), "--naming", "diffusers"])
    scheduler = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert scheduler["timestep_spacing"] == "trailing"
    assert load_stable_diffusion(tmp_path / "folder").sampling == sd.sampling


def test_a_recognised_file_keeps_its_sampling_when_it_is_converted(turbo, tmp_path, recwarn):
    convert([str(turbo[0] / "sd.safetensors"), str(tmp_path / "new.safetensors")])
    recwarn.clear()
    assert load_stable_diffusion(tmp_path / "new.safetensors").sampling == SD_TURBO
    assert not list(recwarn)


def test_diffusers_folder_of_sd_turbo_is_recognised_by_its_scheduler(turbo, tmp_path):
    convert([str(turbo[0] / "sd.safetensors"), str(tmp_path / "folder"), "--naming", "diffusers"])
    for file in (tmp_path / "folder").rglob("*.safetensors"):  # as another program wrote it
        save_file(load_file(file), file)
    assert load_stable_diffusion(tmp_path / "folder").sampling == SD_TURBO


@pytest.mark.parametrize("setting", [
    "steps=0", "steps=1.5", "steps=true", "guidance=-1", "guidance=Infinity", "spacing=karras",
    "seed=1", "steps", "resolution=60", "prediction=x0"])
def test_a_setting_that_cannot_be_is_refused(turbo, tmp_path, capsys, setting):
    source, target = turbo[0] / "sd.safetensors", tmp_path / "new.safetensors"
    assert run(lambda: convert([str(source), str(target), "--set", setting])) == 2
    assert f"got '{setting}'" in capsys.readouterr().err and not target.exists()


# --- Every program samples it so ---


@pytest.mark.filterwarnings("ignore:.*is taken for SD-Turbo")
@pytest.mark.parametrize("steps", [None, 4])
def test_train_evaluate_and_sample_agree_on_steps_guidance_and_timesteps(
        turbo, tmp_path, monkeypatch, uncounted, steps):
    folder, _ = turbo
    calls, seen = [], set()
    ddim_sample, guided = sampling.ddim_sample, sampling.classifier_free_guidance

    def recorded(predict, noise, steps, **options):
        calls.append([])

        def denoiser(latents, timesteps):
            calls[-1].append(timesteps.unique().item())
            return predict(latents, timesteps)

        return ddim_sample(denoiser, noise, steps, **options)

    monkeypatch.setattr(sampling, "ddim_sample", recorded)
    monkeypatch.setattr(sampling, "classifier_free_guidance",
                        lambda *args: seen.add(args[-1]) or guided(*args))
    monkeypatch.setattr(metrics, "load_state_dict_from_url", lambda *_, **__: (_ for _ in ()).throw(
        OSError("no network")))
    given = ["--checkpoint", str(folder / "sd.safetensors"), "--device", "cpu"]
    given += ["--sample-steps", str(steps)] if steps else []
    control = ["--controlnet", str(folder / "control.safetensors")]
    sample.main([*given, *control, "--condition", str(folder / "condition.png"),
                 "--out", str(tmp_path / "out.png")])
    sampled = len(calls)
    evaluate.main([*given, *control, "--teacher", "none", "--images", "2", "--seeds", "0",
                   "--resolution", "64", "--out", str(tmp_path / "evaluation")])
    evaluated = len(calls)
    train.main([*given, "--steps", "1", "--batch-size", "1", "--resolution", "64",
                "--fidelity-samples", "2", "--report-samples", "2", "--out", str(tmp_path / "run")])
    assert 0 < sampled < evaluated < len(calls)
    expected = [999, 749, 499, 249] if steps else [999]
    assert all(call == expected for call in calls) and seen == {0.0}
    protocol = json.loads((tmp_path / "evaluation/results.json").read_text())["protocol"]
    assert (protocol["steps"], protocol["guidance"]) == (steps or 1, 0)
    assert protocol["spacing"] == "trailing"


@pytest.mark.filterwarnings("ignore:.*is taken for SD-Turbo")
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_picture_of_sd_turbo_is_diffusers_with_its_euler_scheduler(turbo, tmp_path, steps):
    folder, sd = turbo
    out = tmp_path / "out.png"
    options = ["--sample-steps", str(steps)] if steps > 1 else []
    sample.main(["--checkpoint", str(folder / "sd.safetensors"), "--controlnet",
                 str(folder / "control.safetensors"), "--condition", str(folder / "condition.png"),
                 "--prompt", "a house", "--seed", "3", "--device", "cpu", "--out", str(out),
                 *options])
    save_stable_diffusion(tmp_path / "sd.safetensors", sd, torch.float32)
    theirs = oracle.pipeline(sd, tmp_path / "sd.safetensors", [folder / "control.safetensors"],
                             oracle.euler())
    expected = np.asarray(theirs(
        "a house", Image.open(folder / "condition.png"), num_inference_steps=steps,
        guidance_scale=0.0, generator=torch.Generator().manual_seed(3)).images[0]).astype(int)
    picture = np.asarray(Image.open(out)).astype(int)
    assert np.abs(picture - expected).max() <= 1 and picture.std() > 20


@pytest.mark.filterwarnings("ignore:.*is taken for SD-Turbo")
def test_the_command_to_try_a_network_has_the_options_of_the_run(turbo, tmp_path, capsys):
    train.main(["--checkpoint", str(turbo[0] / "sd.safetensors"), "--device", "cpu", "--steps", "1",
                "--batch-size", "1", "--resolution", "64", "--report-samples", "0",
                "--fidelity-samples", "2", "--sample-steps", "2", "--guidance", "0",
                "--out", str(tmp_path / "run")])
    tried = capsys.readouterr().out.partition("try it:")[2]
    assert "--sample-steps 2 --guidance 0.0" in tried and "--spacing" not in tried


# --- What it is trained on ---


def test_the_timesteps_of_a_sampling_run_are_trained_on_alone(monkeypatch, tmp_path):
    drawn, forward_backward = [], train.forward_backward
    monkeypatch.setattr(train, "forward_backward", lambda *args: drawn.extend(
        args[4][2].tolist()) or forward_backward(*args))
    train.main(["--timesteps", "trailing:4", "--steps", "1", "--batch-size", "32",
                "--device", "cpu", "--report-samples", "0", "--fidelity-samples", "2",
                "--sample-steps", "1", "--out", str(tmp_path / "run")])
    assert len(drawn) == 32 and set(drawn) == {999, 749, 499, 249}


@pytest.mark.parametrize("text", ["trailing", "trailing:0", "karras:4", "4", "leading:1001"])
def test_other_timesteps_are_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--timesteps", text])
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_an_error_is_weighed_by_what_it_does_to_the_picture(prediction):
    generator = torch.Generator().manual_seed(0)
    x0, noise, error = torch.randn(3, 4, 4, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([1, 249, 749, 999])
    a = ALPHA_BAR[t].view(-1, 1, 1, 1)
    noisy = q_sample(x0, t, noise)
    if prediction == "v":
        predicted = a.sqrt() * noise - (1 - a).sqrt() * x0 + error
        found = a.sqrt() * noisy - (1 - a).sqrt() * predicted
    else:
        found = (noisy - (1 - a).sqrt() * (noise + error)) / a.sqrt()
    squares = (found - x0).square().mean((1, 2, 3)) / error.square().mean((1, 2, 3))
    assert torch.allclose(squares, x0_weights(t, prediction), rtol=1e-6)


def test_at_the_first_timestep_the_noise_counts_14_6_times_in_the_picture():
    assert x0_weights(torch.tensor([999]), "epsilon").sqrt().item() == pytest.approx(14.6, abs=0.05)


def test_weights_have_mean_one_over_what_is_trained_on_and_reach_both_losses():
    weights = error_weights("trailing:4", "x0", "epsilon")
    assert weights[training_timesteps("trailing:4")].mean().item() == pytest.approx(1)
    assert error_weights("trailing:4", "noise", "epsilon") is None
    a, b = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    squares = (a - b).square().mean((1, 2, 3))
    for loss in (diffusion_loss, teacher_loss):
        assert loss(a, b, torch.tensor([3.0, 1.0])).item() == pytest.approx(
            ((3 * squares[0] + squares[1]) / 2).item())


def test_the_probe_takes_the_timesteps_that_are_trained_on(sd):
    sample = {"prompt": "", "target": torch.zeros(3, 16, 16), "condition": torch.zeros(3, 16, 16)}
    assert training_timesteps("trailing:4").tolist() == [249, 499, 749, 999]
    probe = Probe(sd, [sample] * 8, training_timesteps("trailing:4"))
    assert probe.timesteps.tolist() == [249, 249, 499, 499, 749, 749, 999, 999]
    steps = Probe(sd, [sample] * 8).timesteps.tolist()
    assert steps[0] == 62 and {b - a for a, b in pairwise(steps)} == {125}


# --- The tiny one ---


def test_pairs_are_pictures_of_the_base_and_made_once(sd, tmp_path, monkeypatch):
    monkeypatch.setattr(few_steps, "CHUNK", 2)
    monkeypatch.setattr(few_steps, "TEACHER_STEPS", 2)
    noises, latents = few_steps.make_pairs(sd, ["a", "", "b"], tmp_path)
    assert noises.shape == latents.shape == (3, 4, 8, 8)
    context = sd.text.encode(["a", ""])
    empty = sd.text.encode([""]).expand_as(context)
    guided = classifier_free_guidance(sd.unet, context, empty, sd.sampling.guidance)
    expected = ddim_sample(guided, noises[:2], 2, spacing="trailing")
    assert torch.equal(latents[:2], expected)
    (tmp_path / "000002.pt").unlink()  # as if killed before it
    monkeypatch.setattr(few_steps, "ddim_sample", lambda *args, **options: ddim_sample(
        *args, **options) if len(args[1]) == 1 else pytest.fail("made again"))
    again = few_steps.make_pairs(sd, ["a", "", "b"], tmp_path)
    assert torch.equal(noises, again[0]) and torch.equal(latents, again[1])


def test_the_copy_learns_the_pictures_that_the_base_makes_of_its_noises(sd, tmp_path, monkeypatch):
    """At 128 pixels: of 64 the lowest level keeps one, whose attention has no gradient."""
    sd = replace(sd, resolution=128)
    for name, value in {"PAIRS": 4, "CHUNK": 4, "TEACHER_STEPS": 1, "BATCH": 4}.items():
        monkeypatch.setattr(few_steps, name, value)
    unet = few_steps.make_turbo(sd, tmp_path, torch.Generator().manual_seed(0), 2, tmp_path / "s")
    changed = [not torch.equal(a, b) for a, b in zip(unet.parameters(), sd.unet.parameters(),
                                                     strict=True)]
    assert all(changed) and (tmp_path / "s").exists()


def test_the_shipped_turbo_obeys_its_networks_in_four_steps_and_in_one():
    sd, circles = load_stable_diffusion(tiny.TURBO), Circles(64, 8, first=HELD_OUT)
    assert sd.sampling == Sampling(4, 0.0, "trailing")
    students = tiny.TURBO_STUDENTS.glob("*.safetensors")
    for file in (tiny.CONTROLNET, tiny.TURBO_CONTROLNET, *students):
        net = load_controlnet(file, sd.unet)
        assert control_fidelity(sd, net, circles)["overlap"] > 0.85
        assert control_fidelity(sd.sampled(1), net, circles)["overlap"] > 0.7
    assert control_fidelity(sd, None, circles)["overlap"] < 0.6
