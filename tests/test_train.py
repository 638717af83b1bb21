"""The training program end to end on a random base: what it writes, what it leaves alone, and that
stopping costs nothing."""

import json
import math
import subprocess

import pytest
import torch
from conftest import SHORT, TWO_LEVELS, randomize, same, two_levels, two_levels_file
from PIL import Image
from safetensors.torch import save_file

import train
from common.cli import run
from controlnet import ControlNet, Prediction
from data import fill50k
from kd import losses
from training.defaults import warn_of_schedule
from training.settings import parse
from vae import VAE
from weights import load_controlnet, load_stable_diffusion, save_controlnet

sd, base_file = two_levels, two_levels_file  # fixtures in place of conftest's


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_controlnet(path, randomize(ControlNet(TWO_LEVELS, paper_encoder=True), seed=11))
    return path


def line(base_file, out, *more: str) -> list[str]:
    return [*SHORT, "--checkpoint", str(base_file), "--batch-size", "2", "--out", str(out), *more]


def distillation(base_file, teacher_file, out, *more: str) -> list[str]:
    return line(base_file, out, "--student", "reduced_layer", "--teacher", str(teacher_file),
                "--layer-only-steps", "2", "--sample-every", "1000", *more)


@pytest.fixture
def command(base_file, tmp_path):
    """The command line that trains into a named folder of `tmp_path`."""
    return lambda name, *more: line(base_file, tmp_path / name, *more)


@pytest.fixture
def distil(base_file, teacher_file, tmp_path):
    """Run a small distillation into a named folder; further arguments are added."""

    def distil(name: str, *more: str) -> dict[str, torch.Tensor]:
        train.main(distillation(base_file, teacher_file, tmp_path / name, *more))
        return torch.load(tmp_path / name / "state" / "state.pt", weights_only=True)["net"]

    return distil


