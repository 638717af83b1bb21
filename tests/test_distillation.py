"""The experiment: equal images for every row, nothing trained twice, and shipped students that are
the evaluated ones."""

import json
import shutil

import pytest
import torch
from conftest import TWO_LEVELS, randomize

import train
from benchmarks import distillation, docs
from benchmarks.distillation import first_drawings, learning_curve
from benchmarks.distillation_recipes import Experiment, arguments, keys, name_of
from benchmarks.distillation_results import goal_reached
from common.files import sha256
from controlnet import ControlNet
from data.drawings import Drawings
from kd import STUDENTS
from training.settings import parse
from weights import (
    drawings,
    load_controlnet,
    load_stable_diffusion,
    save_controlnet,
    save_stable_diffusion,
    tiny,
)
from weights.files import read_tensors


@pytest.fixture
def go(two_levels, tmp_path):
    """The experiment on a random base, which samples in one step, with a random teacher, four steps
    of two pictures a training."""
    base, teacher = tmp_path / "sd.safetensors", tmp_path / "teacher.safetensors"
    save_stable_diffusion(base, two_levels.sampled(1), dtype=torch.float32)
    save_controlnet(teacher, randomize(ControlNet(TWO_LEVELS, paper_encoder=True), seed=3))

    def go(*only: str, out: str = "out") -> tuple[Experiment, dict]:
        experiment = Experiment(
            out=tmp_path / out, images=8, pictures=1, batch_size=2, points=2, point_pictures=1,
            point_steps=1, checkpoint=base, teacher=teacher)
        return experiment, distillation.run_experiment(experiment, seeds=[0], only=list(only))

    return go


def test_two_variants_share_their_beginning_and_end_as_if_trained_alone(
        go, tmp_path, monkeypatch, capsys):
    experiment, results = go("layers-lite", "distilled-lite", "nothing")
    assert "2 rows to make" in capsys.readouterr().out
    assert list(results["rows"]) == ["layers-lite-0", "distilled-lite-0"]
    networks = []
    for key in (("layers", "lite", 0), ("distilled", "lite", 0)):
        name = name_of(key)
        train.main([*arguments(key, experiment), "--out", str(tmp_path / f"alone-{name}")])
        network, alone = (folder / "controlnet.safetensors" for folder in
                          (experiment.out / name, tmp_path / f"alone-{name}"))
        networks.append(network.read_bytes())
        assert networks[-1] == alone.read_bytes()
        assert results["rows"][name]["curve"]["images"] == [4, 8]
    assert networks[0] != networks[1]
    sd = load_stable_diffusion(experiment.checkpoint)
    best = load_controlnet(experiment.out / "best" / "lite.safetensors", sd.unet)
    assert best.architecture == "lite"

    monkeypatch.setattr(train, "main", lambda *_: pytest.fail("trained again"))
    assert go("layers-lite", "distilled-lite")[1]["rows"] == results["rows"]
    assert "0 rows to make" in capsys.readouterr().out
    # Rows gathered from another machine are enough to go on.
    shutil.copytree(experiment.out, tmp_path / "elsewhere",
                    ignore=shutil.ignore_patterns("*-lite-*", "best"))
    assert go("layers-lite", "distilled-lite", out="elsewhere")[1]["rows"] == results["rows"]


def test_every_row_sees_the_same_images_and_says_how(tmp_path):
    rows = keys([0, 1])
    assert len(rows) == len(set(rows)) == 2 * (4 * len(STUDENTS) - 3)
    started = {student for variant, student, _ in rows if variant == "started"}
    assert started == set(STUDENTS) - {"mlp", "lite", "original"}
    for key in rows:
        settings = parse(arguments(key, Experiment(out=tmp_path)))
        assert (settings.student, settings.seed) == (key[1], key[2])
        assert settings.steps * settings.batch_size == 48_000
        has_teacher, layer_only_steps, init = {
            "alone": (False, 0, "random"), "layers": (True, 3000, "random"),
            "distilled": (True, 2250, "random"), "started": (True, 2250, "teacher"),
        }[key[0]]
        if key[:2] == ("distilled", "mlp"):  # L_layer does it harm
            layer_only_steps = 0
        assert (settings.teacher is not None) == has_teacher and settings.init == init
        assert (settings.layer_only_steps or 0) == layer_only_steps


def test_fewer_drawings_are_the_first_ones_and_all_that_are_held_out(tmp_path):
    folder = first_drawings(drawings.DATA, 3, tmp_path / "few")
    few, every = Drawings(folder, 128), Drawings(drawings.DATA, 128)
    assert len(few) == 3 * 8 and len(few.preview(999)) == len(every.preview(999)) == 222
    for i in range(3):
        assert torch.equal(few.target(i), every.target(i)) and few.prompt(i) == every.prompt(i)
    assert first_drawings(drawings.DATA, 3, folder) == folder


def test_a_goal_is_reached_at_the_first_measurement_that_has_it():
    curve = {"images": [100, 200, 300], "seconds": [1.0, 2.0, 3.0], "overlap": [0.4, 0.9, 0.8]}
    assert goal_reached({"curve": curve}, 0.8) == (200, 2.0)
    assert goal_reached({"curve": curve}, 0.95) is None


def test_a_curve_counts_the_seconds_of_training_without_those_of_measuring(tmp_path):
    entries = [{"step": step, "seconds": step * 1.0 + (60.0 if step > 4 else 0.0)} |
               ({"overlap": 0.5} if step % 5 == 0 else {}) for step in range(1, 11)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    curve = learning_curve(tmp_path, 16, "overlap")
    assert curve["images"] == [5 * 16, 10 * 16]
    # the step that took 61 seconds counts as two
    assert curve["seconds"] == [pytest.approx(6), pytest.approx(11)]


def test_the_shipped_students_are_the_ones_that_were_evaluated():
    networks = docs.stored("evaluation")["networks"]
    shipped = sorted(tiny.STUDENTS.glob("*.safetensors"))
    assert shipped and sum(path.stat().st_size for path in shipped) < 25e6
    for path in shipped:
        assert networks[path.stem]["sha256"] == sha256(path)
        assert networks[path.stem]["architecture"] == read_tensors(path)[1]["architecture"]
