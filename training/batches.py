"""The order in which a run sees its data: a function of the seed and the position alone, so that a resumed run needs to store nothing."""

import os
from collections.abc import Callable, Iterator
from itertools import count, islice

import torch
from torch.utils.data import DataLoader, Dataset


def order(length: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices below `length`: one random permutation an epoch after the other, without a gap between them."""
    pending: list[int] = []
    for epoch in count():
        # (seed, epoch) -> one number below 2^63; the large prime keeps the epochs of neighbouring seeds apart
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        pending += torch.randperm(length, generator=generator).tolist()
        while len(pending) >= batch_size:
            yield pending[:batch_size]
            pending = pending[batch_size:]


def collate(samples: list[dict]) -> dict:
    """Samples -> {"target": (B, 3, S, S), "condition": (B, 3, S, S), "prompt": list}."""
    batch = {key: [sample[key] for sample in samples] for key in samples[0]}
    return batch | {key: torch.stack(batch[key]) for key in ("target", "condition")}


class Shuffled(Dataset):
    """A data set in which every picture has the condition of the next one: what a control network must not be able to learn from."""

    def __init__(self, data):
        self.data, self.size = data, data.size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict:
        return self.data[i] | {"condition": self.data[(i + 1) % len(self.data)]["condition"]}


def own_group(_: int) -> None:
    """A worker's first act. Ctrl-C goes to the whole process group; the workers must live until the step that is to be saved has its data."""
    os.setpgid(0, 0)


def batches(data, batch_size: int, seed: int, first: int = 0, workers: int = 0, part: Callable[[list], list] = list) -> Iterator[dict]:
    """Endless batches of a data set, from batch number `first` on, loaded by `workers` processes (0: by this one); of each the given `part`."""
    indices = map(part, islice(order(len(data), batch_size, seed), first, None))
    return iter(DataLoader(data, batch_sampler=indices, num_workers=workers, collate_fn=collate, generator=torch.Generator(), worker_init_fn=own_group))
