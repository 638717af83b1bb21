"""The trainer's modes, its economies, its signals, and several processes: what each promises, on a
random base of the tiny model's shape."""

import json
import math
import os
import signal
import socket
import sys
from argparse import Namespace
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import sleep

import pytest
import torch
from children import code, nothing, start
from conftest import randomize, same

import train
from common.cli import run
from controlnet import ControlNet
from data import fill50k
from data.circles import HELD_OUT, Circles
from kd import build_student
from kd.losses import diffusion_loss, layer_errors
from training.batches import Shuffled, order
from training.cache import Cache
from training.ema import Average
from training.probe import Probe, averages, by_timestep, in_bucket
from training.step import Step, connect_only_middle
from unet import TINY
from vae import TINY_VAE, VAE
from weights import load_controlnet, load_stable_diffusion, save_controlnet


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_controlnet(path, randomize(ControlNet(TINY, paper_encoder=True), seed=11))
    return path


SHORT = {"FIDELITY_SAMPLES": 1, "SAMPLE_STEPS": 1, "WATCHED": 1, "PROBES": 4}
UNSEEN = {"save_sample_grid": nothing, "report": nothing}


@pytest.fixture(autouse=True)
def short_sampling(monkeypatch):
    for name, value in SHORT.items():
        monkeypatch.setattr(train, name, value)


@pytest.fixture
def command(base_file, tmp_path):
    """The command line that trains into a named folder of `tmp_path`."""
    return lambda name, *more: [
        "--checkpoint",
        str(base_file), "--batch-size", "2", "--sample-every", "1000", "--out",
        str(tmp_path / name), *more
    ]


@pytest.fixture
def go(command, tmp_path):
    """Train into a named folder of `tmp_path`; returns it."""

    def go(name: str, *more: str) -> Path:
        train.main(command(name, *more))
        return tmp_path / name

    return go


@pytest.fixture
def no_report(monkeypatch):
    for name, value in UNSEEN.items():
        monkeypatch.setattr(train, name, value)


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


def test_the_small_mode_trains_all_that_leads_to_the_middle_and_nothing_else(go, no_report, sd):
    folder = go("run", "--mode", "small", "--steps", "3")
    net, fresh = load_controlnet(folder / "controlnet.safetensors", sd.unet), ControlNet.from_unet(
        sd.unet, generator=torch.Generator().manual_seed(0))
    assert not any(p.any() for p in net.zero_convs.parameters())
    assert net.middle_block_out[0].weight.any() and not same(net.input_blocks, fresh.input_blocks)


def test_the_small_mode_gives_a_gradient_to_every_weight_that_it_calls_trainable(sd, teacher_file):
    """Otherwise several processes would wait for it forever."""
    for name in ("original", "reduced_layer", "modulated", "lite"):
        net = build_student(name, sd.unet, torch.Generator().manual_seed(0))
        learner = Step(sd.unet, net, None, "small")
        with torch.no_grad():
            randomize(net.middle_block_out)
        losses, _ = learner(
            *train.drawn(
                Namespace(drop_prompt=0.5, device="cpu"), sd, batch(), *train.caches(sd, None),
                torch.Generator()), False)
        losses["L_d"].backward()
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters()), name


def batch() -> dict:
    data = Circles(32, 2)
    return {key: torch.stack([data[i][key] for i in range(2)])
            for key in ("target", "condition")} | {"prompt": [data[i]["prompt"] for i in range(2)]}


def test_a_small_run_is_continued_in_the_default_mode_in_its_folder_and_from_its_file(
        go, no_report, capsys):
    folder = go("run", "--mode", "small", "--steps", "2")
    assert "4,029,232" not in capsys.readouterr().out
    other = go("other", "--init", str(folder / "controlnet.safetensors"), "--steps", "2")
    go("run", "--resume", "--steps", "4")
    assert "controlnet                  4,029,232              0" in capsys.readouterr().out
    for continued in (folder, other):
        assert any(
            state(continued)["net"][name].any()
            for name in ("zero_convs.0.0.weight", "zero_convs.11.0.weight"))


