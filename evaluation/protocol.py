"""The protocol of `evaluate.py`: five settings of prompt and condition, each with its measures.

Every network gets the same conditions, prompts and initial noise. Pictures are rounded to 8 bits
before they are measured.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from controlnet import ControlNetwork
from data.annotators import annotate, canny
from data.circles import Circle
from data.dataset import Dataset
from data.fidelity import edge_f1, fidelity
from evaluation.fidelity import sample_pictures
from evaluation.metrics import Reference
from weights import StableDiffusion

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
        samples = [dataset[i] for i in range(len(dataset))]
        self.annotator = annotator
        self.truth = torch.stack([sample["target"] for sample in samples]) / 2 + 0.5
        conditions = [sample["condition"] for sample in samples]
        prompts = [sample["prompt"] for sample in samples]
        self.conditions = dict.fromkeys(SETTINGS, conditions) | {SWAPPED: _next(conditions)}
        self.prompts = dict.fromkeys(SETTINGS, prompts) | {
            EMPTY: [""] * len(prompts), DEFAULT: [DEFAULT_PROMPT] * len(prompts),
            CONFLICTING: _next(prompts)}
        self.circles = {}
        if circles:
            self.circles = dict.fromkeys(SETTINGS, circles) | {
                CONFLICTING: _recolored(circles, _next(circles)),
                SWAPPED: _recolored(_next(circles), circles)}

    def pictures(self, sd: StableDiffusion, net: ControlNetwork | None, setting: str, *, steps: int,
                 seed: int, name: str = "") -> Tensor:
        """(N, 3, H, W) in [0, 1], sampled with a network and rounded as a PNG would hold them."""
        pictures = sample_pictures(sd, net, self.conditions[setting], self.prompts[setting],
                                   steps=steps, seed=seed, name=f"{name}, {setting}")
        return pictures.mul(255).round().div(255)

    def fidelity(self, pictures: Tensor, setting: str) -> dict[str, float]:
        """Control fidelity: for circles overlap and colour error, for photos the F1 of the edges
        that the annotator finds in the picture; {} without an annotator."""
        if self.circles:
            names_no_colors = setting in (EMPTY, DEFAULT)
            return fidelity(pictures, self.circles[setting], own_colors=names_no_colors)
        if self.annotator is None:
            return {}
        find_edges = canny if self.annotator == "canny" else partial(annotate, self.annotator)
        scores = [edge_f1(find_edges(picture), condition)
                  for picture, condition in zip(pictures, self.conditions[setting], strict=True)]
        return {"edge F1": sum(scores) / len(scores)}


def _next(items: Sequence) -> list:
    """In place of every item the next one."""
    return [*items[1:], items[0]]


def _recolored(shapes: Sequence[Circle], colors: Sequence[Circle]) -> list[Circle]:
    return [replace(shape, color=other.color, background=other.background)
            for shape, other in zip(shapes, colors, strict=True)]


def evaluate_network(
    sd: StableDiffusion, net: ControlNetwork | None, samples: EvaluationSet, truth: Reference,
    teacher: Mapping[int, Reference], *, seeds: Sequence[int], steps: int, name: str,
) -> tuple[dict, dict[int, dict[str, Tensor]]]:
    """One network's measures, every value a list with one entry a seed, and its pictures by seed
    and setting: all of the first seed, those with the right prompt of the others.

    `net` None: the base without control. `truth`: the true pictures. `teacher`: by seed the
    teacher's pictures with the right prompt; empty for the teacher itself, or without a teacher.
    """
    fidelity = {setting: defaultdict(list) for setting in SETTINGS}
    to_truth, to_teacher = defaultdict(list), defaultdict(list)
    sampled = {seed: {} for seed in seeds}
    for seed in seeds:
        for setting in SETTINGS:
            pictures = samples.pictures(sd, net, setting, steps=steps, seed=seed, name=name)
            if setting == RIGHT or seed == seeds[0]:
                sampled[seed][setting] = pictures
            append(fidelity[setting], samples.fidelity(pictures, setting))
        right = sampled[seed][RIGHT]
        append(to_truth, truth.compare(right))
        append(to_teacher, teacher[seed].compare(right) if teacher else {})
    return {"control fidelity": fidelity, "against the truth": to_truth,
            "against the teacher": to_teacher}, sampled


def append(lists: dict[str, list[float]], values: Mapping[str, float]) -> None:
    for key, value in values.items():
        lists[key].append(value)
