"""The experiment: equal images for every row, nothing trained twice, and tables that are those of
the stored results."""

import json
import shutil

import pytest
from conftest import randomize

import train
from benchmarks import distillation, readme
from common.files import sha256
from controlnet import ControlNet
from kd import STUDENTS
from unet import TINY
from weights import load_controlnet, load_stable_diffusion, save_controlnet
from weights.files import read_tensors


@pytest.fixture
def go(base_file, tmp_path, monkeypatch):
    """The experiment on a random base with random teacher, four steps of two pictures a
    training."""
    (tmp_path / "tiny").mkdir()
    shutil.copy(base_file, tmp_path / "tiny" / "sd.safetensors")
    save_controlnet(tmp_path / "tiny" / "controlnet.safetensors",
                    randomize(ControlNet(TINY, paper_encoder=True), seed=3))
    monkeypatch.setattr(train, "TINY", tmp_path / "tiny")
    monkeypatch.setattr(train, "Probe", lambda *_: lambda _: 0.0)
    for name in ("report", "draw", "WATCHED", "SAMPLE_STEPS"):  # which the experiment sets
        monkeypatch.setattr(train, name, getattr(train, name))
    for name, value in {"BATCH": 2, "POINTS": 2, "WATCHED": 1, "WATCHED_STEPS": 1}.items():
        monkeypatch.setattr(distillation, name, value)
    fidelity = distillation.control_fidelity
    monkeypatch.setattr(
        distillation, "control_fidelity",
        lambda sd, net, **told: fidelity(sd, net, **told | {"count": 1, "steps": 1}))

    def go(*only: str, out: str = "out") -> dict:
        distillation.main([
            "--images", "8", "--circles", "1", "--seeds", "0", "--only", *only, "--out",
            str(tmp_path / out)
        ])
        return json.loads((tmp_path / out / "results.json").read_text())

    return go


def test_two_variants_share_their_beginning_and_end_as_if_trained_alone(
        go, tmp_path, monkeypatch, capsys):
    results = go("layers-lite", "distilled-lite", "nothing")
    assert "2 rows to make" in capsys.readouterr().out
    assert list(results["rows"]) == ["layers-lite-0", "distilled-lite-0"]
    for key in (("layers", "lite", 0), ("distilled", "lite", 0)):
        alone = tmp_path / f"alone-{key[0]}"
        train.main([*distillation.settings(key, 8, tmp_path / "out"), "--out", str(alone)])
        name = "-".join(map(str, key))
        assert (tmp_path / "out" / name /
                "controlnet.safetensors").read_bytes() == (alone /
                                                           "controlnet.safetensors").read_bytes()
        assert results["rows"][name]["curve"]["images"] == [4, 8]
    assert (tmp_path / "out" / "layers-lite-0" /
            "controlnet.safetensors").read_bytes() != (alone /
                                                       "controlnet.safetensors").read_bytes()
    sd = load_stable_diffusion(tmp_path / "tiny" / "sd.safetensors")
    assert load_controlnet(tmp_path / "out" / "best" / "lite.safetensors",
                           sd.unet).architecture == "lite"
    monkeypatch.setattr(train, "main", lambda *_: pytest.fail("trained again"))
    assert go("layers-lite", "distilled-lite")["rows"] == results["rows"]
    assert "0 rows to make" in capsys.readouterr().out
    shutil.copytree(
        tmp_path / "out", tmp_path / "elsewhere", ignore=shutil.ignore_patterns("*-lite-*", "best"))
    # gathered rows are enough to go on
    assert go("layers-lite", "distilled-lite", out="elsewhere")["rows"] == results["rows"]


def test_every_row_sees_the_same_images_and_says_how(tmp_path):
    rows = distillation.keys([0, 1])
    assert len(rows) == len(set(rows)) == 2 * (4 * len(STUDENTS) - 3)
    assert {student
            for variant, student, _ in rows
            if variant == "started"} == set(STUDENTS) - {"mlp", "lite", "original"}
    for key in rows:
        args = train.parse(distillation.settings(key, 48_000, tmp_path))
        assert (args.steps * args.batch_size, args.seed, args.student) == (48_000, key[2], key[1])
        teacher, first, init = {
            "alone": (False, 0, "random"), "layers": (True, 3000, "random"), "distilled":
            (True, 2250, "random"), "started": (True, 2250, "teacher")
        }[key[0]]  # fmt: skip
        # to which L_layer does harm
        first = 0 if (key[0], key[1]) == ("distilled", "mlp") else first
        assert (args.teacher
                is not None, args.layer_only_steps, args.init) == (teacher, first, init)


def test_a_goal_is_reached_at_the_first_measurement_that_has_it():
    found = {
        "curve":
        {"images": [100, 200, 300], "seconds": [1.0, 2.0, 3.0], "overlap": [0.4, 0.9, 0.8]}
    }
    assert distillation.reached(found, 0.8) == (200, 2.0) and distillation.reached(found,
                                                                                   0.95) is None


def test_a_curve_counts_the_seconds_of_training_without_those_of_measuring(tmp_path):
    entries = [{"step": step, "seconds": step * 1.0 + (60.0 if step > 4 else 0.0)} |
               ({"overlap": 0.5} if step % 5 == 0 else {}) for step in range(1, 11)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    curve = distillation.curve(tmp_path)
    assert curve["images"] == [5 * distillation.BATCH, 10 * distillation.BATCH]
    # the step that took 61 seconds counts as two
    assert curve["seconds"] == [pytest.approx(6), pytest.approx(11)]


def test_the_readmes_tables_are_those_of_the_stored_results():
    text = (readme.ROOT / "README.md").read_text()
    assert readme.filled(text) == text, "run python -m benchmarks.readme"


def test_the_shipped_students_are_the_ones_that_were_evaluated():
    results = json.loads((readme.ROOT / "docs" / "evaluation.json").read_text())
    shipped = sorted((train.TINY / "students").glob("*.safetensors"))
    assert shipped and sum(path.stat().st_size for path in shipped) < 25e6
    for path in shipped:
        assert results["networks"][path.stem]["sha256"] == sha256(path)
        assert read_tensors(path)[1]["architecture"] == results["networks"][
            path.stem]["architecture"]
