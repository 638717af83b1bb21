"""Stable Diffusion in one file, in the original naming with a prefix for each network."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion import Sampling
from text import CLIPText, TextConfig, infer_text_config
from unet import UNet, infer_config
from vae import VAE, infer_vae_config
from weights import naming
from weights.base_settings import (
    PREDICTIONS,
    TURBO,
    check_settings,
    settings_of,
    why_turbo,
    with_settings,
)
from weights.files import (
    cast,
    check_tensors,
    fill,
    read_safetensors,
    read_tensors,
    shapes_of,
    strip_prefix,
    without_weights,
    write_tensors,
)
from weights.folder import part_files, read_folder
from weights.kinds import STABLE_DIFFUSION, WHOLE, kind_of
from weights.naming import TEXT, TEXT_1X, UNET

IGNORED = {  # what published files hold besides weights: the schedule's tables, and unused CLIP
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "denoiser.sigmas",
    "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "logvar", "posterior_variance", "posterior_mean_coef1",
    "posterior_mean_coef2", "posterior_log_variance_clipped", "scale_factor",
    TEXT_1X + "text_model.embeddings.position_ids", TEXT + "logit_scale", TEXT + "text_projection",
    TEXT_1X + "logit_scale", TEXT_1X + "text_projection.weight", "v_pred",
    TEXT + "model.logit_scale", TEXT + "model.text_projection", TEXT + "model.attn_mask",
}
IGNORED_PREFIXES = (  # averaged copies, parts of training, a ControlNet
    "model_ema.", naming.VAE + "model_ema.", naming.VAE + "loss.", "embedding_manager.",
    naming.CONTROL)


@dataclass
class StableDiffusion:
    """The three networks of a base model, and the settings it is used with."""

    unet: UNet
    vae: VAE
    text: CLIPText
    sampling: Sampling = Sampling()
    lr: float = 1e-5  # what the ControlNet project trains with
    resolution: int = 512

    def to(self, device: torch.device | str) -> "StableDiffusion":
        for network in (self.unet, self.vae, self.text):
            network.to(device)
        return self

    def sampled(self, steps: int) -> "StableDiffusion":
        """The same networks, sampled with another number of steps."""
        return replace(self, sampling=replace(self.sampling, steps=steps))


def read_stable_diffusion(path: str | Path, vae: str | Path | None = None) -> tuple[
        dict[str, Tensor], dict[str, str]]:
    """A base model's tensors in the original naming, and metadata, of a file or diffusers' folder.
    `vae`: take the autoencoder from there. Raises ValueError for others, or without all parts."""
    path = Path(path)
    tensors, metadata = read_folder(path) if path.is_dir() else read_tensors(path)
    if (kind := kind_of(tensors)) not in (STABLE_DIFFUSION, WHOLE):
        raise ValueError("expected Stable Diffusion 1.x or 2.x in one file, original naming; "
                         f"{path} is {kind}")
    if "ztsnr" in tensors:
        raise ValueError(f"{path} was trained with zero terminal SNR, which is not supported")
    if "v_pred" in tensors:  # a marker without values
        metadata = {"modelspec.prediction_type": "v"} | metadata
    if why := why_turbo(path, tensors, metadata):
        warnings.warn(f"{path} is taken for SD-Turbo by {why}: 1 step unless --sample-steps says "
                      "more, no guidance, trailing timesteps", stacklevel=3)
        metadata = with_settings(metadata, TURBO)
    tensors = naming.rename(tensors, naming.OTHER_PREFIXES)
    tensors = {name: tensor for name, tensor in tensors.items()
               if name not in IGNORED and not name.startswith(IGNORED_PREFIXES)}
    own = strip_prefix(tensors, naming.VAE)
    autoencoder = read_vae(Path(vae)) if vae else naming.vae_from_others(own)
    tensors = {name: tensor for name, tensor in tensors.items()
               if not name.startswith(naming.VAE)}
    tensors |= {naming.VAE + name: tensor for name, tensor in autoencoder.items()}
    if not autoencoder:
        raise ValueError(f"{path} has no autoencoder (VAE): name the file of one with --vae, or "
                         "put it in with python -m weights.convert IN OUT --vae FILE")
    if not strip_prefix(tensors, TEXT):
        raise ValueError(f"{path} has no text encoder: expected a whole checkpoint")
    return tensors, metadata


def read_vae(path: Path) -> dict[str, Tensor]:
    """The autoencoder in a file or folder of its own, or in a whole model: its tensors in the
    original naming, without prefix. Raises ValueError if it has none."""
    tensors = {}
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        for file in part_files(folder, "diffusion_pytorch_model"):
            tensors |= read_safetensors(file)[0]
    else:
        tensors = read_tensors(path)[0]
    tensors = naming.vae_from_others(strip_prefix(tensors, naming.VAE) or tensors)
    if "decoder.conv_in.weight" not in tensors or "post_quant_conv.weight" not in tensors:
        raise ValueError(f"expected an autoencoder (VAE), {path} is {kind_of(tensors)}")
    return {name: tensor for name, tensor in tensors.items()
            if not name.startswith(("loss.", "model_ema."))}


def load_stable_diffusion(path: str | Path, dtype: torch.dtype = torch.float32,
                          given: Mapping[str, object] | None = None,
                          vae: str | Path | None = None) -> StableDiffusion:
    """Load a base model: frozen, in eval mode, in `dtype`, on the CPU; the autoencoder in float32,
    which costs little: a picture passes through it once.

    Shapes show the architecture; metadata has what they do not, unless it is Stable Diffusion's.
    `given`: fields of `Sampling` that count more than the file's own. A warning for 2.x, if nothing
    says which it is: the one for 768 pixels predicts v, and Turbo takes few steps. `vae`: a file to
    take the autoencoder from. Raises ValueError if the file is not such a model.
    """
    tensors, metadata = read_stable_diffusion(path, vae)
    return assemble(path, tensors, metadata, dtype, given)


def assemble(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str],
             dtype: torch.dtype = torch.float32,
             given: Mapping[str, object] | None = None) -> StableDiffusion:
    """The base model of what `read_stable_diffusion` returned for `path`."""
    try:
        settings = settings_of(metadata)
        networks = _empty_networks(tensors, settings)
        check_settings(settings)
    except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError,
            AssertionError) as problem:
        raise ValueError(f"{path} is no whole Stable Diffusion checkpoint, or its metadata is "
                         f"wrong: {problem}") from None

    text_config = networks[TEXT].config
    tensors = naming.from_huggingface(tensors, text_config.layers)
    check_tensors(_prefixed(networks), tensors, path)
    for prefix, network in networks.items():
        own_dtype = torch.float32 if prefix == naming.VAE else dtype
        fill(network, strip_prefix(tensors, prefix), own_dtype)

    settings |= given or {}
    if "prediction" not in settings and text_config.openclip:
        warnings.warn(f"{path} has the shape of Stable Diffusion 2.x and no prediction type: "
                      "epsilon is assumed; 2.1 for 768 pixels needs --prediction v, SD-Turbo "
                      "--sample-steps 1 --guidance 0 --spacing trailing (python -m weights.convert "
                      "--set writes them into a file)", stacklevel=3)
    settings["prediction"] = PREDICTIONS[settings.get("prediction", "epsilon")]
    if settings["prediction"] == "v" and text_config.openclip:
        settings.setdefault("resolution", 768)
    sampling = {f.name: settings.pop(f.name) for f in fields(Sampling) if f.name in settings}
    return StableDiffusion(*networks.values(), Sampling(**sampling), **settings)


def in_original_naming(tensors: dict[str, Tensor], text: TextConfig) -> dict[str, Tensor]:
    """A base model's tensors under the names of the original files: open_clip's for 2.x."""
    named = naming.from_huggingface(tensors, text.layers)
    return named if text.openclip else naming.to_huggingface(named, text.layers)


def _empty_networks(tensors: dict[str, Tensor], settings: dict) -> dict[str, nn.Module]:
    """Prefix -> network on the meta device. Takes what shapes do not show out of `settings`."""
    shapes = shapes_of(tensors)
    unet = infer_config(strip_prefix(shapes, UNET), settings.pop("groups", 32),
                        settings.pop("num_heads", None), settings.pop("head_dim", None))
    vae = infer_vae_config(strip_prefix(shapes, naming.VAE), settings.pop("vae_groups", 32))
    text = infer_text_config(strip_prefix(shapes, TEXT), openclip=unet.linear_projections)
    with without_weights():
        return {UNET: UNet(unet), naming.VAE: VAE(vae), TEXT: CLIPText(text)}


def _prefixed(networks: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of all networks with their prefixes."""
    return {prefix + name: tensor for prefix, network in networks.items()
            for name, tensor in network.state_dict().items()}


def save_stable_diffusion(path: str | Path, sd: StableDiffusion,
                          dtype: torch.dtype = torch.float16) -> None:
    """Write a base model as one safetensors file in the original naming. Raises OSError."""
    tensors = _prefixed({UNET: sd.unet, naming.VAE: sd.vae, TEXT: sd.text})
    tensors = in_original_naming(tensors, sd.text.config)
    config = sd.unet.config
    settings = {"groups": config.groups, "num_heads": config.num_heads,
                "head_dim": config.head_dim, "vae_groups": sd.vae.config.groups}
    settings |= asdict(sd.sampling) | {"lr": sd.lr, "resolution": sd.resolution}
    settings["prediction"] = "v" if sd.sampling.prediction == "v" else "noise"
    write_tensors(path, cast(tensors, dtype, path), {
        "format": "pt", "stable_diffusion": json.dumps(settings)})
