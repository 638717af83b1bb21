"""The protocol of `evaluate.py`: five settings of prompt and condition, each with its measures.

Every network gets the same conditions, prompts and initial noise.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import default_collate

from controlnet import ControlNetwork
from controlnet.sampling import restored, sample_pictures
from data.dataset import Dataset
from vae import VAE
from weights import StableDiffusion

if TYPE_CHECKING:  # training needs the names below, and not torchmetrics: that takes two seconds
    from evaluation.metrics import Reference

RIGHT = "right prompt"              # the sample's own
EMPTY = "empty prompt"              # ""
DEFAULT = "default prompt"          # the paper's, the same for all, which describes nothing
CONFLICTING = "conflicting prompt"  # the next sample's: for circles, other colours
SWAPPED = "swapped condition"       # the next sample's condition, with the sample's own prompt
SETTINGS = (RIGHT, EMPTY, DEFAULT, CONFLICTING, SWAPPED)

CEILING = "ceiling: the truth through the autoencoder"
CHANCE = "chance: the next sample's"

# ControlNet paper, first version, section 4: for a control without a prompt
DEFAULT_PROMPT = "a professional, detailed, high-quality image"


class EvaluationSet:
    """The samples of a data set in each of the five settings."""

    def __init__(self, dataset: Dataset):
        samples = default_collate([dataset[i] for i in range(len(dataset))])
        conditions, prompts = samples["condition"], samples["prompt"]
        self.dataset = dataset
        self.truth = samples["target"] / 2 + 0.5
        self.conditions = dict.fromkeys(SETTINGS, conditions) | {SWAPPED: conditions.roll(-1, 0)}
        self.prompts = dict.fromkeys(SETTINGS, prompts) | {
            EMPTY: [""] * len(prompts), DEFAULT: [DEFAULT_PROMPT] * len(prompts),
            CONFLICTING: _next(prompts)}

    def fidelity(self, pictures: Tensor, setting: str) -> dict[str, float]:
        """Control fidelity, as far as the data set can tell."""
        same = range(len(self.truth))
        conditions = _next(same) if setting == SWAPPED else same
        prompts = None if setting in (EMPTY, DEFAULT) else same
        return self.dataset.fidelity(pictures, conditions,
                                     _next(same) if setting == CONFLICTING else prompts)


def bounds(vae: VAE, samples: EvaluationSet, truth: "Reference") -> dict[str, dict]:
    """Between what a network's measures with the right prompt lie: those of pictures that are right
    but for the autoencoder, and those of pictures that are as good but of other samples."""
    restorations = restored(vae, 2 * samples.truth - 1).mul(255).round().div(255)
    pictures = {CEILING: restorations, CHANCE: restorations.roll(-1, 0)}
    return {name: {"control fidelity": {RIGHT: columns([samples.fidelity(shown, RIGHT)])},
                   "against the truth": columns([truth.compare(shown)])}
            for name, shown in pictures.items()}


def _next(items: Sequence) -> list:
    """Every item replaced by the next one."""
    return [*items[1:], *items[:1]]


def evaluate_network(
    sd: StableDiffusion, net: ControlNetwork | None, samples: EvaluationSet, truth: "Reference",
    teacher: Mapping[int, "Reference"], *, seeds: Sequence[int], name: str,
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
                seed=seed, name=f"{name}, {setting}")
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
