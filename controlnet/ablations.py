"""What makes a ControlNet work? The ControlNet paper's ablations (section 4.2, figure 8) and those of its discussion: one thing changed in each.

`python train.py --ablation NAME` trains them as it trains a ControlNet, without a teacher.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from controlnet import ControlNet
from controlnet.injection import differences
from controlnet.lite import Lite
from unet import UNet, UNetConfig
from unet.blocks import initialize
from unet.model import Features


class FinetunedEncoder(ControlNet):
    """No copy beside the SD encoder: the encoder itself is trained on the condition, and nothing else is left of a ControlNet than E(c).

    Its control is its own outputs less the frozen encoder's, so the decoder gets the trained encoder's instead of the frozen one's.
    """

    architecture = "finetune"
    connects_to = "encoder"

    def __init__(self, config: UNetConfig, paper_encoder: bool = False):
        super().__init__(config, paper_encoder=paper_encoder)
        del self.zero_convs, self.middle_block_out

    def forward(self, latents: Tensor, condition: Tensor, timesteps: Tensor, context: Tensor) -> Features:
        return self.encode(latents, timesteps, context, added={0: self.input_hint_block(condition)})

    def control(self, unet: UNet, features: Features, latents: Tensor, condition: Tensor, timesteps: Tensor) -> list[Tensor]:
        return differences(self(latents, condition, timesteps, features.context), features)


@torch.no_grad()
def without_zeros(net: ControlNet | Lite, generator: torch.Generator) -> ControlNet | Lite:
    """Ordinary Gaussian weights, N(0, 1 / fan_in), where zero convolutions were: the base model is disturbed from the first step."""
    for part in (net.zero_convs, getattr(net, "middle_block_out", nn.Identity()), net.input_hint_block[-1]):
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.copy_(layer.weight[0].numel() ** -0.5 * torch.randn(layer.weight.shape, generator=generator))  # drawn on the CPU
    return net


def gaussian(unet: UNet, generator: torch.Generator) -> ControlNet:
    """A ControlNet without zero convolutions. The paper: the trainable copy loses what it was pretrained on, and is no better than `lite`."""
    return without_zeros(ControlNet.from_unet(unet, generator=generator), generator)


def lite_encoder(unet: UNet, generator: torch.Generator) -> Lite:
    """A plain convolution a block, from scratch, connected to the SD encoder."""
    return without_zeros(initialize(Lite(unet.config, connects_to="encoder"), generator), generator)


def lite_decoder(unet: UNet, generator: torch.Generator) -> Lite:
    """The same connected to the decoder, without zero convolutions."""
    return without_zeros(initialize(Lite(unet.config), generator), generator)


def lite_decoder_zero(unet: UNet, generator: torch.Generator) -> Lite:
    """The same through zero convolutions. The paper: too weak to understand a condition that no prompt explains."""
    return initialize(Lite(unet.config), generator)


def finetune(unet: UNet, generator: torch.Generator) -> FinetunedEncoder:
    """The SD encoder itself learns the condition. Nothing is kept safe from the new data."""
    return FinetunedEncoder.from_unet(unet, generator=generator)


ABLATIONS: dict[str, Callable[[UNet, torch.Generator], nn.Module]] = {
    ablation.__name__: ablation for ablation in (gaussian, lite_encoder, lite_decoder, lite_decoder_zero, finetune)
}
