"""How near are pictures to others? FID, SSIM, PSNR and LPIPS through torchmetrics, and a Frechet distance between the base model's own latents.

FID and LPIPS need networks trained on photographs, which are fetched when first used, or given as files. Where they cannot be had, the
others are computed all the same.
"""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg
from torch import Tensor, nn
from torch.hub import get_dir, load_state_dict_from_url
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.image.lpips import _LPIPS  # its public class cannot be given the backbone's weights
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.models import AlexNet_Weights

from vae.model import LATENT_SCALE

BATCH = 32         # pictures at a time through a network
FEATURES = 2048    # of Inception's last pooling, those of the published FIDs
LATENT_SIDE = 8    # latents are averaged down to 8 x 8, so that a distribution has 256 numbers at any resolution


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians that have the mean and covariance of a and b, (N, D) each (Heusel et al. 2017, eq. 6):
    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). In float64. It is biased upward, the more the fewer samples: compare equal N only.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The root's trace is that of the eigenvalues' roots, which exists where the matrix root of a singular product does not.
    eigenvalues = linalg.eigvals(np.atleast_2d(c_a) @ np.atleast_2d(c_b))
    root = np.sqrt(eigenvalues.real.clip(min=0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.atleast_2d(c_a + c_b)) - 2 * root)


def weights_file(path: Path | None, url: str) -> Path:
    """The file, or the one fetched from `url`, once it is known to hold tensors and nothing else.

    Raises ValueError for a wrong file, OSError if there is none to be had.
    """
    if path is None:
        load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True, weights_only=True)
        return Path(get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, KeyError) as problem:
        raise ValueError(f"expected the weights of {url}, {path} is another file or damaged: {str(problem)[:150]}") from None
    return path


def inception(path: Path | None, device: torch.device) -> nn.Module:
    """FID's network, the Inception of 2015, from a file or from torch-fidelity's address: pictures (B, 3, H, W) of bytes -> (B, 2048)."""
    file = weights_file(path, URL_INCEPTION_V3)
    try:
        net = FrechetInceptionDistance(feature=FEATURES, feature_extractor_weights_path=str(file)).inception
        net.num_features = FEATURES
        return net.to(device)
    except (RuntimeError, TypeError, AttributeError) as problem:
        raise ValueError(f"expected the Inception network's weights, {file} holds others: {str(problem)[:150]}") from None


def lpips(path: Path | None, device: torch.device) -> nn.Module:
    """LPIPS (Zhang et al. 2018), its layers' weights from torchmetrics on an AlexNet from a file or from torchvision's address."""
    file = weights_file(path, AlexNet_Weights.IMAGENET1K_V1.url)
    net = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    try:
        net.net.load_state_dict({name: tensors[f"features.{name.split('.', 1)[1]}"] for name in net.net.state_dict()})
    except (RuntimeError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"expected AlexNet's weights, {file} holds others: {str(problem)[:150]}") from None
    return net.eval().requires_grad_(False).to(device)


class Networks:
    """The metrics' networks that could be had; `missing` says why the others could not."""

    def __init__(self, inception_file: Path | None, lpips_file: Path | None, device: torch.device):
        self.device, self.missing = device, {}
        self.inception = self._had("FID", lambda: inception(inception_file, device), inception_file)
        self.lpips = self._had("LPIPS", lambda: lpips(lpips_file, device), lpips_file)

    def _had(self, name: str, make: Callable[[], nn.Module], given: Path | None) -> nn.Module | None:
        try:
            return make()
        except (OSError, RuntimeError) as problem:  # no network, or what came from it is not what was asked for
            if given:
                raise ValueError(f"expected the weights for {name}, {given} cannot be read: {problem}") from None
            self.missing[name] = " ".join(f"its network's weights could not be fetched ({problem})".split())
            return None


class Reference:
    """Pictures (N, 3, H, W) in [0, 1] that others are compared with, one by one and as a distribution."""

    @torch.no_grad()
    def __init__(self, pictures: Tensor, vae: nn.Module, networks: Networks):
        self.pictures, self.vae, self.networks = pictures, vae, networks
        self.latents = self._latents(pictures)
        self.fid = None
        if networks.inception:
            self.fid = FrechetInceptionDistance(feature=networks.inception, reset_real_features=False).to(networks.device)
            self._update(pictures, real=True)

    def _latents(self, pictures: Tensor) -> np.ndarray:
        """(N, 256): the means of the latents, in the scale that the denoiser sees, averaged down to 8 x 8."""
        like, found = next(self.vae.parameters()), []
        for part in pictures.split(BATCH):
            mean, _ = self.vae.encode(2 * part.to(like) - 1)
            found.append(F.adaptive_avg_pool2d(LATENT_SCALE * mean.float(), LATENT_SIDE).flatten(1).cpu())
        return torch.cat(found).numpy()

    def _update(self, pictures: Tensor, real: bool) -> None:
        for part in pictures.split(BATCH):
            self.fid.update(part.mul(255).round().byte().to(self.networks.device), real=real)

    @torch.no_grad()
    def compare(self, pictures: Tensor) -> dict[str, float]:
        """Mean SSIM, mean PSNR in dB (infinite between equal pictures) and mean LPIPS of the pairs; FID and latent distance of the two sets.

        A metric whose network is missing is left out.
        """
        found: dict[str, list[Tensor]] = {"SSIM": [], "PSNR": [], "LPIPS": []}
        for a, b in zip(pictures.split(BATCH), self.pictures.split(BATCH), strict=True):
            # In float64: on plain backgrounds variances cancel, and in float32 equal pictures would not have an SSIM of 1.
            found["SSIM"].append(structural_similarity_index_measure(a.double(), b.double(), data_range=1.0, reduction="none").reshape(-1))
            found["PSNR"].append(peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none"))
            if self.networks.lpips:
                found["LPIPS"].append(self.networks.lpips(*(2 * part.to(self.networks.device) - 1 for part in (a, b))).reshape(-1).cpu())
        means = {name: torch.cat(parts).mean().item() for name, parts in found.items() if parts}
        if self.fid:
            self.fid.reset()
            self._update(pictures, real=False)
            means["FID"] = self.fid.compute().item()
        return means | {"latent distance": frechet_distance(self._latents(pictures), self.latents)}