def test_the_small_mode_is_refused_where_its_file_would_lie(go, capsys, teacher_file):
    assert "those of --init are trained already" in refused(
        capsys, lambda: go("a", "--mode", "small", "--init", str(teacher_file)))
    assert "mlp enters the SD encoder" in refused(
        capsys, lambda: go("b", "--mode", "small", "--student", "mlp", "--teacher", "none"))
    assert "an --ablation has the default mode" in refused(
        capsys, lambda: go("c", "--mode", "small", "--ablation", "gaussian"))


def test_a_small_network_has_no_outputs_for_the_skip_connections_and_the_unet_takes_that(
        sd, no_grad):
    net = randomize(ControlNet(TINY))
    x, condition, t, context = torch.randn(1, 4, 4, 4), torch.rand(1, 3, 32, 32), torch.tensor(
        [500]), sd.text.encode(["a"])
    whole = net(x, condition, t, context)
    for zero in net.zero_convs.parameters():
        zero.zero_()
    connect_only_middle(net)
    small = net(x, condition, t, context)
    assert small[:-1] == [None] * 12 and torch.equal(small[-1], whole[-1])
    zeros = [torch.zeros_like(c) for c in whole[:-1]]
    assert torch.equal(sd.unet(x, t, context, small), sd.unet(x, t, context, [*zeros, whole[-1]]))


def test_the_large_mode_unlocks_the_decoder_when_told_saves_the_changed_base_and_says_so(
        go, no_report, base_file, capsys):
    folder = go("run", "--mode", "large", "--unlock-at", "2", "--steps", "2")
    assert not (folder / "sd.safetensors").exists()
    assert "from step 3" not in capsys.readouterr().out
    go("run", "--mode", "large", "--unlock-at", "2", "--steps", "4", "--resume")
    assert "SD decoder                  5,114,468              0" in capsys.readouterr().out
    base, changed = load_stable_diffusion(base_file), load_stable_diffusion(
        folder / "sd.safetensors")
    for part in ("time_embed", "input_blocks", "middle_block"):
        assert same(getattr(base.unet, part), getattr(changed.unet, part))
    assert same(base.vae, changed.vae) and same(base.text, changed.text)
    assert all(
        not torch.equal(a, b)
        for a, b in zip(base.unet.out.parameters(), changed.unet.out.parameters(), strict=True))
    whole = go("whole", "--mode", "large", "--unlock-at", "2", "--steps", "4")
    assert (whole / "sd.safetensors").read_bytes() == (folder / "sd.safetensors").read_bytes()
    assert (whole / "state/state.pt").read_bytes() == (folder / "state/state.pt").read_bytes()


def test_an_unlocked_decoder_does_not_change_what_the_teacher_says(sd, teacher_file):
    unet, (teacher, net) = load_copy(sd.unet), (
        load_controlnet(teacher_file, sd.unet) for _ in range(2))
    learner = Step(unet, net, teacher, "large")
    given = train.drawn(
        Namespace(drop_prompt=0.5, device="cpu"), sd, batch(), *train.caches(sd, None),
        torch.Generator())
    learner.unlock()
    with torch.no_grad():
        unet.out[2].bias += 1.0
        losses, _ = learner(*given, layer_only=False)
    # teacher and student are the same, but for the decoder
    assert losses["L_td"].item() == pytest.approx(1.0, rel=1e-4)


def load_copy(module: torch.nn.Module) -> torch.nn.Module:
    copy = type(module)(module.config)
    copy.load_state_dict(module.state_dict())
    return copy


# --- Memory and speed ---


