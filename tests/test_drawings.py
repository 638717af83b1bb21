"""OpenMoji's drawings: what is made of a release, the shipped data, and how they are placed."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import gallery
from common.cli import run
from data import fill50k, openmoji
from data.drawings import (
    GROUNDS,
    SIZES,
    STORED_SIZE,
    WHITE_SHARE,
    Drawings,
    HeldOutDrawings,
    Placement,
    place,
    prompt,
    random_placement,
)
from data.fidelity import color_error
from data.folder import Folder
from data.own import evaluation_data, training_data
from weights.drawings import DATA, STUDENTS


def entries(part: str) -> list[dict]:
    text = (DATA / part / "metadata.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


TRAIN, HELD_OUT = entries("train"), entries("held_out")


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return Drawings(DATA, 128)


# --- The shipped data ---


def test_no_group_is_both_trained_on_and_held_out():
    assert not {e["group"] for e in TRAIN} & {e["group"] for e in HELD_OUT}
    bases = [{openmoji.base_code(Path(e["file_name"]).stem) for e in part}
             for part in (TRAIN, HELD_OUT)]
    assert not bases[0] & bases[1]
    assert all(openmoji.is_held_out(e["group"]) for e in HELD_OUT)
    assert not any(openmoji.is_held_out(e["group"]) for e in TRAIN)


def test_no_held_out_line_art_is_nearly_a_trained_one(drawings):
    """The shipped held-out drawings are placed, so: cut out and scaled like the trained ones."""

    def unit(path: Path) -> np.ndarray:
        lines = Image.open(path).convert("L")
        lines = lines.crop(lines.point(lambda v: 255 * (v > 16)).getbbox()).resize((32, 32))
        return np.asarray(lines, dtype=np.float32).ravel() / np.linalg.norm(lines)

    train, held_out = (np.stack([unit(DATA / part / e["conditioning_image"]) for e in lines])
                       for part, lines in (("train", TRAIN), ("held_out", HELD_OUT)))
    # Cut out and squeezed to a square, not all that look alike here did so in the release.
    assert ((held_out @ train.T).max(axis=1) > 0.97).mean() < 0.05


def test_the_shipped_data_is_whole_and_small():
    assert (len(TRAIN), len(HELD_OUT)) == (1720, 222)
    assert len({e["file_name"] for e in TRAIN + HELD_OUT}) == 1942
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert len(files) == 2 * 1942 + 2
    assert sum(path.stat().st_size for path in files) < 8e6


def test_every_prompt_says_kind_colors_and_ground():
    for e in TRAIN + HELD_OUT:
        assert e["text"] == prompt(e["kind"], e["colors"], e["ground"])
        assert 1 <= len(e["colors"]) <= 3 and set(e["colors"]) <= openmoji.PALETTE.keys()
        assert e["ground"] in GROUNDS and e["annotation"] and e["author"]
    assert {e["ground"] for e in TRAIN} == {"white"} and {
        e["ground"] for e in HELD_OUT} == GROUNDS.keys()


def test_the_first_color_of_a_prompt_is_the_one_that_is_seen():
    apple = next(e for e in TRAIN + HELD_OUT if e["annotation"] == "red apple")
    assert apple["text"].startswith("food, red, dark red")


def test_both_parts_are_read_as_folders_with_the_ground_of_the_prompt():
    for part, lines in (("train", TRAIN), ("held_out", HELD_OUT)):
        folder = Folder(DATA / part, 128)
        for i in range(12):
            ground = torch.tensor(GROUNDS[lines[i]["ground"]]) / 127.5 - 1
            target = folder[i]["target"]
            corners = torch.stack([target[:, y, x] for y in (0, -1) for x in (0, -1)])
            distance = (corners - ground).abs().amax(1).median()
            assert distance < 0.05, lines[i]


# --- Placing ---


def test_a_sample_depends_on_seed_and_index_alone(drawings):
    other = Drawings(DATA, 128)
    _ = other[5]
    for key in ("target", "condition"):
        assert torch.equal(drawings[3][key], other[3][key])
    assert not torch.equal(drawings[3]["target"], Drawings(DATA, 128, seed=1)[3]["target"])
    assert not torch.equal(drawings[3]["target"], drawings[3 + len(TRAIN)]["target"])
    assert random_placement(0, 7) == random_placement(0, 7) != random_placement(0, 8)


def test_values_have_the_ranges_of_every_data_set(drawings):
    sample = drawings[0]
    assert sample["target"].shape == sample["condition"].shape == (3, 128, 128)
    assert -1 <= sample["target"].min() < 0 and sample["target"].max() <= 1
    assert sample["condition"].min() == 0 and 0.9 < sample["condition"].max() <= 1
    assert Drawings(DATA, 64)[0]["target"].shape == (3, 64, 64)


def test_placements_cover_the_ranges_and_every_ground():
    drawn = [random_placement(0, i) for i in range(4000)]
    sizes = [p.size for p in drawn]
    assert SIZES[0] <= min(sizes) < 0.73 and 0.95 < max(sizes) <= SIZES[1]
    share = Counter(p.ground for p in drawn)
    assert share.keys() == GROUNDS.keys()
    assert abs(share["white"] / 4000 - WHITE_SHARE) < 0.03
    assert 0.45 < sum(p.mirrored for p in drawn) / 4000 < 0.55
    assert all(0 <= p.x <= 1 and 0 <= p.y <= 1 for p in drawn)


@pytest.fixture
def square() -> tuple[Image.Image, Image.Image]:
    """A drawing whose left half is red and whose right half is blue, framed in STORED_SIZE."""
    drawing, lines = Image.new("RGBA", (100, 100)), Image.new("L", (100, 100))
    border = round(50 * (1 - STORED_SIZE))
    drawing.paste((255, 0, 0, 255), (border, border, 50, 100 - border))
    drawing.paste((0, 0, 255, 255), (50, border, 100 - border, 100 - border))
    lines.paste(255, (border, border, 100 - border, 100 - border))
    return drawing, lines


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (1, 0), (0.5, 0.5), (1, 1)])
@pytest.mark.parametrize("size", SIZES)
def test_a_drawing_is_whole_and_its_lines_lie_on_it(square, size, x, y, mirrored):
    picture, lines = place(*square, 100, Placement(size, x, y, mirrored, "lemon"))
    seen = np.asarray(picture).astype(int)
    mask = np.asarray(lines) > 127
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    for indices, position in ((rows, y), (columns, x)):
        assert abs(len(indices) - 100 * size) <= 1
        assert abs(indices[0] - position * (100 - 100 * size)) <= 1.5
    outside = np.asarray(lines) < 8
    assert np.abs(seen[outside] - GROUNDS["lemon"]).max() < 16
    left, right = seen[rows[5], columns[3]], seen[rows[5], columns[-3]]
    assert (left[0] > left[2]) != mirrored and (right[2] > right[0]) != mirrored


def test_the_preview_is_held_out_and_placed_once(drawings):
    preview = drawings.preview(5)
    assert len(preview) == 5 and [preview[i]["prompt"] for i in range(5)] == [
        e["text"] for e in HELD_OUT[:5]]


def test_data_without_kinds_and_colors_is_refused(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / "train").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name)
    (tmp_path / "train/metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", "conditioning_image": "b.png", "text": "x"}))
    with pytest.raises(ValueError, match="line 1: expected 'kind' and 'colors'"):
        Drawings(tmp_path, 8)


# --- Making it from a release ---


def entry(code: str, group: str = "food-drink", subgroup: str = "food-fruit", **more: str) -> dict:
    return {"hexcode": code, "group": group, "subgroups": subgroup, "skintone": "",
            "annotation": f"thing {code}", "openmoji_author": "A. Author"} | more


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (entry("1"), None),
        (entry("1", "people-body", "person", skintone="1"), "skin-tone"),
        (entry("1", "component", "skin-tone"), "skin-tone"),
        (entry("1", "flags", "country-flag"), "flags"),
        (entry("1", "extras-unicode", "subdivision-flag"), "flags"),
        (entry("1", "extras-openmoji", "brand"), "brands"),
        (entry("1", "symbols", "keycap"), "letters"),
        (entry("1", "symbols", "alphanum"), "letters"),
        (entry("1", "extras-unicode", "regional-indicator"), "letters"),
    ],
)
def test_what_is_left_out_by_its_description(description, reason):
    found = openmoji.reason_to_leave_out(description)
    assert found is None if reason is None else found.startswith(reason)


def test_gender_hair_and_skin_do_not_make_another_group():
    assert openmoji.base_code("1F468-200D-1F52C") == openmoji.base_code("1F469-1F3FD-200D-1F52C")
    assert openmoji.base_code("1F469-200D-1F9B0") == "1F9D1"
    assert openmoji.base_code("2640") == "2640"  # the sign itself


def test_groups_join_equal_codes_and_equal_lines():
    lines = np.eye(5, dtype=np.float32)
    lines[3] = lines[0] + 0.1 * lines[1]  # a cosine of 0.995 with drawing 0
    codes = ["B", "1F468", "1F469-1F3FB", "A", "C"]
    assert openmoji.groups(codes, lines) == ["A", "1F9D1", "1F9D1", "A", "C"]


SVG = '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">{}</svg>'
LINES = ('<rect x="20" y="20" width="{w}" height="{h}" fill="none" stroke="#000" '
         'stroke-width="2"/>')
FILL = '<rect x="20" y="20" width="{w}" height="{h}" fill="#d22f27"/>'


@pytest.fixture
def release(tmp_path) -> Path:
    """Six drawings: three whole ones, of which two are equal, one without fill, one without lines,
    one flag."""
    pytest.importorskip("resvg_py")
    rows = [entry("1F34E"), entry("1F34F"), entry("1F350"), entry("1F351"), entry("1F352"),
            entry("1F3F4", "flags", "flag")]
    for folder in ("data", "color/svg", "black/svg"):
        (tmp_path / "r" / folder).mkdir(parents=True)
    (tmp_path / "r/data/openmoji.json").write_text(json.dumps(rows))
    for row, w, h, parts in zip(rows, (32, 32, 10, 20, 20, 20), (20, 20, 30, 25, 25, 25),
                                ("fl", "fl", "fl", "l", "f", "fl"), strict=True):
        fill, lines = (shape.format(w=w, h=h) if letter in parts else ""
                       for shape, letter in ((FILL, "f"), (LINES, "l")))
        (tmp_path / f"r/color/svg/{row['hexcode']}.svg").write_text(SVG.format(fill + lines))
        (tmp_path / f"r/black/svg/{row['hexcode']}.svg").write_text(SVG.format(lines))
    return tmp_path / "r"


def test_a_release_becomes_two_folders(release, tmp_path, capsys):
    openmoji.main([str(release), "--out", str(tmp_path / "a"), "--size", "64"])
    printed = capsys.readouterr().out
    for line in ("6 drawings, left out", "1  flags", "1  no fill", "1  no line art", "2 groups"):
        assert line in printed
    written = [json.loads(line) for part in ("train", "held_out") for line in
               (tmp_path / "a" / part / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert sorted(e["file_name"] for e in written) == ["1F34E.png", "1F34F.png", "1F350.png"]
    assert [e["text"].split(", ")[:2] for e in written] == [["food", "dark red"]] * 3
    assert {e["group"] for e in written} == {"1F34E", "1F350"}


def test_the_same_release_gives_the_same_bytes(release, tmp_path):
    for name in "ab":
        openmoji.main([str(release), "--out", str(tmp_path / name), "--size", "64"])
    contents = [{str(path.relative_to(tmp_path / name)): path.read_bytes()
                 for path in (tmp_path / name).rglob("*") if path.is_file()} for name in "ab"]
    assert contents[0] == contents[1] and len(contents[0]) == 8


def test_a_folder_that_is_no_release_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["openmoji", str(tmp_path), "--out", str(tmp_path / "o")])
    assert run(openmoji.main) == 2
    assert "expected an OpenMoji release" in capsys.readouterr().err


# --- Control fidelity ---


def test_held_out_drawings_measure_lines_colors_and_what_the_prompt_names():
    data = HeldOutDrawings(DATA / "held_out", 128)
    truth = torch.stack([data[i]["target"] / 2 + 0.5 for i in range(4)])
    same, other = range(4), [1, 2, 3, 0]
    right = data.fidelity(truth, same, same)
    assert right["line F1"] > 0.95 and right["color_error"] < 1e-3
    assert right["named_color_error"] < 15
    wrong = data.fidelity(truth.roll(1, 0), same, same)
    assert wrong["line F1"] < 0.6 and wrong["color_error"] > 20
    assert data.fidelity(truth.roll(-1, 0), other, other) == pytest.approx(
        data.fidelity(truth.roll(-1, 0), [1, 2, 3, 0], [1, 2, 3, 0]))
    assert data.fidelity(truth, same, None).keys() == {"line F1"}
    conflicting = data.fidelity(truth, same, other)
    assert conflicting.keys() == {"line F1", "named_color_error"}
    assert conflicting["named_color_error"] > right["named_color_error"] + 20


@pytest.mark.parametrize(("error", "shift"), [(0, 0), (51, 0.2)])
def test_color_error_looks_between_the_lines_only(error, shift):
    condition = torch.zeros(3, 16, 16)
    condition[:, 8] = 1
    truth, picture = torch.full((3, 16, 16), 0.5), torch.full((3, 16, 16), 0.5 + shift)
    picture[:, 6:11] = 0
    assert color_error(picture, truth, condition) == pytest.approx(error)


# --- What is trained on, and what is held out ---


def test_a_folder_with_held_out_pairs_trains_on_the_others_and_previews_those(tmp_path):
    for part, count in (("train", 3), ("held_out", 2)):
        fill50k.main(["--out", str(tmp_path / part), "--count", str(count), "--size", "64"])
    data = training_data(tmp_path, 64)
    assert (len(data), len(data.preview(9))) == (3, 2)
    assert len(evaluation_data(tmp_path, 64)) == 2
    elsewhere = training_data(tmp_path / "train", 64, held_out=tmp_path / "held_out")
    assert (len(elsewhere), len(elsewhere.preview(9))) == (3, 2)
    assert len(training_data(tmp_path / "train", 64).preview(9)) == 3
    edges = training_data(tmp_path, 64, edges=True)
    picture = edges.preview(1)[0]["target"][None] / 2 + 0.5
    assert edges.preview(1).fidelity(picture, [0], [0]) == {"edge F1": 1}


def test_drawings_are_recognised_and_placed_for_training_only():
    assert isinstance(training_data(DATA, 128), Drawings)
    assert type(training_data(DATA, 128, edges=True)) is Folder
    assert isinstance(evaluation_data(DATA, 128), HeldOutDrawings)
    assert isinstance(evaluation_data(DATA / "held_out", 128), HeldOutDrawings)


def test_the_gallery_has_a_column_for_every_network_and_refuses_unknown_drawings(tmp_path):
    file = tmp_path / "gallery.png"
    gallery.main(["1F422", "--steps", "1", "--out", str(file)])
    networks = 3 + len(list(STUDENTS.glob("*.safetensors")))  # line art, base, ControlNet
    with Image.open(file) as image:
        assert image.width == networks * 164 + 4
    with pytest.raises(ValueError, match="held-out drawings, got 'dog'"):
        gallery.main(["dog"])
