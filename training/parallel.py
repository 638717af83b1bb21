"""Several processes, one training: torchrun starts them, DistributedDataParallel averages their
gradients.

Two processes with --batch-size 8 are one with --batch-size 16, up to the order of additions: each
samples the random numbers of the whole batch and takes its shard. Process 0 alone writes.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import sleep

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_store: dist.Store | None = None  # where the processes of a group leave notes for each other


def world_size() -> int:
    """The number of processes on all machines, from torchrun; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number, 0 for the one that writes."""
    return int(os.environ.get("RANK", 0))


def cores() -> int:
    """The processor cores for this process, of the machine's that it may use."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, own // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the other processes, over nccl with a GPU each or over gloo on the CPU, and leave with
    them; nothing for a single process. Raises ConnectionError if another one has died."""
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world_size() == 1:
        yield
        return
    global _store
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, own_rank, size = next(dist.rendezvous("env://"))
    _store = store
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=own_rank,
                            world_size=size)
    try:
        yield
        _leave(store)
    except RuntimeError as problem:
        if not (isinstance(problem, dist.DistError) or "by peer" in str(problem)):
            raise
        raise ConnectionError(f"process {rank()} has lost the others, whose errors tell why "
                              f"({str(problem)[:100]})") from None
    finally:
        dist.destroy_process_group()


def _leave(store: dist.Store) -> None:
    """A process that closes its connections early looks dead to a slower one, so all wait until
    everyone is done."""
    store.set(f"done {rank()}", "")
    store.wait([f"done {other}" for other in range(world_size())])
    store.set(f"gone {rank()}", "")
    if rank() == 0:  # may be hosting the store
        store.wait([f"gone {other}" for other in range(world_size())])


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def wait_for_all() -> None:
    """Wait until every process is here, however long it takes: a collective operation, as `barrier`
    is one, gives up after minutes. To be called once."""
    if dist.is_initialized():
        _store.set(f"ready {rank()}", "")
        while not _store.check([f"ready {other}" for other in range(world_size())]):
            sleep(0.1)


def agree_on_stop(stop_signal: signal.Signals | None) -> signal.Signals | None:
    """The signal that any process received: all must stop after the same step."""
    if not dist.is_initialized():
        return stop_signal
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    number = torch.tensor(int(stop_signal or 0), device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return signal.Signals(number.item()) if number else None


def wrap(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over all processes. To be called again when the set of
    trainable weights has changed."""
    return DistributedDataParallel(module) if dist.is_initialized() else module


def gradient_sync(module: nn.Module, last: bool) -> AbstractContextManager:
    """Around a forward and backward pass: gradients are exchanged in the last one of a step."""
    return nullcontext() if last or not dist.is_initialized() else module.no_sync()


def shard(whole: Sequence | Tensor) -> Sequence | Tensor:
    """This process's part of the whole batch."""
    size = len(whole) // world_size()
    return whole[rank() * size : (rank() + 1) * size]


class ShardedRandom:
    """Random numbers for the whole batch of all processes, of which each takes its shard: from one
    generator on the CPU, so that they depend on the seed alone. Batch sizes B are a shard's."""

    def __init__(self, generator: torch.Generator, batch_size: int):
        self.generator, self.batch_size = generator, batch_size

    def normal(self, shape: Sequence[int]) -> Tensor:   # (B, *shape) from N(0, 1)
        return shard(torch.randn((self.batch_size, *shape), generator=self.generator))

    def integers(self, high: int) -> Tensor:            # (B,) in [0, high)
        return shard(torch.randint(high, (self.batch_size,), generator=self.generator))

    def uniform(self) -> Tensor:                        # (B,) in [0, 1)
        return shard(torch.rand(self.batch_size, generator=self.generator))


def all_reduce_sum(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor's sum over all processes, in one message for all; of the same dtype."""
    if not dist.is_initialized():
        return values
    flat = torch.cat([value.reshape(-1) for value in values.values()])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in values.values()])
    return {name: part.reshape(value.shape)
            for (name, value), part in zip(values.items(), parts, strict=True)}


@torch.no_grad()
def variances(tensors: Sequence[Tensor], by_channel: bool = False) -> list[Tensor]:
    """The variance of each tensor (B, C, H, W) over the whole batch of all processes, from each
    one's mean and variance: a number (), or `by_channel` one for each (C,). Raises ValueError for
    the variance of a single value."""
    tensors = [tensor.float() for tensor in tensors]
    dims = (0, 2, 3) if by_channel else None
    means = [tensor.mean(dims) for tensor in tensors]
    counts = [tensor.numel() // mean.numel() for tensor, mean in zip(tensors, means, strict=True)]
    if min(counts) * world_size() == 1:
        raise ValueError("expected at least two values in a channel to take a variance of, got a "
                         "batch of one picture whose middle is one pixel: try --batch-size 2")
    own = [tensor.var(dims, correction=min(1, count - 1))      # of a single value 0, not 0 / 0
           for tensor, count in zip(tensors, counts, strict=True)]
    if not dist.is_initialized():
        return own
    sizes = [mean.numel() for mean in means]
    moments = torch.stack([torch.cat([value.reshape(-1) for value in values])
                           for values in (means, own)]).double()        # (2, 13), or channels
    gathered = [torch.empty_like(moments) for _ in range(world_size())]
    dist.all_gather(gathered, moments)
    all_means, within = torch.stack(gathered, dim=1)                    # (N, 13) each
    counts = torch.tensor(counts, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    counts = counts.to(within.device)
    squares = (counts - 1) * within.sum(0)                              # within the processes
    squares += counts * (all_means - all_means.mean(0)).square().sum(0)  # between them
    whole = (squares / (counts * world_size() - 1)).float().split(sizes)
    return [part.reshape(mean.shape) for part, mean in zip(whole, means, strict=True)]
