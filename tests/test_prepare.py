"""data.prepare: a folder of pictures becomes pairs that are trained on, whatever interrupts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common.cli import run
from data import captions, prepare
from data.annotators import canny
from data.captions import caption
from data.folder import Folder, Reading
from data.pictures import read_target

SIZE = 16
ROOT = Path(__file__).parents[1]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Five pictures: upright, turned by EXIF, in a folder inside, transparent, with odd names."""
    folder = tmp_path / "photos"
    (folder / "in side").mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, shape in (("a.jpg", (20, 32)), ("b é'\".png", (32, 24)), ("in side/a.jpg", (16, 16))):
        pixels = draw.integers(0, 255, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    left_half = Image.new("RGB", (20, 20))
    left_half.paste("white", (0, 0, 10, 20))
    left_half.save(folder / "phone.jpg", exif=exif, quality=95)
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(folder / "z.png")
    (folder / "a.txt").write_text("two\nlines \N{GRINNING FACE}", "utf-8")
    return folder


def prepared(photos: Path, out: Path, *options: str) -> int:
    arguments = [str(photos), "--out", str(out), "--size", str(SIZE), "--processes", "1", *options]
    return run(lambda: prepare.main(arguments))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and path.name != ".prepare.lock"}


def test_pictures_become_pairs_in_the_layout_that_is_trained_on(photos, tmp_path):
    before = contents(photos)
    assert prepared(photos, tmp_path / "out") == 0
    assert contents(photos) == before
    data = Folder(tmp_path / "out", SIZE)
    names = ["a.jpg", "b é'\".png", "in side/a.jpg", "phone.jpg", "z.png"]
    assert [data.prompt(i) for i in range(5)] == ["two lines \N{GRINNING FACE}"] + [""] * 4
    for i, name in enumerate(names):
        target = read_target(photos / name, (SIZE, SIZE))
        assert torch.equal(data.target(i), target)
        assert torch.equal(data.condition(i), (canny(target / 255) * 255).byte())


def test_a_photo_is_turned_before_its_condition_is_made(photos, tmp_path):
    assert prepared(photos, tmp_path / "out") == 0
    target = Folder(tmp_path / "out", SIZE).target(3)
    assert target[:, 0].min() > 200 and target[:, -1].max() < 50  # the left half is now the upper
    assert Folder(tmp_path / "out", SIZE).condition(3)[0, 7:9].amax(0).min() == 255


