"""What a data set is. Another one is another file in this folder: a class with these methods."""

from abc import ABC, abstractmethod
from typing import TypedDict

from torch import Tensor


class Sample(TypedDict):
    target: Tensor     # (3, S, S) in [-1, 1]: the picture
    condition: Tensor  # (3, S, S) in [0, 1]
    prompt: str


class Dataset(ABC):
    size: int  # S, the side of the pictures

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Sample: ...

    @abstractmethod
    def preview(self, count: int) -> "Dataset":
        """At most `count` samples to make pictures and measures of, the same ones every time:
        held-out ones, if there are any."""

    def fidelity(self, pictures: Tensor, without_prompt: bool = False) -> dict[str, float]:
        """How well pictures (N, 3, S, S) in [0, 1] follow the first N samples: means by measure, {}
        if it cannot be measured. `without_prompt`: they were made with the empty prompt."""
        return {}
