"""One prediction of the frozen UNet under a control network."""

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

    Its parameters are those that may learn, the control network's and the SD decoder's. The encoder
    is kept out of them: it never learns, so it must not be sent to every process.
    """

    def __init__(self, unet: UNet, net: ControlNetwork):
        super().__init__()
        self.net = net
        self.decoder = nn.ModuleList([unet.output_blocks, unet.out])
        self._unet = (unet,)  # in a tuple, which nn.Module does not look into

    def forward(self, noisy_latents: Tensor, condition: Tensor, timesteps: Tensor, context: Tensor,
                features: Features | None) -> Prediction:
        """Noisy latents (B, 4, H, W), condition (B, 3, 8H, 8W) in [0, 1], timesteps (B,), text
        states (B, N, D). `features`: what `unet.encode` returned for them. Without, there is
        nothing to decode: only the control is computed."""
        unet, = self._unet
        control = self.net.control(noisy_latents, condition, timesteps, context, unet, features)
        if features is None:
            return Prediction(control, None)
        # The decoder is frozen, but the gradient has to pass through it to reach the control.
        return Prediction(control, unet.decode(features, control).float())