@pytest.mark.parametrize("moment", range(11))
def test_a_kill_at_any_file_ends_in_the_same_bytes(photos, tmp_path, monkeypatch, moment):
    assert prepared(photos, tmp_path / "whole") == 0
    files = 0

    def write(path: Path, image: Image.Image) -> None:
        nonlocal files
        if files == moment:  # as a kill leaves it: half a file, half a line
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.123.tmp").write_bytes(b"half")
            with open(tmp_path / "out" / "prepared.jsonl", "a") as journal:
                journal.write('{"source": "a.j')
            raise KeyboardInterrupt
        files += 1
        write_png(path, image)

    write_png = prepare.write_png
    monkeypatch.setattr(prepare, "write_png", write)
    assert prepared(photos, tmp_path / "out") == (130 if moment < 10 else 0)
    assert (tmp_path / "out" / "metadata.jsonl").exists() == (moment == 10)
    monkeypatch.undo()
    assert prepared(photos, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_processes_write_the_same_bytes(photos, tmp_path):
    assert prepared(photos, tmp_path / "one") == prepared(
        photos, tmp_path / "two", "--processes", "2") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_to_the_same_bytes(photos, tmp_path):
    for i in range(60):
        shutil.copy2(photos / "a.jpg", photos / f"copy {i}.jpg")
    assert prepared(photos, tmp_path / "whole") == 0
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-m", "data.prepare", photos, "--out", out, "--size", str(SIZE),
         "--processes", "2"], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while child.poll() is None and not (out / "conditions").exists():
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (out / "metadata.jsonl").exists()
    time.sleep(0.3)  # its workers end with it
    assert prepared(photos, out, "--processes", "2") == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_broken_pictures_are_named_and_left_out(photos, tmp_path, capsys):
    (photos / "cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:-200])
    (photos / "text.png").write_text("no picture")
    shutil.copy(photos / "a.jpg", photos / "c.jpg")
    (photos / "c.txt").write_bytes("标题".encode("gbk"))
    (photos / "film.mov").write_bytes(b"")
    for _ in range(2):  # the second time from the journal
        assert prepared(photos, tmp_path / "out") == 0
        out, err = capsys.readouterr()
        assert out.startswith("5 pairs, 3 left out.") and f"--data {tmp_path / 'out'}" in out
        assert "cut.jpg left out: expected a picture" in err and "text.png left out" in err
        assert "c.jpg left out" in err and "c.txt: expected a caption in UTF-8" in err
        assert "are not used: 1 .mov" in err
        assert "canny found nothing in 1 of 5 pictures" in err and "one colour: z.png" in err
        assert "4 of 5 pictures have an empty prompt" in err
    assert len(Folder(tmp_path / "out", SIZE)) == 5


def test_it_is_an_error_if_no_picture_remains(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert prepared(tmp_path / "photos", tmp_path / "out") == 2
    (tmp_path / "photos" / "a.png").write_text("no picture")
    assert prepared(tmp_path / "photos", tmp_path / "out") == 2
    assert "none of the 1 pictures" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metadata.jsonl").exists()


@pytest.mark.parametrize("name", ["holiday.png", "metadata.jsonl", "prepared.jsonl",
                                  "pictures/mine.png", ".x.png.12.tmp"])
def test_a_folder_with_files_of_others_is_refused_and_left_as_it_is(photos, tmp_path, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    assert prepared(photos, out) == 2
    assert contents(out) == {name: b"mine"} and not (out / ".prepare.lock").exists()


def test_a_file_of_others_that_came_later_is_refused_too(photos, tmp_path):
    assert prepared(photos, tmp_path / "out") == 0
    (tmp_path / "out" / "pictures" / "mine.png").write_text("mine")
    before = contents(tmp_path / "out")
    assert prepared(photos, tmp_path / "out") == 2
    assert contents(tmp_path / "out") == before


def test_the_folder_of_the_pictures_is_never_written_to(photos):
    before = contents(photos)
    for out in (photos, photos / "out", photos / "in side" / ".." / "new"):
        assert prepared(photos, out) == 2
    assert contents(photos) == before


def test_other_settings_are_refused_and_named(photos, tmp_path, capsys):
    assert prepared(photos, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    assert prepared(photos, tmp_path / "out", "--annotator", "lines", "--size", "24") == 2
    assert "--annotator canny, not lines, --size 16, not 24" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_in_buckets_pictures_and_conditions_keep_their_shapes(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepared(photos, out, "--size", "32", "--buckets") == 0
    assert capsys.readouterr().out.endswith(f"python train.py --data {out} --buckets\n")
    for name, size in (("a.jpg", (40, 24)), ("b é'\".png", (24, 40)), ("in side/a.jpg", (32, 32))):
        for kind in ("pictures", "conditions"):
            assert Image.open(out / kind / f"{name}.png").size == size
    data = Folder(out, 32, reading=Reading(buckets=True))
    assert torch.equal(data.target(0), read_target(photos / "a.jpg", (24, 40)))
    assert prepared(photos, out, "--size", "32") == 2
    assert "--buckets True, not False: choose another --out" in capsys.readouterr().err


def test_only_new_and_changed_pictures_are_made(photos, tmp_path, monkeypatch):
    assert prepared(photos, tmp_path / "out") == 0
    shutil.copy(photos / "a.jpg", photos / "new.jpg")
    (photos / "phone.txt").write_text("a phone")
    (photos / "z.png").unlink()
    read = []
    monkeypatch.setattr(prepare, "read_target",
                        lambda path, shape: read.append(path.name) or read_target(path, shape))
    assert prepared(photos, tmp_path / "out") == 0
    assert read == ["new.jpg", "phone.jpg"]
    data = Folder(tmp_path / "out", SIZE)
    assert [data.prompt(i) for i in (3, 4)] == ["", "a phone"] and len(data) == 5


def test_a_second_program_in_the_same_folder_is_refused(photos, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with prepare.FileLock(tmp_path / "out" / ".prepare.lock"):
        assert prepared(photos, tmp_path / "out") == 2
    assert "another data.prepare is writing" in capsys.readouterr().err
    assert prepared(photos, tmp_path / "out") == 0


# --- Annotators and captions of other packages ---


def test_short_names_are_those_of_controlnet_aux(photos, tmp_path, monkeypatch):
    asked = []

    class Processor:
        def __init__(self, name: str):
            asked.append(name)

        def __call__(self, image: Image.Image, to_pil: bool) -> Image.Image:
            return ImageOps.invert(image)

    module = types.ModuleType("controlnet_aux.processor")
    module.Processor = Processor
    module.MODELS = ["softedge_hed", "lineart_realistic", "depth_midas", "normal_bae", "mlsd"]
    monkeypatch.setitem(sys.modules, "controlnet_aux", types.ModuleType("controlnet_aux"))
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", module)
    for name in ("hed", "lineart", "depth", "normal", "mlsd"):
        assert prepared(photos, tmp_path / name, "--annotator", name) == 0
        data = Folder(tmp_path / name, SIZE)
        assert torch.equal(data.condition(0), 255 - data.target(0))
    assert asked == module.MODELS


def test_a_missing_package_is_one_line_and_the_folder_can_be_used_with_another(
        photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    captions._blip.cache_clear()
    assert prepared(photos, tmp_path / "out", "--annotator", "hed") == 2
    assert 'needs controlnet_aux' in capsys.readouterr().err
    assert prepared(photos, tmp_path / "out", "--caption", "blip") == 2
    assert 'pip install -e ".[captions]"' in capsys.readouterr().err
    assert prepared(photos, tmp_path / "out") == 0


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    """The real class at a tiny size with random weights, and its processor."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16}
    text = small | {"vocab_size": len(words) + 1, "bos_token_id": len(words),
                    "sep_token_id": 3, "eos_token_id": 3,
                    "pad_token_id": 0, "encoder_hidden_size": 16,
                    "max_position_embeddings": 32, "initializer_range": 1.0}
    config = BlipConfig(text_config=text, vision_config=small | {"image_size": 16, "patch_size": 8})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BlipForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    BlipProcessor(images, BertTokenizer(str(folder / "vocab.txt"))).save_pretrained(folder)
    return folder


def test_pictures_without_a_text_file_are_described_by_blip(photos, tmp_path, blip):
    assert prepared(photos, tmp_path / "out") == 0
    assert prepared(photos, tmp_path / "out", "--caption", str(blip)) == 0  # they may come later
    data = Folder(tmp_path / "out", SIZE)
    prompts = [data.prompt(i) for i in range(5)]
    assert prompts[0] == "two lines \N{GRINNING FACE}"
    assert prompts[1:] == [caption(data.target(i) / 255, str(blip)) for i in range(1, 5)]
    assert prepared(photos, tmp_path / "out") == 2  # would mix prompts by BLIP with empty ones
    assert all(prompts) and not any("[" in prompt for prompt in prompts)
    assert prepared(photos, tmp_path / "at once", "--caption", str(blip)) == 0
    assert (contents(tmp_path / "at once")["metadata.jsonl"]
            == contents(tmp_path / "out")["metadata.jsonl"])


def test_a_model_that_is_no_blip_or_is_not_there_is_refused(tmp_path, blip):
    captions._blip.cache_clear()
    shutil.copytree(blip, tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(ValueError, match="expected a BLIP captioning model, .* of kind clip"):
        caption(torch.zeros(3, 16, 16), str(tmp_path / "clip"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="could not be fetched or read"):
        caption(torch.zeros(3, 16, 16), str(tmp_path / "empty"))
