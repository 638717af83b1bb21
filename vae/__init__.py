"""Floor 1: the autoencoder of Stable Diffusion, pixels <-> latents, with the tensor names of the
published checkpoints. Nothing about noise, and nothing about files."""

from vae.config import DOWNSCALE, LATENT_CHANNELS, SD_VAE, TINY_VAE, VAEConfig, infer_vae_config
from vae.model import LATENT_SCALE, VAE, sample_latents

__all__ = ["DOWNSCALE", "LATENT_CHANNELS", "LATENT_SCALE", "SD_VAE", "TINY_VAE", "VAE", "VAEConfig",
           "infer_vae_config", "sample_latents"]
