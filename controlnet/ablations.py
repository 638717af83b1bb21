"""What makes a ControlNet work? The ControlNet paper's ablations (section 4.2, figure 8) and those
of its discussion: one thing changed in each.

`python train.py --ablation NAME` trains one; what each lost is in docs/experiments.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from controlnet import ABLATIONS
from controlnet.injection import control_through_encoder
from controlnet.lite import Lite
from controlnet.model import ControlNet
from controlnet.network import ControlNetwork
from unet import Features, UNet, UNetConfig
from unet.blocks import initialize, timestep_embedding


class FinetunedEncoder(ControlNet):
    """No copy beside the SD encoder: the encoder itself is trained on the condition, and of the
    additions only E(c) is left.

    Its control is its own outputs less the frozen encoder's, so the decoder gets the trained
    encoder's outputs in place of the frozen one's.
    """

    connects_to = "encoder"

    def __init__(self, config: UNetConfig, paper_encoder: bool = False,
                 architecture: str = "finetune"):
        super().__init__(config, paper_encoder=paper_encoder, architecture=architecture)
        del self.zero_convs, self.middle_block_out

    def forward(self, latents: Tensor, condition: Tensor, timesteps: Tensor,
                context: Tensor) -> Features:
        hint = self.hint(condition, latents)
        return self.encode(latents, timesteps, context, added={0: hint})

    def control(self, latents: Tensor, condition: Tensor, timesteps: Tensor, context: Tensor,
                unet: UNet | None = None, features: Features | None = None) -> list[Tensor]:
        return control_through_encoder(self, latents, condition, timesteps, context, unet, features)

    def changed_features(self, latents: Tensor, condition: Tensor, timesteps: Tensor,
                         context: Tensor, unet: UNet) -> Features:
        changed = self(latents, condition, timesteps, context)
        # The decoder keeps the embedding of the timestep that it was trained with, the base's own.
        sinusoids = timestep_embedding(timesteps, unet.config.model_channels).to(latents.dtype)
        return changed._replace(time=unet.time_embed(sinusoids))


@torch.no_grad()
def without_zeros(net: ControlNet | Lite, generator: torch.Generator) -> ControlNet | Lite:
    """Ordinary Gaussian weights, N(0, 1 / fan_in), in place of the zero convolutions: the base
    model is disturbed from the first step. Returns the network."""
    middle = getattr(net, "middle_block_out", nn.Identity())
    for part in (net.zero_convs, middle, net.input_hint_block[-1]):
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d):
                std = layer.weight[0].numel() ** -0.5
                noise = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(std * noise)
    return net


def gaussian(unet: UNet, generator: torch.Generator) -> ControlNet:
    """A ControlNet without zero convolutions. The paper: the trainable copy loses what it was
    pretrained on, and is no better than plain convolutions."""
    return without_zeros(ControlNet.from_unet(unet, generator=generator), generator)


def lite_encoder(unet: UNet, generator: torch.Generator) -> Lite:
    """A plain convolution per block, from scratch, connected to the SD encoder."""
    net = initialize(Lite(unet.config, connects_to="encoder"), generator)
    return without_zeros(net, generator)


def lite_decoder(unet: UNet, generator: torch.Generator) -> Lite:
    """The same connected to the decoder, without zero convolutions."""
    return without_zeros(initialize(Lite(unet.config), generator), generator)


def lite_decoder_zero(unet: UNet, generator: torch.Generator) -> Lite:
    """The same through zero convolutions. The paper: too weak to understand a condition that no
    prompt explains."""
    return initialize(Lite(unet.config), generator)


def finetune(unet: UNet, generator: torch.Generator) -> FinetunedEncoder:
    """The SD encoder itself learns the condition. Nothing protects it from the new data. With
    --mode large all of the original model does, the decoder too, by E(c) alone."""
    return FinetunedEncoder.from_unet(unet, generator=generator, architecture="finetune")


# The functions above by their names.
BUILDERS: dict[str, Callable[[UNet, torch.Generator], ControlNetwork]] = {
    name: globals()[name] for name in ABLATIONS
}
