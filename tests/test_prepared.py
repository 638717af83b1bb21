"""What is computed once before training: right, never stale, never half written, shared between
processes; and in the training loop no target picture is opened."""

import json
import os
import signal
from itertools import islice
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch
from children import exit_code, start
from conftest import SHORT, randomize, two_levels, two_levels_file
from PIL import Image, ImageOps
from torch import Tensor

import train
import training.prepared
from benchmarks import loader
from data import fill50k
from data.circles import Circles
from data.folder import Folder
from data.pictures import write_png
from text.clip import TINY_TEXT, CLIPText
from training.batches import ShuffledConditions, batches, drawn, order
from training.prepared import (
    Prepared,
    cache_folder,
    encode_prompts,
    encode_targets,
    on_device,
    prepare,
)
from training.rows import Rows
from training.settings import parse
from vae import TINY_VAE, VAE

SIZE = 32
sd, base_file = two_levels, two_levels_file  # fixtures in place of conftest's


@pytest.fixture
def data_folder(tmp_path) -> Path:
    """Nine pairs; the last has the picture and the prompt of the first."""
    folder = tmp_path / "data"
    fill50k.main(["--out", str(folder), "--count", "8", "--size", str(SIZE)])
    with open(folder / "prompt.json", "a") as index:
        index.write((folder / "prompt.json").read_text().splitlines()[0] + "\n")
    return folder


@pytest.fixture
def counted(sd, monkeypatch):
    """How many pictures and prompts were encoded, without the fillers of a batch."""
    counts = {"pictures": 0, "prompts": 0}

    def counting(name, function):
        def encode(network, inputs):
            counts[name] += len(inputs)
            return function(network, inputs)
        return encode

    for name, function in (("pictures", encode_targets), ("prompts", encode_prompts)):
        monkeypatch.setattr(training.prepared, function.__name__, counting(name, function))
    return counts


def prepare_all(sd, data, folder=None, **more) -> Prepared:
    return prepare(sd.vae, sd.text, data, range(len(data)), folder, show=False, **more)


def contents(prepared: Prepared) -> list[Tensor]:
    return [tensor for i in range(len(prepared)) for tensor in prepared[i, 0].values()]


def equal(a: Prepared, b: Prepared) -> bool:
    return all(torch.equal(x, y) for x, y in zip(contents(a), contents(b), strict=True))


def index_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]


# --- What is prepared ---


def test_what_is_prepared_is_what_the_networks_say_in_half_precision(sd, no_grad):
    data = Circles(SIZE, 6)
    prepared = prepare_all(sd, data)
    moments, condition, context = on_device(next(batches(prepared, 6, seed=0)), sd.vae)
    samples = [data[i] for i, _ in next(order([(SIZE, SIZE)] * 6, 6, seed=0))]
    expected = sd.vae.encode(torch.stack([s["target"] for s in samples]))
    assert torch.allclose(moments, torch.stack(expected, dim=1), rtol=1e-3, atol=1e-3)
    assert torch.equal(condition, torch.stack([s["condition"] for s in samples]))
    states = sd.text.encode([s["prompt"] for s in samples])
    assert torch.allclose(context, states, rtol=1e-3, atol=1e-3)
    assert torch.allclose(prepared.empty_prompt, sd.text.encode([""])[0], rtol=1e-3, atol=1e-3)


def test_no_bit_of_an_entry_depends_on_the_others_of_its_batch(sd):
    targets = torch.stack([Circles(64, 7).target(i) for i in range(7)])
    prompts = [Circles(64, 40).prompt(i) for i in range(40)]
    for encode, network, inputs in ((encode_targets, sd.vae, targets),
                                    (encode_prompts, sd.text, prompts)):
        alone = torch.cat([encode(network, inputs[i : i + 1]) for i in range(len(inputs))])
        assert torch.equal(encode(network, inputs), alone)


