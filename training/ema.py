"""An exponential moving average of a network's parameters: a smoother network than the one that training leaves behind."""

from copy import deepcopy

import torch
from torch import nn


class Average:
    """`net` is the average: average <- decay * average + (1 - decay) * parameter after every step. Of parameters only: a buffer is no quantity to average.

    Starts at the network itself, so over the first 1 / (1 - decay) steps it lags behind.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.net, self.decay = deepcopy(net).requires_grad_(False).eval(), decay

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - self.decay)
