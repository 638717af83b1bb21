"""Pictures that are not square keep their shape: each in the nearest bucket, a batch of one size,
every picture once an epoch, and a run that is resumed has the bytes of one that never stopped."""

import json
import os
import random
import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
from children import exit_code, start
from conftest import SHORT, TWO_LEVELS, two_levels, two_levels_file
from PIL import Image

import evaluate
import train
from controlnet import ControlNet
from data import fill50k
from data.buckets import bucket_shapes, nearest_shape
from data.folder import Folder, Reading
from data.grids import grid
from evaluation import metrics
from training.batches import batches, drawn, order
from training.prepared import prepare
from training.probe import Probe
from training.settings import parse
from training.state import as_json, require_same
from weights import save_controlnet

IN_BUCKETS = Reading(buckets=True)
SIZE = 32
LYING, UPRIGHT, SQUARE = (24, 40), (40, 24), (32, 32)  # of 32 pixels, height and width
SIDES = [(60, 100), (60, 100), (90, 61), (64, 64), (60, 100), (90, 61), (60, 100)]  # W x H
sd, base_file = two_levels, two_levels_file  # fixtures in place of conftest's


def write_pairs(folder: Path, sizes: list[tuple[int, int]], first: int = 0) -> Path:
    """Noise, so that no two pictures are alike, and a bright square for a condition."""
    lines = []
    for kind in ("target", "source"):
        (folder / kind).mkdir(parents=True)
    for i, size in enumerate(sizes, first):
        noise = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8)
        Image.fromarray(noise).save(folder / f"target/{i}.png")
        condition = np.zeros_like(noise)
        condition[5 + i : 25 + i, 10:30] = 255
        Image.fromarray(condition).save(folder / f"source/{i}.png")
        lines.append({"target": f"target/{i}.png", "source": f"source/{i}.png",
                      "prompt": f"number {i}"})
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_pairs(tmp_path / "data", SIDES)


# --- The sizes ---


@pytest.mark.parametrize(("resolution", "step", "some"), [
    (32, 8, {LYING, UPRIGHT}), (64, 8, {(48, 80), (56, 72)}), (128, 16, {(96, 160)}),
    (512, 64, {(448, 576), (640, 384)}), (640, 64, {(768, 512), (512, 768)}),
    (768, 64, {(1024, 576)}), (600, 64, {(640, 512)}), (8, 8, set()),
])
def test_sizes_are_as_documented(resolution, step, some):
    shapes = bucket_shapes(resolution)
    assert shapes[0] == (resolution, resolution) and len(set(shapes)) == len(shapes)
    assert some <= set(shapes) == {shape[::-1] for shape in shapes}
    for height, width in shapes[1:]:
        assert height % step == width % step == 0
        assert height * width <= resolution**2 and max(height, width) <= 2 * min(height, width)


@pytest.mark.parametrize(("size", "expected"), [
    ((1000, 1000), (512, 512)), ((1000, 1020), (512, 512)), ((4000, 3000), (448, 576)),
    ((1080, 1920), (640, 384)), ((50, 5000), (640, 384)), ((3000, 2000), (384, 640)),
])
def test_a_picture_goes_where_least_of_it_is_cropped(size, expected):
    width, height = size

    def kept(shape):
        scale = max(shape[0] / height, shape[1] / width)  # covers the bucket
        return shape[0] * shape[1] / (scale * height * scale * width)

    shapes = bucket_shapes(512)
    assert nearest_shape(height, width, shapes) == expected
    assert kept(expected) == pytest.approx(max(map(kept, shapes)))


def test_picture_and_condition_cover_their_bucket_and_lie_on_each_other(tmp_path):
    """A white square on black, the condition at another scale."""
    for kind, scale in (("target", 4), ("source", 2)):
        (tmp_path / kind).mkdir()
        pixels = np.zeros((90 * scale, 140 * scale), np.uint8)
        pixels[20 * scale : 60 * scale, 30 * scale : 70 * scale] = 255
        Image.fromarray(pixels).save(tmp_path / kind / "0.png")
    (tmp_path / "target/0.txt").write_text("a square")
    data = Folder(tmp_path, 128, reading=IN_BUCKETS)
    assert data.shape(0) == (96, 160)
    target, condition = data.pair(0)
    assert target.shape == condition.shape == (3, 96, 160)
    ys, xs = (torch.nonzero(target[0].amax(dim) > 127).flatten() for dim in (1, 0))
    scale = 160 / 140  # the height of 90 becomes 102.9, of which 96 are seen
    expected = [20 * scale - 3.43, 60 * scale - 3.43, 30 * scale, 70 * scale]
    assert [ys[0], ys[-1] + 1, xs[0], xs[-1] + 1] == pytest.approx(expected, abs=1)
    assert (target.int() - condition.int()).abs().float().mean() < 2


