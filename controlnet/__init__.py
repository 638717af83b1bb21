"""ControlNet: a frozen denoiser, a trainable copy of its encoder, and the zero convolutions between them."""

from controlnet.model import ControlNet
from controlnet.zero_convolution import zero_convolution

__all__ = ["ControlNet", "zero_convolution"]
