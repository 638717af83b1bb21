"""Control through the encoder: tensors are added inside the frozen SD encoder, and what that
changes in its outputs is the control.

So an encoder-connected network returns the same 13 tensors as any other, and losses, sampling,
scale and guess mode need not know. The price: the encoder runs a second time (but in sampling at
full strength, see `changed_features`), and in training the gradient passes through it, which a
decoder-connected network leaves alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from controlnet.network import ControlNetwork
from unet import Features, UNet, UNetConfig


def injection_points(config: UNetConfig) -> dict[int, int]:
    """Encoder blocks whose output something is added to -> its channels: the first block of each
    level, and the last before the middle.

    In Stable Diffusion {0: 320, 3: 320, 6: 640, 9: 1280, 11: 1280}: before blocks 1, 4, 7, 10 and
    the middle.
    """
    blocks = config.encoder_blocks()
    firsts = [i for i, (level, _) in enumerate(blocks) if i == 0 or level > blocks[i - 1][0]]
    return {i: blocks[i][1] for i in [*firsts, len(blocks) - 1]}


def encode_without_gradient(unet: UNet, latents: Tensor, timesteps: Tensor,
                            context: Tensor) -> Features:
    """The undisturbed encoder's outputs, for a caller that has not computed them already."""
    with torch.no_grad():
        return unet.encode(latents, timesteps, context)


def feature_differences(changed: Features, features: Features) -> list[Tensor]:
    """13 tensors: what must be added to the skip connections and the middle of `features` to make
    them those of `changed`."""
    pairs = zip([*changed.skips, changed.middle], [*features.skips, features.middle], strict=True)
    return [a - b for a, b in pairs]


def encode_with(injected: Sequence[Tensor], latents: Tensor, timesteps: Tensor, context: Tensor,
                unet: UNet) -> Features:
    """The SD encoder's outputs with `injected` added, one tensor for each injection point."""
    added = dict(zip(injection_points(unet.config), injected, strict=True))
    return unet.encode(latents, timesteps, context, added)


def control_through_encoder(net: ControlNetwork, latents: Tensor, condition: Tensor,
                            timesteps: Tensor, context: Tensor, unet: UNet,
                            features: Features | None = None) -> list[Tensor]:
    """13 tensors: the effect of a network on the UNet's encoder, whose undisturbed outputs are
    `features`, computed here if they are not given."""
    features = features or encode_without_gradient(unet, latents, timesteps, context)
    changed = net.changed_features(latents, condition, timesteps, context, unet)
    return feature_differences(changed, features)
