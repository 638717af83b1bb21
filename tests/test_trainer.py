"""The trainer's modes, its economies, its signals, and several processes: what each promises, on a
random base of the tiny model's first two levels."""

import json
import math
import os
import signal
import socket
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
from children import exit_code, start
from conftest import SHORT, TWO_LEVELS, randomize, relative_error, same, two_levels, two_levels_file
from diffusers import UNet2DConditionModel
from PIL import Image

import sample
import train
import training.probe
from common.cli import run
from controlnet import ControlledUNet, ControlNet, Prediction
from controlnet.sampling import batch_size_for
from data import fill50k
from data.circles import HELD_OUT, Circles
from kd import build_student
from kd.losses import diffusion_loss, distillation_losses, layer_errors
from training.batches import ShuffledConditions, order
from training.breakdown import COUNTS, averages, breakdown, by_timestep
from training.ema import EMA
from training.previews import base_pictures, save_sample_grid
from training.probe import Probe
from training.settings import parse
from training.state import read_state
from weights import load_controlnet, load_stable_diffusion, save_controlnet, tiny
from weights.convert import convert

sd, base_file = two_levels, two_levels_file  # fixtures in place of conftest's


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_controlnet(path, randomize(ControlNet(TWO_LEVELS, paper_encoder=True), seed=11))
    return path


@pytest.fixture
def command(base_file, tmp_path):
    """The command line that trains into a named folder of `tmp_path`."""
    return lambda name, *more: [
        *SHORT, "--checkpoint", str(base_file), "--batch-size", "2", "--sample-every", "1000",
        "--out", str(tmp_path / name), *more]


@pytest.fixture
def go(command, tmp_path):
    """Train into a named folder of `tmp_path`; returns it."""

    def go(name: str, *more: str) -> Path:
        train.main(command(name, *more))
        return tmp_path / name

    return go


def state(folder: Path) -> dict:
    return torch.load(folder / "state" / "state.pt", weights_only=True)


def log(folder: Path, *without: str) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value
             for name, value in entry.items() if name not in without} for entry in entries]


def refused(capsys, work) -> str:
    """The one line with which a command refuses, exit code 2."""
    try:
        code = run(work)
    except SystemExit as leaving:  # argparse
        code = leaving.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error:") and err.count("\n") == 1
    return err


# --- Modes ---


def test_the_small_mode_trains_all_that_leads_to_the_middle_and_nothing_else(go, sd):
    folder = go("run", "--mode", "small", "--steps", "3")
    net = load_controlnet(folder / "controlnet.safetensors", sd.unet)
    fresh = ControlNet.from_unet(sd.unet, generator=torch.Generator().manual_seed(0))
    assert not any(p.any() for p in net.zero_convs.parameters())
    assert net.middle_block_out[0].weight.any()
    assert not same(net.input_blocks, fresh.input_blocks)


def test_the_small_mode_gives_a_gradient_to_every_weight_that_it_calls_trainable(sd, teacher_file):
    """Otherwise several processes would wait for it forever."""
    for name in ("original", "reduced_layer", "modulated", "lite"):
        net = build_student(name, sd.unet, torch.Generator().manual_seed(0))
        net.connect_only_middle()
        with torch.no_grad():
            randomize(net.middle_block_out)
        inputs, features, target = one_step(sd)
        prediction = ControlledUNet(sd.unet, net)(*inputs, features)
        distillation_losses(prediction, None, target)["L_d"].backward()
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters()), name


