"""The denoiser of Stable Diffusion."""

from unet.config import SD15, SD21, TINY, UNetConfig, infer_config
from unet.model import Encoder, Features, UNet

__all__ = ["SD15", "SD21", "TINY", "Encoder", "Features", "UNet", "UNetConfig", "infer_config"]
