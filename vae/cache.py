"""The latents of a data set, encoded once: the autoencoder is frozen, and its encoder costs more than a training step of a small model."""

import torch
from torch import Tensor

from vae.model import VAE, sample_latents


class LatentCache:
    """Means and log variances of pictures by index, kept on the CPU as long as all of them fit into `limit` bytes.

    Pictures are encoded one at a time, so that the result does not depend, not even in the last bit, on the batch a picture came in.
    """

    def __init__(self, vae: VAE, length: int, size: int, limit: int = 2 * 1024**3):
        self.vae = vae
        self.kept: dict[int, Tensor] | None = {} if length * 2 * 4 * 4 * (size // 8) ** 2 <= limit else None

    @torch.no_grad()
    def _moments(self, index: int, picture: Tensor) -> Tensor:
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        moments = torch.cat(self.vae.encode(picture[None].to(self.vae.quant_conv.weight))).float().cpu()
        if self.kept is not None:
            self.kept[index] = moments
        return moments

    def latents(self, indices: list[int], pictures: Tensor, noise: Tensor) -> Tensor:
        """The denoiser's latents (B, 4, S/8, S/8) on the CPU for pictures (B, 3, S, S) in [-1, 1], with the autoencoder's own `noise`."""
        moments = torch.stack([self._moments(i, picture) for i, picture in zip(indices, pictures, strict=True)])
        return sample_latents(moments[:, 0], moments[:, 1], noise)
