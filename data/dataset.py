"""What every data set offers."""

from typing import Protocol, TypedDict

from torch import Tensor


class Sample(TypedDict):
    target: Tensor
    condition: Tensor
    prompt: str


class Dataset(Protocol):
    size: int

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Sample: ...
    def preview(self, count: int) -> "Dataset": ...
    def fidelity(self, pictures: Tensor, own_colors: bool = False) -> dict[str, float]: ...
