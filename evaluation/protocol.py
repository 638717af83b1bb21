"""The protocol of `evaluate.py`: five settings of prompt and condition, each with its measures.

Every network gets the same conditions, prompts and initial noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import default_collate

from controlnet import ControlNetwork
from controlnet.sampling import sample_pictures
from data.annotators import annotate, canny
from data.circles import Circle
from data.dataset import Dataset
from data.fidelity import edge_f1, fidelity
from weights import StableDiffusion

if TYPE_CHECKING:  # training needs the names below, and not torchmetrics: that takes two seconds
    from evaluation.metrics import Reference

RIGHT = "right prompt"              # the sample's own
EMPTY = "empty prompt"              # ""
DEFAULT = "default prompt"          # the paper's, the same for all, which describes nothing
CONFLICTING = "conflicting prompt"  # the next sample's: for circles, other colours
SWAPPED = "swapped condition"       # the next sample's condition, with the sample's own prompt
SETTINGS = (RIGHT, EMPTY, DEFAULT, CONFLICTING, SWAPPED)

# ControlNet paper, first version, section 4: for a control without a prompt
DEFAULT_PROMPT = "a professional, detailed, high-quality image"


class EvaluationSet:
    """The samples of a data set in each of the five settings."""

    def __init__(self, dataset: Dataset, circles: Sequence[Circle] = (),
                 annotator: str | None = None):
        """`circles`: what generated samples show. `annotator`: what made the conditions of photos,
        canny or a name of controlnet_aux; without it their fidelity is not measured."""
        samples = default_collate([dataset[i] for i in range(len(dataset))])
        conditions, prompts = samples["condition"], samples["prompt"]
        self.annotator = annotator
        self.truth = samples["target"] / 2 + 0.5
        self.conditions = dict.fromkeys(SETTINGS, conditions) | {SWAPPED: conditions.roll(-1, 0)}
        self.prompts = dict.fromkeys(SETTINGS, prompts) | {
            EMPTY: [""] * len(prompts), DEFAULT: [DEFAULT_PROMPT] * len(prompts),
            CONFLICTING: _next(prompts)}
        self.circles = dict.fromkeys(SETTINGS, circles) | {
            CONFLICTING: _recolored(circles, _next(circles)),
            SWAPPED: _recolored(_next(circles), circles)}

    def fidelity(self, pictures: Tensor, setting: str) -> dict[str, float]:
        """Control fidelity: for circles overlap and colour error, for photos the F1 of the edges
        that the annotator finds in the picture; {} without an annotator."""
        if self.circles[setting]:
            without_colors = setting in (EMPTY, DEFAULT)
            return fidelity(pictures, self.circles[setting], own_colors=without_colors)
        if self.annotator is None:
            return {}
        find_edges = canny if self.annotator == "canny" else partial(annotate, self.annotator)
        scores = [edge_f1(find_edges(picture), condition)
                  for picture, condition in zip(pictures, self.conditions[setting], strict=True)]
        return {"edge F1": sum(scores) / len(scores)}


def _next(items: Sequence) -> list:
    """Every item replaced by the next one."""
    return [*items[1:], *items[:1]]


def _recolored(shapes: Sequence[Circle], colors: Sequence[Circle]) -> list[Circle]:
    return [replace(shape, color=other.color, background=other.background)
            for shape, other in zip(shapes, colors, strict=True)]


def evaluate_network(
    sd: StableDiffusion, net: ControlNetwork | None, samples: EvaluationSet, truth: "Reference",
    teacher: Mapping[int, "Reference"], *, seeds: Sequence[int], steps: int, name: str,
) -> tuple[dict, dict[int, dict[str, Tensor]]]:
    """One network's measures, every value a list with one entry per seed, and its pictures by seed
    and setting: all of the first seed, those with the right prompt of the others.

    `net` None: the base without control. `truth`: the true pictures. `teacher`: by seed the
    teacher's pictures with the right prompt; empty for the teacher itself, or without a teacher.
    """
    fidelity = {setting: [] for setting in SETTINGS}
    sampled = {seed: {} for seed in seeds}
    for seed in seeds:
        for setting in SETTINGS:
            pictures = sample_pictures(
                sd, net, samples.conditions[setting], samples.prompts[setting],
                steps=steps, seed=seed, name=f"{name}, {setting}")
            pictures = pictures.mul(255).round().div(255)  # as a PNG would hold them
            if setting == RIGHT or seed == seeds[0]:
                sampled[seed][setting] = pictures
            fidelity[setting].append(samples.fidelity(pictures, setting))
    measures = {
        "control fidelity": {setting: columns(rows) for setting, rows in fidelity.items()},
        "against the truth": columns([truth.compare(sampled[seed][RIGHT]) for seed in seeds]),
        "against the teacher": columns([teacher[seed].compare(sampled[seed][RIGHT])
                                        for seed in seeds if teacher])}
    return measures, sampled


def columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in rows] for key in rows[0]} if rows else {}
