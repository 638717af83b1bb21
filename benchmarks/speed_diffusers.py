"""The other side of `benchmarks.speed`: diffusers with our weights in it.

Steps and pictures are made as its StableDiffusionControlNetPipeline makes them, training steps as
its script train_controlnet.py takes them. Its own defaults: contiguous tensors, not channels-last.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from diffusers.utils import logging
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from controlnet import ControlNet, ControlNetwork
from kd.losses import layerwise_loss
from text import CLIPText
from text.tokenizer import Tokenizer
from unet import UNet
from vae import VAE
from weights import naming
from weights.convert import encoder_settings
from weights.for_diffusers import ControlNetForDiffusers

logging.set_verbosity_error()
logging.disable_progress_bar()
disable_progress_bar()
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def converted(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """diffusers' network with our network's parameters: the same tensors, if they have this dtype.
    A student, for which diffusers has no class, is itself, with diffusers' interface around it."""
    tensors = {name: tensor.to(dtype) for name, tensor in
               network.state_dict(keep_vars=True).items()}
    if isinstance(network, CLIPText):
        return text_encoder(network, tensors)
    if isinstance(network, ControlNetwork) and network.architecture != "controlnet":
        return ControlNetForDiffusers(network)
    with torch.device("meta"):
        if isinstance(network, ControlNet):
            model = ControlNetModel(**encoder_settings(network.config),
                                    conditioning_embedding_out_channels=(16, 32, 96, 256))
            tensors = naming.to_diffusers(tensors, network.config)
        elif isinstance(network, UNet):
            up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D"
                  for attention in reversed(network.config.attention)]
            model = UNet2DConditionModel(**encoder_settings(network.config), up_block_types=up)
            tensors = {naming.UNET + name: tensor for name, tensor in tensors.items()}
            tensors = convert_ldm_unet_checkpoint(tensors, model.config)
        else:
            model = autoencoder(network)
            tensors = convert_ldm_vae_checkpoint(tensors, model.config)
    learns = any(p.requires_grad for p in network.parameters())
    model.load_state_dict(tensors, assign=True)  # which makes them learn
    return model.requires_grad_(learns).eval()


def autoencoder(network: VAE) -> AutoencoderKL:
    config = network.config
    levels = len(config.channel_mult)
    return AutoencoderKL(
        block_out_channels=[mult * config.channels for mult in config.channel_mult],
        layers_per_block=config.num_res_blocks, latent_channels=config.latent_channels,
        down_block_types=["DownEncoderBlock2D"] * levels, norm_num_groups=config.groups,
        up_block_types=["UpDecoderBlock2D"] * levels)


