"""The order of a run's data: a function of seed and position, so a resumed run stores nothing."""

import os
from collections.abc import Callable, Iterator
from itertools import count, islice

import torch
from torch.utils.data import DataLoader

from data.dataset import Dataset, Sample


def order(length: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices below `length`: one random permutation an epoch after the other,
    without a gap between them."""
    pending: list[int] = []
    for epoch in count():
        # (seed, epoch) -> a number below 2^63; the large prime keeps the epochs of neighbouring
        # seeds apart.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        pending += torch.randperm(length, generator=generator).tolist()
        while len(pending) >= batch_size:
            yield pending[:batch_size]
            pending = pending[batch_size:]


class ShuffledConditions:
    """Every picture has the condition of the next one: a control experiment, nothing to learn."""

    def __init__(self, data: Dataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Sample:
        return self.data[i] | {"condition": self.data[(i + 1) % len(self.data)]["condition"]}


def own_process_group(_: int) -> None:
    """Ctrl-C goes to a process group, but the step that will be saved still needs its data."""
    os.setpgid(0, 0)


def batches(data: Dataset, batch_size: int, seed: int, first: int = 0, workers: int = 0,
            part: Callable[[list], list] = list) -> Iterator[dict]:
    """Endless batches {"target": (B, 3, S, S), "condition": (B, 3, S, S), "prompt": list} of a data
    set, from batch number `first` on, loaded by `workers` processes (0: by this one). `part` picks
    the indices of a batch that this process loads."""
    indices = map(part, islice(order(len(data), batch_size, seed), first, None))
    return iter(DataLoader(data, batch_sampler=indices, num_workers=workers,
                           generator=torch.Generator(), worker_init_fn=own_process_group))
