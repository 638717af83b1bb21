"""The protocol of `evaluate.py`: five settings of prompt and condition, each with its measures.

Every network gets the same conditions, prompts and initial noise.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import default_collate
from tqdm import tqdm

from controlnet import ControlNetwork
from controlnet.sampling import restored, sample_pictures
from data.captions import caption
from data.dataset import Dataset
from text.prompts import DEFAULT_PROMPT, with_suffix
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
AUTOMATIC = "automatic prompt"      # BLIP's caption of the true picture; measured when asked for
BY_PROMPT = {"none": EMPTY, "default": DEFAULT, "automatic": AUTOMATIC, "user": RIGHT}

CEILING = "ceiling: the truth through the autoencoder"
CHANCE = "chance: the next sample's"


class EvaluationSet:
    """The samples of a data set in each of the five settings, or with one of the paper's prompt
    settings alone. `suffix` is appended to all prompts but the empty one. The first of `settings`
    is the one whose pictures are compared with the truth and with the teacher's."""

    def __init__(self, dataset: Dataset, prompt_setting: str | None = None,
                 suffix: str | None = None):
        samples = default_collate([dataset[i] for i in range(len(dataset))])
        conditions, prompts = samples["condition"], samples["prompt"]
        self.dataset = dataset
        self.truth = samples["target"] / 2 + 0.5
        self.conditions = dict.fromkeys((*SETTINGS, AUTOMATIC), conditions) | {
            SWAPPED: conditions.roll(-1, 0)}
        self.settings = (BY_PROMPT[prompt_setting],) if prompt_setting else SETTINGS
        prompts = dict.fromkeys(SETTINGS, prompts) | {
            EMPTY: [""] * len(prompts), DEFAULT: [DEFAULT_PROMPT] * len(prompts),
            CONFLICTING: _next(prompts)}
        if prompt_setting == "automatic":
            prompts[AUTOMATIC] = [caption(truth) for truth in tqdm(self.truth, "captions")]
        self.prompts = {
            setting: [with_suffix(prompt, suffix) if setting != EMPTY else prompt
                      for prompt in prompts[setting]] for setting in self.settings}

    def fidelity(self, pictures: Tensor, setting: str) -> dict[str, float]:
        """Control fidelity, as far as the data set can tell."""
        same = range(len(self.truth))
        conditions = _next(same) if setting == SWAPPED else same
        prompts = None if setting in (EMPTY, DEFAULT, AUTOMATIC) else same
        return self.dataset.fidelity(pictures, conditions,
                                     _next(same) if setting == CONFLICTING else prompts)


def bounds(vae: VAE, samples: EvaluationSet, truth: "Reference") -> dict[str, dict]:
    """Between what a network's measures in the first setting lie: those of pictures that are right
    but for the autoencoder, and those of pictures that are as good but of other samples."""
    restorations = restored(vae, 2 * samples.truth - 1).mul(255).round().div(255)
    pictures = {CEILING: restorations, CHANCE: restorations.roll(-1, 0)}
    setting = samples.settings[0]
    return {name: {"control fidelity": {setting: columns([samples.fidelity(shown, setting)])},
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
    and setting: all of the first seed, those of the first setting of the others.

    `net` None: the base without control. `truth`: the true pictures. `teacher`: by seed the
    teacher's pictures in the first setting; empty for the teacher itself, or without a teacher.
    """
    first = samples.settings[0]
    fidelity = {setting: [] for setting in samples.settings}
    sampled = {seed: {} for seed in seeds}
    for seed in seeds:
        for setting in samples.settings:
            pictures = sample_pictures(
                sd, net, samples.conditions[setting], samples.prompts[setting],
                seed=seed, name=f"{name}, {setting}")
            pictures = pictures.mul(255).round().div(255)  # as a PNG would hold them
            if setting == first or seed == seeds[0]:
                sampled[seed][setting] = pictures
            fidelity[setting].append(samples.fidelity(pictures, setting))
    measures = {
        "control fidelity": {setting: columns(rows) for setting, rows in fidelity.items()},
        "against the truth": columns([truth.compare(sampled[seed][first]) for seed in seeds]),
        "against the teacher": columns([teacher[seed].compare(sampled[seed][first])
                                        for seed in seeds if teacher])}
    return measures, sampled


def columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in rows] for key in rows[0]} if rows else {}
