"""Plots of training logs: which panels a log gets, and what is done with a damaged one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.cli import run
from evaluation import plot


def write(folder: Path, entries: list[dict], end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)
    return folder


def controlnet(step: int) -> dict:
    buckets = [0.2, None, 0.05, 0.01] if step % 2 else [None, 0.1, 0.05, 0.01]
    entry = {"step": step, "loss": 0.1, "L_d": 0.1, "L_d by timestep": buckets, "gradient": 0.3,
             "lr": 1e-3, "seconds": step}
    return entry | ({"probe": -0.01 * step, "overlap": 0.5} if step % 5 == 0 else {})


def student(step: int) -> dict:
    return {"step": step, "L_layer": 1 / step, "L_layer shares": [1 / 13] * 13,
            "L_layer by timestep": [1.0] * 4, "gradient": 0.1}


@pytest.fixture
def runs(tmp_path):
    a = write(tmp_path / "a", [controlnet(i) for i in range(1, 21)])
    b = write(tmp_path / "b", [student(i) for i in range(1, 11)])
    return a, b


def titles(*folders: Path) -> list[str]:
    figure = plot.plot_runs(plot.read_logs(list(folders)))
    return [axes.get_title() for axes in figure.axes]


def test_there_is_a_panel_for_what_any_run_has_logged(runs):
    a, b = runs
    keys = ("L_d", "L_d by timestep", "gradient", "probe", "overlap")
    assert titles(a) == [plot.PANELS[key] for key in keys]
    assert titles(b) == [plot.PANELS["L_layer"], plot.PANELS["gradient"],
                         "share of the 13 outputs in L_layer: b"]
    assert len(titles(a, b)) == 7


def test_curves_are_the_logs_own_numbers(runs):
    figure = plot.plot_runs(plot.read_logs(list(runs)))
    axes = {panel.get_title(): panel for panel in figure.axes}
    probe = axes[plot.PANELS["probe"]].lines[0]
    assert probe.get_xdata().tolist() == [5, 10, 15, 20]
    assert probe.get_ydata().ravel().tolist() == pytest.approx([-0.05, -0.1, -0.15, -0.2])
    by_timestep = axes[plot.PANELS["L_d by timestep"]].lines[:4]
    # buckets without samples are left out of the mean
    assert [line.get_ydata()[3] for line in by_timestep] == pytest.approx([0.2, 0.1, 0.05, 0.01])
    gradients = axes[plot.PANELS["gradient"]].lines
    assert gradients[0].get_color() == gradients[1].get_color() != gradients[2].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_running_mean_keeps_what_is_constant_and_skips_what_is_missing():
    assert plot.smoothed(np.full(50, 3.0)).tolist() == [3.0] * 50
    means = plot.smoothed(np.array([1.0, math.nan, 3.0, math.nan, math.nan, math.nan]))
    assert means[:3].tolist() == [1.0, 2.0, 3.0] and math.isnan(means[-1])


def test_runs_of_the_same_name_are_distinguished_by_their_paths(tmp_path):
    one, two = (write(tmp_path / parent / "run", [controlnet(1)]) for parent in ("x", "y"))
    assert list(plot.read_logs([one, two])) == [str(one), str(two)]
    assert list(plot.read_logs([one])) == ["run"]


def test_the_file_is_a_picture_and_the_same_logs_give_the_same_bytes(runs, tmp_path):
    for name in ("1.png", "2.png"):
        plot.main([str(runs[0]), str(runs[1]), "--out", str(tmp_path / name)])
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert Image.open(tmp_path / "1.png").size[0] == 1100


def test_a_last_line_that_a_killed_run_left_is_ignored(tmp_path):
    assert len(plot.read_log(write(tmp_path / "run", [controlnet(1)], end='{"step": 2, "L_'))) == 1


@pytest.mark.parametrize(("content", "message"), [
    (None, "log.jsonl does not exist"),
    ("", "expected logs with losses"),
    ('{"step": 1}\nnonsense\n{"step": 3}\n',
     "log.jsonl, line 2: expected a JSON object with a step, got 'nonsense'"),
    ('{"step": 1}\n[3]\n{"step": 3}\n', "line 2"),
    ('{"step": 1}\n', "expected logs with losses"),
])
def test_a_damaged_log_is_one_line(tmp_path, capsys, content, message):
    folder = write(tmp_path / "run", [])
    if content is None:
        (folder / "log.jsonl").unlink()
    else:
        (folder / "log.jsonl").write_text(content)
    assert run(lambda: plot.main([str(folder), "--out", str(tmp_path / "plot.png")])) == 2
    err = capsys.readouterr().err
    assert err.startswith("error:") and message in err and err.count("\n") == 1
    assert not (tmp_path / "plot.png").exists()


def test_another_kind_of_picture_than_png_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), "--out", "plot.jpg"])
    assert "expected a .png file" in capsys.readouterr().err
