"""The layout: rooms on floors, imports that only go down, a word at every door, narrow lines."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "common": 0,
    "unet": 1, "vae": 1, "text": 1, "diffusion": 1, "data": 1,
    "controlnet": 2,
    "kd": 3,
    "weights": 4,
    "training": 5, "sampling": 5, "evaluation": 5,
    "train": 6, "sample": 6, "evaluate": 6, "tour": 6, "demo": 6,
}  # fmt: skip
ROOMS = [name for name in FLOORS if (ROOT / name).is_dir()]


def sources(name: str) -> list[Path]:
    folder = ROOT / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported(tree: ast.AST) -> set[str]:
    """The top-level names that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            names.add(node.module.split(".")[0])
    return names


def climbing(name: str, text: str) -> list[str]:
    """Rooms that a module of this room imports although they are not on a floor below it."""
    others = imported(ast.parse(text)) & FLOORS.keys() - {name}
    return sorted(other for other in others if FLOORS[other] >= FLOORS[name])


@pytest.mark.parametrize("name", FLOORS)
def test_a_room_imports_only_from_floors_below(name):
    for path in sources(name):
        assert not climbing(name, path.read_text()), path


def test_an_import_that_climbs_is_noticed():
    assert climbing("unet", "import torch\nfrom unet.blocks import ResBlock") == []
    assert climbing("unet", "def f():\n    from vae import VAE") == ["vae"]
    assert climbing("controlnet", "import kd.losses, unet") == ["kd"]


def test_what_a_room_imports_when_it_is_first_used_is_its_own():
    lazy = ROOT / "common" / "lazy.py"  # it puts the room's name before the module's
    for path in {path for name in FLOORS for path in sources(name)} - {lazy}:
        text = path.read_text()
        assert "import_module" not in text and "__import__" not in text, path
        assert text.count("on_first_use(") == text.count("on_first_use(__name__, "), path


def test_only_what_lives_in_a_room_is_in_the_tree():
    programs = {path.stem for path in ROOT.glob("*.py")}
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert programs | rooms - {"tests", "benchmarks"} == set(FLOORS)


@pytest.mark.parametrize("name", ROOMS)
def test_every_room_has_a_docstring_at_its_door(name):
    assert ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text()))


def test_no_line_of_code_is_wider_than_100_columns():
    for folder in (*ROOMS, "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert max(map(len, path.read_text().splitlines()), default=0) <= 100, path
