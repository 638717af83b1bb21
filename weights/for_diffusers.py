"""Control networks of this project in diffusers' pipelines.

    net = for_diffusers("runs/reduced_layer/controlnet.safetensors", unet)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(base, unet=unet, controlnet=net)

`unet` is diffusers' UNet2DConditionModel. A plain ControlNet needs no adapter: weights.convert
writes a folder for diffusers' own class. Only this file imports diffusers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import Tensor

from controlnet import ControlNetwork
from unet import UNet, UNetConfig
from vae import LATENT_CHANNELS
from weights.controlnet import ENCODER, load_controlnet
from weights.folder import ATTENTION, encoder_settings
from weights.naming import from_diffusers

COMMON = {  # to SD 1.x and 2.x; SDXL, inpainting and upscalers differ
    "in_channels": LATENT_CHANNELS, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1, "only_cross_attention": False, "addition_embed_type": None,
    "class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim": None,
}


def _require(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    lists = {name: list(value) for name, value in config.items() if isinstance(value, tuple)}
    wrong = [f"{name} is {config.get(name)}, not {value}" for name, value in expected.items()
             if {**config, **lists}.get(name) != value]
    if wrong:
        raise ValueError(f"expected a UNet of Stable Diffusion 1.x or 2.x, its {', '.join(wrong)}")


def unet_config(config: Mapping[str, Any]) -> UNetConfig:
    """Our config of diffusers' UNet2DConditionModel. Raises ValueError for neither 1.x nor 2.x."""
    if not isinstance(config, Mapping):
        raise ValueError("expected the configuration of diffusers' UNet2DConditionModel, got "
                         f"{type(config).__name__}")
    _require(config, COMMON)
    widths, blocks = config["block_out_channels"], config["layers_per_block"]
    heads = config["attention_head_dim"]  # despite its name, the number of heads
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    equal = len(set(heads)) == 1  # 1.x; in 2.x heads are of equal width
    ours = UNetConfig(
        model_channels=widths[0], channel_mult=tuple(width // widths[0] for width in widths),
        attention=tuple(kind == ATTENTION for kind in config["down_block_types"]),
        num_res_blocks=blocks if isinstance(blocks, int) else blocks[0],
        context_dim=config["cross_attention_dim"], groups=config["norm_num_groups"],
        num_heads=heads[0] if equal else None, head_dim=None if equal else widths[0] // heads[0],
        linear_projections=config["use_linear_projection"])
    _require({**config, "attention_head_dim": heads}, encoder_settings(ours))
    return ours


class ControlNetForDiffusers(ControlNetModel):
    """A control network as diffusers' ControlNetModel, a type that the pipelines check. Raises
    ValueError for one that is connected to the UNet's encoder."""

    def __init__(self, net: ControlNetwork):
        if net.connects_to == "encoder":
            raise ValueError(f"{net.architecture} needs the encoder, diffusers offers the decoder")
        super(ControlNetModel, self).__init__()  # the grandparent's: no layers of the parent
        self.register_to_config(global_pool_conditions=False)  # all that the pipelines read
        self.net = net

    def forward(self, sample: Tensor, timestep: Tensor | float | int, encoder_hidden_states: Tensor,
                controlnet_cond: Tensor, conditioning_scale: float = 1.0, class_labels=None,
                timestep_cond=None, attention_mask=None, added_cond_kwargs=None,
                cross_attention_kwargs=None, guess_mode: bool = False,
                return_dict: bool = True) -> ControlNetOutput | tuple[list[Tensor], Tensor]:
        """Latents (B, 4, H, W), timesteps () or (B,), text states (B, N, D), condition
        (B, 3, 8H, 8W) in [0, 1] -> tensors for skips and middle. Guess mode scales output i of 13
        by logspace(-1, 0, 13)[i]."""
        if attention_mask is not None or timestep_cond is not None:
            raise ValueError("expected no attention_mask and no timestep_cond")
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        control = self.net.control(sample, controlnet_cond, timesteps, encoder_hidden_states)
        scales = [1.0] * len(control)
        if guess_mode:
            scales = torch.logspace(-1, 0, len(control), device=sample.device)
        *skips, middle = [output * (scale * conditioning_scale)
                          for output, scale in zip(control, scales, strict=True)]
        return ControlNetOutput(skips, middle) if return_dict else (skips, middle)

    def save_pretrained(self, *args, **kwargs) -> None:
        raise ValueError("diffusers' format has no such network: keep its file, or weights.convert")


def for_diffusers(path: str | Path, unet: UNet2DConditionModel) -> ControlNetForDiffusers:
    """Load a control network for diffusers' UNet: frozen, in eval mode, in the UNet's dtype, on the
    CPU. Raises ValueError as `unet_config` and `load_controlnet` do."""
    with torch.device("meta"):
        base = UNet(unet_config(unet.config))
    # Only its shape is needed, and of a difference ControlNet's base the encoder.
    encoder = {name: tensor for name, tensor in from_diffusers(unet.state_dict()).items()
               if name.startswith(ENCODER)}
    base.load_state_dict(encoder, strict=False, assign=True)
    return ControlNetForDiffusers(load_controlnet(path, base, unet.dtype)).eval()
