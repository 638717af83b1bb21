"""README, CONTRIBUTING and docs/ say what is there: their links, paths, names, commands and figures
are checked against the repository, and their tables are those of the stored results."""

import importlib
import re
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import docs
from kd import STUDENTS

ROOT = docs.ROOT
GUIDES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in [*GUIDES, "CHANGELOG.md"]}
# The module whose `parse` reads a script's command line, where it is not the script's own. The tour
# has no options, and to import it would be to run it.
PARSERS = {"train": "training.settings", "tour": "benchmarks.docs"}
# What stands for a value in a command. Other words in capitals are files and folders.
PLACEHOLDERS = {"STUDENT": "lite", "ABLATION": "gaussian", "RATE": "1e-3", "N": "2", "B": "2"}
# The student that docs/your_own_student.md adds, which is there only in its test's copy.
PLACEHOLDERS["pyramid"] = "lite"
ROOMS = [path.parent.name for path in ROOT.glob("*/__init__.py")]
FOLDERS = [*ROOMS, "benchmarks", "tests", "docs"]


# --- Reading the documents ---


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for word, block in fenced if word == language]


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """What stands between backticks, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def links(name: str) -> list[tuple[str, str]]:
    """Text and address of every link and picture that leads to a file of the repository."""
    found = re.findall(r"\[([^\]]*)\]\(([^)]+)\)", prose(TEXTS[name]))
    return [(text, address) for text, address in found if not address.startswith("http")]


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(text: str) -> list[str]:
    """The commands of a document: the lines of its fenced blocks, split at && and joined where they
    continue, and what stands between backticks and begins with a program."""
    joined = [block.replace("\\\n", " ").replace("&&", "\n") for block in blocks(text)]
    lines = [line for block in joined for line in block.splitlines() if line.strip()]
    return lines + [span for span in spans(text) if re.match(r"(python|torchrun|\w+\.py) ", span)]


def commands() -> list[tuple[str, list[str]]]:
    """(module, arguments) of every command in the documents that runs a program of this repository.
    Any other command must be of a known kind."""
    programs = []
    for line in [line for name in GUIDES for line in command_lines(TEXTS[name])]:
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]
        script = next((i for i, word in enumerate(words) if re.fullmatch(r"\w+\.py", word)), None)
        if script is not None:
            programs.append((words[script].removesuffix(".py"), words[script + 1:]))
        elif words[0].endswith("python") and words[1] == "-m":
            programs.append((words[2], words[3:]))
        else:
            program = words[0].removeprefix(".venv/bin/")
            known = ("python3", "pip", "pytest", "ruff", "git", "cd", "bash", "npm", "tar")
            assert program in known, line
    return programs


def parsed(module: str, arguments: list[str]) -> Namespace | None:
    """A command line as its program reads it; None if it only asks for help."""
    parse = importlib.import_module(PARSERS.get(module, module)).parse
    try:
        return parse(arguments)
    except SystemExit as end:
        assert end.code == 0, f"{module} refuses {shlex.join(arguments)}"
        return None


# --- What must hold ---


def test_the_readme_is_a_front_page():
    assert len(TEXTS["README.md"]) <= 12_500


@pytest.mark.parametrize("name", [name for name in GUIDES if name.startswith("docs/")])
def test_every_document_begins_by_saying_what_one_learns(name):
    title, introduction = TEXTS[name].split("\n\n")[:2]
    assert title.startswith("# ") and len(introduction) > 150 and not introduction.startswith("#")


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_to_a_file_a_heading_or_a_definition(name):
    assert links(name)
    for text, address in links(name):
        path, _, anchor = address.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), address
        assert not anchor or anchor in anchors(target), address
        symbol = text.strip("`")
        if target.suffix == ".py" and text.startswith("`") and symbol.isidentifier():
            definition = rf"^\s*(def|class) {symbol}\b|^{symbol}\b.*="
            assert re.search(definition, target.read_text(), flags=re.MULTILINE), (text, address)


@pytest.mark.parametrize("name", GUIDES)
def test_every_path_between_backticks_exists(name):
    for span in spans(TEXTS[name]):
        inside = re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", span)
        if inside or re.fullmatch(r"\w+\.(py|md|toml)", span):
            assert (ROOT / span).exists(), span


@pytest.mark.parametrize("name", GUIDES)
def test_every_dotted_name_of_this_project_exists(name):
    for span in spans(TEXTS[name]):
        first, *rest = span.split(".")
        if re.fullmatch(r"\w+(\.\w+)+", span) and first in ROOMS and rest[-1] != "safetensors":
            value = importlib.import_module(first)
            for part in rest:
                if not hasattr(value, part):
                    importlib.import_module(f"{value.__name__}.{part}")
                value = getattr(value, part)


def test_every_command_is_understood_by_its_program():
    assert len(commands()) >= 25
    for module, arguments in commands():
        parsed(module, arguments)


def test_every_option_that_is_named_exists(capsys):
    for module in sorted({module for module, _ in commands()}):
        parsed(module, ["--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for name in GUIDES:
        for span in spans(TEXTS[name]):
            if span.startswith("--"):
                assert set(re.findall(r"--[a-z][a-z-]*", span)) <= known, (name, span)


def test_no_command_writes_over_a_file_of_the_repository():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)
    files = [ROOT.resolve() / line for line in listed.splitlines()]
    taken = {path for file in files for path in (file, *file.parents)}
    for module, arguments in commands():
        settings = parsed(module, arguments)
        settings = settings[0] if isinstance(settings, tuple) else settings
        for option in ("out", "target"):  # weights.convert names its output `target`
            path = getattr(settings, option, None)
            if isinstance(path, Path):
                assert (ROOT / path).resolve() not in taken, arguments


@pytest.mark.parametrize("name", GUIDES)
def test_python_in_the_documents_imports_what_exists(name):
    for block in blocks(TEXTS[name], "python"):
        compile(block, name, "exec")
        for module, symbols in re.findall(r"^from (\S+) import (.+)$", block, flags=re.MULTILINE):
            for symbol in symbols.split(", "):
                assert hasattr(importlib.import_module(module), symbol), (module, symbol)


@pytest.mark.parametrize("name", docs.TABLES)
def test_the_tables_are_those_of_the_stored_results(name):
    expected = docs.filled(TEXTS[name], docs.TABLES[name])
    assert TEXTS[name] == expected, "run python -m benchmarks.docs"


def test_the_readme_gives_no_figure_that_the_documents_do_not():
    number = r"(?<![\w./-])\d+\.\d+(?![\w.]*\w)"
    readme = re.sub(r"\]\([^)]*\)|`[^`]*`", "", prose(TEXTS["README.md"]))
    readme, known = re.sub(r"<!--.*?<!-- end -->", "", readme, flags=re.DOTALL), docs.headline()
    known += "".join(TEXTS[name] for name in GUIDES if name.startswith("docs/"))
    figures = set(re.findall(number, readme))
    assert figures and figures <= set(re.findall(number, known))


def test_the_sizes_in_the_cost_sheet_are_those_of_the_networks():
    sheet = next(block for block in blocks(TEXTS["docs/costs.md"], "text") if "stored M" in block)
    stored = {line.split()[0]: line.split()[1] for line in sheet.splitlines()[1:]}
    assert stored.keys() == {"controlnet", *STUDENTS}
    for name, millions in stored.items():
        count = docs.parameters_at_sd15(docs.TEACHER if name == "controlnet" else name)
        assert millions == f"{count / 1e6:.1f}", name