def test_half_precision_moves_latents_by_less_than_a_thousandth_of_their_spread(sd, no_grad):
    targets = torch.stack([Circles(64, 8).target(i) for i in range(8)])
    exact = sd.vae.encode(targets / 127.5 - 1)[0]
    error = (encode_targets(sd.vae, targets)[:, 0].float() - exact).abs().max()
    assert 0 < error < 1e-3 * exact.std()


def test_only_what_the_steps_to_come_draw_is_prepared():
    for first, last in ((0, 2), (3, 9), (2, 2), (0, 100)):
        shapes = [(SIZE, SIZE)] * 10
        batches_drawn = islice(order(shapes, 4, seed=1), first, last)
        assert drawn(shapes, 4, 1, first, last) == sorted({i for b in batches_drawn for i, _ in b})


def test_the_loader_gives_the_same_with_and_without_processes(sd, data_folder, tmp_path):
    data = Folder(data_folder, SIZE)
    for folder in (None, tmp_path / "cache"):
        prepared = prepare_all(sd, data, folder)
        alone, helped = (islice(batches(prepared, 4, seed=0, workers=workers), 3)
                         for workers in (0, 2))
        for a, b in zip(alone, helped, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
            assert {name: t.dtype for name, t in a.items()} == {
                "moments": torch.float16, "condition": torch.uint8, "context": torch.float16}


def test_after_the_preparation_no_target_picture_is_read(sd, data_folder, tmp_path):
    data = Folder(data_folder, SIZE)
    before = contents(prepare_all(sd, data))
    prepared = prepare_all(sd, data, tmp_path / "cache")
    for file in data_folder.glob("target/*"):
        file.write_bytes(file.read_bytes()[:60])  # the header, which has the picture's size
    assert all(map(torch.equal, contents(prepared), before))


def test_canny_edges_are_made_once_and_kept(sd, data_folder, tmp_path, monkeypatch):
    data = Folder(data_folder, SIZE, edges=True)
    expected = [data.condition(i) for i in range(len(data))]
    assert torch.stack(expected).any()
    prepare_all(sd, data, tmp_path / "cache")
    monkeypatch.setattr(Folder, "target", lambda *_: pytest.fail("a picture was opened"))
    prepared = prepare_all(sd, data, tmp_path / "cache")
    for i, edges in enumerate(expected):
        assert torch.equal(prepared[i, 0]["condition"], edges)


@pytest.mark.parametrize("edges", [False, True])
def test_shuffled_conditions_are_prepared_as_they_are(sd, data_folder, tmp_path, edges):
    data = ShuffledConditions(Folder(data_folder, SIZE, edges))
    for folder in (None, tmp_path / "cache"):
        prepare_all(sd, data.data, folder)
        prepared = prepare_all(sd, data, folder)
        for i in range(len(data)):
            other = data.data.condition((i + 1) % len(data))
            assert torch.equal(prepared[i, 0]["condition"], other)


def test_conditions_that_are_to_be_kept_must_be_black_or_white(sd, monkeypatch):
    monkeypatch.setattr(Circles, "keeps_conditions", True)
    with pytest.raises(ValueError, match="black or white"):
        prepare_all(sd, Circles(SIZE, 2))


# --- What has changed is computed again, and nothing else ---


def test_a_second_run_computes_nothing_and_opens_no_picture(
        sd, data_folder, tmp_path, counted, monkeypatch):
    first = prepare_all(sd, Folder(data_folder, SIZE), tmp_path / "cache")
    assert counted == {"pictures": 8, "prompts": 9}  # each once, with the empty prompt
    monkeypatch.setattr(Folder, "target", lambda *_: pytest.fail("a picture was opened"))
    monkeypatch.setattr(training.prepared, "sha256", lambda _: pytest.fail("a file was read"))
    assert equal(prepare_all(sd, Folder(data_folder, SIZE), tmp_path / "cache"), first)
    assert counted == {"pictures": 8, "prompts": 9}


def test_a_changed_picture_is_computed_again_and_a_touched_one_is_not(
        sd, data_folder, tmp_path, counted):
    cache = tmp_path / "cache"
    prepare_all(sd, Folder(data_folder, SIZE), cache)
    os.utime(data_folder / "target/1.png", (1, 1))
    with Image.open(data_folder / "target/2.png") as image:
        inverted = ImageOps.invert(image)
    write_png(data_folder / "target/2.png", inverted)
    (data_folder / "target/3.png").rename(data_folder / "target/moved.png")
    index = (data_folder / "prompt.json").read_text().replace("target/3.png", "target/moved.png")
    (data_folder / "prompt.json").write_text(index)
    changed = prepare_all(sd, Folder(data_folder, SIZE), cache)
    assert counted == {"pictures": 9, "prompts": 9}
    assert equal(changed, prepare_all(sd, Folder(data_folder, SIZE)))


def test_the_order_of_a_data_set_and_its_prompts_may_change(sd, data_folder, tmp_path, counted):
    cache = tmp_path / "cache"
    prepare_all(sd, Folder(data_folder, SIZE), cache)
    entries = index_of(data_folder)[::-1][2:]
    entries[0]["prompt"] = "another"
    (data_folder / "prompt.json").write_text("\n".join(map(json.dumps, entries)))
    changed = prepare_all(sd, Folder(data_folder, SIZE), cache)
    assert counted == {"pictures": 8, "prompts": 10}
    assert equal(changed, prepare_all(sd, Folder(data_folder, SIZE)))


def test_other_weights_and_another_size_have_entries_of_their_own(
        sd, data_folder, tmp_path, counted):
    cache = tmp_path / "cache"
    prepare_all(sd, Folder(data_folder, SIZE), cache)
    vae, text = randomize(VAE(TINY_VAE), seed=7), randomize(CLIPText(TINY_TEXT), seed=8)
    other = prepare(vae, text, Folder(data_folder, SIZE), range(9), cache, show=False)
    assert counted == {"pictures": 16, "prompts": 18}
    assert other[0, 0]["moments"].shape == (2, 4, 4, 4)
    smaller = prepare_all(sd, Folder(data_folder, 16), cache)
    assert smaller[0, 0]["moments"].shape == (2, 4, 2, 2)
    assert counted == {"pictures": 24, "prompts": 18}


def test_generated_circles_are_kept_by_seed_and_index(sd, tmp_path, counted):
    for seed, first, pictures in ((0, 0, 5), (0, 0, 5), (0, 2, 7), (1, 0, 12)):
        data = Circles(SIZE, 5, seed, first)
        kept = prepare_all(sd, data, tmp_path / "cache")
        assert counted["pictures"] == pictures and equal(kept, prepare_all(sd, data))
        counted["pictures"] -= 5  # in memory


# --- Files ---


def test_a_row_counts_when_its_key_is_whole_and_what_is_cut_off_is_computed_again(tmp_path):
    row = np.dtype([("x", np.int64)])
    computed = []

    def compute(items):
        computed.extend(items)
        return np.array([(item,) for item in items], row)

    def fill(count: int) -> list[int]:
        computed.clear()
        keys = {f"{i:16}".encode(): i for i in range(count)}
        rows = Rows(tmp_path, row)
        rows.fill(keys, compute, "", show=False)
        assert [rows[key]["x"] for key in keys] == list(range(count))
        return list(computed)

    assert fill(40) == list(range(40)) and fill(40) == []
    whole = {name: (tmp_path / name).read_bytes() for name in ("rows", "keys")}
    for name, length, missing in (
            ("rows", 8 * 38 + 3, [38, 39]), ("keys", 16 * 37 + 15, [37, 38, 39]),
            ("rows", 0, list(range(40))), ("keys", 0, list(range(40)))):
        os.truncate(tmp_path / name, length)
        assert fill(40) == missing
        assert whole == {name: (tmp_path / name).read_bytes() for name in whole}


def test_a_full_disk_is_an_error_and_leaves_whole_rows(tmp_path, monkeypatch):
    rows = Rows(tmp_path, np.dtype([("x", np.int64)]))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        rows.fill({b"0" * 16: 0}, lambda items: np.zeros(len(items), rows.dtype), "", show=False)
    assert Rows(tmp_path, rows.dtype).count == 0


def test_older_cache_folders_and_the_users_files_are_left_alone(sd, data_folder):
    before = {p: p.read_bytes() for p in data_folder.rglob("*") if p.is_file()}
    old = data_folder / ".light_controlnet/0123456789abcdef/ab/cd.npy"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    prepare_all(sd, Folder(data_folder, SIZE), data_folder / ".light_controlnet")
    assert old.read_bytes() == b"old"
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_broken_picture_is_named_before_the_first_step(sd, data_folder, tmp_path):
    (data_folder / "target/5.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="target/5.png is not one or is damaged"):
        prepare_all(sd, Folder(data_folder, SIZE), tmp_path / "cache")


def test_latents_go_into_the_data_folder_if_that_can_be_written_and_else_into_memory(
        data_folder, tmp_path, capsys, monkeypatch):
    with_data = ["--data", str(data_folder)]
    assert cache_folder(parse([])) is None
    assert cache_folder(parse(["--cache", str(tmp_path)])) == tmp_path
    assert cache_folder(parse([*with_data, "--cache", str(tmp_path)])) == tmp_path
    assert cache_folder(parse(with_data)) == data_folder / ".light_controlnet"
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cache_folder(parse(with_data)) is None
    assert "kept in memory and computed anew in the next run" in capsys.readouterr().out


def test_more_than_memory_should_hold_is_refused_with_the_option_that_helps(sd, monkeypatch):
    monkeypatch.setattr(training.prepared, "LARGEST_IN_MEMORY", 10_000)
    with pytest.raises(ValueError, match="need 60 kB: name a folder for them with --cache"):
        prepare_all(sd, Circles(SIZE, 5))


# --- Runs ---


@pytest.fixture
def command(base_file, tmp_path):
    return lambda name, *more: [
        *SHORT, "--checkpoint", str(base_file), "--batch-size", "2", "--steps", "2",
        "--sample-every", "1000", "--resolution", str(SIZE), "--out", str(tmp_path / name), *more]


@pytest.fixture
def go(command, tmp_path):
    def go(name: str, *more: str) -> bytes:
        train.main(command(name, *more))
        return (tmp_path / name / "controlnet.safetensors").read_bytes()

    return go


def without_measures(monkeypatch) -> None:
    """Without the probe and the sample grid, which encode pictures and prompts too."""
    monkeypatch.setattr(train, "Probe", lambda *_: None)
    for name in ("base_pictures", "save_sample_grid"):
        monkeypatch.setattr(train, name, lambda *_, **__: None)


def test_a_kept_cache_and_none_change_no_bit_of_a_run(go, data_folder, tmp_path, monkeypatch):
    without_measures(monkeypatch)
    for more in ([], ["--data", str(data_folder)], ["--data", str(data_folder), "--canny"]):
        cache = ["--cache", str(tmp_path / "cache")]
        name = f"run{len(more)}-"
        expected = go(name + "plain", *more)
        assert go(name + "first", *more, *cache) == expected
        assert go(name + "none", *more, "--no-cache") == expected
        with monkeypatch.context() as patch:
            for network in (VAE, CLIPText):
                patch.setattr(network, "encode", lambda *_: pytest.fail("encoded again"))
            assert go(name + "second", *more, *cache) == expected


class Flipped(Circles):
    """Mirrored in every second epoch."""

    augmented = True
    epochs: list[int] = []

    def pair(self, i: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        self.epochs.append(epoch)
        pair = super().pair(i)
        return tuple(p.flip(-1) for p in pair) if epoch % 2 else pair


def test_pictures_that_change_with_the_epoch_are_encoded_in_every_step_and_prompts_once(
        go, command, monkeypatch, counted, tmp_path):
    monkeypatch.setattr(train, "GENERATED", 3)
    plain = go("plain", "--steps", "4")
    monkeypatch.setattr(train, "Circles", Flipped)
    without_measures(monkeypatch)
    counted.update(pictures=0, prompts=0)
    Flipped.epochs.clear()
    whole = go("whole", "--steps", "4")
    assert counted == {"pictures": 8, "prompts": 4}
    assert [Flipped.epochs.count(epoch) for epoch in (1, 2, 3)] == [3, 2, 0]
    go("parts", "--steps", "3")
    assert go("parts", "--steps", "4", "--resume") == whole != plain


on_cpu = pytest.mark.skipif(os.name == "nt" or torch.cuda.is_available(),
                            reason="compares bytes, which only a CPU gives twice")


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    """The options of a run on a folder of 128 pictures, all of which it prepares."""
    fill50k.main(["--out", str(tmp_path / "many"), "--count", "128", "--size", str(SIZE)])
    return ["--data", str(tmp_path / "many"), "--batch-size", "32", "--steps", "4",
            "--mode", "small"]


def kept(cache: Path) -> dict[str, bytes]:
    return {p.relative_to(cache).as_posix(): p.read_bytes() for p in sorted(cache.rglob("*"))
            if p.is_file()}


def wait_for_rows(cache: Path, more_than: int, child) -> int:
    """Wait until that many pictures are kept; returns how many are."""
    rows = 0
    while rows <= more_than:
        assert child.is_alive()
        sleep(0.005)
        rows = sum(p.stat().st_size for p in cache.glob("latents-*/keys")) // 16
    return rows


@on_cpu
def test_a_preparation_killed_twice_goes_on_where_it_was_and_ends_in_the_same_bytes(
        command, pictures, tmp_path):
    assert exit_code(start(command("whole", *pictures, "--cache", str(tmp_path / "whole-c")))) == 0
    cache, rows = tmp_path / "parts-c", 0
    for _ in range(2):
        child = start(command("parts", *pictures, "--cache", str(cache)))
        rows = wait_for_rows(cache, rows, child)
        child.kill()
        assert exit_code(child) == -signal.SIGKILL
    assert rows < 128
    assert exit_code(start(command("parts", *pictures, "--cache", str(cache)))) == 0
    expected = kept(tmp_path / "whole-c")
    assert kept(cache) == expected and len(expected) == 11  # two of them: the pictures' headers
    name = "controlnet.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@on_cpu
def test_runs_that_prepare_the_same_pictures_share_the_work_and_one_may_die(
        command, pictures, tmp_path):
    arguments = [*pictures, "--cache", str(tmp_path / "cache")]
    children = [start(command(name, *arguments)) for name in ("a", "b", "c")]
    wait_for_rows(tmp_path / "cache", 0, children[0])
    children[0].kill()
    assert [exit_code(child) for child in children] == [-signal.SIGKILL, 0, 0]
    prompts = {entry["prompt"] for entry in index_of(tmp_path / "many")} | {""}
    for folder, count in (("latents-*", 128), ("text-*", len(prompts)), ("files", 128)):
        keys, = (tmp_path / "cache").glob(f"{folder}/keys")
        assert keys.stat().st_size == 16 * count  # nothing was computed twice
    assert (tmp_path / "b/controlnet.safetensors").read_bytes() == (
        tmp_path / "c/controlnet.safetensors").read_bytes()


def test_the_benchmark_of_the_loader_runs(capsys, monkeypatch):
    monkeypatch.setattr(loader, "WORKERS", (0, 1))
    monkeypatch.setattr(loader, "count", lambda *_: {"MACs of training": 10**12})
    loader.main("--size 64 --pairs 4 --pictures 8 --repeats 1".split())
    lines = capsys.readouterr().out.splitlines()
    rates = [float(line[40:52].replace(",", "")) for line in lines[-5:]]
    assert all(rate > 0 for rate in rates) and rates[-1] == round(0.4 * 989e12 / 2e12)
