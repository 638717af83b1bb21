"""Floor 1: the denoiser of Stable Diffusion and its config, with the tensor names of the published
checkpoints. Nothing about control except where it is added, and nothing about files."""

from unet.config import SD15, SD21, TINY, UNetConfig, infer_config
from unet.model import Encoder, Features, UNet

__all__ = ["SD15", "SD21", "TINY", "Encoder", "Features", "UNet", "UNetConfig", "infer_config"]