def one_step(sd) -> tuple:
    """Random inputs of a step (noisy latents, condition, timesteps, context), the encoder's
    features of them, and the noise."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 2, 4, 4, 4), generator=generator)
    condition = torch.rand((2, 3, 32, 32), generator=generator)
    timesteps, context = torch.tensor([100, 700]), sd.text.encode(["a", ""])
    features = sd.unet.encode(latents, timesteps, context)
    return (latents, condition, timesteps, context), features, noise


def test_a_small_run_is_continued_in_the_default_mode_in_its_folder_and_from_its_file(
        go, capsys):
    folder = go("run", "--mode", "small", "--steps", "2")
    assert "971,056" not in capsys.readouterr().out
    other = go("other", "--init", str(folder / "controlnet.safetensors"), "--steps", "2")
    go("run", "--resume", "--steps", "4")
    assert "controlnet                    971,056              0" in capsys.readouterr().out
    for continued in (folder, other):
        net = state(continued)["net"]
        assert net["zero_convs.0.0.weight"].any() or net["zero_convs.5.0.weight"].any()


def test_the_small_mode_is_refused_where_its_file_would_mislead(go, capsys, teacher_file):
    assert "those of --init are trained already" in refused(
        capsys, lambda: go("a", "--mode", "small", "--init", str(teacher_file)))
    assert "mlp enters the SD encoder" in refused(
        capsys, lambda: go("b", "--mode", "small", "--student", "mlp", "--teacher", "none"))
    assert "an --ablation has the default mode" in refused(
        capsys, lambda: go("c", "--mode", "small", "--ablation", "gaussian"))


def test_a_small_network_has_no_outputs_for_the_skip_connections_and_the_unet_takes_that(
        sd, no_grad):
    net = randomize(ControlNet(TWO_LEVELS))
    x, condition, t, context = one_step(sd)[0]
    whole = net(x, condition, t, context)
    for zero in net.zero_convs.parameters():
        zero.zero_()
    net.connect_only_middle()
    small = net(x, condition, t, context)
    assert small[:-1] == [None] * 6 and torch.equal(small[-1], whole[-1])
    zeros = [torch.zeros_like(c) for c in whole[:-1]]
    assert torch.equal(sd.unet(x, t, context, small), sd.unet(x, t, context, [*zeros, whole[-1]]))


def test_the_large_mode_unlocks_the_decoder_on_time_and_saves_the_changed_base(
        go, base_file, capsys):
    folder = go("run", "--mode", "large", "--unlock-at", "2", "--steps", "2")
    assert not (folder / "sd.safetensors").exists()
    assert "from step 3" not in capsys.readouterr().out
    go("run", "--mode", "large", "--unlock-at", "2", "--steps", "4", "--resume")
    assert "SD decoder                    588,836              0" in capsys.readouterr().out
    base = load_stable_diffusion(base_file)
    changed = load_stable_diffusion(folder / "sd.safetensors")
    for part in ("time_embed", "input_blocks", "middle_block"):
        assert same(getattr(base.unet, part), getattr(changed.unet, part))
    assert same(base.vae, changed.vae) and same(base.text, changed.text)
    outs = zip(base.unet.out.parameters(), changed.unet.out.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in outs)
    whole = go("whole", "--mode", "large", "--unlock-at", "2", "--steps", "4",
               "--report-samples", "2")
    assert "measured on the base as it has become, not as it was" in capsys.readouterr().out
    for name in ("sd.safetensors", "state/state.pt"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()


def test_the_teacher_keeps_the_decoder_that_it_was_trained_with(base_file, teacher_file, command):
    settings = replace(parse(command("run", "--student", "original", "--mode", "large",
                                     "--teacher", "any")), precision="float32")
    sd = load_stable_diffusion(base_file)
    teacher, net = (load_controlnet(teacher_file, sd.unet) for _ in range(2))
    student, taught, _ = train.set_up(settings, sd, net, teacher)
    inputs, features, target = one_step(sd)
    with torch.no_grad():
        sd.unet.out[2].bias += 1.0
        losses = distillation_losses(student(*inputs, features), taught(*inputs, features), target)
    # Teacher and student are the same, but for the decoder.
    assert losses["L_layer"] == 0 and losses["L_td"].item() == pytest.approx(1.0, rel=1e-4)


def test_all_of_the_unet_is_unlocked_on_time_and_resumes_to_the_same_bytes(go, base_file, capsys):
    more = ["--mode", "large", "--unlock", "all", "--unlock-at", "1", "--steps"]
    folder = go("run", *more, "2")
    out = capsys.readouterr().out
    assert out.count("SD encoder                          0        531,712") == 1
    assert out.count("SD encoder                    531,712              0") == 1
    go("run", *more, "4", "--resume")
    base = load_stable_diffusion(base_file)
    changed = load_stable_diffusion(folder / "sd.safetensors")
    for part in ("time_embed", "input_blocks", "middle_block", "output_blocks", "out"):
        pairs = zip(getattr(base.unet, part).parameters(),
                    getattr(changed.unet, part).parameters(), strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs), part
    assert same(base.vae, changed.vae) and same(base.text, changed.text)
    whole = go("whole", *more, "4")
    # The grid shows what the base was at the start, also where it is resumed after it has learned.
    for name in ("controlnet.safetensors", "sd.safetensors", "state/state.pt",
                 "samples/000004.png"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes(), name
    capsys.readouterr()
    assert "--unlock was all, is decoder" in refused(
        capsys, lambda: go("run", "--mode", "large", "--unlock-at", "1", "--steps", "6",
                           "--resume"))


def test_diffusers_runs_the_base_whose_encoder_has_learned_as_it_is_run_here(
        go, base_file, tmp_path):
    saved = go("run", "--mode", "large", "--unlock", "all", "--steps", "2") / "sd.safetensors"
    convert(saved, tmp_path / "folder", naming="diffusers")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet").eval()
    ours = load_stable_diffusion(saved)
    (latents, _, _, context), _, _ = one_step(ours)
    with torch.no_grad():
        expected = theirs(latents, 500, context).sample
        noise_pred = ours.unet(latents, torch.tensor([500, 500]), context)
        before = load_stable_diffusion(base_file).unet(latents, torch.tensor([500, 500]), context)
    assert relative_error(noise_pred, expected) < 1e-5 < 1e-3 < relative_error(before, expected)
    picture = tmp_path / "picture.png"
    sample.main(["--checkpoint", str(saved), "--controlnet", str(saved.with_name(
        "controlnet.safetensors")), "--condition", str(saved.parent / "samples/condition.png"),
        "--steps", "1", "--out", str(picture)])
    assert picture.exists()


@pytest.mark.parametrize("name", ["original", "mlp"])  # beside the SD encoder, and inside it
def test_a_teacher_keeps_the_unet_that_it_was_trained_with_when_all_of_it_learns(
        base_file, teacher_file, command, name):
    settings = replace(parse(command("run", "--student", name, "--mode", "large", "--unlock", "all",
                                     "--teacher", "any")), precision="float32", accumulate=1,
                       loss_layer=1.0)
    sd, untouched = load_stable_diffusion(base_file), load_stable_diffusion(base_file)
    teacher = load_controlnet(teacher_file, sd.unet)
    net = randomize(build_student(name, sd.unet))
    train.freeze(sd.unet, teacher)
    student, taught, trained = train.set_up(settings, sd, net, teacher)
    assert len(trained) == len([*net.parameters(), *sd.unet.parameters()])
    student.unlockable.requires_grad_(True)
    inputs, features, target = one_step(untouched)
    expected = ControlledUNet(untouched.unet, teacher)(*inputs, features)
    with torch.no_grad():
        sd.unet.input_blocks[0][0].bias += 1.0
    assert relative_error(taught(*inputs).noise_pred, expected.noise_pred) < 1e-5
    losses = train.forward_backward(settings, sd.unet, student, taught, inputs, target,
                                    train.gradient_scaler(settings))
    prediction = student(*inputs)
    assert losses["L_d"].item() == pytest.approx(diffusion_loss(prediction.noise_pred, target)
                                                 .item(), rel=1e-6)
    assert losses["L_td"].item() == pytest.approx(
        diffusion_loss(prediction.noise_pred, expected.noise_pred).item(), rel=1e-6)
    assert all(p.grad is not None for p in sd.unet.parameters())
    assert sd.unet.input_blocks[0][0].weight.grad.any()
    assert all(p.grad is None for p in [*teacher.parameters(), *taught._unet[0].parameters()])


def test_the_gradient_of_an_encoder_that_learns_is_that_of_the_whole_unet(sd):
    """Nothing of it is lost on the way through a network that enters the encoder, whose control is
    the difference of two encodings."""
    unet = deepcopy(sd.unet).requires_grad_(True)
    net = randomize(build_student("mlp", unet))
    (latents, condition, timesteps, context), _, target = one_step(sd)
    changed = net.changed_features(latents, condition, timesteps, context, unet)
    weight = unet.input_blocks[0][0].weight
    expected, = torch.autograd.grad(diffusion_loss(unet.decode(changed), target), weight)
    prediction = ControlledUNet(unet, net, whole=True)(latents, condition, timesteps, context)
    found, = torch.autograd.grad(diffusion_loss(prediction.noise_pred, target), weight)
    assert relative_error(found, expected) < 1e-4


# --- Memory and speed ---


def test_gradient_checkpointing_changes_no_bit(go, teacher_file):
    more = ["--student", "reduced_layer", "--teacher", str(teacher_file), "--layer-only-steps", "1",
            "--steps", "3"]
    with_it, without = go("b", *more, "--checkpointing"), go("c", *more)
    name = "controlnet.safetensors"
    assert (with_it / name).read_bytes() == (without / name).read_bytes()


def test_half_precision_holds_the_frozen_networks_in_bf16_and_what_learns_in_float32(
        go, command, base_file, teacher_file):
    more = ["--student", "reduced_layer", "--teacher", str(teacher_file), "--layer-only-steps", "1",
            "--steps", "2", "--precision", "bf16"]
    sd = load_stable_diffusion(base_file)
    teacher, net = load_controlnet(teacher_file, sd.unet), build_student("reduced_layer", sd.unet)
    train.set_up(parse(command("x", *more)), sd, net, teacher)
    for network in (sd.unet, sd.text, teacher):
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    for network in (sd.vae, net):
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    optimizer = state(go("run", *more))["optimizer"]["state"]
    moments = [moment for entry in optimizer.values() for moment in entry.values()]
    assert {moment.dtype for moment in moments} == {torch.float32}
    sd = load_stable_diffusion(base_file)  # of the large mode, whose decoder learns
    settings = parse(command("x", "--mode", "large", "--precision", "bf16"))
    train.set_up(settings, sd, ControlNet.from_unet(sd.unet), None)
    assert {p.dtype for p in sd.unet.parameters()} == {torch.float32}


def test_pictures_and_fidelity_work_in_half_precision(go):
    folder = go("run", "--steps", "1", "--precision", "bf16", "--sample-every", "1")
    assert (folder / "samples/000001.png").exists() and math.isfinite(log(folder)[0]["probe"])


def test_a_grid_shows_beside_its_samples_what_the_base_makes_of_the_text_alone(sd, tmp_path):
    data, quick = Circles(32, 4), replace(sd, sampling=replace(sd.sampling, steps=1))
    base = base_pictures(quick, data, seed=3)
    columns = []
    for step, net in enumerate((ControlNet.from_unet(sd.unet), randomize(ControlNet(TWO_LEVELS)))):
        save_sample_grid(quick, net, data, base, tmp_path, step, seed=3)
        picture = np.asarray(Image.open(tmp_path / f"{step:06}.png").convert("RGB"))
        columns.append(np.split(picture[24:, 4:], 5, axis=1))  # below the titles
    untrained, trained = columns
    assert np.array_equal(untrained[3], untrained[4])
    assert not np.array_equal(untrained[2], untrained[3])
    assert np.array_equal(untrained[3], trained[3])
    assert not np.array_equal(trained[3], trained[4])


def test_the_learning_rate_rises_linearly_and_falls_along_a_line_or_a_cosine():
    settings = parse(["--warmup", "4", "--decay", "4", "--steps", "12"])
    factors = [train.lr_factor(settings, step) for step in range(12)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    cosine = replace(settings, cosine=True)
    assert train.lr_factor(cosine, 10) == pytest.approx(0.5)
    assert train.lr_factor(cosine, 9) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert [train.lr_factor(parse(["--steps", "3"]), step) for step in range(3)] == [1, 1, 1]


def test_clipping_scales_the_gradient_down_to_the_norm_and_the_log_shows_it_unclipped(
        go, monkeypatch):
    norms = []
    monkeypatch.setattr(torch.optim, "AdamW",
                        lambda parameters, lr, fused: RecordedSGD(parameters, lr, norms))
    folder = go("run", "--steps", "3", "--clip", "1e-3")
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)
    assert all(entry["gradient"] > 2e-3 for entry in log(folder))


class RecordedSGD(torch.optim.SGD):
    """Gradient descent that records the norm of its gradients."""

    def __init__(self, parameters, lr: float, norms: list[float]):
        super().__init__(parameters, lr)
        self.norms = norms

    def step(self) -> None:
        gradients = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
        super().step()


def test_the_ema_is_of_parameters_and_follows_its_formula():
    net = torch.nn.BatchNorm1d(2)
    ema = EMA(net, decay=0.75)
    with torch.no_grad():
        net.weight.fill_(5.0)
        net.running_mean.fill_(7.0)
    ema.update(net)
    assert torch.equal(ema.net.weight, torch.full((2,), 0.75 * 1 + 0.25 * 5))
    assert not ema.net.running_mean.any()
    ema.update(net)
    assert torch.equal(ema.net.weight, torch.full((2,), 0.75 * 2 + 0.25 * 5))
    assert not ema.net.weight.requires_grad


def test_a_run_with_ema_writes_both_networks_and_resumes_exactly(go, sd):
    whole = go("whole", "--steps", "4", "--ema", "0.9")
    go("parts", "--steps", "2", "--ema", "0.9")
    parts = go("parts", "--steps", "4", "--ema", "0.9", "--resume")
    for name in ("controlnet.safetensors", "controlnet_ema.safetensors", "state/state.pt"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    files = (whole / f"{name}.safetensors" for name in ("controlnet", "controlnet_ema"))
    assert not same(*(load_controlnet(file, sd.unet) for file in files))


# --- Signals ---


def test_the_log_splits_the_losses_by_timestep_and_layer(go, teacher_file):
    folder = go("run", "--student", "reduced_layer", "--teacher", str(teacher_file),
                "--layer-only-steps", "1", "--steps", "3", "--sample-every", "2")
    first, second, third = log(folder)
    assert len(first["L_layer shares"]) == 7 and "L_d by timestep" not in first
    assert sum(first["L_layer shares"]) == pytest.approx(1)
    for name in ("L_d", "L_td", "L_layer"):
        assert len(third[f"{name} by timestep"]) == 4
    assert "probe" in second and "overlap" in second and "probe" not in third


def test_losses_by_timestep_are_means_over_the_samples_of_each_quarter_and_none_without():
    timesteps = torch.tensor([0, 249, 250, 999])
    noise_pred, target = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None], torch.zeros(4, 1)
    prediction = Prediction([], noise_pred)
    sums = breakdown(prediction, None, target, timesteps, None)
    sums["L_d"] = distillation_losses(prediction, None, target)["L_d"]
    assert sums[COUNTS].tolist() == [2, 1, 0, 1]
    losses = torch.stack([diffusion_loss(*pair) for pair in zip(noise_pred, target, strict=True)])
    assert torch.equal(sums["L_d by timestep"], by_timestep(losses, timesteps))
    assert averages(dict(sums)) == {"L_d by timestep": [2.5, 9.0, None, 16.0], "L_d": 7.5}
    two = averages({name: 2 * value for name, value in sums.items()})
    assert two == {"L_d by timestep": [2.5, 9.0, None, 16.0], "L_d": 7.5}


def test_layer_errors_are_squared_differences_in_units_of_the_teachers_variance():
    teacher = [torch.tensor([1.0, -1.0]), torch.tensor([3.0, -3.0])]
    errors = layer_errors([torch.zeros(2), torch.zeros(2)], teacher, [a.var() for a in teacher])
    assert torch.allclose(errors, torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="as many outputs"):
        layer_errors(teacher[:1], teacher, [torch.ones(())] * 2)


def test_the_breakdown_of_l_layer_is_the_same_equation_applied_to_each_sample():
    student = Prediction([torch.zeros(2, 3), torch.zeros(2, 1)], None)
    teacher = Prediction([torch.tensor([[1.0, 1, 1], [0, 3, 0]]), torch.tensor([[0.0], [2]])], None)
    variance = [torch.tensor(2.0), torch.tensor(4.0)]
    sums = breakdown(student, teacher, None, torch.tensor([0, 999]), variance)
    # By layer and sample the errors are (0.5, 1.5) and (0, 1).
    assert torch.allclose(sums["L_layer by timestep"], torch.tensor([0.25, 0, 0, 1.25]))
    assert torch.allclose(sums["L_layer shares"], torch.tensor([1.0, 0.5]))
    assert averages(sums)["L_layer shares"] == pytest.approx([2 / 3, 1 / 3])
    assert layer_errors(student.control, teacher.control, variance).tolist() == [1.0, 0.5]


def test_a_disconnected_output_does_not_count_in_l_layer():
    student = Prediction([None, torch.zeros(2, 1)], None)
    teacher = Prediction([torch.ones(2, 3), torch.tensor([[0.0], [2.0]])], None)
    losses = distillation_losses(student, teacher, None, [torch.ones(()), torch.tensor(4.0)])
    assert losses == {"L_layer": torch.tensor(0.5)}


def test_the_probe_is_zero_for_an_untrained_network_and_negative_for_one_that_obeys():
    base = load_stable_diffusion(tiny.SD)
    probe = Probe(base, [Circles(64, 32, first=HELD_OUT)[i] for i in range(32)])
    assert probe(ControlNet.from_unet(base.unet)) == 0.0
    assert probe(load_controlnet(tiny.CONTROLNET, base.unet)) < -0.005


def test_the_probe_is_the_same_in_smaller_batches(sd, monkeypatch):
    samples = [Circles(32, 5)[i] for i in range(5)]
    net = randomize(ControlNet(TWO_LEVELS))
    whole = Probe(sd, samples)(net)
    monkeypatch.setattr(training.probe, "batch_size_for", lambda *_: 2)
    assert Probe(sd, samples)(net) == pytest.approx(whole, abs=1e-6) and abs(whole) > 1e-5


def test_measuring_without_enough_memory_costs_a_warning_and_not_the_run(
        go, monkeypatch, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "save_sample_grid", full)
    with pytest.warns(UserWarning, match="step 1 is not measured"):
        folder = go("run", "--steps", "2", "--sample-every", "1")
    assert [entry["step"] for entry in log(folder)] == [1, 2] and state(folder)["step"] == 2


def test_at_stable_diffusions_size_nothing_is_measured_in_larger_batches_than_one():
    assert [batch_size_for(side, side) for side in (64, 128, 512, 768)] == [32, 8, 1, 1]


def test_shuffled_conditions_belong_to_another_picture():
    data = Circles(32, 3)
    shuffled = ShuffledConditions(data)
    for i in range(3):
        assert torch.equal(shuffled[i]["target"], data[i]["target"])
        assert torch.equal(shuffled[i]["condition"], data[(i + 1) % 3]["condition"])
    assert len(shuffled) == 3


def test_a_run_on_a_folder_has_the_probe_and_no_overlap(go, tmp_path):
    fill50k.main(["--out", str(tmp_path / "data"), "--count", "3", "--size", "32"])
    folder = go("run", "--data", str(tmp_path / "data"), "--resolution", "32", "--steps", "1",
                "--sample-every", "1")
    assert "probe" in log(folder)[0] and "overlap" not in log(folder)[0]


def test_tensorboard_gets_what_the_log_gets(go):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = go("run", "--steps", "2", "--tensorboard")
    go("run", "--steps", "3", "--tensorboard", "--resume")
    events = loading.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    logged = [(entry["step"], pytest.approx(entry["L_d"])) for entry in log(folder)]
    assert [(event.step, event.value) for event in events.Scalars("L_d")] == logged


def test_tensorboard_without_its_package_is_one_line(go, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in refused(capsys, lambda: go("run", "--tensorboard"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--unlock-at", "3"], "--unlock-at needs --mode large"),
    (["--unlock", "all", "--mode", "small"], "--unlock all needs --mode large"),
    (["--checkpoint", str(tiny.SD), "--student", "lite", "--teacher", str(tiny.CONTROLNET),
      "--mode", "large", "--unlock-at", "3", "--layer-only-steps", "5"],
     "must not come before the end of --layer-only-steps, 5"),
    (["--cosine"], "--cosine is the curve of --decay"),
    (["--ema", "2"], "expected a number from 0 to 1"),
    (["--clip", "0"], "expected a positive number"),
    (["--mode", "medium"], "invalid choice: 'medium'"),
])
def test_settings_that_do_not_go_together_are_refused(go, capsys, arguments, message):
    assert message in refused(capsys, lambda: go("run", *arguments))


# --- Several processes ---


@pytest.fixture
def torchrun(command, tmp_path):
    """Start train.py in two processes as torchrun does, with the same variables; none outlives a
    test that has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everyone, output = [], tmp_path / "output.log"

    def torchrun(name: str, *more: str) -> list[BaseProcess]:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        children = [start(command(name, *more), {"RANK": rank, "LOCAL_RANK": rank} | shared,
                          str(output)) for rank in ("0", "1")]
        everyone.extend(children)
        return children

    yield torchrun
    for child in everyone:
        child.kill()
    if output.exists():
        print("the processes printed:", output.read_text()[-5000:])