def test_a_photo_that_lies_on_its_side_is_upright_before_its_bucket_is_chosen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 60)).save(tmp_path / "0.jpg", exif=exif)
    (tmp_path / "0.txt").write_text("turned")
    data = Folder(tmp_path, SIZE, edges=True, reading=IN_BUCKETS)
    assert data.shape(0) == UPRIGHT and data.target(0).shape == (3, *UPRIGHT)


def test_without_the_option_all_are_squares(folder):
    data = Folder(folder, SIZE)
    assert {data.shape(i) for i in range(len(data))} == {SQUARE}


# --- The order ---


SHAPES = [LYING] * 11 + [UPRIGHT] * 6 + [SQUARE] * 3
random.Random(0).shuffle(SHAPES)


def test_a_batch_is_of_one_size_and_what_is_left_of_an_epoch_begins_the_next():
    seen: dict[tuple, list] = {}
    for batch in islice(order(SHAPES, 4, seed=1), 200):
        shape, = {SHAPES[i] for i, _ in batch}
        assert len(batch) == 4
        seen.setdefault(shape, []).extend(batch)
    epochs = 1 + max(epoch for places in seen.values() for _, epoch in places)
    for shape, places in seen.items():
        members = [i for i, s in enumerate(SHAPES) if s == shape]
        for epoch in range(epochs - 1):
            whole = places[epoch * len(members) : (epoch + 1) * len(members)]
            missing = len(members) - len(whole)
            assert missing == 0 or (missing < 4 and epoch == epochs - 2)  # they wait
            assert whole == [] or {e for _, e in whole} == {epoch}
            assert missing or sorted(i for i, _ in whole) == members


def test_the_order_of_squares_is_one_permutation_after_the_other_without_a_gap():
    expected = []
    for epoch in range(3):
        generator = torch.Generator().manual_seed(5 * 1_000_003 + epoch)
        expected += [(i, epoch) for i in torch.randperm(10, generator=generator).tolist()]
    found = [place for batch in islice(order([SQUARE] * 10, 4, seed=5), 7) for place in batch]
    assert found == expected[:28]


def test_what_is_drawn_is_prepared():
    for first, last in ((0, 2), (3, 9), (4, 40)):
        places = [i for batch in islice(order(SHAPES, 4, 1), first, last) for i, _ in batch]
        assert set(places) <= set(drawn(SHAPES, 4, 1, first, last))
    assert sorted(set(places)) == list(range(20))


# --- What is prepared ---