def test_the_cache_changes_nothing_and_spares_the_second_run_the_encoders(
        go, no_report, tmp_path, monkeypatch):
    plain = go("plain", "--steps", "2")
    first = go("first", "--steps", "2", "--cache", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "Probe", lambda *_: None)
    monkeypatch.setattr(VAE, "encode", lambda *_: pytest.fail("the autoencoder ran again"))
    second = go("second", "--steps", "2", "--cache", str(tmp_path / "cache"))
    assert state(plain)["net"].keys() == state(first)["net"].keys()
    for folder in (first, second):
        assert (folder /
                "controlnet.safetensors").read_bytes() == (plain /
                                                           "controlnet.safetensors").read_bytes()


def test_the_cache_is_keyed_by_the_content_of_the_picture_and_of_the_network(tmp_path):
    counted = []

    def cache(network: torch.nn.Module) -> Cache:
        return Cache(
            network, lambda x: counted.append(1) or torch.as_tensor(
                x if isinstance(x, torch.Tensor) else [len(x)]).float() * 2, tmp_path)

    vae = VAE(TINY_VAE)
    a, b = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    b[2, 7, 7] = 1e-6
    for network, inputs, runs in ((vae, [a, b, a], 2), (vae, [b, a.clone()], 0), (vae, [
            a[:, :4]
    ], 1), (vae, ["", "a", ""], 2)):
        counted.clear()
        found = cache(network)(inputs)
        assert len(counted) == runs and len(found) == len(inputs)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    counted.clear()
    cache(vae)([a])
    assert len(counted) == 1


def test_a_damaged_entry_of_the_cache_is_computed_again(tmp_path):
    network = torch.nn.Linear(1, 1)
    expected = Cache(network, lambda x: x * 2, tmp_path)([torch.ones(5)])
    (entry,) = tmp_path.rglob("*.npy")
    for content in (b"", entry.read_bytes()[:-3], b"garbage"):
        entry.write_bytes(content)
        assert torch.equal(Cache(network, lambda x: x * 2, tmp_path)([torch.ones(5)]), expected)
    # and written whole again
    assert torch.equal(
        Cache(network, lambda x: pytest.fail("computed"), tmp_path)([torch.ones(5)]), expected)


def test_memory_holds_only_what_the_limit_allows():
    counted = []
    cache = Cache(torch.nn.Linear(1, 1), lambda x: counted.append(1) or x, limit=2 * 4 * 5)
    for _ in range(2):
        cache([torch.full((5,), float(i)) for i in range(3)])
    assert len(counted) == 4  # the third did not fit


def test_gradient_checkpointing_changes_no_bit(go, no_report, teacher_file):
    more = [
        "--student", "reduced_layer", "--teacher",
        str(teacher_file), "--layer-only-steps", "1", "--steps", "3"
    ]
    assert state(go("a", *more))["net"].keys()
    assert (go("b", *more, "--checkpointing") /
            "controlnet.safetensors").read_bytes() == (go("c", *more) /
                                                       "controlnet.safetensors").read_bytes()


def test_half_precision_holds_the_frozen_networks_in_bf16_and_what_learns_in_float32(
        go, no_report, teacher_file, monkeypatch):
    seen = {}

    def announce(args, step, sd, net, teacher, learner) -> None:
        seen.update(unet=sd.unet, text=sd.text, teacher=teacher, net=net, vae=sd.vae)

    monkeypatch.setattr(train, "announce", announce)
    more = [
        "--student", "reduced_layer", "--teacher",
        str(teacher_file), "--layer-only-steps", "1", "--steps", "2", "--precision", "bf16"
    ]
    folder = go("run", *more)
    assert {name: next(network.parameters()).dtype
            for name, network in seen.items()} == {
                # fmt: skip
                "unet": torch.bfloat16,
                "text": torch.bfloat16,
                "teacher": torch.bfloat16,
                "net": torch.float32,
                "vae": torch.float32
            }
    assert all(moment.dtype == torch.float32
               for entry in state(folder)["optimizer"]["state"].values()
               for moment in entry.values())
    go("large", "--mode", "large", "--steps", "1", "--precision", "bf16")
    assert {p.dtype for p in seen["unet"].parameters()} == {torch.float32}  # a decoder that learns


