"""Put the tables of the stored results into the README, between their marks: python -m
benchmarks.readme"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import distillation
from common.cli import run
from common.files import atomic_write
from evaluation import report

ROOT = Path(__file__).parent.parent
# docs/NAME.json -> its tables
TABLES: dict[str, Callable[[dict], str]] = {
    "evaluation": report.markdown, "distillation": distillation.markdown
}


def filled(readme: str) -> str:
    """The README with every block between <!-- NAME.json --> and <!-- end --> made again. Raises
    ValueError if a mark is missing."""
    for name, table in TABLES.items():
        block = f"<!-- {name}.json -->\n{table(json.loads((ROOT / 'docs' / f'{name}.json').read_text()))}<!-- end -->"
        readme, count = re.subn(
            rf"<!-- {name}\.json -->\n.*?<!-- end -->",
            lambda _, block=block: block,
            readme,
            flags=re.DOTALL)
        if count != 1:
            raise ValueError(
                f"expected one <!-- {name}.json --> ... <!-- end --> in the README, found {count}")
    return readme


def main() -> None:
    readme = filled((ROOT / "README.md").read_text())
    with atomic_write(ROOT / "README.md") as temporary:
        temporary.write_text(readme)


if __name__ == "__main__":
    sys.exit(run(main))
