"""What is in --out and was not written by a run stays as it is, and a folder is one run's."""

import json
import multiprocessing
from pathlib import Path

import pytest

from common.files import atomic_write
from training.log import Log
from training.run_folder import claimed, remove_leftovers, require_free

SETTINGS = json.dumps({"torch": "2.14", "processes": 1, "save_every": 200})


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SETTINGS if name == "settings.json" else "precious")


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text()
            for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("names", [
    ["samples/holiday.png"], ["log.jsonl"], ["controlnet.safetensors"], [".x.tmp"],
    ["prompt.json", "source/0.png"], ["samples/000001.png"],
    ["settings.json", "samples/holiday.png"], ["settings.json", "controlnet.safetensors"],
    ["settings.json", "notes/log.jsonl"], ["settings.json", "state/state.pt"],
])
def test_a_folder_with_what_no_run_wrote_is_refused_and_left_alone(tmp_path, names):
    write(tmp_path, *names)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="--out"), claimed(tmp_path, resume=False):
        pass
    assert content(tmp_path) == before


def test_what_a_run_left_that_saved_nothing_makes_room_for_the_next(tmp_path):
    leftovers = ["log.jsonl", "samples/000200.png", "samples/condition.png",
                 "state/.state.pt.77.tmp"]
    write(tmp_path, "settings.json", *leftovers)
    require_free(tmp_path)
    remove_leftovers(tmp_path)
    assert content(tmp_path) == {"settings.json": SETTINGS}


def test_only_what_a_run_was_writing_when_it_died_is_removed(tmp_path):
    write(tmp_path, ".mine.png.7.tmp", "notes/.log.jsonl.7.tmp", ".log.jsonl.tmp",
          ".log.jsonl.7.tmp", "state/.000400.pt.12.tmp", "samples/mine.png")
    remove_leftovers(tmp_path)
    assert sorted(content(tmp_path)) == [".log.jsonl.tmp", ".mine.png.7.tmp",
                                         "notes/.log.jsonl.7.tmp", "samples/mine.png"]


def claim(folder: Path, claimed_it, go_on) -> None:
    with claimed(folder, resume=False):
        claimed_it.set()
        go_on.wait()


def test_a_folder_is_one_runs_until_its_process_ends_however_that_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    claimed_it, never = context.Event(), context.Event()
    other = context.Process(target=claim, args=(tmp_path / "run", claimed_it, never))
    other.start()
    assert claimed_it.wait(10)
    with (pytest.raises(ValueError, match=f"another run is writing to .*process {other.pid}"),
          claimed(tmp_path / "run", resume=False)):
        pass
    other.kill()
    other.join()
    with claimed(tmp_path / "run", resume=False):
        pass
    assert content(tmp_path / "run") == {"state/lock": ""}


def test_nothing_is_made_to_resume_what_was_never_saved(tmp_path):
    with (pytest.raises(ValueError, match="expected a saved run to resume"),
          claimed(tmp_path / "run", resume=True)):
        pass
    assert not (tmp_path / "run").exists()


FULL = Path("/dev/full")  # of Linux: a disk that is always full


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_full_disk_is_named_by_the_file_that_it_has_no_room_for(tmp_path):
    log = Log(tmp_path, step=0)
    log.file.close()
    log.file = open(FULL, "a", buffering=1)
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        log.write({"step": 1})
    with pytest.raises(OSError, match="No space left on device: '.*picture.png'"):
        with atomic_write(tmp_path / "picture.png"), open(FULL, "wb", buffering=0) as file:
            file.write(b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "state" / "lock").symlink_to(FULL)
    with pytest.raises(OSError, match="state/lock'"), claimed(run, resume=False):
        pass