def test_pictures_and_fidelity_work_in_half_precision(go):
    folder = go("run", "--steps", "1", "--precision", "bf16", "--sample-every", "1")
    assert (folder / "samples/000001.png").exists() and math.isfinite(log(folder)[0]["probe"])


def test_the_learning_rate_rises_linearly_and_falls_along_a_line_or_a_cosine():
    settings = Namespace(warmup=4, decay=4, steps=12, cosine=False)
    assert [train.rate(settings, step)
            for step in range(12)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    settings.cosine = True
    assert train.rate(settings, 10) == pytest.approx(0.5) and train.rate(
        settings, 9) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert [
        train.rate(Namespace(warmup=0, decay=0, steps=3, cosine=False), step) for step in range(3)
    ] == [1, 1, 1]


def test_clipping_scales_the_gradient_down_to_the_norm_and_the_log_shows_it_unclipped(
        go, no_report, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.optim, "AdamW",
                        lambda parameters, lr, fused: Watched(parameters, lr, seen))
    folder = go("run", "--steps", "3", "--clip", "1e-3")
    assert seen == pytest.approx([1e-3] * 3, rel=1e-3)
    assert all(entry["gradient"] > 2e-3 for entry in log(folder))


class Watched(torch.optim.SGD):
    """Gradient descent that notes the norm of the gradient that it is given."""

    def __init__(self, parameters, lr: float, seen: list[float]):
        super().__init__(parameters, lr)
        self.seen = seen

    def step(self) -> None:
        self.seen.append(
            torch.nn.utils.get_total_norm([
                p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
            ]).item())
        super().step()


def test_the_average_is_of_parameters_and_follows_its_formula():
    net = torch.nn.BatchNorm1d(2)
    average = Average(net, decay=0.75)
    with torch.no_grad():
        net.weight.fill_(5.0)
        net.running_mean.fill_(7.0)
    average.update(net)
    assert torch.equal(average.net.weight, torch.full(
        (2, ), 0.75 * 1 + 0.25 * 5)) and not average.net.running_mean.any()
    average.update(net)
    assert torch.equal(average.net.weight, torch.full(
        (2, ), 0.75 * 2 + 0.25 * 5)) and not average.net.weight.requires_grad


def test_an_averaged_run_writes_both_networks_and_resumes_exactly(go, no_report, sd):
    whole = go("whole", "--steps", "4", "--ema", "0.9")
    go("parts", "--steps", "2", "--ema", "0.9")
    parts = go("parts", "--steps", "4", "--ema", "0.9", "--resume")
    for name in ("controlnet.safetensors", "controlnet_ema.safetensors", "state/state.pt"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert not same(*(load_controlnet(whole / f"{name}.safetensors", sd.unet)
                      for name in ("controlnet", "controlnet_ema")))


# --- Signals ---


def test_the_log_splits_the_losses_by_timestep_and_layer(go, no_report, teacher_file):
    folder = go("run", "--student", "reduced_layer", "--teacher", str(teacher_file),
                "--layer-only-steps", "1", "--steps", "3", "--sample-every", "2")
    first, second, third = log(folder)
    assert len(first["L_layer shares"]) == 13 and sum(
        first["L_layer shares"]) == pytest.approx(1) and "L_d by timestep" not in first
    for name in ("L_d", "L_td", "L_layer"):
        assert len(third[f"{name} by timestep"]) == 4
    assert "probe" in second and "overlap" in second and "probe" not in third


def test_losses_by_timestep_are_means_over_the_samples_of_each_quarter_and_none_without(sd):
    t = torch.tensor([0, 249, 250, 999])
    predicted, target = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None], torch.zeros(4, 1)
    sums = {
        "samples by timestep": in_bucket(t), "L_d by timestep": by_timestep(
            map(diffusion_loss, predicted, target), t), "L_d": torch.tensor(7.5)
    }
    assert averages(dict(sums), 1) == {"L_d by timestep": [2.5, 9.0, None, 16.0], "L_d": 7.5}
    two = averages({name: 2 * value for name, value in sums.items()}, 2)
    assert two == {"L_d by timestep": [2.5, 9.0, None, 16.0], "L_d": 7.5}


def test_layer_errors_are_squared_differences_in_units_of_the_teachers_variance():
    teacher = [torch.tensor([1.0, -1.0]), torch.tensor([3.0, -3.0])]
    errors = layer_errors([torch.zeros(2), torch.zeros(2)], teacher, [a.var() for a in teacher])
    assert torch.allclose(errors, torch.tensor([0.5, 0.5]))
    student, teacher = torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]])
    assert torch.allclose(
        layer_errors([student], [teacher], [torch.tensor(2.0)], by_sample=True),
        torch.tensor([[0.5, 1.5]]))
    with pytest.raises(ValueError, match="as many outputs"):
        layer_errors(teacher[:1], teacher, [torch.ones(())] * 2)


