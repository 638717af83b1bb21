"""What a data set is. Another one is another file in this folder: a class with these methods."""

from typing import Protocol, TypedDict

from torch import Tensor


class Sample(TypedDict):
    target: Tensor     # (3, S, S) in [-1, 1]: the picture
    condition: Tensor  # (3, S, S) in [0, 1]
    prompt: str


class Dataset(Protocol):
    size: int  # S, the side of the pictures
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Sample: ...

    def preview(self, count: int) -> "Dataset":
        """At most `count` samples to make pictures and measures of, the same ones every time."""

    def fidelity(self, pictures: Tensor, own_colors: bool = False) -> dict[str, float]:
        """How well pictures (N, 3, S, S) in [0, 1] obey the first N samples: means by measure, none
        if unknown. `own_colors`: the pictures' prompts named no colours."""
        return {}
