"""The order of a run's data: a function of seed and position, so a resumed run stores nothing."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.dataset import Dataset
from training import parallel
from training.prepared import Prepared

Place = tuple[int, int]  # index, epoch


def order(shapes: Sequence[Hashable], batch_size: int, seed: int) -> Iterator[list[Place]]:
    """Endless batches of the indices of `shapes`, each of one shape: one random permutation an
    epoch after the other, and a batch as soon as there are enough of its shape. Those that are left
    of a shape at the end of an epoch come first in the next one."""
    pending: dict[Hashable, list[Place]] = {shape: [] for shape in shapes}
    for epoch in count():
        # (seed, epoch) -> a number below 2^63; the large prime keeps the epochs of neighbouring
        # seeds apart.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        for i in torch.randperm(len(shapes), generator=generator).tolist():
            batch = pending[shapes[i]]
            batch.append((i, epoch))
            if len(batch) == batch_size:
                yield batch
                pending[shapes[i]] = []


def drawn(shapes: Sequence[Hashable], batch_size: int, seed: int, first: int,
          last: int) -> list[int]:
    """The indices, in their order, that occur in `order`'s batches from number `first` to before
    `last`. (All, if these are two epochs: of a rare shape some may be left for later.)"""
    if (last - first) * batch_size >= 2 * len(shapes):
        return list(range(len(shapes)))
    places = chain.from_iterable(islice(order(shapes, batch_size, seed), first, last))
    return sorted({i for i, _ in places})


def shapes_of(data: Dataset | Prepared) -> list[tuple[int, int]]:
    return [data.shape(i) for i in range(len(data))]


class ShuffledConditions(Dataset):
    """Every picture has the condition of the next one: a control experiment, nothing to learn."""

    def __init__(self, data: Dataset):
        self.data, self.size = data, data.size
        self.augmented, self.keeps_conditions = data.augmented, data.keeps_conditions

    def __len__(self) -> int:
        return len(self.data)

    def next(self, i: int) -> int:
        return (i + 1) % len(self.data)

    def target(self, i: int) -> Tensor:
        return self.data.target(i)

    def condition(self, i: int) -> Tensor:
        return self.data.condition(self.next(i))

    def pair(self, i: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        return self.data.pair(i, epoch)[0], self.data.pair(self.next(i), epoch)[1]

    def prompt(self, i: int) -> str:
        return self.data.prompt(i)

    def sources(self, i: int) -> list[Path | str]:
        others = self.data.sources(self.next(i)) if self.keeps_conditions else []
        return self.data.sources(i) + others

    def preview(self, count: int) -> Dataset:
        return self.data.preview(count)


def loader_workers(device: torch.device) -> int:
    """Processes that decode conditions for a GPU: one about keeps up with an H100
    (docs/costs.md), four leave room for costlier conditions. A CPU is busy with the step itself."""
    return max(1, min(4, parallel.cores() - 1)) if device.type == "cuda" else 0


def left_alone(_: int) -> None:
    """Ctrl-C goes to a process group (on Windows to all processes of a console), but the step that
    will be saved still needs its data."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def start_method() -> str | None:
    """How workers start: as copies, which cost nothing; on Windows, which has none, anew."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def batches(data: Prepared, batch_size: int, seed: int, first: int = 0, workers: int = 0,
            part: Callable[[list], list] = list) -> Iterator[dict[str, Tensor]]:
    """Endless batches of a prepared data set from number `first` on, loaded by `workers` processes
    (0: by this one). `part` picks the samples of a batch that this process loads."""
    places = map(part, islice(order(shapes_of(data), batch_size, seed), first, None))
    return one_line(iter(DataLoader(data, batch_sampler=places, num_workers=workers,
                                    pin_memory=torch.cuda.is_available(),
                                    generator=torch.Generator(), worker_init_fn=left_alone,
                                    multiprocessing_context=start_method() if workers else None)))


def one_line(loaded: Iterator[dict]) -> Iterator[dict]:
    """The batches. A worker's ValueError comes with its traceback, of which users need the end."""
    try:
        yield from loaded
    except ValueError as problem:
        text = str(problem).strip().rsplit("\nValueError: ", 1)[-1]
        raise ValueError(text) from None