def test_the_probe_is_zero_for_an_untrained_network_and_negative_for_one_that_obeys():
    tiny = load_stable_diffusion(train.TINY / "sd.safetensors")
    probe = Probe(tiny, [Circles(64, 32, first=HELD_OUT)[i] for i in range(32)])
    assert probe(ControlNet.from_unet(tiny.unet)) == 0.0
    assert probe(load_controlnet(train.TINY / "controlnet.safetensors", tiny.unet)) < -0.005


def test_shuffled_conditions_belong_to_another_picture():
    data = Circles(32, 3)
    shuffled = Shuffled(data)
    for i in range(3):
        assert torch.equal(shuffled[i]["target"], data[i]["target"]) and torch.equal(
            shuffled[i]["condition"], data[(i + 1) % 3]["condition"])
    assert len(shuffled) == 3


def test_a_run_on_a_folder_has_the_probe_and_no_overlap(go, no_report, tmp_path):
    fill50k.main(["--out", str(tmp_path / "data"), "--count", "3", "--size", "32"])
    folder = go("run", "--data", str(tmp_path / "data"), "--resolution", "32", "--steps", "1",
                "--sample-every", "1")
    assert "probe" in log(folder)[0] and "overlap" not in log(folder)[0]


def test_tensorboard_gets_what_the_log_gets(go, no_report):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = go("run", "--steps", "2", "--tensorboard")
    go("run", "--steps", "3", "--tensorboard", "--resume")
    events = loading.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("L_d")
            ] == [(entry["step"], pytest.approx(entry["L_d"])) for entry in log(folder)]


