"""Outputs of the frozen networks, computed once: the autoencoder alone costs more than a step."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.files import atomic_write


class Cache:
    """Outputs of a frozen network, one for each input, kept on the CPU: up to `limit` bytes in
    memory and, with a `folder`, on disk from run to run.

    The key is the content of the input and of the network's weights: a changed picture or network
    never gets an old entry. Inputs are computed one at a time, so that not even the last bit
    depends on the batch. A damaged entry is computed again. Processes may share a folder.
    """

    def __init__(self, network: nn.Module, compute: Callable[[Tensor | str], Tensor],
                 folder: Path | None = None, limit: int = 2 * 1024**3):
        self.compute, self.limit, self.bytes = compute, limit, 0
        self.entries: dict[str, Tensor] = {}
        self.folder = folder and folder / _digest(network)

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor | str]) -> Tensor:
        """B pictures or prompts -> outputs (B, ...) in float32. Raises OSError if one cannot be
        written."""
        return torch.stack([self._entry(item) for item in inputs])

    def _entry(self, item: Tensor | str) -> Tensor:
        content = item.encode() if isinstance(item, str) else (
            f"{tuple(item.shape)} ".encode() + item.contiguous().numpy().tobytes())
        key = hashlib.sha256(content).hexdigest()
        if key in self.entries:
            return self.entries[key]
        # 256 folders: no file system likes a million files in one.
        path = self.folder and self.folder / key[:2] / f"{key[2:]}.npy"
        output = _read(path) if path else None
        if output is None:
            output = self.compute(item).float().cpu()
            if path:
                with atomic_write(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, output.numpy())
        if self.bytes + output.nbytes <= self.limit:
            self.entries[key] = output
            self.bytes += output.nbytes
        return output


def latent_cache(vae: nn.Module, folder: Path | None = None) -> Cache:
    """Pictures (3, S, S) -> mean and log variance of their latents, (2, 4, S/8, S/8)."""
    weight = next(vae.parameters())
    return Cache(vae, lambda picture: torch.cat(vae.encode(picture[None].to(weight))), folder)


def text_cache(text: nn.Module, folder: Path | None = None) -> Cache:
    """Prompts -> text states (N, D)."""
    return Cache(text, lambda prompt: text.encode([prompt])[0], folder)


def _read(path: Path) -> Tensor | None:
    """An entry; None if it is missing or damaged."""
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (FileNotFoundError, ValueError, EOFError, TypeError):
        return None


def _digest(network: nn.Module) -> str:
    """A hash of all weights of a network."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
