"""The tour's page is what tour.py says and prints, and the figures are what the modules are."""

import re
from html import unescape
from pathlib import Path

import pytest
import torch

from benchmarks import tour
from benchmarks.figures import FIGURES, NAMES, parse
from benchmarks.figures_networks import groups_of, kind_of
from benchmarks.figures_theme import THEMES
from benchmarks.figures_training import PARTS, first_gradients, phase_work
from data.grids import sheet
from kd import build_student
from unet import SD15, UNet, UNetConfig

ROOT = tour.ROOT
SOURCE = tour.TOUR.read_text(encoding="utf-8")
CELLS = tour.cells(SOURCE)
CODE = [content for is_text, content in CELLS if not is_text]
EXPENSIVE = r"paint\(\[|circles|errors|sizes_and_work"  # sampling, measuring, counting


def texts_of_svg(path: Path) -> list[str]:
    found = re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))
    return sorted(map(unescape, found))


def test_the_page_has_the_tours_text_and_code():
    page = tour.PAGE.read_text(encoding="utf-8")
    outputs = tour.printed(SOURCE, page)
    assert page == tour.page(SOURCE, outputs), "run python -m benchmarks.tour (--text-only)"


def test_the_tour_prints_what_its_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    outputs = tour.run_cells(SOURCE, leave_out=EXPENSIVE)
    printed = {i: output.strip() for i, output in outputs.items() if output}
    expected = tour.printed(SOURCE, tour.PAGE.read_text(encoding="utf-8"))
    assert len(printed) >= 5
    assert printed == {i: output.strip() for i, output in expected.items() if i in outputs}
    made = {path.stem for path in (tmp_path / "runs" / "tour").iterdir()}
    assert made == {"noise", "gradients", "convergence"}


def test_a_cell_of_the_tour_is_one_idea():
    for code in CODE:
        assert len(code.splitlines()) <= 15, code
        assert len(re.findall(r"^show\(", code, flags=re.MULTILINE)) <= 1, code
    for is_text, content in CELLS[1:-1]:
        if is_text:
            assert len(re.findall(r"[.?:](?=\s|$)", content)) <= 4 and len(content) < 420, content


def test_the_tour_has_its_pictures_and_no_others():
    pictures = list(tour.PICTURES.glob("*.png"))
    assert {path.stem for path in pictures} == set(filter(None, map(tour.shown, CODE)))
    assert sum(path.stat().st_size for path in pictures) < 1.5e6


def test_a_script_becomes_a_page():
    source = ('"""Left out."""\n# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nprint(1)\n'
              'show("x", 2)\n')
    assert tour.cells(source) == [(True, "# Title\n\nText."), (False, 'print(1)\nshow("x", 2)')]
    page = tour.page(source, {1: "1\n"})
    assert page == ('# Title\n\nText.\n\n```python\nprint(1)\nshow("x", 2)\n```\n\n'
                    "```text\n1\n```\n\n![Title](tour/x.png)\n")
    assert tour.printed(source, page) == {1: "1\n"}
    with pytest.raises(ValueError, match="expected 2 pieces of code"):
        tour.printed(source + "# %%\npass\n", page)


def test_a_sheet_has_rows_of_pictures_under_their_captions():
    pictures = torch.zeros(3, 3, 8, 8)
    pictures[2, 0] = 1
    image = sheet(["a", "b", "c"], pictures, columns=2, cell=8)
    row = sheet(["a", "b"], pictures[:2], columns=2, cell=8)
    assert image.size == (row.width, 2 * row.height)
    y = image.height - 8  # in the second row, where only the first column has a picture
    assert image.getpixel((8, y)) == (255, 0, 0)
    assert image.getpixel((image.width - 8, y)) == (255, 255, 255)


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_there_in_every_form_and_shown_with_its_command(name):
    page = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    folder = ROOT / "docs" / "figures"
    for theme in THEMES:
        assert (folder / f"{name}-{theme.name}.png").stat().st_size < 200_000
        assert f'"figures/{name}-{theme.name}.svg"' in page
    light, dark = (texts_of_svg(folder / f"{name}-{theme.name}.svg") for theme in THEMES)
    assert light == dark and len(light) > 10
    assert f"python -m benchmarks.figures {name}\n" in page


@pytest.mark.parametrize("name", ["architecture", "students", "sizes"])
def test_a_figure_says_what_the_modules_and_results_are_now(name):
    texts = [text.get_text() for text in FIGURES[name](THEMES[0]).findobj(
        match=lambda artist: hasattr(artist, "get_text"))]
    stored = set(texts_of_svg(ROOT / "docs" / "figures" / f"{name}-light.svg"))
    assert {text for text in stored if re.search("[a-z]{3}", text)} <= set(texts), (
        "run python -m benchmarks.figures --out docs/figures")


def test_a_student_shares_or_keeps_the_layers_that_the_figure_says():
    with torch.device("meta"):
        unet = UNet(SD15)
        nets = {name: build_student(name, unet) for name in ("reduced_layer", "loha", "mlp")}
    groups = groups_of(nets["reduced_layer"])
    assert [(first, last) for first, last, _ in groups] == [
        (0, 0), (1, 2), (3, 3), (4, 5), (6, 6), (7, 8), (9, 9), (10, 11), (12, 12)]
    assert [channels for *_, channels in groups] == [
        320, 320, 320, 640, 640, 1280, 1280, 1280, 1280]
    assert [first for first, *_ in groups_of(nets["mlp"])] == [0, 3, 6, 9, 11]
    assert [kind_of(net) for net in nets.values()] == [
        "kept", "low-rank weights (LoHa)", "new, in the UNet's encoder"]


def test_the_gradients_of_the_figure_set_in_over_three_steps():
    reached = [{part for part, norm in norms.items() if norm} for norms in first_gradients()]
    assert reached == [set(PARTS[:1]), set(PARTS[:3]), set(PARTS)]


def test_the_first_phase_of_the_figure_runs_no_unet():
    small = UNetConfig(model_channels=32, channel_mult=(1, 2), attention=(False, True),
                       context_dim=64, groups=8)
    first, second = phase_work(small, size=64).values()
    assert list(first) == ["teacher", "student", "backward"]
    assert first["backward"] == pytest.approx(2 * first["student"], rel=0.05)  # weights, inputs
    assert list(second)[2:5] == ["encoder", "decoder, teacher's", "decoder, student's"]
    assert second["backward"] > first["backward"] + 0.9 * second["decoder, student's"]
    stored = texts_of_svg(ROOT / "docs" / "figures" / "phases-light.svg")
    assert {"142 G", "69 G", "131 G"} <= set(stored)  # as in docs/costs.md; the UNet has 402


def test_an_unknown_figure_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["boxes"])
    assert end.value.code == 2
    assert "expected figures among architecture, students" in capsys.readouterr().err
