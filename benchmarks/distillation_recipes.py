"""What `benchmarks.distillation` trains: every student in four variants, from fresh weights but for
the last.

    alone      L_d only: no teacher
    layers     L_layer only: the control networks of teacher and student alone, no UNet
    distilled  L_layer for three quarters of the steps, then all three losses
    started    the same from the teacher's weights, for students that can take them and are not the
               teacher's equal
"""

from dataclasses import dataclass
from pathlib import Path

from kd import STUDENTS
from weights import drawings, tiny

VARIANTS = ("alone", "layers", "distilled", "started")
FRESH_ONLY = ("mlp", "lite")  # nothing of the teacher fits them; alone they need the lower rate
ORIGINAL = "original"         # the teacher's own architecture; diverges at the others' rate
INJECTED = "mlp"              # enters the SD encoder and has not its teacher's outputs: no L_layer

Key = tuple[str, str, int]    # variant, student, seed


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all trainings share: by default, those on circles."""

    out: Path = Path("runs/distillation")
    images: int = 48_000      # that a training draws, the papers' number
    pool: str = "5,000 circles"  # that they are drawn from, over and over
    pictures: int = 256       # held out, that a network is measured on in the end
    batch_size: int = 16
    points: int = 30          # measurements along a training, on fewer pictures and steps:
    point_pictures: int = 32
    point_steps: int = 10
    checkpoint: Path = tiny.SD
    teacher: Path = tiny.CONTROLNET
    data: Path | None = None  # None: circles
    measure: str = "overlap"  # the control fidelity that students are judged by

    @property
    def steps(self) -> int:
        """Of a training."""
        return self.images // self.batch_size

    @property
    def shared_steps(self) -> int:
        """Of L_layer alone, in which the variants `layers` and `distilled` are the same."""
        return self.steps * 3 // 4


CIRCLES = Experiment()
DRAWINGS = Experiment(
    out=Path("runs/drawings_distillation"), images=9_600, pool="1,720 drawings",
    pictures=96, points=5, point_pictures=16, checkpoint=drawings.SD, teacher=drawings.CONTROLNET,
    data=drawings.DATA, measure="line F1")


def keys(seeds: list[int]) -> list[Key]:
    """Every training of the experiment, the smallest students first."""
    return [(variant, student, seed) for seed in seeds for student in reversed(STUDENTS)
            for variant in VARIANTS
            if variant != "started" or student not in (*FRESH_ONLY, ORIGINAL)]


def name_of(key: Key) -> str:
    return "-".join(map(str, key))


def recipe(variant: str, student: str, experiment: Experiment) -> list[str]:
    """Losses and learning rate; docs/experiments.md has what was tried. L_layer gets a tenth of the
    weight once the others count, so as not to hold back a student that cannot reach the teacher's
    outputs."""
    lr = "1e-3" if student == ORIGINAL else "2e-3"
    teacher = ["--teacher", str(experiment.teacher)]
    init = ["--init", "teacher" if variant == "started" else "random"]
    if variant == "alone" and student in FRESH_ONLY:
        return ["--teacher", "none", *init, "--lr", "1e-3"]
    if variant == "alone":
        # Clipped at three to four times the usual norm of L_d's gradient.
        return ["--teacher", "none", *init, "--lr", "2e-3", "--clip", "0.1"]
    if variant == "layers":
        return [*teacher, *init, "--layer-only-steps", str(experiment.steps), "--loss-layer", "1",
                "--lr", lr]
    if student == INJECTED:
        return [*teacher, *init, "--layer-only-steps", "0", "--loss-layer", "0", "--lr", "1e-3"]
    return [*teacher, *init, "--layer-only-steps", str(experiment.shared_steps),
            "--loss-layer", "1", "--loss-d", "10", "--loss-td", "10", "--lr", lr]


def arguments(key: Key, experiment: Experiment, shared: bool = False) -> list[str]:
    """The command line of a training, without --out. The learning rate falls to zero over the last
    fifth. `shared`: only its first three quarters."""
    variant, student, seed = key
    length = ["--steps", str(experiment.steps), "--decay", str(experiment.steps // 5)]
    if shared:
        length = ["--steps", str(experiment.shared_steps)]
    interval = str(max(1, experiment.steps // experiment.points))
    data = ["--data", str(experiment.data)] if experiment.data else []
    return [
        "--student", student, "--seed", str(seed), "--checkpoint", str(experiment.checkpoint),
        *data, *recipe(variant, student, experiment), *length,
        "--batch-size", str(experiment.batch_size), "--cache", str(experiment.out / "cache"),
        "--save-every", interval, "--sample-every", interval, "--report-samples", "0",
        "--fidelity-samples", str(experiment.point_pictures),
        "--sample-steps", str(experiment.point_steps),
    ]
