"""Write docs/tour.md and its pictures from tour.py: python -m benchmarks.tour

Runs every cell of tour.py, and puts down its text, its code, what it printed and what it showed. A
test fails when the text or the code of docs/tour.md are no longer those of tour.py.
"""

import re
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from common.cli import Parser, answer, run


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--text-only", action="store_true", help="run nothing: write text and code, and "
                   "keep what the cells printed and showed")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

from PIL import Image

from common.files import atomic_write

ROOT = Path(__file__).parent.parent
TOUR, PAGE, PICTURES = ROOT / "tour.py", ROOT / "docs" / "tour.md", ROOT / "docs" / "tour"
MARK = "# %%"
TEXT = " [markdown]"


def cells(source: str) -> list[tuple[bool, str]]:
    """(is text, content) of every cell of a percent script; what stands before the first is none.
    """
    parts = re.split(rf"^{MARK}(.*)\n", source, flags=re.MULTILINE)[1:]
    found = []
    for kind, content in zip(parts[::2], parts[1::2], strict=True):
        if kind == TEXT:
            content = re.sub(r"^# ?", "", content, flags=re.MULTILINE)
        found.append((kind == TEXT, content.strip()))
    return found


def shown(code: str) -> str | None:
    """The name of the picture that a cell shows."""
    match = re.search(r'^show\("(\w+)"', code, flags=re.MULTILINE)
    return match and match[1]


def page(source: str, outputs: dict[int, str]) -> str:
    """The tour as Markdown. `outputs`: what cells printed, by their number."""
    parts, title = [], ""
    for i, (is_text, content) in enumerate(cells(source)):
        if is_text:
            parts.append(content)
            title = content.splitlines()[0].lstrip("# ") if content.startswith("#") else title
            continue
        parts.append(f"```python\n{content}\n```")
        if output := outputs.get(i):
            parts.append(f"```text\n{output.strip()}\n```")
        if name := shown(content):
            parts.append(f"![{title}](tour/{name}.png)")
    return "\n\n".join(parts) + "\n"


def run_cells(source: str, leave_out: str | None = None) -> dict[int, str]:
    """Run the cells, but those that match `leave_out`, from the repository's root. Returns what
    they printed besides the names of pictures, by their number."""
    namespace, outputs = {"__name__": "tour"}, {}
    for i, (is_text, content) in enumerate(cells(source)):
        if not is_text and not (leave_out and re.search(leave_out, content)):
            with redirect_stdout(StringIO()) as output:
                exec(compile(content, f"{TOUR}, cell {i}", "exec"), namespace)
            lines = output.getvalue().splitlines(keepends=True)
            outputs[i] = "".join(line for line in lines if not line.startswith("runs"))
    return outputs


def printed(source: str, text: str) -> dict[int, str]:
    """What cells printed, by their number, read off a page. ValueError if it has other cells."""
    code = [i for i, (is_text, _) in enumerate(cells(source)) if not is_text]
    found = re.findall(r"^```python$.*?^```$(?:\n\n```text\n(.*?)^```$)?", text,
                       flags=re.DOTALL | re.MULTILINE)
    if len(found) != len(code):
        raise ValueError(f"expected {len(code)} pieces of code in {PAGE}, got {len(found)}: run "
                         "python -m benchmarks.tour")
    return {i: output for i, output in zip(code, found, strict=True) if output}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    source = TOUR.read_text(encoding="utf-8")
    if args.text_only:
        outputs = printed(source, PAGE.read_text(encoding="utf-8"))
    else:
        outputs = run_cells(source)
        for name in filter(None, (shown(content) for is_text, content in cells(source))):
            picture = Image.open(f"runs/tour/{name}.png").convert("RGB")
            with atomic_write(PICTURES / f"{name}.png") as temporary:  # 256 colours: a third
                picture.quantize(256, kmeans=2).save(temporary, format="PNG", optimize=True)
    with atomic_write(PAGE) as temporary:
        temporary.write_text(page(source, outputs), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    sys.exit(run(main))
