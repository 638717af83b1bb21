"""docs/your_own_student.md, done by the book in a copy of the repository."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHORT
from test_docs import TEXTS, blocks
from test_house import FLOORS, ROOT

PAGE = TEXTS["docs/your_own_student.md"]
# What is added to the page's commands, for them to take seconds.
SHORTER = {"train.py": [*SHORT, "--steps", "2", "--layer-only-steps", "1", "--no-cache"],
           "evaluate.py": ["--images", "2", "--steps", "1", "--resolution", "32", "--seeds", "0"]}
CHILD = """
import json, runpy, sys
import pytest
from evaluation import metrics
def refuse(*_, **__):
    raise OSError("no route to host")
metrics.load_state_dict_from_url = refuse  # as on a machine without a network
for command in json.loads(sys.argv[1]):
    sys.argv = command
    if command[0] == "pytest":
        code = pytest.main([*command[1:], "-p", "no:cacheprovider", "--assert", "plain"])
    else:
        try:
            runpy.run_path(command[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
    assert not code, command
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The code, and the tiny model's files by links."""
    folder = tmp_path_factory.mktemp("copy")
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)

    def copy_or_link(source: str, target: str) -> None:
        if source.endswith(".safetensors"):
            Path(target).symlink_to(source)
        else:
            shutil.copy(source, target)

    ignored = shutil.ignore_patterns("__pycache__", "examples", "*.png")
    for name in ("tests", "benchmarks", *(name for name in FLOORS if (ROOT / name).is_dir())):
        shutil.copytree(ROOT / name, folder / name, copy_function=copy_or_link, ignore=ignored)
    return folder


def commands(page: str) -> list[list[str]]:
    """The page's command lines up to the one that serves the page to draw on."""
    lines = [line for block in blocks(page) for line in block.splitlines()]
    words = [shlex.split(line.removeprefix("python ")) for line in lines]
    return [[*w, *SHORTER.get(w[0], [])] for w in words if w[0] in ("pytest", *SHORTER)]


def test_the_student_of_the_page_is_added_tested_trained_and_measured(copy):
    code, = blocks(PAGE, "python")
    patch, = blocks(PAGE, "diff")
    assert len(code.splitlines()) < 50
    (copy / "kd" / "pyramid.py").write_text(code)
    subprocess.run(["git", "apply", "-"], cwd=copy, input=patch, text=True, check=True)
    done = commands(PAGE)
    assert [command[0] for command in done] == ["pytest", "train.py", "evaluate.py"]
    child = subprocess.run([sys.executable, "-c", CHILD, json.dumps(done)], cwd=copy, text=True,
                           capture_output=True, check=False)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
    assert " passed" in child.stdout or "[100%]" in child.stdout
    assert (copy / "runs" / "pyramid" / "controlnet.safetensors").is_file()
    results = json.loads((copy / "runs" / "pyramid_evaluation" / "results.json").read_text())
    assert "pyramid" in json.dumps(results)
