"""The generated circles, Fill50k's layout, and control fidelity at its known values."""

import json
import sys
import types
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common.cli import run
from data import fill50k
from data.annotators import annotate, canny
from data.circles import HELD_OUT, MIN_COLOR_DISTANCE, Circle, Circles, random_circle
from data.fidelity import overlap_and_color_error
from data.folder import Folder
from data.pictures import read_picture, to_image, write_png
from training.batches import order


def test_a_sample_depends_on_seed_and_index_alone():
    a, b = Circles(64, 100), Circles(64, 10)
    assert torch.equal(a[7]["target"], b[7]["target"]) and a[7]["prompt"] == b[7]["prompt"]
    assert random_circle(7) != random_circle(8)
    assert random_circle(7, seed=0) != random_circle(7, seed=1)


def test_held_out_circles_are_none_of_the_training_circles():
    train = {random_circle(i) for i in range(5000)}
    assert not train & {random_circle(HELD_OUT + i) for i in range(256)}


def test_circles_lie_inside_and_their_colors_are_apart():
    for i in range(500):
        c = random_circle(i)
        assert c.radius < c.x < 1 - c.radius and c.radius < c.y < 1 - c.radius
        assert np.linalg.norm(np.subtract(*c.colors())) >= MIN_COLOR_DISTANCE


@pytest.mark.parametrize("size", [64, 256])
def test_target_and_condition_show_the_circle_at_any_size(size):
    circle = Circle(0.5, 0.5, 0.25, "red", "blue")
    target, condition = circle.target(size), circle.condition(size)
    assert tuple(target[size // 2, size // 2]) == (255, 0, 0) and tuple(target[0, 0]) == (0, 0, 255)
    assert condition[size // 2, size // 4].max() > 180
    assert condition[size // 2, size // 2].max() == 0
    edge = target[..., 0][(target[..., 0] > 0) & (target[..., 0] < 255)]
    assert len(edge) > size  # anti-aliased: neither colour alone along the line
    # and the area is the circle's
    assert abs((target[..., 0] / 255).mean() - np.pi * 0.25**2) < 1e-3


def test_value_ranges_are_the_training_contract():
    sample, circle = Circles(64, 1)[0], random_circle(0)
    assert -1 <= sample["target"].min() < 0 and sample["target"].max() <= 1
    assert sample["condition"].min() == 0 and sample["condition"].max() == 1
    assert sample["prompt"] == f"{circle.color} circle with {circle.background} background"


def test_the_preview_of_circles_is_held_out_and_the_same_for_every_seed():
    preview = Circles(64, 100, seed=5).preview(3)
    assert len(preview) == 3 and preview.size == 64
    assert [preview.circle(i) for i in range(3)] == [random_circle(HELD_OUT + i) for i in range(3)]


def test_circles_measure_how_well_pictures_obey_them():
    circles = Circles(64, 5)
    pictures = torch.stack([circles[i]["target"] / 2 + 0.5 for i in range(3)])
    same = range(3)
    perfect, wrong = (circles.fidelity(p, same, same) for p in (pictures, pictures.flip(0)))
    assert perfect["overlap"] > 0.95 > wrong["overlap"]
    assert perfect["color_error"] < 1 < wrong["color_error"]
    swapped = 1 - pictures  # other colours, which a prompt without colours does not forbid
    assert circles.fidelity(swapped, same, same)["overlap"] < 0.95
    assert circles.fidelity(swapped, same, None)["overlap"] > 0.95


def test_the_preview_of_a_folder_is_its_first_pairs_and_nothing_measures_them(tmp_path):
    fill50k.main(["--out", str(tmp_path / "d"), "--count", "3", "--size", "64"])
    folder = Folder(tmp_path / "d", 64)
    preview = folder.preview(2)
    assert (len(folder), len(preview), len(folder.preview(9))) == (3, 2, 3)
    for i in range(2):
        assert preview[i]["prompt"] == folder[i]["prompt"]
        assert torch.equal(preview[i]["target"], folder[i]["target"])
    assert folder.fidelity(torch.zeros(3, 3, 64, 64), range(3), range(3)) == {}


def test_a_written_folder_reads_back_as_the_generated_samples(tmp_path):
    fill50k.main(["--out", str(tmp_path / "d"), "--count", "3", "--size", "64"])
    assert len((tmp_path / "d/prompt.json").read_text().splitlines()) == 3
    folder, circles = Folder(tmp_path / "d", 64), Circles(64, 3)
    for i in range(3):
        for key in ("target", "condition"):
            assert torch.allclose(folder[i][key], circles[i][key], atol=1e-6)
        assert folder[i]["prompt"] == circles[i]["prompt"]


def test_pictures_of_another_size_are_scaled_with_their_condition(tmp_path):
    fill50k.main(["--out", str(tmp_path / "d"), "--count", "1", "--size", "128"])
    sample = Folder(tmp_path / "d", 64)[0]
    assert sample["target"].shape == sample["condition"].shape == (3, 64, 64)
    assert (sample["target"] - Circles(64, 1)[0]["target"]).abs().mean() < 0.02


GOOD = {"source": "source/0.png", "target": "target/0.png", "prompt": "x"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([json.dumps(GOOD), "{not json"], "line 2: expected a JSON object"),
        ([json.dumps(GOOD), json.dumps({"source": "a"})], "line 2: expected {"),
        ([json.dumps(GOOD | {"target": "target/9.png"})],
         "line 1: expected a picture, .*target/9.png does not exist"),
        (["[1, 2]"], "line 1: expected {"),
    ],
)
def test_a_malformed_folder_is_refused_with_the_line(tmp_path, lines, message):
    fill50k.main(["--out", str(tmp_path / "d"), "--count", "1", "--size", "64"])
    (tmp_path / "d/prompt.json").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path / "d", 64)


@pytest.mark.parametrize("column", ["conditioning_image", "conditioning_image_file_name"])
def test_an_imagefolder_is_read_and_its_prompts_may_be_missing(tmp_path, column):
    fill50k.main(["--out", str(tmp_path), "--count", "3", "--size", "64"])
    expected = [Folder(tmp_path, 64)[i] for i in range(3)]
    entries = [{"file_name": f"target/{i}.png", column: f"source/{i}.png"} for i in range(3)]
    entries[0]["text"], entries[1]["text"] = expected[0]["prompt"], None
    (tmp_path / "prompt.json").unlink()
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    folder = Folder(tmp_path, 64)
    assert [folder[i]["prompt"] for i in range(3)] == [expected[0]["prompt"], "", ""]
    for i in range(3):
        for key in ("target", "condition"):
            assert torch.equal(folder[i][key], expected[i][key])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "target/0.png"},
         'line 1: expected {"file_name": file, "conditioning_image": file, "text": text}'),
        ({"file_name": "target/0.png", "conditioning_image": "source/0.png", "text": 7},
         "line 1: expected {"),
        ({"file_name": "target/0.png", "conditioning_image": "source/7.png"},
         "line 1: expected a picture, .*source/7.png does not exist"),
    ],
)
def test_a_wrong_line_of_an_imagefolder_is_refused_with_its_number(tmp_path, entry, message):
    fill50k.main(["--out", str(tmp_path), "--count", "1", "--size", "64"])
    (tmp_path / "prompt.json").unlink()
    (tmp_path / "metadata.jsonl").write_text(json.dumps(entry))
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path, 64)