def codes(children: list[BaseProcess]) -> list[int]:
    return [exit_code(child) for child in children]


on_cpu = pytest.mark.skipif(
    os.name == "nt" or torch.cuda.is_available(), reason="two processes would need two GPUs")
DISTIL = ["--student", "modulated", "--layer-only-steps", "6", "--steps", "20", "--lr", "1e-3",
          "--clip", "1", "--ema", "0.9"]


@on_cpu
def test_two_processes_make_the_loss_curve_of_one_with_the_whole_batch_and_resume_exactly(
        go, torchrun, teacher_file, tmp_path):
    more = [*DISTIL, "--teacher", str(teacher_file)]
    one = go("one", *more, "--batch-size", "4")
    assert codes(torchrun("two", *more)) == [0, 0]
    assert codes(torchrun("parts", *more, "--steps", "8")) == [0, 0]
    assert codes(torchrun("parts", *more, "--resume")) == [0, 0]
    two = tmp_path / "two"
    entries = list(zip(log(one, "seconds", "lr"), log(two, "seconds", "lr"), strict=True))
    assert len(entries) == 20
    for expected, entry in entries:
        later = ("L_d", "L_td") if entry["step"] > 6 else ()
        for name in ("loss", "L_layer", "gradient", *later):
            assert entry[name] == pytest.approx(expected[name], rel=1e-4), (entry["step"], name)
        for name in ("L_layer shares", "L_layer by timestep"):
            values, targets = ([x or 0 for x in e[name]] for e in (entry, expected))
            assert values == pytest.approx(targets, rel=1e-3)
    for name in ("controlnet.safetensors", "controlnet_ema.safetensors", "state/state.pt"):
        assert (tmp_path / "parts" / name).read_bytes() == (two / name).read_bytes()


