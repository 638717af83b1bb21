"""Control through the encoder: tensors are added inside the frozen SD encoder, and what that changes is the control.

A network that is connected this way says the same 13 tensors as any other, the differences that it made to the encoder's outputs, so
that losses, sampling, scale and guess mode need not know. The price: the encoder runs a second time, and in training the gradient has
to pass through it, where a decoder-connected network leaves it alone.
"""

from collections.abc import Mapping

from torch import Tensor

from unet import Encoder, UNetConfig
from unet.model import Features


def places(config: UNetConfig) -> dict[int, int]:
    """Block -> channels of its output, for the places where something is added: the first of each level, and the last before the middle.

    In Stable Diffusion {0: 320, 3: 320, 6: 640, 9: 1280, 11: 1280}, that is, before blocks 1, 4, 7, 10 and the middle.
    """
    blocks = config.encoder_blocks()
    firsts = [number for number, (level, _) in enumerate(blocks) if number == 0 or level > blocks[number - 1][0]]
    return {number: blocks[number][1] for number in [*firsts, len(blocks) - 1]}


def differences(changed: Features, features: Features) -> list[Tensor]:
    """13 tensors: what has to be added to the skip connections and the middle of `features` to make them those of `changed`."""
    return [a - b for a, b in zip([*changed.skips, changed.middle], [*features.skips, features.middle], strict=True)]


def control_through_encoder(encoder: Encoder, features: Features, latents: Tensor, timesteps: Tensor, added: Mapping[int, Tensor]) -> list[Tensor]:
    """13 tensors: the effect of `added` (block -> tensor, added to its output) on an encoder whose undisturbed outputs are `features`."""
    return differences(encoder.encode(latents, timesteps, features.context, added), features)