def test_a_picture_and_its_condition_are_cropped_together_whatever_their_sizes(tmp_path):
    """A white square, off centre in a wide picture, lies in the condition where it lies in the
    picture, which has another size."""
    for name, size in (("a.png", (200, 100)), ("b.png", (100, 50))):
        image = Image.new("RGB", size)
        image.paste("white", (size[0] * 6 // 10, size[1] * 4 // 10,
                              size[0] * 7 // 10, size[1] * 6 // 10))
        write_png(tmp_path / name, image)
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "a.png", "conditioning_image": "b.png"}))
    sample = Folder(tmp_path, 64)[0]
    picture, condition = sample["target"][0] / 2 + 0.5, sample["condition"][0]
    assert picture.shape == (64, 64) and (picture > 0.5).sum() > 50
    assert ((picture > 0.5) == (condition > 0.5)).float().mean() > 0.98


def test_canny_makes_the_condition_from_the_picture_alone(tmp_path):
    image = Image.new("RGB", (100, 80))
    image.paste("white", (30, 20, 70, 60))
    write_png(tmp_path / "a.png", image)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a square"}))
    sample = Folder(tmp_path, 64, edges=True)[0]
    assert torch.equal(sample["condition"], canny(sample["target"] / 2 + 0.5))
    assert 0.02 < sample["condition"].mean() < 0.2


def test_an_empty_folder_is_refused(tmp_path):
    message = "expected a folder with prompt.json, metadata.jsonl, .* has none of them"
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path, 64)


def test_a_folder_with_files_is_not_written_over(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    assert run(lambda: fill50k.main(["--out", str(tmp_path), "--count", "1", "--size", "64"])) == 2
    assert capsys.readouterr().err.startswith("error: expected a new or empty folder")
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_broken_png_is_refused(tmp_path):
    write_png(tmp_path / "a.png", Image.new("RGB", (64, 64)))
    whole = (tmp_path / "a.png").read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2]):
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(ValueError, match="b.png is not one or is damaged"):
            read_picture(tmp_path / "b.png")


