"""Several processes, one training: torchrun starts them, DistributedDataParallel averages their gradients.

    torchrun --nproc-per-node 2 train.py --batch-size 8        the run of one process with --batch-size 16, up to the order of additions

Every process draws the numbers of the whole batch and takes its own part, so nothing is random but the seed. The first one writes.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def processes() -> int:
    """How many there are on all machines, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number, 0 for the one that writes."""
    return int(os.environ.get("RANK", 0))


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the others, over nccl with a GPU for each process or over gloo on the CPU; leave with them. Does nothing for a single process.

    Raises ConnectionError if one of the others has died.
    """
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if processes() == 1:
        yield
        return
    store, number, count = next(dist.rendezvous("env://"))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("group", store), rank=number, world_size=count)
    try:
        yield
        leave(store)
    except RuntimeError as problem:
        if not (isinstance(problem, dist.DistError) or "by peer" in str(problem)):
            raise
        raise ConnectionError(f"process {rank()} has lost the others, which say why ({str(problem)[:100]})") from None
    finally:
        dist.destroy_process_group()


def leave(store: dist.Store) -> None:
    """Wait until all have heard the last message. One that closes its connections earlier looks to a slower one as if it had died."""
    store.set(f"done {rank()}", "")
    store.wait([f"done {number}" for number in range(processes())])
    store.set(f"gone {rank()}", "")
    if rank() == 0:  # who may be keeping the store itself
        store.wait([f"gone {number}" for number in range(processes())])


def wait() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def agreed(asked: signal.Signals | None) -> signal.Signals | None:
    """The signal that any process was asked to stop by: they must all stop after the same step."""
    if not dist.is_initialized():
        return asked
    found = torch.tensor(int(asked or 0), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return signal.Signals(found.item()) if found else None


def wrapped(step: nn.Module) -> nn.Module:
    """The module whose gradients are averaged over all processes. To be called again when the set of trainable weights has changed."""
    return DistributedDataParallel(step) if dist.is_initialized() else step


def mine(whole: Sequence | Tensor) -> Sequence | Tensor:
    """This process's part of something that is given for the whole batch."""
    share = len(whole) // processes()
    return whole[rank() * share : (rank() + 1) * share]


def summed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor's sum over all processes, in float64 on the CPU, with one message for all of them."""
    flat = torch.cat([value.detach().double().reshape(-1) for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(flat)
    parts = flat.cpu().split([value.numel() for value in values.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(values.items(), parts, strict=True)}


def variances(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The variance of each tensor (B, ...) over the whole batch of all processes: what one process with all of it would find."""
    tensors = [tensor.float() for tensor in tensors]
    own = [tensor.var() for tensor in tensors]
    if not dist.is_initialized():
        return own
    moments = torch.stack([torch.stack([tensor.mean() for tensor in tensors]), torch.stack(own)]).double()         # (2, 13)
    everyones = [torch.empty_like(moments) for _ in range(processes())]
    dist.all_gather(everyones, moments)
    means, varied = torch.stack(everyones, dim=1)                                                                  # (N, 13) each
    counts = torch.tensor([float(tensor.numel()) for tensor in tensors], dtype=torch.float64, device=means.device)
    within, between = (counts - 1) * varied.sum(0), counts * (means - means.mean(0)).square().sum(0)
    return list(((within + between) / (counts * processes() - 1)).float())
