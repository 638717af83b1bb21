"""What everything that controls Stable Diffusion has in common: read this to add a student."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from unet import Features, UNet, UNetConfig
from vae import DOWNSCALE


class ControlNetwork(nn.Module, ABC):
    """The base class of the ControlNet, of every student and of every ablation.

    Training, sampling, files and evaluation use a network through these names:

    config        its own numbers; written into its file
    target        the numbers of the UNet that it controls (the same for a ControlNet)
    architecture  its name, by which its file is loaded again; set by the constructor
    connects_to   "decoder": its outputs are added to the UNet's skip connections and middle.
                  "encoder": it changes the UNet's encoder, which has to run a second time

    A new student is a subclass with a `control`, and a function of the base's config in
    `kd/students.py`. Its E(c) is `input_hint_block`. It should start exactly at the base model
    (y_c = y): let every output pass through a `zero_convolution`. `tests/test_claims.py` checks
    that for every student. The rest is
    optional: small mode (`zero_convs` for the skip connections, None for their outputs when
    `only_middle`), `set_checkpointing`, `for_inference`.
    """

    config: UNetConfig
    target: UNetConfig
    architecture: str
    connects_to = "decoder"
    only_middle = False

    def hint(self, condition: Tensor, latents: Tensor) -> Tensor:
        """E(c), (B, C, H, W), of a condition (B, 3, 8H, 8W) in [0, 1]; `condition` itself if it has
        the size of the latents: then it is E(c) already, which sampling computes once a picture.

        Raises ValueError for any other size."""
        height, width = latents.shape[-2:]
        if condition.shape[-2:] == (height, width):
            return condition
        if condition.shape[-2:] != (DOWNSCALE * height, DOWNSCALE * width):
            raise ValueError(f"expected a condition {DOWNSCALE} times as large as the latents "
                             f"({height}, {width}), got {tuple(condition.shape[-2:])}")
        return self.input_hint_block(condition)

    @abstractmethod
    def control(self, latents: Tensor, condition: Tensor, timesteps: Tensor, context: Tensor,
                unet: UNet | None = None, features: Features | None = None) -> list[Tensor | None]:
        """The tensors to add to the UNet's twelve skip connections, in encoder order, and to its
        middle: 13 in Stable Diffusion. None: nothing is connected there.

        Noisy latents (B, 4, H, W), condition (B, 3, 8H, 8W) in [0, 1] or its E(c), timesteps (B,),
        text states (B, N, D). Only networks that are connected to the encoder need the UNet, and
        `features`, what `unet.encode` returned for the same latents (which they compute if not
        given).
        """

    def changed_features(self, latents: Tensor, condition: Tensor, timesteps: Tensor,
                         context: Tensor, unet: UNet) -> Features:
        """What the SD encoder returns under a network that is connected to it. At full strength the
        decoder can take it as it is, and the undisturbed encoder need not run beside."""
        raise NotImplementedError(f"{self.architecture} is connected to the SD decoder")

    def for_inference(self) -> "ControlNetwork":
        """The network to sample with: itself, or a faster one that computes the same."""
        return self

    def connect_only_middle(self) -> None:
        """Small mode: disconnect the outputs for the skip connections, freeze what leads to them.

        Their zero convolutions must still be zero, because a file does not record that they were
        disconnected. Raises ValueError if they are not, or if the network has no such outputs.
        """
        if self.connects_to != "decoder":
            raise ValueError("--mode small disconnects outputs to the SD decoder, and "
                             f"{self.architecture} enters the SD encoder")
        if not hasattr(self, "zero_convs"):
            raise ValueError(f"--mode small needs zero_convs, which {self.architecture} does not "
                             "have")
        zero_convs = [layer for layer in self.zero_convs.modules() if isinstance(layer, nn.Conv2d)]
        if any(layer.weight.any() or layer.bias.any() for layer in zero_convs):
            raise ValueError("--mode small needs untrained zero convolutions, "
                             "those of --init are trained already")
        self.only_middle = True
        self.zero_convs.requires_grad_(False)

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass instead of storing them, where built in."""
