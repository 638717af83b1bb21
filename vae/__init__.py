"""The autoencoder of Stable Diffusion."""

from vae.model import DOWNSCALE, LATENT_CHANNELS, LATENT_SCALE, SD_VAE, TINY_VAE, VAE, VAEConfig, infer_vae_config, sample_latents

__all__ = ["DOWNSCALE", "LATENT_CHANNELS", "LATENT_SCALE", "SD_VAE", "TINY_VAE", "VAE", "VAEConfig", "infer_vae_config", "sample_latents"]