def test_tensorboard_without_its_package_is_one_line(go, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in refused(capsys, lambda: go("run", "--tensorboard"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--unlock-at", "3"], "--unlock-at needs --mode large"),
    (["--student", "lite", "--mode", "large", "--unlock-at", "3", "--layer-only-steps", "5"
      ], "must not come before the end of --layer-only-steps, 5"),
    (["--cosine"], "--cosine is the curve of --decay"),
    (["--ema", "2"], "expected a number from 0 to 1"),
    (["--clip", "0"], "expected a positive number"),
    (["--mode", "medium"], "invalid choice: 'medium'"),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(go, capsys, arguments, message):
    assert message in refused(capsys, lambda: go("run", *arguments))


# --- Several processes ---


@pytest.fixture
def torchrun(command, tmp_path):
    """Start train.py in two processes as torchrun does, with the same variables; of a test that has
    failed, nothing goes on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everyone, said = [], tmp_path / "said.log"

    def torchrun(name: str, *more: str) -> list[BaseProcess]:
        places = [{
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR":
            "127.0.0.1", "MASTER_PORT": str(port)
        } for rank in (0, 1)]
        children = [
            start(command(name, *more), SHORT | UNSEEN | {"Probe": nothing}, place, str(said))
            for place in places
        ]
        everyone.extend(children)
        return children

    yield torchrun
    for child in everyone:
        child.kill()
    print("the processes said:", said.read_text()[-5000:])


def codes(children: list[BaseProcess]) -> list[int]:
    return [code(child) for child in children]


on_cpu = pytest.mark.skipif(
    os.name == "nt" or torch.cuda.is_available(), reason="two processes would need two GPUs")
DISTIL = [
    "--student", "modulated", "--layer-only-steps", "6", "--steps", "20", "--lr", "1e-3", "--clip",
    "1", "--ema", "0.9"
]


@on_cpu
def test_two_processes_make_the_loss_curve_of_one_with_the_whole_batch_and_resume_exactly(
        go, torchrun, no_report, teacher_file, tmp_path):
    more = [*DISTIL, "--teacher", str(teacher_file)]
    one = go("one", *more, "--batch-size", "4")
    assert codes(torchrun("two", *more)) == [0, 0]
    assert codes(torchrun("parts", *more, "--steps", "8")) == [0, 0]
    assert codes(torchrun("parts", *more, "--resume")) == [0, 0]
    two = tmp_path / "two"
    entries = list(zip(log(one, "seconds", "lr"), log(two, "seconds", "lr"), strict=True))
    assert len(entries) == 20
    for expected, found in entries:
        for name in ("loss", "L_layer", "gradient",
                     *(["L_d", "L_td"] if found["step"] > 6 else [])):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (found["step"], name)
        for name in ("L_layer shares", "L_layer by timestep"):
            assert [x or 0 for x in found[name]] == pytest.approx([x or 0 for x in expected[name]],
                                                                  rel=1e-3)
    for name in ("controlnet.safetensors", "controlnet_ema.safetensors", "state/state.pt"):
        assert (tmp_path / "parts" / name).read_bytes() == (two / name).read_bytes()


@on_cpu
def test_two_processes_unlock_accumulate_and_stop_together(go, torchrun, no_report, tmp_path):
    more = ["--mode", "large", "--unlock-at", "2", "--accumulate", "2", "--batch-size", "1"]
    assert codes(torchrun("two", *more, "--steps", "4")) == [0, 0]
    one = go("one", *more, "--batch-size", "2", "--steps", "4")
    for expected, found in zip(log(one), log(tmp_path / "two"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    children = torchrun("stopped", *more, "--steps", "1000")
    written = tmp_path / "stopped" / "log.jsonl"
    while not written.exists() or written.read_text().count("\n") < 2:
        sleep(0.05)
        assert all(child.is_alive() for child in children)
    os.kill(children[1].pid, signal.SIGTERM)  # only the one that does not write is asked
    assert codes(children) == [0, 0]
    assert state(tmp_path / "stopped")["step"] == written.read_text().count("\n") >= 2


def test_a_resume_with_another_number_of_processes_says_so(go, no_report, base_file, monkeypatch):
    folder = go("run", "--steps", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = train.parse([
        "--checkpoint",
        str(base_file), "--batch-size", "2", "--out",
        str(folder), "--steps", "2", "--resume"
    ])
    with pytest.raises(ValueError, match="begun with: torchrun's processes was 1, is 2$"):
        train.resume(folder, arguments, {})


def test_processes_see_disjoint_parts_of_the_order_of_one(monkeypatch):
    whole, parts = order(10, 6, seed=3), []
    for rank in range(3):
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", str(rank))
        parts.append([train.parallel.mine(indices) for indices in islice(order(10, 6, seed=3), 5)])
    for number, indices in enumerate(islice(whole, 5)):
        assert [i for part in parts for i in part[number]] == indices
