"""An exponential moving average of a network: smoother than the one that training leaves behind."""

from copy import deepcopy

import torch
from torch import nn


class EMA:
    """`net` is the average: ema <- decay * ema + (1 - decay) * parameter after every step. Only
    parameters are averaged, not buffers.

    It starts at the network itself, so over the first 1 / (1 - decay) steps it lags behind.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.net = deepcopy(net).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        averages, parameters = list(self.net.parameters()), list(net.parameters())
        torch._foreach_lerp_(averages, parameters, 1 - self.decay)