def test_a_png_carries_its_text_and_pixels_are_rounded(tmp_path):
    picture = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 2.0])[None, None].expand(3, 1, 4)
    write_png(tmp_path / "a.png", to_image(picture), {"prompt": "größe"})
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["prompt"] == "größe"
        assert np.array(image)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_every_sample_comes_once_an_epoch_and_positions_need_no_state():
    whole = [i for batch in islice(order([(64, 64)] * 10, 4, seed=3), 5) for i, _ in batch]
    assert sorted(whole[:10]) == sorted(whole[10:]) == list(range(10)) and whole[:10] != whole[10:]
    other = [i for batch in islice(order([(64, 64)] * 10, 4, seed=4), 5) for i, _ in batch]
    assert whole != other


def test_fidelity_is_perfect_on_the_truth_and_known_on_wrong_pictures():
    circle = Circle(0.5, 0.5, 0.25, "red", "blue")

    def picture(a):
        return torch.from_numpy(a / 255).permute(2, 0, 1).float()

    truth = picture(circle.target(64))
    overlap, color_error = overlap_and_color_error(truth, circle)
    assert overlap > 0.98 and color_error < 0.5
    swapped = picture(Circle(0.5, 0.5, 0.25, "blue", "red").target(64))
    overlap, color_error = overlap_and_color_error(swapped, circle)
    assert overlap < 0.05 and color_error > 160  # two of three channels wrong by 255
    # two discs at a distance of their radius
    shifted = picture(Circle(0.75, 0.5, 0.25, "red", "blue").target(64))
    lens = 2 * np.arccos(0.5) - np.sin(2 * np.arccos(0.5))
    overlap, _ = overlap_and_color_error(shifted, circle)
    assert abs(overlap - lens / (2 * np.pi - lens)) < 0.02


def test_overlap_without_a_prompt_is_measured_by_the_pictures_own_colours():
    circle = random_circle(0)
    # the right disc in colours that no prompt named
    other = Circle(circle.x, circle.y, circle.radius, "white", "black")
    picture = torch.from_numpy(other.target(64) / 255).permute(2, 0, 1).float()
    overlap, color_error = overlap_and_color_error(picture, circle, own_colors=True)
    assert overlap > 0.97 and color_error < 0.5
    plain = 0.5 + 0.1 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert overlap_and_color_error(plain, circle, own_colors=True)[0] < 0.5


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    depth = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(depth).save(tmp_path / "depth.png")
    assert np.abs(read_picture(tmp_path / "depth.png")[0].numpy() - depth / 65535).max() < 0.003


def test_a_photo_is_turned_as_its_camera_recorded(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    Image.new("RGB", (40, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert read_picture(tmp_path / "phone.jpg").shape == (3, 40, 20)


@pytest.fixture
def annotators(monkeypatch):
    """A stand-in for controlnet_aux: inverts the picture, at half the size."""

    class Processor:
        def __init__(self, name: str):
            if name == "offline":
                raise OSError("cannot reach the hub")

        def __call__(self, image: Image.Image, to_pil: bool) -> Image.Image:
            return ImageOps.invert(image).resize((image.width // 2, image.height // 2))

    module = types.ModuleType("controlnet_aux.processor")
    module.MODELS, module.Processor = {"invert": None, "offline": None}, Processor
    monkeypatch.setitem(sys.modules, "controlnet_aux", types.ModuleType("controlnet_aux"))
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", module)


def test_another_annotators_picture_comes_back_in_the_photos_size(annotators):
    photo = torch.zeros(3, 32, 48)
    assert torch.equal(annotate("invert", photo), torch.ones(3, 32, 48))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "among invert, offline, got"),
        ("offline", "could not get what it needs: cannot reach the hub"),
    ],
)
def test_an_annotator_that_cannot_work_is_refused_with_the_reason(annotators, name, message):
    with pytest.raises(ValueError, match=message):
        annotate(name, torch.zeros(3, 8, 8))


def test_a_transparent_picture_is_read_as_on_white_paper(tmp_path):
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 255, 255))
    picture.putpixel((1, 0), (0, 0, 0, 51))
    for name, image in (("a.png", picture), ("b.png", picture.quantize(method=2))):
        write_png(tmp_path / name, image)
        pixels = read_picture(tmp_path / name) * 255
        assert pixels[:, 0, 0].round().tolist() == [0, 0, 255]
        assert pixels[:, 0, 1].round().tolist() == [204] * 3
        assert pixels[:, 2, 2].round().tolist() == [255] * 3
