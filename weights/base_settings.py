"""What a base model's file says besides its tensors: how it is sampled, what it predicts, its rate
of learning and size. It stands in the metadata; of SD-Turbo, which has none, it is recognised.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from diffusion import SD_TURBO, TIMESTEPS
from vae import DOWNSCALE
from weights.files import Tensors

PREDICTIONS = {"noise": "epsilon", "epsilon": "epsilon", "v": "v"}  # files have the word noise
CHECKS = {  # setting -> whether a value can be used
    "prediction": lambda value: value in PREDICTIONS,
    "steps": lambda value: type(value) is int and 1 <= value <= TIMESTEPS,
    "guidance": lambda value: type(value) in (int, float) and 0 <= value < math.inf,
    "spacing": lambda value: value in ("leading", "trailing"),
    "lr": lambda value: type(value) in (int, float) and 0 < value < math.inf,
    "resolution": lambda value: type(value) is int and value > 0 and value % DOWNSCALE == 0,
}
TURBO = asdict(SD_TURBO) | {"prediction": "noise"}
OPENCLIP = ("conditioner.embedders.0.model.", "cond_stage_model.model.")  # SD 2.x, by two programs


def settings_of(metadata: Mapping[str, str]) -> dict:
    """A base model's settings from its metadata: this project's, and the prediction type as the
    modelspec standard has it. Raises ValueError."""
    settings = json.loads(metadata.get("stable_diffusion", "{}"))
    if stated := metadata.get("modelspec.prediction_type"):
        word = stated.lower().replace("_", "-").removesuffix("-prediction")
        settings.setdefault("prediction", word)
    return settings


def with_settings(metadata: Mapping[str, str], settings: Mapping[str, object]) -> dict[str, str]:
    """The metadata with these settings in the place of its own."""
    own = json.loads(metadata.get("stable_diffusion", "{}"))
    return {**metadata, "stable_diffusion": json.dumps(own | dict(settings))}


def check_settings(settings: Mapping[str, object]) -> None:
    """Raises ValueError for a setting that is unknown or cannot be used."""
    for name, value in settings.items():
        if name not in CHECKS or not CHECKS[name](value):
            raise ValueError(f"unusable setting {name}: {value}")


def read_setting(text: str) -> tuple[str, object]:
    """NAME=VALUE of a command line. Raises ValueError."""
    name, _, value = text.partition("=")
    try:
        setting = {name: json.loads(value)}
    except ValueError:  # a word
        setting = {name: value}
    try:
        check_settings(setting)
    except ValueError:
        raise ValueError(f"expected NAME=VALUE with a name among {', '.join(CHECKS)} and a value "
                         f"that it can have, got {text!r}") from None
    return name, setting[name]


def why_turbo(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> str | None:
    """What shows that a file is SD-Turbo: it has the shapes of Stable Diffusion 2.x, and its
    tensors the names of the later code it was published by, or it is called so. None: nothing does,
    or its own metadata says how it is sampled."""
    if not any(name.startswith(OPENCLIP) for name in tensors):
        return None
    if {"steps", "guidance", "spacing"} & settings_of(metadata).keys():
        return None
    if any(name.startswith(OPENCLIP[0]) for name in tensors):
        return "its tensors' names"
    names = (path.name, metadata.get("modelspec.title", ""))
    return "its name" if any("turbo" in name.lower() for name in names) else None
