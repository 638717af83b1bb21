"""Floor 2: ControlNet. A frozen denoiser, a trainable copy of its encoder, and the zero
convolutions between them; the interface of everything that controls; sampling under control; the
ablations of the ControlNet paper. Nothing about teachers and students."""

from controlnet.controlled import ControlledUNet, Prediction
from controlnet.model import ControlNet
from controlnet.network import ControlNetwork
from controlnet.zero_convolution import zero_convolution

__all__ = ["ControlNet", "ControlNetwork", "ControlledUNet", "Prediction", "zero_convolution"]
