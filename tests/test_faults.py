"""A run that dies loses nothing: killed at any moment, stopped politely, out of disk space, or
resumed with other settings."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from children import exit_code, start
from conftest import SHORT, two_levels_file
from safetensors import safe_open

import train
from common.cli import run
from kd import losses
from training.batches import batches

pytestmark = pytest.mark.skipif(
    os.name == "nt" or torch.cuda.is_available(),
    reason="compares bytes, which only a CPU gives twice")

base_file = two_levels_file  # in place of conftest's


def settings(base_file: Path, out: Path) -> list[str]:
    return [*SHORT, "--checkpoint", str(base_file), "--batch-size", "1", "--steps", "10",
            "--save-every", "2", "--sample-every", "5", "--out", str(out)]


@pytest.fixture
def arguments(base_file, tmp_path):
    return lambda name, *more: [*settings(base_file, tmp_path / name), *more]


class Whole(NamedTuple):
    """A run that nothing happened to."""

    files: dict[str, bytes]
    seconds: float


@pytest.fixture(scope="module")
def whole(base_file, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    # the first one waits for the imports
    assert exit_code(start([*settings(base_file, folder / "first"), "--steps", "1"])) == 0
    begun = time.monotonic()
    assert exit_code(start(settings(base_file, folder / "run"))) == 0
    return Whole(files_of(folder / "run"), time.monotonic() - begun)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a run that must not depend on what happened to it; the log has times in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".pt", ".safetensors", ".png", ".tmp")
    }


def readable(folder: Path) -> None:
    """Every file that has its name is whole."""
    for path in folder.rglob("*"):
        if path.name == "state.pt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert file.keys()


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(arguments, whole, tmp_path, kills):
    moments, killed, resumed, finished = random.Random(0), 0, 0, 0
    while killed < kills or not resumed or not finished:
        folder = tmp_path / f"run-{finished}"
        again = (folder / "state" / "state.pt").exists()
        child = start(arguments(folder.name, *(["--resume"] if again else [])))
        if killed < kills or not resumed:  # a test without it would show nothing
            time.sleep(moments.uniform(0.0, whole.seconds))
            child.kill()
        ended = exit_code(child)
        readable(folder)
        if ended == -signal.SIGKILL:
            killed, resumed = killed + 1, resumed + again
        else:  # it was faster than its end: the next begins anew
            assert ended == 0 and files_of(folder) == whole.files
            finished += 1


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_the_run_can_go_on(arguments, whole, tmp_path, number,
                                                            expected):
    child = start(arguments("stopped", "--save-every", "100"))
    log = tmp_path / "stopped" / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        time.sleep(0.01)
        assert child.is_alive()
    os.kill(child.pid, number)
    assert exit_code(child) == expected
    step = torch.load(tmp_path / "stopped" / "state" / "state.pt", weights_only=True)["step"]
    assert 3 <= step < 10 and log.read_text().count("\n") == step
    assert exit_code(start(arguments("stopped", "--resume"))) == 0
    assert files_of(tmp_path / "stopped") == whole.files


@pytest.mark.parametrize(("file", "message"),
                         [("state", "state of step 4 could not be written"),
                          ("outputs", "controlnet.safetensors was not written")])
def test_a_full_disk_is_one_error_and_the_state_before_is_kept(arguments, tmp_path, capsys,
                                                               monkeypatch, file, message):
    assert run(lambda: train.main(arguments("run", "--steps", "2"))) == 0
    if file == "state":
        monkeypatch.setattr(train, "write_networks", lambda *_: None)
    before, limits = files_of(tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    # no file may grow beyond a megabyte
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert run(lambda: train.main(arguments("run", "--steps", "4", "--resume"))) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and message in error[0] and files_of(tmp_path / "run") == before


class Indices:
    """A data set of numbers, by (index, epoch)."""

    def __len__(self) -> int:
        return 40

    def shape(self, i: int) -> tuple[int, int]:
        return 64, 64

    def __getitem__(self, place: tuple[int, int]) -> dict[str, int]:
        return {"i": place[0]}


def test_ctrl_c_leaves_the_workers_that_load_the_data_alone():
    """It goes to the whole process group, and the step that is to be saved still needs its data."""
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = 1
        try:
            passes = batches(Indices(), 2, seed=0, workers=2)
            next(passes)
            signal.signal(signal.SIGINT, lambda *_: None)
            os.killpg(0, signal.SIGINT)
            code = 0 if all(len(next(passes)["i"]) == 2 for _ in range(12)) else 1
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_a_resume_with_other_settings_says_which(arguments, tmp_path, capsys):
    assert run(lambda: train.main(arguments("run", "--steps", "2"))) == 0
    before = files_of(tmp_path / "run")
    assert run(lambda: train.main(
        arguments("run", "--resume", "--batch-size", "3", "--seed", "5", "--save-every", "7"))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "was begun with: --batch-size was 1, is 3; --seed was 0, is 5" in error
    assert "save" not in error
    assert files_of(tmp_path / "run") == before


def test_a_checkpoint_may_move_but_not_change_between_a_run_and_its_resume(
        arguments, base_file, tmp_path, capsys):
    assert run(lambda: train.main(arguments("run", "--steps", "2"))) == 0
    moved = tmp_path / "elsewhere" / base_file.name
    moved.parent.mkdir()
    content = base_file.read_bytes()
    moved.write_bytes(content)
    assert run(lambda: train.main(
        arguments("run", "--steps", "3", "--resume", "--checkpoint", str(moved)))) == 0
    moved.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run(lambda: train.main(
        arguments("run", "--steps", "4", "--resume", "--checkpoint", str(moved)))) == 2
    assert "--checkpoint was sd.safetensors (" in capsys.readouterr().err


def test_steps_may_not_change_under_a_decay_that_counts_from_the_last(arguments, tmp_path, capsys):
    assert run(lambda: train.main(arguments("run", "--steps", "2", "--decay", "1"))) == 0
    assert run(
        lambda: train.main(arguments("run", "--steps", "4", "--decay", "1", "--resume"))) == 2
    assert "--steps was 2, is 4" in capsys.readouterr().err


def test_what_lies_ahead_of_a_run_may_change_as_if_it_had_been_begun_so(
        arguments, tmp_path):
    assert run(lambda: train.main(arguments("run", "--steps", "2"))) == 0
    for _ in range(2):  # with the new settings, which are now the run's
        assert run(
            lambda: train.main(arguments("run", "--steps", "4", "--decay", "2", "--resume"))) == 0
    assert run(lambda: train.main(arguments("same", "--steps", "4", "--decay", "2"))) == 0
    for name in ("controlnet.safetensors", "state/state.pt", "samples/000004.png"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


def test_the_learning_rate_and_its_schedule_may_change_and_a_warning_says_that_bits_do(
        arguments, tmp_path):
    train.main(arguments("run", "--steps", "2", "--decay", "1"))
    with pytest.warns(UserWarning, match="^--decay, --lr, --warmup changed: the run continues"):
        train.main(arguments("run", "--steps", "4", "--lr", "0.5", "--warmup", "8", "--decay", "0",
                             "--resume"))
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["lr"] for entry in log] == [0.001, 0.001, 0.5 * 3 / 8, 0.5 * 4 / 8]


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_touched(
        arguments, tmp_path, capsys, monkeypatch):
    assert run(lambda: train.main(arguments("run", "--steps", "2"))) == 0
    before = files_of(tmp_path / "run")

    def poisoned(noise_pred: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        return (noise_pred - noise_pred.detach()).abs().sqrt().sum()  # zero, with infinite slope

    monkeypatch.setattr(losses, "diffusion_loss", poisoned)
    assert run(lambda: train.main(arguments("run", "--steps", "4", "--resume"))) == 1
    error = capsys.readouterr().err
    assert "error: the gradient became infinite or not a number by step 3" in error
    assert files_of(tmp_path / "run") == before
