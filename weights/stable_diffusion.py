"""Stable Diffusion in one file, in the original naming: a prefix each for the denoiser, the autoencoder and the text encoder."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from text.clip import CLIPText, from_huggingface, infer_text_config, to_huggingface
from unet import UNet, infer_config
from vae import VAE, infer_vae_config
from weights.files import fill, mismatches, raise_if, read_tensors, shapes_of, strip_prefix, write_tensors
from weights.kinds import STABLE_DIFFUSION, UNET, WHOLE, kind_of

VAE_PREFIX, TEXT = "first_stage_model.", "cond_stage_model."
TEXT_1X = TEXT + "transformer."  # Hugging Face's names follow
OTHER_PREFIXES = {  # prefixes of other programs -> Stable Diffusion's own
    "conditioner.embedders.0.model.": TEXT + "model.",             # SD-Turbo, written by Stability's later code
    TEXT_1X + "embeddings.": TEXT_1X + "text_model.embeddings.",   # community models of 1.x, merged by early tools
    TEXT_1X + "encoder.": TEXT_1X + "text_model.encoder.",
    TEXT_1X + "final_layer_norm.": TEXT_1X + "text_model.final_layer_norm.",
}  # fmt: skip

# What published files hold besides weights: the schedule's tables (computed in diffusion.py), averaged copies, the autoencoder's
# training loss, and CLIP's parts that Stable Diffusion does not run.
IGNORED_NAMES = {
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2", "logvar", "scale_factor", "denoiser.sigmas",
    TEXT_1X + "text_model.embeddings.position_ids", TEXT + "logit_scale", TEXT + "text_projection", TEXT + "model.text_projection",
    TEXT + "model.logit_scale", TEXT + "model.attn_mask",
}  # fmt: skip
IGNORED_PREFIXES = ("model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.", "embedding_manager.", "control_model.")


SETTINGS = {  # what a file may say about using it, each with its check
    "prediction": lambda value: value in ("noise", "v"),
    "guidance": lambda value: isinstance(value, (int, float)) and value >= 0,
    "lr": lambda value: isinstance(value, (int, float)) and value > 0,
    "resolution": lambda value: isinstance(value, int) and value > 0 and value % 8 == 0,
}


@dataclass
class StableDiffusion:
    """The three networks of a base model, and what its file says about using them."""

    unet: UNet
    vae: VAE
    text: CLIPText
    prediction: str = "noise"  # or "v" (SD 2.1 at 768)
    guidance: float = 9.0      # what the ControlNet project samples with
    lr: float = 1e-5           # what the ControlNet project trains with
    resolution: int = 512

    def to(self, device: torch.device | str) -> "StableDiffusion":
        for network in (self.unet, self.vae, self.text):
            network.to(device)
        return self


def load_stable_diffusion(path: str | Path, dtype: torch.dtype = torch.float32, prediction: str | None = None) -> StableDiffusion:
    """Load a base model, frozen, in eval mode. Half-precision files are converted to `dtype`; in the file's own dtype nothing is copied.

    The architecture (1.x or 2.x, widths, levels) is inferred from the shapes; what shapes do not tell (number of groups, heads,
    recommended guidance, learning rate, resolution, prediction) is read from the file's metadata if it is not Stable Diffusion's own.
    `prediction`: "noise" or "v". None: what the metadata says, else noise, with a warning for 2.x, whose 768-pixel model predicts v.
    Raises ValueError with what the file is instead, or with every missing, unexpected or wrongly shaped tensor.
    """
    if Path(path).is_dir():
        raise ValueError(f"expected Stable Diffusion in one file, {path} is a folder")
    tensors, metadata = read_tensors(path)
    if (kind := kind_of(shapes_of(tensors))) not in (STABLE_DIFFUSION, WHOLE):
        raise ValueError(f"expected Stable Diffusion 1.x or 2.x in one file, original naming; {path} is {kind}")
    tensors = {original_name(name): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in IGNORED_NAMES and not name.startswith(IGNORED_PREFIXES)}
    try:
        told = json.loads(metadata.get("stable_diffusion", "{}"))
        parts = {prefix: strip_prefix(tensors, prefix) for prefix in (UNET, VAE_PREFIX, TEXT)}
        config = infer_config(shapes_of(parts[UNET]), told.pop("groups", 32), told.pop("num_heads", None), told.pop("head_dim", None))
        vae_config = infer_vae_config(shapes_of(parts[VAE_PREFIX]), told.pop("vae_groups", 32))
        text_config = infer_text_config(shapes_of(parts[TEXT]))
        if unknown := told.keys() - SETTINGS.keys():
            raise ValueError(f"unknown settings {sorted(unknown)}")
        if wrong := {name: value for name, value in told.items() if not SETTINGS[name](value)}:
            raise ValueError(f"unusable settings {wrong}")
        with torch.device("meta"):
            networks = {UNET: UNet(config), VAE_PREFIX: VAE(vae_config), TEXT: CLIPText(text_config)}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError, AssertionError) as problem:
        raise ValueError(f"{path} is no whole Stable Diffusion checkpoint, or its metadata is wrong: {problem}") from None
    if not text_config.openclip:
        parts[TEXT] = from_huggingface({name.removeprefix("transformer."): tensor for name, tensor in parts[TEXT].items()})

    problems = [f"unexpected {name} {list(tensor.shape)}" for name, tensor in tensors.items() if not name.startswith((UNET, VAE_PREFIX, TEXT))]
    for prefix, network in networks.items():
        problems += mismatches(network, parts[prefix], prefix)
    raise_if(problems, path)
    for prefix, network in networks.items():
        fill(network, parts[prefix], dtype)
    if prediction is None and "prediction" not in told and text_config.openclip:
        warnings.warn(
            f"{path} has the shape of Stable Diffusion 2.x and does not say what it predicts: noise is assumed (2.1-base, SD-Turbo); "
            "2.1 at 768 pixels needs --prediction v",
            stacklevel=2,
        )
    told["prediction"] = prediction or told.get("prediction", "noise")
    if told["prediction"] == "v":
        told.setdefault("resolution", 768)
    return StableDiffusion(networks[UNET], networks[VAE_PREFIX], networks[TEXT], **told)


def original_name(name: str) -> str:
    """A tensor's name with Stable Diffusion's own prefix in place of another program's."""
    prefix = next((prefix for prefix in OTHER_PREFIXES if name.startswith(prefix)), "")
    return OTHER_PREFIXES.get(prefix, "") + name[len(prefix):]


def save_stable_diffusion(path: str | Path, sd: StableDiffusion, dtype: torch.dtype = torch.float16) -> None:
    """Write a base model as one safetensors file in the original naming."""
    text = sd.text.state_dict()
    if not sd.text.config.openclip:
        text = {"transformer." + name: tensor for name, tensor in to_huggingface(text, sd.text.config.layers).items()}
    tensors = {
        prefix + name: tensor.to(dtype)
        for prefix, state in ((UNET, sd.unet.state_dict()), (VAE_PREFIX, sd.vae.state_dict()), (TEXT, text))
        for name, tensor in state.items()
    }
    told = {"groups": sd.unet.config.groups, "num_heads": sd.unet.config.num_heads, "head_dim": sd.unet.config.head_dim, "vae_groups": sd.vae.config.groups}
    told |= {name: getattr(sd, name) for name in SETTINGS}
    write_tensors(path, tensors, {"format": "pt", "stable_diffusion": json.dumps(told)})
