"""What `evaluate.py` measures of a control network: how well it obeys when the prompt helps, says nothing or contradicts, and how good its pictures are.

Every network is given the same conditions, prompts and initial noise. Pictures are rounded to 8 bits before anything is measured.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from controlnet import ControlNet
from data.annotators import annotate, canny
from data.circles import Circle
from data.fidelity import edge_f1, fidelity
from evaluation.fidelity import sampled
from evaluation.metrics import Reference

RIGHT, EMPTY, DEFAULT, CONFLICTING, SWAPPED = SETTINGS = ("right prompt", "empty prompt", "default prompt", "conflicting prompt", "swapped condition")
DEFAULT_PROMPT = "a professional, detailed, high-quality image"  # ControlNet paper, first version, section 4: for a control without a prompt


class EvaluationSet:
    """N samples in each of the five settings.

    right prompt        the sample's own
    empty prompt        ""
    default prompt      the paper's, the same for all, which describes nothing
    conflicting prompt  the next sample's: of circles, other colours than the true picture's
    swapped condition   the sample's prompt and noise, the next sample's condition: the picture has to follow it
    """

    def __init__(self, samples: Sequence[dict], circles: Sequence[Circle] = (), annotator: str | None = None):
        """`samples` of a data set; `circles`: what they were drawn from. `annotator`: what made photos' conditions, to see whether pictures obey them."""
        others = [*range(1, len(samples)), 0]
        conditions, words = [s["condition"] for s in samples], [s["prompt"] for s in samples]
        self.annotator, self.truth = annotator, torch.stack([s["target"] for s in samples]) / 2 + 0.5
        self.prompts = {RIGHT: words, EMPTY: [""] * len(words), DEFAULT: [DEFAULT_PROMPT] * len(words), CONFLICTING: [words[i] for i in others]}
        self.prompts[SWAPPED] = words
        self.conditions = dict.fromkeys(SETTINGS, conditions) | {SWAPPED: [conditions[i] for i in others]}
        self.circles = {}
        if circles:
            next_ones = [circles[i] for i in others]
            self.circles = dict.fromkeys(SETTINGS, circles)
            self.circles[CONFLICTING] = [replace(own, color=other.color, background=other.background) for own, other in zip(circles, next_ones, strict=True)]
            self.circles[SWAPPED] = [replace(other, color=own.color, background=own.background) for own, other in zip(circles, next_ones, strict=True)]

    def pictures(self, sd, net: ControlNet | None, setting: str, *, steps: int, seed: int, name: str = "") -> Tensor:
        """(N, 3, H, W) in [0, 1], as a PNG would hold them. `sd`: a base model, as in `evaluation.fidelity.sampled`."""
        found = sampled(sd, net, self.conditions[setting], self.prompts[setting], steps=steps, seed=seed, name=f"{name}, {setting}")
        return found.mul(255).round().div(255)

    def obeyed(self, pictures: Tensor, setting: str) -> dict[str, float]:
        """Control fidelity: of circles overlap and colour error, of photos F1 of the edges that the annotator sees in the picture."""
        if self.circles:
            return fidelity(pictures, self.circles[setting], own_colors=setting in (EMPTY, DEFAULT))  # which name no colours
        if self.annotator is None:
            return {}
        seen = [canny(picture) if self.annotator == "canny" else annotate(self.annotator, picture) for picture in pictures]
        scores = [edge_f1(found, condition) for found, condition in zip(seen, self.conditions[setting], strict=True)]
        return {"edge F1": sum(scores) / len(scores)}


def measured(
    sd, net: ControlNet | None, exam: EvaluationSet, truth: Reference, teacher: dict[int, Reference], *, seeds: Sequence[int], steps: int, name: str
) -> tuple[dict, dict[str, Tensor], dict[int, Tensor]]:
    """One row, each number a list with one entry a seed; the pictures of the first seed by setting, and those with the right prompt by seed.

    `teacher`: by seed the teacher's pictures with the right prompt; empty for the teacher itself, and where there is none.
    """
    row: dict = {"control fidelity": {setting: {} for setting in SETTINGS}, "against the truth": {}, "against the teacher": {}}
    shown, right = {}, {}

    def add(place: dict[str, list[float]], values: dict[str, float]) -> None:
        for key, value in values.items():
            place.setdefault(key, []).append(value)

    for seed in seeds:
        for setting in SETTINGS:
            pictures = exam.pictures(sd, net, setting, steps=steps, seed=seed, name=name)
            shown.setdefault(setting, pictures)
            add(row["control fidelity"][setting], exam.obeyed(pictures, setting))
            if setting == RIGHT:
                right[seed] = pictures
                add(row["against the truth"], truth.compare(pictures))
                if teacher:
                    add(row["against the teacher"], teacher[seed].compare(pictures))
    return row, shown, right
