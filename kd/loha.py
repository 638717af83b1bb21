"""LoHa: a weight as the Hadamard product of two low-rank matrices, W = (B1 A1) * (B2 A2) (FedPara,
Hyeon-Woo, Ye-Bin and Oh, ICLR 2022).

Two products of rank R multiply to a matrix of rank up to R^2 with 2 R (out + in) numbers instead of
out * in. The layer saves storage, not work: W is formed, and then used like any other weight.
Letters: O outputs, I inputs (of a convolution: in * k * k), R rank.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.modulation import ModulatedControlNet
from unet import UNetConfig


class LoHaLinear(nn.Module):
    """A linear layer with a factored weight, in place of `layer`. Starts with He's scale, or at
    zero where `layer` does."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int):
        super().__init__()
        self.shape, self.rank = layer.weight.shape, rank
        outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
        self.b1 = nn.Parameter(layer.weight.new_empty(outputs, rank))
        self.b2 = nn.Parameter(layer.weight.new_empty(outputs, rank))
        self.a1 = nn.Parameter(layer.weight.new_empty(rank, inputs))
        self.a2 = nn.Parameter(layer.weight.new_empty(rank, inputs))
        self.bias = layer.bias
        self.zero = not layer.weight.is_meta and not layer.weight.any()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Factors from N(0, s^2). An entry of B1 A1 is a sum of R products, with variance R s^4, so
        Var(W) = (R s^4)^2.

        He's variance is 2 / fan_in, so s = (sqrt(2 / fan_in) / R)^(1/4). A layer that is to start
        at zero gets B2 = 0 and nothing else: then W = 0, and B2 has a gradient.
        """
        if self.a1.is_meta:  # nothing to draw, for which PyTorch would import its compiler
            return
        inputs = self.a1.shape[1]
        std = (math.sqrt(2 / inputs) / self.rank) ** 0.25
        for factor in (self.b1, self.a1, self.b2, self.a2):
            factor.normal_(0, std, generator=generator)
        if self.zero:
            self.b2.zero_()
        if self.bias is not None:
            bound = 0.0 if self.zero else inputs**-0.5  # PyTorch's default
            self.bias.uniform_(-bound, bound, generator=generator)

    def weight(self) -> Tensor:
        """W, (O, I); of a convolution (O, in, k, k)."""
        return ((self.b1 @ self.a1) * (self.b2 @ self.a2)).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)

    @torch.no_grad()
    def approximate(self, weight: Tensor, noise: float, generator: torch.Generator) -> None:
        """Start at a given weight: B1 A1 = ones, B2 A2 = the best approximation of rank R (from its
        singular value decomposition).

        `noise`, relative to the ones, fills the other columns of B1 and rows of A1: at exactly
        zero, most of the rank would get no gradient.
        """
        u, s, v = torch.linalg.svd(weight.flatten(1).float(), full_matrices=False)
        root = s[: self.rank].sqrt()
        self.b2.copy_(u[:, : self.rank] * root)
        self.a2.copy_(root[:, None] * v[: self.rank])
        for factor in (self.b1, self.a1):
            factor.normal_(0, noise, generator=generator)
        self.b1[:, 0] = 1
        self.a1[0] = 1


class LoHaConv2d(LoHaLinear):
    """A convolution with a factored weight; its kernels are flattened to (out, in * k * k)."""

    def __init__(self, layer: nn.Conv2d, rank: int):
        super().__init__(layer, rank)
        self.stride, self.padding = layer.stride, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), self.bias, self.stride, self.padding)


def factorize(module: nn.Module, rank: int, only_convolutions: bool = False) -> nn.Module:
    """Replace every convolution and linear layer inside `module` by a LoHa layer, unless that would
    have more weights. Returns the module."""
    for name, layer in module.named_children():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            factorize(layer, rank, only_convolutions)
        elif isinstance(layer, nn.Linear) and only_convolutions:
            continue
        elif 2 * rank * (layer.weight.shape[0] + layer.weight[0].numel()) < layer.weight.numel():
            kind = LoHaConv2d if isinstance(layer, nn.Conv2d) else LoHaLinear
            setattr(module, name, kind(layer, rank))
    return module


class LoHaControlNet(ModulatedControlNet):
    """A modulated ControlNet whose backbone has LoHa layers of rank `config.rank`, if
    `only_convolutions` in place of its convolutions alone."""

    def __init__(self, config: UNetConfig, target: UNetConfig, architecture: str = "loha",
                 only_convolutions: bool = False):
        super().__init__(replace(config, rank=None), target, architecture)
        self.config = config
        for part in (self.time_embed, self.input_blocks, self.middle_block):
            factorize(part, config.rank, only_convolutions)

    @torch.no_grad()
    def for_inference(self) -> ModulatedControlNet:
        """The `modulated` network that computes the same: its weights are formed once, not in every
        forward pass. What is not factored it shares with this network."""
        layers = {name: layer for name, layer in self.named_modules()
                  if isinstance(layer, LoHaLinear)}
        state = {name: tensor for name, tensor in self.state_dict().items()
                 if name.rpartition(".")[0] not in layers or name.endswith(".bias")}
        state |= {f"{name}.weight": layer.weight().to(layer.b1) for name, layer in layers.items()}
        with torch.device("meta"):
            net = ModulatedControlNet(replace(self.config, rank=None), self.target)
        net.load_state_dict(state, assign=True)
        # Autocast would keep copies of weights that learn, until it ends.
        return net.requires_grad_(False).train(self.training)
