"""Students in diffusers: a control network trained here as the `controlnet` of diffusers' pipelines. The same call, the same pictures.

    from diffusers import StableDiffusionControlNetPipeline, UNet2DConditionModel
    from weights.for_diffusers import for_diffusers

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    net = for_diffusers("runs/reduced_layer/controlnet.safetensors", unet)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(base, unet=unet, controlnet=net)

A plain ControlNet does better without: `save_controlnet(path, net, naming="diffusers")` writes the tensors of diffusers' own
ControlNetModel, and `python -m weights.convert` a folder for its from_pretrained. This file is for the networks that diffusers has no
class for, and the only one that imports diffusers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import Tensor

from controlnet import ControlNet
from unet import UNet, UNetConfig
from weights.controlnet import load_controlnet

EXPECTED = {  # what the UNets of Stable Diffusion 1.x and 2.x have in common in diffusers' configuration. SDXL, inpainting and upscalers differ
    "in_channels": 4,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "transformer_layers_per_block": 1,
    "only_cross_attention": False,
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
}
ATTENTION = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}


def unet_config(config: Mapping[str, Any]) -> UNetConfig:
    """Our config from that of diffusers' UNet2DConditionModel. Raises ValueError for what is not Stable Diffusion 1.x or 2.x.

    `attention_head_dim` is, despite its name, the number of heads: 8 at every level (1.x), or 5, 10, 20, 20, heads of width 64 (2.x).
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"expected the configuration of diffusers' UNet2DConditionModel, got {type(config).__name__}")
    wrong = [f"{name} is {config.get(name)}, not {value}" for name, value in EXPECTED.items() if config.get(name) != value]
    if not wrong:
        widths, kinds, blocks, heads = (config[n] for n in ("block_out_channels", "down_block_types", "layers_per_block", "attention_head_dim"))
        heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
        head_dims = {width // number for width, number in zip(widths, heads, strict=True)}
        if not set(kinds) <= ATTENTION.keys():
            wrong.append(f"down_block_types is {kinds}")
        if any(width % widths[0] for width in widths):
            wrong.append(f"block_out_channels is {widths}, not multiples of the first")
        if not isinstance(blocks, int):
            wrong.append(f"layers_per_block is {blocks}, not one number")
        if len(set(heads)) > 1 and len(head_dims) > 1:
            wrong.append(f"attention_head_dim is {heads}, neither one number of heads nor heads of one width")
    if wrong:
        raise ValueError(f"expected a UNet of Stable Diffusion 1.x or 2.x, got one whose {', '.join(wrong)}")
    return UNetConfig(
        model_channels=widths[0],
        channel_mult=tuple(width // widths[0] for width in widths),
        attention=tuple(ATTENTION[kind] for kind in kinds),
        num_res_blocks=blocks,
        context_dim=config["cross_attention_dim"],
        num_heads=heads[0] if len(set(heads)) == 1 else None,
        head_dim=None if len(set(heads)) == 1 else head_dims.pop(),
        linear_projections=config["use_linear_projection"],
        groups=config["norm_num_groups"],
    )


class ControlNetForDiffusers(ControlNetModel):
    """A control network of ours behind the interface of diffusers' ControlNetModel, and by its type one, because the pipelines ask for that.

    Raises ValueError for a network that injects into the UNet's encoder: diffusers' UNet takes control in its decoder only.
    """

    def __init__(self, net: ControlNet):
        if net.connects_to == "encoder":
            raise ValueError(f"expected a network that controls the UNet's decoder, {net.architecture} needs its encoder too, which diffusers does not offer")
        super(ControlNetModel, self).__init__()  # the parent's parent: none of the parent's layers
        self.register_to_config(global_pool_conditions=False)  # all that the pipelines read
        self.net = net

    def forward(
        self,
        sample: Tensor,                     # (B, 4, H, W)
        timestep: Tensor | float | int,     # one, or (B,)
        encoder_hidden_states: Tensor,      # (B, N, D)
        controlnet_cond: Tensor,            # (B, 3, 8H, 8W) in [0, 1]
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[list[Tensor], Tensor]:
        """The tensors for the skip connections, and the one for the middle. Arguments and results are the parent's; what is None means
        nothing to a ControlNet of Stable Diffusion.

        Guess mode weakens the control towards the finest level: output i of 13 is scaled by logspace(-1, 0, 13)[i].
        """
        if attention_mask is not None or timestep_cond is not None:
            raise ValueError("expected neither attention_mask nor timestep_cond: a control network of this project takes none")
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        control = self.net.control(sample, controlnet_cond, timesteps, encoder_hidden_states)
        scales = torch.logspace(-1, 0, len(control), device=sample.device) if guess_mode else [1.0] * len(control)
        *skips, middle = [c * (scale * conditioning_scale) for c, scale in zip(control, scales, strict=True)]
        return ControlNetOutput(skips, middle) if return_dict else (skips, middle)

    def save_pretrained(self, *args, **kwargs) -> None:
        raise ValueError("diffusers has no format for this network: keep its own file, or write a plain ControlNet with save_controlnet, naming='diffusers'")


def for_diffusers(path: str | Path, unet: UNet2DConditionModel) -> ControlNetForDiffusers:
    """Load a ControlNet or a student for diffusers' UNet: frozen, in eval mode, in the UNet's dtype, on the CPU until the pipeline moves it.

    Raises ValueError for a UNet that is not Stable Diffusion 1.x or 2.x, and as `load_controlnet` does.
    """
    with torch.device("meta"):
        base = UNet(unet_config(unet.config))  # only its shape is needed
    return ControlNetForDiffusers(load_controlnet(path, base, unet.dtype)).eval()
