"""What a data set is. Another one is another file in this folder: a class with these methods."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TypedDict

from torch import Tensor


class Sample(TypedDict):
    target: Tensor     # (3, H, W) in [-1, 1]: the picture
    condition: Tensor  # (3, H, W) in [0, 1]
    prompt: str


class Dataset(ABC):
    """Pictures and conditions are bytes (3, H, W). Training asks for a condition in every epoch,
    for a target once, before the first step: then its latents are known."""

    size: int  # the side of the pictures, or of a square of the area that the largest have
    augmented = False         # `pair` depends on the epoch, so that no latents can be kept
    fingerprint: str | None = None  # of its content, if it is read from files
    keeps_conditions = False  # black or white, and costly: they are kept with the latents

    @abstractmethod
    def __len__(self) -> int: ...

    def shape(self, i: int) -> tuple[int, int]:
        """Height and width of picture and condition i. A batch is of pictures of one shape."""
        return self.size, self.size

    @abstractmethod
    def target(self, i: int) -> Tensor: ...

    @abstractmethod
    def condition(self, i: int) -> Tensor: ...

    @abstractmethod
    def prompt(self, i: int) -> str: ...

    def pair(self, i: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Target and condition i. If the data is `augmented`, every random number comes from i and
        the epoch, so that a resumed run sees what an uninterrupted one does."""
        return self.target(i), self.condition(i)

    def sources(self, i: int) -> list[Path | str]:
        """What pair i is made of, so that it is noticed when that has changed: files, and texts
        that no other pair has."""
        return [sha256(self.target(i).numpy().tobytes()).hexdigest()]

    def __getitem__(self, i: int) -> Sample:
        target, condition = self.pair(i)
        return {"target": target / 127.5 - 1, "condition": condition / 255,
                "prompt": self.prompt(i)}

    @abstractmethod
    def preview(self, count: int) -> "Dataset":
        """At most `count` samples to make pictures and measures of, all of one shape, the same
        ones every time: held-out ones, if there are any."""

    def fidelity(self, pictures: Tensor, conditions: Sequence[int],
                 prompts: Sequence[int] | None) -> dict[str, float]:
        """How well pictures (N, 3, H, W) in [0, 1] obey: means by measure, {} if it cannot be
        measured. `conditions`, `prompts`: the samples whose they were made with (prompts None:
        with one that describes none of them)."""
        return {}
