"""The established implementation of each network, with our weights in it: diffusers and
transformers, renamed by diffusers' own converters.

`tensors` is what a published file holds: names with their prefix (a ControlNet's may have none),
other networks' tensors may be among them. Everything loads strictly. """

import json
from collections.abc import Mapping
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from text import TextConfig
from text.tokenizer import Tokenizer
from unet import UNetConfig
from vae import VAEConfig
from weights import StableDiffusion


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _encoder_arguments(config: UNetConfig) -> dict:
    """What UNet2DConditionModel and ControlNetModel have in common. `attention_head_dim` is,
    despite its name, the number of heads."""
    widths = [mult * config.model_channels for mult in config.channel_mult]
    return {
        "block_out_channels":
        widths,
        "layers_per_block":
        config.num_res_blocks,
        "down_block_types":
        ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention],
        "attention_head_dim": [config.heads(width) for width in widths],
        "cross_attention_dim":
        config.context_dim,
        "use_linear_projection":
        config.linear_projections,
        "norm_num_groups":
        config.groups,
    }


def unet(config: UNetConfig, tensors: Mapping[str, Tensor]) -> UNet2DConditionModel:
    up = [
        "CrossAttnUpBlock2D" if attention else "UpBlock2D"
        for attention in reversed(config.attention)
    ]
    model = UNet2DConditionModel(**_encoder_arguments(config), up_block_types=up)
    model.load_state_dict(convert_ldm_unet_checkpoint(dict(tensors), model.config))
    return model.eval()


def controlnet(config: UNetConfig, tensors: Mapping[str, Tensor]) -> ControlNetModel:
    model = ControlNetModel(
        **_encoder_arguments(config), conditioning_embedding_out_channels=(16, 32, 96, 256))
    model.load_state_dict(convert_controlnet_checkpoint(dict(tensors), model.config))
    return model.eval()


def vae(config: VAEConfig, tensors: Mapping[str, Tensor]) -> AutoencoderKL:
    levels = len(config.channel_mult)
    model = AutoencoderKL(
        block_out_channels=[mult * config.channels for mult in config.channel_mult],
        layers_per_block=config.num_res_blocks,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
    )
    model.load_state_dict(convert_ldm_vae_checkpoint(dict(tensors), model.config))
    return model.eval()


def text_transformer(model: CLIPTextModel) -> nn.Module:
    """The module that owns `encoder` and `final_layer_norm`: CLIPTextModel itself since
    transformers 5.6, its child `text_model` before."""
    return getattr(model, "text_model", model)


def text(config: TextConfig, tensors: Mapping[str, Tensor]) -> CLIPTextModel:
    """All layers, also the last, which SD 2.x does not run; of ViT-H's 24, diffusers' converter
    itself leaves it out."""
    model = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=23 if config.openclip and config.layers == 24 else config.layers,
            num_attention_heads=config.width // 64,
            hidden_act="gelu" if config.openclip else "quick_gelu",
        )
    )
    renamed = convert_open_clip_checkpoint(
        model, dict(tensors)) if config.openclip else convert_ldm_clip_checkpoint(dict(tensors))
    # a table of 0, 1, 2, ... in published files
    renamed.pop("text_model.embeddings.position_ids", None)
    if not hasattr(model, "text_model"):
        renamed = {name.removeprefix("text_model."): tensor for name, tensor in renamed.items()}
    model.load_state_dict(renamed)
    return model.eval()


def tokenizer(folder: Path, openclip: bool) -> CLIPTokenizer:
    """CLIP's tokenizer as published with SD 1.x (pads with the end token) or SD 2.x (pads with "!",
    whose number is 0).

    Its two files are written into `folder` from the tokens and merges that our own tokenizer has:
    what is compared is what is made of them. """
    ours = Tokenizer()
    tokens = [*ours.tokens, "<|startoftext|>", "<|endoftext|>"]
    merges = map(" ".join, ours.ranks)
    (folder / "vocab.json").write_text(
        json.dumps({token: number
                    for number, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(
        str(folder), pad_token="!" if openclip else "<|endoftext|>", model_max_length=77)


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION = {"epsilon": "epsilon", "noise": "epsilon", "v": "v_prediction"}


def scheduler(prediction: str = "epsilon", spacing: str = "leading") -> DDIMScheduler:
    """DDIM with Stable Diffusion's published settings; with trailing spacing it ends without noise,
    as SD-Turbo's scheduler does."""
    return DDIMScheduler(
        **SCHEDULE,
        steps_offset=1,
        set_alpha_to_one=spacing == "trailing",
        clip_sample=False,
        timestep_spacing=spacing,
        prediction_type=PREDICTION[prediction],
    )


def euler(prediction: str = "epsilon") -> EulerDiscreteScheduler:
    """The scheduler that SD-Turbo is published with."""
    return EulerDiscreteScheduler(
        **SCHEDULE, timestep_spacing="trailing", prediction_type=PREDICTION[prediction])


def pipeline(sd: StableDiffusion, checkpoint: Path, controlnets: list[Path],
             scheduler) -> StableDiffusionControlNetPipeline:
    """diffusers' whole pipeline with the tensors of our files, which are in the original naming;
    `sd` is the same base as we load it."""
    tensors = load_file(checkpoint)
    text_encoder = text(sd.text.config, tensors)
    # as published for diffusers: without the last layer, so that the last hidden state is the
    # penultimate one
    if sd.text.config.openclip:
        transformer = text_transformer(text_encoder)
        transformer.encoder.layers = transformer.encoder.layers[: sd.text.config.layers - 1]
    nets = [controlnet(sd.unet.config, load_file(path)) for path in controlnets]
    whole = StableDiffusionControlNetPipeline(
        vae=vae(sd.vae.config, tensors),
        text_encoder=text_encoder,
        tokenizer=tokenizer(checkpoint.parent, sd.text.config.openclip),
        unet=unet(sd.unet.config, tensors),
        controlnet=nets if len(nets) > 1 else nets[0],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    whole.set_progress_bar_config(disable=True)
    return whole