def test_resuming_equals_never_having_stopped(distil, tmp_path):
    distil("whole", "--steps", "6")
    distil("parts", "--steps", "3")
    distil("parts", "--steps", "6", "--resume")
    for name in ("controlnet.safetensors", "samples/000006.png"):
        whole, parts = (tmp_path / folder / name for folder in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "parts")]
    for log in logs:
        for entry in log:
            del entry["seconds"]
    assert logs[0] == logs[1] and [entry["step"] for entry in logs[0]] == [1, 2, 3, 4, 5, 6]


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(distil, tmp_path):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        distil(name, "--steps", "3", "--seed", seed)
    a, b, c = ((tmp_path / name / "controlnet.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c


def test_what_was_logged_after_the_saved_state_is_not_logged_twice(distil, tmp_path):
    distil("run", "--steps", "2")
    with open(tmp_path / "run/log.jsonl", "a") as log:
        # written by a run that was killed before it saved
        log.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    distil("run", "--steps", "3", "--resume")
    assert [
        json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()
    ] == [1, 2, 3]


EVERY_SECOND = ("--steps", "4", "--save-every", "2", "--sample-every", "2")


@pytest.fixture(scope="module")
def whole(base_file, teacher_file, tmp_path_factory):
    """The folder of a run that does not die."""
    folder = tmp_path_factory.mktemp("whole") / "whole"
    train.main(distillation(base_file, teacher_file, folder, *EVERY_SECOND))
    return folder


@pytest.mark.parametrize("part", ["write_networks", "save_sample_grid", "control_fidelity"])
def test_a_run_that_dies_after_its_state_loses_neither_log_nor_outputs(
        distil, whole, tmp_path, monkeypatch, part):
    """Measuring needs more memory than saving does, so it comes later."""
    with monkeypatch.context() as patch:
        patch.setattr(train, part, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert run(lambda: distil("run", *EVERY_SECOND)) == 130
    assert torch.load(tmp_path / "run/state/state.pt", weights_only=True)["step"] == 2
    distil("run", *EVERY_SECOND, "--resume")
    logs = []
    for folder in (whole, tmp_path / "run"):
        lines = (folder / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) | {"seconds": 0} for line in lines])
    assert logs[0] == logs[1] and "overlap" in logs[0][1]
    for name in ("controlnet.safetensors", "samples/000002.png", "state/state.pt"):
        assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_a_run_that_died_before_it_saved_anything_starts_again(distil, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert run(lambda: distil("run", "--steps", "2", "--save-every", "1")) == 130
    monkeypatch.undo()
    distil("run", "--steps", "2")
    assert [
        json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()
    ] == [1, 2]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80"])
def test_a_damaged_state_is_refused_in_one_line(distil, tmp_path, capsys, content):
    (tmp_path / "run/state").mkdir(parents=True)
    (tmp_path / "run/state/state.pt").write_bytes(content)
    assert run(lambda: distil("run", "--steps", "2", "--resume")) == 2
    assert "state.pt is damaged" in capsys.readouterr().err


def test_the_first_phase_needs_no_unet_and_then_all_losses_join(distil, tmp_path):
    distil("run", "--steps", "4")
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert ["L_d" in entry for entry in log] == [False, False, True, True]
    assert log[0]["loss"] == pytest.approx(log[0]["L_layer"])
    assert log[3]["loss"] == pytest.approx(
        log[3]["L_layer"] + log[3]["L_d"] + log[3]["L_td"], rel=1e-5)


def test_accumulated_passes_make_the_step_of_one_large_batch(command, tmp_path, monkeypatch):
    """With plain gradient descent and a loss without noise, two passes of 2 pictures move the
    weights as one pass of 4 does."""
    monkeypatch.setattr(torch.optim, "AdamW",
                        lambda parameters, lr, fused: torch.optim.SGD(parameters, lr))

    def forward(self, noisy_latents, condition, *_):
        brightness = condition.mean(dim=(1, 2, 3), keepdim=True)
        bias = self.net.zero_convs[0][0].bias.sum()
        return Prediction([], bias * brightness + torch.zeros_like(noisy_latents))

    monkeypatch.setattr(train.ControlledUNet, "forward", forward)
    monkeypatch.setattr(losses, "diffusion_loss", lambda noise_pred, *_: noise_pred.mean())
    biases = []
    for batch_size, accumulate in (("4", "1"), ("2", "2")):
        train.main(command(accumulate, "--steps", "2", "--batch-size", batch_size,
                           "--accumulate", accumulate, "--lr", "1"))
        state = torch.load(tmp_path / accumulate / "state/state.pt", weights_only=True)
        biases.append(state["net"]["zero_convs.0.0.bias"])
    assert biases[0].abs().min() > 1e-3 and torch.allclose(*biases, rtol=1e-5)


def test_training_changes_no_frozen_weight_and_gives_it_no_gradient(distil, base_file, teacher_file,
                                                                    sd, monkeypatch):
    loaded = {}
    for name in ("load_stable_diffusion", "load_controlnet"):
        load = getattr(train, name)
        monkeypatch.setattr(train, name, lambda *args, name=name, load=load, **kwargs:
                            loaded.setdefault(name, load(*args, **kwargs)))
    distil("run", "--steps", "4")
    base, teacher = loaded["load_stable_diffusion"], loaded["load_controlnet"]
    fresh = load_stable_diffusion(base_file)
    pairs = [(base.unet, fresh.unet), (base.vae, fresh.vae), (base.text, fresh.text),
             (teacher, load_controlnet(teacher_file, sd.unet))]
    for used, original in pairs:
        assert all(p.grad is None for p in used.parameters()) and same(used, original)


def test_the_start_prints_what_learns_and_the_end_what_it_learned(distil, capsys):
    distil("run", "--steps", "3", "--report-samples", "2")
    out = capsys.readouterr().out
    table = [
        line.rsplit(maxsplit=2) for line in out[:out.index("control fidelity")].splitlines()
        if line.startswith("  ")
    ]
    assert {name.strip(): trainable != "0" for name, trainable, _ in table} == {
        "reduced_layer": True, "teacher": False, "SD encoder": False, "SD decoder": False,
        "autoencoder": False, "text encoder": False}
    for row in ("base without control", "teacher", "reduced_layer"):
        assert any(line.startswith(row) for line in out.splitlines())
    assert "python sample.py --controlnet" in out


def test_a_controlnet_starts_as_a_copy_and_learns(command, sd, tmp_path):
    train.main(command("run", "--steps", "3", "--sample-every", "2"))
    net = load_controlnet(tmp_path / "run/controlnet.safetensors", sd.unet)
    assert net.zero_convs[0][0].weight.any() and net.config == sd.unet.config
    assert (net.time_embed[0].weight - sd.unet.time_embed[0].weight).abs().max() < 0.01
    pictures = sorted((tmp_path / "run/samples").glob("0*.png"))
    assert [p.name for p in pictures] == ["000002.png", "000003.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.size == (5 * 132 + 4, 24 + 4 * 132)  # five columns, four samples


def test_training_continues_from_any_control_network_file(command, teacher_file, tmp_path, sd):
    train.main(command("run", "--init", str(teacher_file), "--lr", "1e-9", "--steps", "1"))
    net = load_controlnet(tmp_path / "run/controlnet.safetensors", sd.unet)
    start = load_controlnet(teacher_file, sd.unet)
    pairs = zip(net.parameters(), start.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in pairs)


@pytest.mark.parametrize("fraction", ["0", "0.5", "1"])
def test_prompts_are_dropped_at_the_given_rate(command, monkeypatch, fraction):
    contexts, drop_prompts = [], train.drop_prompts

    def recorded(context, empty_prompt, dropped):
        result = drop_prompts(context, empty_prompt, dropped)
        contexts.append((context, empty_prompt, result))
        return result

    monkeypatch.setattr(train, "drop_prompts", recorded)
    train.main(command("run", "--steps", "1", "--batch-size", "40", "--drop-prompt", fraction))
    (before, empty_prompt, after), = contexts
    is_empty = (after == empty_prompt).all(dim=(1, 2))
    assert len(after) == 40 and torch.equal(after[~is_empty], before[~is_empty])
    assert not (before == empty_prompt).all(dim=(1, 2)).any()
    assert abs(is_empty.float().mean() - float(fraction)) <= (0.2 if fraction == "0.5" else 0)


def test_bf16_computes_the_losses_in_half_precision_and_keeps_the_weights(command, tmp_path):
    values = []
    for precision in ("float32", "bf16"):
        train.main(command(precision, "--steps", "2", "--precision", precision))
        log = (tmp_path / precision / "log.jsonl").read_text()
        values.append(json.loads(log.splitlines()[0])["loss"])
    assert values[0] == pytest.approx(values[1], rel=0.05) and values[0] != values[1]
    state = torch.load(tmp_path / "bf16/state/state.pt", weights_only=True)
    assert state["net"]["time_embed.0.weight"].dtype == torch.float32


def test_a_folder_of_pictures_is_trained_on(command, tmp_path):
    fill50k.main(["--out", str(tmp_path / "data"), "--count", "3", "--size", "64"])
    train.main(command("run", "--data", str(tmp_path / "data"), "--steps", "2"))
    assert (tmp_path / "run/samples/000002.png").exists()


def test_a_resume_takes_data_that_has_moved_and_refuses_what_has_changed(command, tmp_path, capsys):
    fill50k.main(["--out", str(tmp_path / "data"), "--count", "3", "--size", "64"])
    train.main(command("run", "--data", str(tmp_path / "data"), "--steps", "1"))
    moved = (tmp_path / "data").rename(tmp_path / "elsewhere")
    again = command("run", "--data", str(moved), "--steps", "2", "--resume")
    train.main(again)
    before = (tmp_path / "run/state/state.pt").read_bytes()
    Image.new("RGB", (64, 64), "red").save(moved / "source/1.png")
    assert run(lambda: train.main([*again, "--steps", "3"])) == 2
    assert "conditions or prompts in" in capsys.readouterr().err
    assert (tmp_path / "run/state/state.pt").read_bytes() == before


def test_another_autoencoder_is_trained_with_and_belongs_to_the_run(
        command, sd, tmp_path, capsys, monkeypatch):
    other, encoded_by = randomize(VAE(sd.vae.config), seed=21), set()
    file = tmp_path / "vae.safetensors"
    save_file(other.state_dict(), file)
    prepare = train.prepare

    def noticing(vae, *inputs, **more):
        encoded_by.add(same(vae, other))
        return prepare(vae, *inputs, **more)

    monkeypatch.setattr(train, "prepare", noticing)
    train.main(command("run", "--steps", "1", "--vae", str(file)))
    assert encoded_by == {True} and f" --vae {file} " in capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    moved = file.rename(tmp_path / "elsewhere/vae.safetensors")
    train.main(command("run", "--steps", "2", "--resume", "--vae", str(moved)))
    assert run(lambda: train.main(command("run", "--steps", "3", "--resume"))) == 2
    assert "--vae was vae.safetensors (" in capsys.readouterr().err


def test_a_prompt_from_the_data_is_only_a_word_of_the_command_that_is_printed(
        command, tmp_path, capsys):
    prompt = "-n it's \"$(rm x)\" `y`; 圆"
    fill50k.main(["--out", str(tmp_path / "a b"), "--count", "3", "--size", "64"])
    lines = (tmp_path / "a b/prompt.json").read_text().splitlines()
    entries = [json.loads(line) | {"prompt": prompt} for line in lines]
    (tmp_path / "a b/prompt.json").write_text("\n".join(map(json.dumps, entries)))
    train.main(command("my run", "--data", str(tmp_path / "a b"), "--steps", "1"))
    line = capsys.readouterr().out.split("try it:")[1].strip()
    printed = subprocess.run(["sh", "-c", "printf '%s\\n' " + line], capture_output=True, text=True,
                             check=True).stdout.splitlines()
    assert printed[-1] == f"--prompt={prompt}"
    assert str(tmp_path / "my run/controlnet.safetensors") in printed


def test_a_schedule_longer_than_the_run_is_a_warning(command):
    settings = parse(command("run", "--steps", "4", "--warmup", "5"))
    with pytest.warns(UserWarning, match="--warmup 5 take longer than --steps 4"):
        warn_of_schedule(settings)


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_state(
        distil, tmp_path, capsys, monkeypatch):
    kept = distil("run", "--steps", "2")
    layerwise_loss = losses.layerwise_loss
    monkeypatch.setattr(losses, "layerwise_loss", lambda *args: layerwise_loss(*args) * math.nan)
    assert run(lambda: distil("run", "--steps", "4", "--resume")) == 1
    assert "error: the loss became nan by step 3" in capsys.readouterr().err
    state = torch.load(tmp_path / "run/state/state.pt", weights_only=True)
    assert state["step"] == 2
    assert all(torch.equal(state["net"][name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize(("arguments", "message"), [
    (["--student", "tiny"], "invalid choice: 'tiny'"),
    (["--steps", "0"], "expected a positive whole number, got '0'"),
    (["--batch-size", "-1"], "expected a positive whole number, got '-1'"),
    (["--lr", "0"], "expected a positive number, got '0'"),
    (["--lr", "nan"], "expected a positive number, got 'nan'"),
    (["--drop-prompt", "1.5"], "expected a number from 0 to 1"),
    (["--teacher", "x.safetensors"], "--teacher needs a --student"),
    (["--resolution", "60"], "divisible by 8"),
    (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    (["--data", "nowhere"],
     "images/ and conditions/, nowhere does not exist"),
    (["--canny"], "--canny needs --data"),
    (["--student", "reduced_layer", "--teacher", "nowhere.safetensors"],
     "nowhere.safetensors does not exist"),
    (["--student", "reduced_layer", "--teacher", "none", "--init", "base"],
     "use random or a control network file"),
    (["--student", "reduced_layer", "--teacher", "none", "--init", "TEACHER"],
     "expected a reduced_layer file in --init"),
    (["--resume"], "expected a saved run to resume"),
])
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(
        base_file, teacher_file, tmp_path, capsys, arguments, message):
    arguments = [str(teacher_file) if argument == "TEACHER" else argument for argument in arguments]
    everything = ["--out", str(tmp_path / "run")] + (
        [] if "--checkpoint" in arguments else ["--checkpoint", str(base_file)]) + arguments
    try:
        code = run(lambda: train.main(everything))
    except SystemExit as leaving:  # argparse
        code = leaving.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error:") and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_written_over(distil, tmp_path, capsys):
    distil("run", "--steps", "2")
    before = (tmp_path / "run/controlnet.safetensors").read_bytes()
    assert run(lambda: distil("run", "--steps", "2")) == 2
    assert "continue it with --resume, or choose another --out" in capsys.readouterr().err
    assert (tmp_path / "run/controlnet.safetensors").read_bytes() == before
