"""One prediction of the UNet under a control network."""

from typing import NamedTuple

from torch import Tensor, nn

from controlnet.network import ControlNetwork
from unet import Features, UNet


class Prediction(NamedTuple):
    """What a control network makes of noisy latents."""

    control: list[Tensor | None]  # its 13 outputs
    noise_pred: Tensor | None     # what the UNet predicts under them, (B, 4, H, W) in float32


class ControlledUNet(nn.Module):
    """A UNet and a control network as one module: what DistributedDataParallel can wrap.

    Its parameters are those that may learn, the control network's and `unlockable`: the SD decoder,
    or with `whole` all of the UNet. An encoder that never learns is kept out of them: it must not
    be sent to every process.
    """

    def __init__(self, unet: UNet, net: ControlNetwork, whole: bool = False):
        super().__init__()
        self.net = net
        self.unlockable = unet if whole else nn.ModuleList([unet.output_blocks, unet.out])
        self._unet = (unet,)  # in a tuple, which nn.Module does not look into

    def forward(self, noisy_latents: Tensor, condition: Tensor, timesteps: Tensor, context: Tensor,
                features: Features | None = None, decodes: bool = True) -> Prediction:
        """Noisy latents (B, 4, H, W), condition (B, 3, 8H, 8W) in [0, 1], timesteps (B,), text
        states (B, N, D). `features`: what the UNet's `encode` returned for them; computed here if
        not given, with gradient where the encoder learns. Without `decodes` only the control is
        computed."""
        unet, = self._unet
        if features is None and decodes:
            features = unet.encode(noisy_latents, timesteps, context)
        control = self.net.control(noisy_latents, condition, timesteps, context, unet, features)
        if not decodes:
            return Prediction(control, None)
        # Also through a frozen decoder the gradient has to pass, to reach the control.
        return Prediction(control, unet.decode(features, control).float())
