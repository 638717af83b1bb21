"""What frozen networks say about a data set, computed once: the autoencoder's encoder alone costs more than a training step of a small model."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.files import atomic_write


class Cache:
    """Outputs of a frozen network, one an input, kept on the CPU: up to `limit` bytes in memory, and in `folder`, if there is one, from run to run.

    An entry's key is the content of the input and of the network's weights, so that a changed picture, another crop or another network is never
    answered with an old entry. Inputs are computed one at a time: the result does not depend, not even in the last bit, on the batch that an
    input came in. A damaged entry is computed again. Several processes may share a folder.
    """

    def __init__(self, network: nn.Module, compute: Callable[[Tensor | str], Tensor], folder: Path | None = None, limit: int = 2 * 1024**3):
        self.compute, self.limit, self.kept, self.size = compute, limit, {}, 0
        self.folder = folder and folder / _digest(network)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor | str]) -> Tensor:
        """B pictures or prompts -> their outputs (B, ...) in float32. Raises OSError if an entry cannot be written."""
        return torch.stack([self._one(item) for item in inputs])

    def _one(self, item: Tensor | str) -> Tensor:
        content = item.encode() if isinstance(item, str) else f"{tuple(item.shape)} ".encode() + item.contiguous().numpy().tobytes()
        key = hashlib.sha256(content).hexdigest()
        if key in self.kept:
            return self.kept[key]
        path = self.folder and self.folder / key[:2] / f"{key[2:]}.npy"  # 256 folders: no file system likes a million files in one
        output = _read(path) if path else None
        if output is None:
            output = self.compute(item).float().cpu()
            if path:
                with atomic_write(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, output.numpy())
        if self.size + output.nbytes <= self.limit:
            self.kept[key], self.size = output, self.size + output.nbytes
        return output


def _read(path: Path) -> Tensor | None:
    """An entry; None if it is not there or not whole."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (FileNotFoundError, ValueError, EOFError, TypeError):
        return None


def _digest(network: nn.Module) -> str:
    """A word that changes with any weight of a network. On one core of a laptop a second for a gigabyte."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