def text_encoder(network: CLIPText, tensors: dict[str, Tensor]) -> CLIPTextModel:
    config = network.config
    model = CLIPTextModel(CLIPTextConfig(
        hidden_size=config.width, intermediate_size=4 * config.width,
        num_hidden_layers=config.layers, num_attention_heads=config.width // 64,
        hidden_act="quick_gelu"))
    tensors = {naming.TEXT + name: tensor for name, tensor in tensors.items()}
    tensors = convert_ldm_clip_checkpoint(naming.to_huggingface(tensors, config.layers))
    if not hasattr(model, "text_model"):  # since transformers 5.6 the model is its own child
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    like = next(iter(tensors.values()))
    model.to(like)  # its buffers too
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def pipeline(unet: nn.Module, vae: nn.Module, controlnet: nn.Module,
             **parts: object) -> StableDiffusionControlNetPipeline:
    """With DDIM, the sampler that both sides have. Without text encoder, unless `parts` has it."""
    scheduler = DDIMScheduler(**SCHEDULE, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    parts = {"text_encoder": None, "tokenizer": None} | parts
    whole = StableDiffusionControlNetPipeline(
        unet=unet, vae=vae, controlnet=controlnet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **parts)
    whole.set_progress_bar_config(disable=True)
    return whole


def save_folder(folder: Path, networks: list[nn.Module]) -> None:
    """UNet, autoencoder, text encoder and ControlNet, as `from_pretrained` loads them."""
    ours = Tokenizer()
    tokens = [*ours.tokens, "<|startoftext|>", "<|endoftext|>"]
    files = {"vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}),
             "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, ours.ranks)])}
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    unet, vae, text, controlnet = (converted(network, torch.float16) for network in networks)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)
    pipeline(unet, vae, controlnet, text_encoder=text, tokenizer=tokenizer).save_pretrained(folder)


def guided_step(unet: nn.Module, controlnet: nn.Module, latents: Tensor, timestep: Tensor,
                context: Tensor, condition: Tensor) -> Tensor:
    """A prediction for both halves of guidance, all of them twice as long as the pictures."""
    skips, middle = controlnet(
        latents, timestep, encoder_hidden_states=context, controlnet_cond=condition,
        conditioning_scale=1.0, guess_mode=False, return_dict=False)
    return unet(latents, timestep, encoder_hidden_states=context,
                down_block_additional_residuals=skips, mid_block_additional_residual=middle,
                return_dict=False)[0]


class Training:
    """A training step in the manner of diffusers' train_controlnet.py, which has no distillation:
    that is composed of the same calls, the UNet with the teacher's control and the UNet with the
    student's. `cached`: latents and text states are given, else computed in every step."""

    def __init__(self, networks: list[nn.Module], dtype: torch.dtype, device: torch.device,
                 cached: bool, layer_only: bool):
        self.unet, self.vae, self.text, self.net, self.teacher = networks
        self.dtype, self.device = dtype, device
        self.cached, self.layer_only = cached, layer_only
        self.scheduler = DDPMScheduler(**SCHEDULE)

    def backward(self, data: dict[str, Tensor]) -> None:
        if self.cached:
            mean, std = data["mean"], data["std"]
            context = data["context"].to(self.dtype)
        else:
            distribution = self.vae.encode(data["pixels"].to(self.dtype)).latent_dist
            mean, std = distribution.mean, distribution.std
            context = self.text(data["tokens"], return_dict=False)[0]
        latents = (mean + std * data["sampling_noise"]) * 0.18215
        noisy_latents = self.scheduler.add_noise(
            latents.float(), data["noise"].float(), data["timesteps"]).to(self.dtype)
        inputs = noisy_latents, data["timesteps"], context
        self.loss(inputs, data["condition"].to(self.dtype), data["noise"]).backward()

    def loss(self, inputs: tuple[Tensor, ...], condition: Tensor, target: Tensor) -> Tensor:
        control, losses = self.control(self.net, inputs, condition), []
        if self.teacher:
            with torch.no_grad():
                teachers_control = self.control(self.teacher, inputs, condition)
            losses.append(layerwise_loss(control, teachers_control))        # L_layer
        if not self.layer_only:
            prediction = self.predict(inputs, control)
            losses.append(F.mse_loss(prediction, target))                   # L_d
            if self.teacher:
                with torch.no_grad():
                    teachers_prediction = self.predict(inputs, teachers_control)
                losses.append(F.mse_loss(prediction, teachers_prediction))  # L_td
        return sum(losses)

    def control(self, net: nn.Module, inputs: tuple[Tensor, ...],
                condition: Tensor) -> list[Tensor]:
        """What learns is under autocast, as accelerate's `prepare` wraps it. In `dtype`."""
        latents, timesteps, context = inputs
        enabled = net is self.net and self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled):
            skips, middle = net(latents, timesteps, encoder_hidden_states=context,
                                controlnet_cond=condition, return_dict=False)
        return [output.to(self.dtype) for output in (*skips, middle)]

    def predict(self, inputs: tuple[Tensor, ...], control: list[Tensor]) -> Tensor:
        latents, timesteps, context = inputs
        return self.unet(latents, timesteps, encoder_hidden_states=context,
                         down_block_additional_residuals=control[:-1],
                         mid_block_additional_residual=control[-1], return_dict=False)[0].float()
