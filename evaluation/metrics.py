"""How near pictures are to reference pictures: FID, SSIM, PSNR and LPIPS through torchmetrics, and
a Frechet distance between the base model's own latents.

FID and LPIPS need networks trained on photographs; without them the others are computed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics.functional.image as image_metrics
from torch import Tensor, nn
from torch.hub import get_dir, load_state_dict_from_url
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torchmetrics.functional.image.lpips import _LPIPS  # the public class takes no backbone weights
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.models import AlexNet_Weights

from vae import LATENT_SCALE, VAE

BATCH = 32         # pictures at a time through a network
FEATURES = 2048    # of Inception's last pooling, those of the published FIDs
LATENT_SIDE = 8    # latents are averaged down to 8 x 8: 256 dimensions at any resolution


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians with the means and covariances of a and b, both
    (N, D): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, eq. 6). It is
    biased upward, the more the fewer samples: compare equal N only."""
    # R of a QR decomposition has the covariance R^T R, so that the eigenvalues of C_a C_b are the
    # squared singular values of R_a R_b^T: a matrix of no more rows than there are samples.
    root_a, root_b = (np.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r") for x in (a, b))
    root_trace = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    means = np.square(a.mean(0) - b.mean(0)).sum()
    return float(means + np.square(root_a).sum() + np.square(root_b).sum() - 2 * root_trace)


def load_inception(file: Path) -> nn.Module:
    """FID's network, the Inception of 2015: 8-bit pictures (B, 3, H, W) -> (B, 2048)."""
    net = FrechetInceptionDistance(FEATURES, feature_extractor_weights_path=str(file)).inception
    net.num_features = FEATURES
    return net


def load_lpips(file: Path) -> nn.Module:
    """LPIPS (Zhang et al. 2018): its layers' weights from torchmetrics, on the file's AlexNet."""
    net = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    net.net.load_state_dict({name: tensors[f"features.{name.split('.', 1)[1]}"]
                             for name in net.net.state_dict()})
    return net.eval().requires_grad_(False)


class MetricNetworks:
    """The networks of FID and LPIPS, from files (ValueError for a wrong one) or fetched at first
    use. `missing`: metric -> why its network could not be fetched."""

    def __init__(self, inception_file: Path | None, lpips_file: Path | None, device: torch.device,
                 missing: Mapping[str, str] | None = None):
        """`missing`: metrics that another process could not fetch the networks of, to do without
        them too."""
        self.device = device
        self.missing = dict(missing or {})
        self.inception = self._load("FID", load_inception, inception_file, URL_INCEPTION_V3)
        self.lpips = self._load("LPIPS", load_lpips, lpips_file, AlexNet_Weights.IMAGENET1K_V1.url)

    def _load(self, metric: str, load: Callable[[Path], nn.Module], file: Path | None,
              url: str) -> nn.Module | None:
        if metric in self.missing:
            return None
        try:
            if file is None:
                load_state_dict_from_url(url, map_location="cpu", progress=False, check_hash=True,
                                         weights_only=True)
            path = file or Path(get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
            torch.load(path, map_location="cpu", weights_only=True)  # tensors and nothing else
            return load(path).to(self.device)
        except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError,
                AttributeError) as problem:
            if file:
                raise ValueError(f"expected the weights of {url}, {file} cannot be read or holds "
                                 f"others: {str(problem)[:150]}") from None
            reason = f"its network's weights could not be fetched ({problem})"
            self.missing[metric] = " ".join(reason.split())
            return None


class Reference:
    """Pictures (N, 3, H, W) in [0, 1] with which others are compared, in pairs and as a set."""

    @torch.no_grad()
    def __init__(self, pictures: Tensor, vae: VAE, networks: MetricNetworks):
        self.pictures, self.vae, self.networks = pictures, vae, networks
        self.latents = self._pooled_latents(pictures)
        self.fid = None
        if networks.inception:
            fid = FrechetInceptionDistance(networks.inception, reset_real_features=False)
            self.fid = fid.to(networks.device)
            self._update_fid(pictures, real=True)

    def _pooled_latents(self, pictures: Tensor) -> np.ndarray:
        """(N, 256): the means of the latents, in the UNet's scale, averaged down to 8 x 8."""
        like = next(self.vae.parameters())
        pooled = []
        for batch in pictures.split(BATCH):
            mean, _ = self.vae.encode(2 * batch.to(like) - 1)
            pooled.append(F.adaptive_avg_pool2d(LATENT_SCALE * mean.float(), LATENT_SIDE).cpu())
        return torch.cat(pooled).flatten(1).double().numpy()

    def _update_fid(self, pictures: Tensor, real: bool) -> None:
        for batch in pictures.split(BATCH):
            self.fid.update(batch.mul(255).round().byte().to(self.networks.device), real=real)

    @torch.no_grad()
    def compare(self, pictures: Tensor) -> dict[str, float]:
        """Mean SSIM, PSNR in dB (infinite for equal pictures) and LPIPS of the pairs; FID and
        latent distance of the two sets. A metric without its network is left out."""
        values: dict[str, list[Tensor]] = {"SSIM": [], "PSNR": [], "LPIPS": []}
        for a, b in zip(pictures.split(BATCH), self.pictures.split(BATCH), strict=True):
            # In float64: variances cancel on plain backgrounds, and in float32 the SSIM of equal
            # pictures would not be 1.
            values["SSIM"].append(image_metrics.structural_similarity_index_measure(
                a.double(), b.double(), data_range=1.0, reduction="none"))
            values["PSNR"].append(image_metrics.peak_signal_noise_ratio(
                a, b, data_range=1.0, dim=(1, 2, 3), reduction="none"))
            if self.networks.lpips:
                a, b = (2 * batch.to(self.networks.device) - 1 for batch in (a, b))
                values["LPIPS"].append(self.networks.lpips(a, b).cpu())
        means = {name: torch.cat(parts).mean().item() for name, parts in values.items() if parts}
        if self.fid:
            self.fid.reset()
            self._update_fid(pictures, real=False)
            means["FID"] = self.fid.compute().item()
        means["latent distance"] = frechet_distance(self._pooled_latents(pictures), self.latents)
        return means
