"""The strip of a run's samples: cut out of its grids, and refused where it would mislead."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import run
from data.grids import cells, grid
from data.pictures import write_png
from evaluation import strip

SIDE = 128
TITLES = ["Prompt", "Control", "Target restored", "Base (text alone)", "Samples"]


def flat(value: float) -> torch.Tensor:
    return torch.full((3, SIDE, SIDE), value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run of two samples, whose pictures at step n are as bright as n / 10."""
    for step in (1, 2, 4):
        rows = [[prompt, flat(0.2), flat(0.9), flat(0.8), flat(step / 10)] for prompt in "ab"]
        write_png(tmp_path / "run/samples" / f"{step:06}.png", grid(TITLES, rows),
                  {"columns": '["Prompt", "Control", "Target", "Base", "Samples"]'})
    write_png(tmp_path / "run/samples/condition.png", Image.new("RGB", (64, 64)))
    return tmp_path / "run"


def brightness(picture: Image.Image, columns: int) -> list[list[int]]:
    """Of each cell but the prompts, by rows."""
    return [[int(np.asarray(cell).mean()) for cell in row[1:]] for row in cells(picture, columns)]


def refused(capsys, *arguments: object) -> str:
    assert run(lambda: strip.main([str(a) for a in arguments])) == 2
    err = capsys.readouterr().err
    assert err.startswith("error:") and err.count("\n") == 1
    return err


def test_a_strip_shows_the_samples_at_the_steps_in_the_order_that_was_asked_for(folder, tmp_path):
    out = tmp_path / "strip.png"
    strip.main([str(folder), "--steps", "1", "4", "--out", str(out)])
    assert brightness(Image.open(out), 4) == 2 * [[51, 26, 102]]
    strip.main([str(folder), "--out", str(out)])  # its own picture may be replaced
    assert brightness(Image.open(out), 5) == 2 * [[51, 26, 51, 102]]


def test_the_grids_of_older_runs_have_four_columns(folder):
    rows = [["a", flat(0.2), flat(0.9), flat(0.5)]]
    for step in (1, 2):
        write_png(folder / f"samples/{step:06}.png", grid(strip.BEFORE, rows))
    assert brightness(strip.strip(folder, [1, 2]), 4) == [[51, 128, 128]]


def test_a_step_without_a_grid_is_refused_with_those_that_there_are(folder, tmp_path, capsys):
    err = refused(capsys, folder, "--steps", "1", "3", "5", "--out", tmp_path / "strip.png")
    assert "has no grid of step 3, 5; there are 1, 2, 4" in err
    assert "has none" in refused(capsys, tmp_path, "--out", tmp_path / "strip.png")
    assert not (tmp_path / "strip.png").exists()


def test_grids_of_other_samples_are_not_put_side_by_side(folder, tmp_path, capsys):
    other = [["c", flat(0.2), flat(0.9), flat(0.8), flat(0.5)] for _ in range(2)]
    write_png(folder / "samples/000004.png", grid(TITLES, other),
              {"columns": '["Prompt", "Control", "Target", "Base", "Samples"]'})
    err = refused(capsys, folder, "--out", tmp_path / "strip.png")
    assert "the grid of step 4" in err and "than that of step 1" in err


def test_nothing_that_this_program_did_not_make_is_written_over(folder, tmp_path, capsys):
    photo, grid_file = tmp_path / "photo.png", folder / "samples/000001.png"
    Image.new("RGB", (8, 8)).save(photo)
    for path in (photo, grid_file):
        before = path.read_bytes()
        assert "was not made by this program" in refused(capsys, folder, "--out", path)
        assert path.read_bytes() == before


def test_what_is_no_grid_is_one_line(folder, tmp_path, capsys):
    Image.new("RGB", (300, 200)).save(folder / "samples/000002.png")
    err = refused(capsys, folder, "--out", tmp_path / "strip.png")
    assert "000002.png is no sample grid: expected a table of 4 columns" in err
