"""A program answers its command line before it imports what takes seconds, and never imports what
it does not need."""

import json
import subprocess
import sys

import pytest
from test_house import FLOORS, ROOT, sources

import kd

PROGRAMS = [".".join(path.relative_to(ROOT).with_suffix("").parts)
            for path in [path for name in FLOORS for path in sources(name)]
            + sorted(ROOT.glob("benchmarks/*.py"))
            if 'if __name__ == "__main__":' in path.read_text()]
SLOW = ["PIL", "cv2", "diffusers", "huggingface_hub", "matplotlib", "numpy", "safetensors", "scipy",
        "torch", "torchmetrics", "torchvision", "tqdm", "transformers"]
NEVER_NEEDED = ["cv2", "diffusers", "huggingface_hub", "matplotlib", "scipy",
                "torchmetrics", "torchvision", "transformers"]
CHILD = """
import json, runpy, sys
missing, commands = json.loads(sys.argv[1])
sys.modules |= dict.fromkeys(missing)  # importing one of them is an ImportError
codes = []
for program, *arguments in commands:
    sys.argv = [program, *arguments]
    try:
        runpy.run_module(program, run_name="__main__")
    except SystemExit as end:
        codes.append(end.code)
print(codes)
"""


def exit_codes(commands: list[list[str]], missing: list[str]) -> list[int]:
    """Of programs that are run one after the other while those packages cannot be imported."""
    arguments = [sys.executable, "-c", CHILD, json.dumps([missing, commands])]
    child = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_every_program_shows_its_help_without_importing_anything_slow():
    assert len(PROGRAMS) >= 16
    assert exit_codes([[program, "--help"] for program in PROGRAMS], SLOW) == [0] * len(PROGRAMS)


def test_a_wrong_command_line_is_refused_without_importing_anything_slow():
    wrong = [[program, "--nonsense"] for program in PROGRAMS] + [
        ["train", "--student", "nonsense"],
        ["train", "--ablation", "gaussian", "--mode", "large"],
        ["sample", "--condition", "a.png", "--canny", "b.png"],
        ["evaluate", "--canny"],
        ["benchmarks.distillation", "--images", "1"],
        ["weights.download", "nonsense"],
    ]
    assert exit_codes(wrong, SLOW) == [2] * len(wrong)


def test_sampling_and_training_do_without_what_only_other_programs_need(tmp_path):
    commands = [["sample", "--steps", "1", "--out", str(tmp_path / "circle.png")],
                ["train", "--data", str(tmp_path)]]  # refused, after all imports: it has no pairs
    assert exit_codes(commands, NEVER_NEEDED) == [0, 2]


def test_an_unknown_name_of_a_room_is_an_error_as_anywhere():
    with pytest.raises(ImportError, match="nonsense"):
        from kd import nonsense  # noqa: F401
    assert not hasattr(kd, "nonsense")