@pytest.mark.parametrize("edges", [False, True])
def test_rows_of_every_size_are_kept_and_those_of_squares_shared_with_runs_without(
        sd, folder, tmp_path, edges, monkeypatch):
    data = Folder(folder, SIZE, edges, reading=IN_BUCKETS)
    assert {data.shape(i) for i in range(len(data))} == {LYING, UPRIGHT, SQUARE}
    prepared = [prepare(sd.vae, sd.text, data, range(len(data)), cache, show=False, **more)
                for cache, more in ((tmp_path / "cache", {}), (None, {}),
                                    (None, {"keep_latents": False}))]
    names = {path.name.split("-", 2)[2] for path in (tmp_path / "cache").glob("latents-*")}
    assert {name.removesuffix("-conditions") for name in names} == {"32", "40x24", "24x40"}
    for places in islice(zip(*(batches(p, 2, seed=0) for p in prepared), strict=True), 6):
        for name in ("condition", "context"):
            assert all(torch.equal(batch[name], places[0][name]) for batch in places)
        height, width = places[0]["condition"].shape[-2:]
        assert places[0]["moments"].shape == (2, 2, 4, height // 8, width // 8)
        assert torch.equal(places[0]["moments"], places[1]["moments"])
        assert places[2]["target"].shape == (2, 3, height, width)
    square = [i for i in range(len(data)) if data.shape(i) == SQUARE]
    monkeypatch.setattr(Folder, "target", lambda *_: pytest.fail("a picture was opened"))
    prepare(sd.vae, sd.text, Folder(folder, SIZE, edges), square, tmp_path / "cache", show=False)


# --- What is measured ---


def test_measures_are_of_the_held_out_pictures_of_the_most_frequent_size(sd, folder, tmp_path):
    others = Folder(write_pairs(tmp_path / "others", [(64, 64), (60, 100), (60, 100)]), SIZE,
                    reading=IN_BUCKETS)
    data = Folder(folder, SIZE, held_out=others, reading=IN_BUCKETS)
    assert [data.preview(5).prompt(i) for i in range(2)] == ["number 1", "number 2"]
    assert len(data.preview(5)) == 2 and len(data.preview(1)) == 1
    own = Folder(folder, SIZE, reading=IN_BUCKETS).preview(3)
    assert [own.prompt(i) for i in range(3)] == ["number 0", "number 1", "number 4"]
    assert own[1]["target"].shape == (3, *UPRIGHT)
    probe = Probe(sd, [own[i] for i in range(3)])
    assert probe(ControlNet.from_unet(sd.unet)) == 0 and probe.target.shape == (3, 4, 5, 3)


def test_a_grid_shows_pictures_in_their_aspect():
    cells = np.asarray(grid(["x"], [[torch.zeros(3, 20, 40)]], cell=128).convert("L"))[24:, 4:132]
    rows = (cells[:128] == 0).mean(axis=1)
    assert rows.tolist() == [0.0] * 32 + [1.0] * 64 + [0.0] * 32


def test_networks_are_measured_in_buckets(base_file, folder, tmp_path, monkeypatch, uncounted):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(metrics, "load_state_dict_from_url", refuse)
    save_controlnet(tmp_path / "net.safetensors", ControlNet(TWO_LEVELS, paper_encoder=True))
    evaluate.main(["--checkpoint", str(base_file), "--teacher", "none", "--controlnet",
                   str(tmp_path / "net.safetensors"), "--steps", "1", "--seeds", "0",
                   "--resolution", "32", "--images", "2", "--data", str(folder), "--canny",
                   "--buckets", "--out", str(tmp_path / "out")])
    protocol = json.loads((tmp_path / "out/results.json").read_text())["protocol"]
    assert [protocol[key] for key in ("images", "size", "width", "height")] == [2, 32, 24, 40]
    table = (tmp_path / "out/results.md").read_text()
    assert table.startswith("2 pictures of 24 x 40 per setting") and "those of 32 x 32." in table


# --- Runs ---


on_cpu = pytest.mark.skipif(os.name == "nt" or torch.cuda.is_available(),
                            reason="compares bytes, which only a CPU gives twice")


@pytest.fixture
def command(base_file, folder, tmp_path):
    return lambda name, *more: [
        *SHORT, "--checkpoint", str(base_file), "--batch-size", "2", "--accumulate", "2",
        "--steps", "4", "--save-every", "1", "--sample-every", "100", "--data", str(folder),
        "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / name), *more]


def files_of(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*")
            if path.suffix in (".pt", ".safetensors", ".png")}


@on_cpu
def test_a_run_in_buckets_that_is_killed_and_resumed_ends_in_the_same_bytes(command, tmp_path):
    assert exit_code(start(command("whole", "--buckets"))) == 0
    log = tmp_path / "killed/log.jsonl"
    child = start(command("killed", "--buckets"))
    while not log.exists() or log.read_text().count("\n") < 2:
        assert child.is_alive()
        sleep(0.005)
    child.kill()
    assert exit_code(child) == -signal.SIGKILL
    assert exit_code(start(command("killed", "--buckets", "--resume"))) == 0
    whole = files_of(tmp_path / "whole")
    assert files_of(tmp_path / "killed") == whole and len(whole) == 4


@on_cpu
def test_a_run_on_squares_has_the_same_bytes_with_and_without_buckets(command, tmp_path):
    fill50k.main(["--out", str(tmp_path / "squares"), "--count", "7", "--size", "64"])
    for name, options in (("with", ["--buckets"]), ("without", [])):
        train.main(command(name, "--data", str(tmp_path / "squares"), "--steps", "2", *options))
    assert files_of(tmp_path / "with") == files_of(tmp_path / "without")


def test_the_start_says_how_many_there_are_of_each_size_and_which_are_rare(command, capsys):
    with pytest.warns(UserWarning, match="fewer pictures of 32 x 32 than a batch has, 2"):
        train.main(command("run", "--buckets", "--steps", "1"))
    assert ("buckets (width x height): 4 pictures of 24 x 40, 2 pictures of 40 x 24, 1 pictures of "
            "32 x 32; sampled and measured are those of 24 x 40 alone") in capsys.readouterr().out


@pytest.mark.parametrize(("more", "message"), [
    (["--shuffle-conditions"], "--buckets and --shuffle-conditions do not go together"),
    (["--compile"], "--buckets and --compile do not go together"),
])
def test_what_needs_pictures_of_one_size_is_refused(command, capsys, more, message):
    with pytest.raises(SystemExit):
        train.main(command("run", "--buckets", *more))
    assert message in capsys.readouterr().err


def test_a_run_does_not_change_into_one_in_buckets(command, tmp_path):
    settings = replace(parse(command("run")), layer_only_steps=0, unlock_at=0)
    settings.out.mkdir()
    before = as_json(settings)
    older = {name: value for name, value in before.items() if name != "buckets"}
    for written in (before, older):
        (settings.out / "settings.json").write_text(json.dumps(written))
        require_same(settings, 1)
        with pytest.raises(ValueError, match="--buckets was False, is True"):
            require_same(replace(settings, buckets=True), 1)