@on_cpu
def test_two_processes_prepare_unlock_accumulate_and_stop_together(go, torchrun, tmp_path):
    fill50k.main(["--out", str(tmp_path / "data"), "--count", "9", "--size", "32"])
    more = ["--mode", "large", "--unlock", "all", "--unlock-at", "2", "--accumulate", "2",
            "--batch-size", "1", "--data", str(tmp_path / "data")]
    assert codes(torchrun("two", *more, "--steps", "4")) == [0, 0]
    keys, = tmp_path.glob("data/.light_controlnet/latents-*/keys")
    assert keys.stat().st_size == 9 * 16  # each picture was prepared by one of them
    one = go("one", *more, "--batch-size", "2", "--steps", "4")
    for expected, entry in zip(log(one), log(tmp_path / "two"), strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    children = torchrun("stopped", *more, "--unlock", "decoder", "--steps", "1000")
    written = tmp_path / "stopped" / "log.jsonl"
    while not written.exists() or written.read_text().count("\n") < 4:
        sleep(0.05)
        assert all(child.is_alive() for child in children)
    os.kill(children[1].pid, signal.SIGTERM)  # only the one that does not write
    assert codes(children) == [0, 0]
    assert state(tmp_path / "stopped")["step"] == written.read_text().count("\n") >= 4
    one = go("one decoder", *more, "--unlock", "decoder", "--batch-size", "2", "--steps", "4")
    for expected, entry in zip(log(one), log(tmp_path / "stopped")[:4], strict=True):
        assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_resume_with_another_number_of_processes_is_refused(go, command, monkeypatch):
    go("run", "--steps", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = parse(command("run", "--steps", "2", "--resume"))
    with pytest.raises(ValueError, match="begun with: torchrun's processes was 1, is 2$"):
        read_state(settings)


def test_processes_see_disjoint_parts_of_the_order_of_one(monkeypatch):
    shapes = [(64, 64)] * 7 + [(48, 80)] * 3
    whole, parts = order(shapes, 6, seed=3), []
    for rank in range(3):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        parts.append([train.parallel.shard(batch) for batch in islice(order(shapes, 6, seed=3), 5)])
    for number, batch in enumerate(islice(whole, 5)):
        assert [place for part in parts for place in part[number]] == batch
