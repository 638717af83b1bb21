"""The zero convolution: how a new network is attached to a trained one without disturbing it.

ControlNet paper (Zhang, Rao and Agrawala 2023), section 3.1.
"""

from torch import nn

from unet.blocks import zero_module


def zero_convolution(in_channels: int, out_channels: int, kernel_size: int = 1) -> nn.Conv2d:
    """A convolution whose weight and bias start at zero. It ends every output of a ControlNet.

    At the start y = Z(x) = w x + b = 0: the UNet gets zeros added to its skip connections and is
    exactly what it was before. No random noise reaches the deep features of the trained model, and
    no training is spent on repairing them.

    Why does it learn, with all its weights zero? For one pixel and one channel, y = w x + b, the
    chain rule gives

        dL/dw = dL/dy * x        not zero as soon as x is not, whatever w is
        dL/db = dL/dy            not zero
        dL/dx = dL/dy * w = 0    only this is zero, and only while w is

    So the first step of gradient descent, w <- 0 - lr * dL/dy * x, moves w off zero, and from the
    second step on dL/dx is not zero either: the layers before it begin to learn. (Two zero layers
    in a row would be stuck: the second one's x is zero, so its dL/dw is zero, and its w = 0 passes
    no gradient to the first. In a ControlNet the copy lies between them: its x is not zero.)
    """
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return zero_module(layer)
