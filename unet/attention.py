"""The spatial transformer: pixels attend to each other (self-attention) and to the prompt
(cross-attention). The letters in the shapes are those of `unet/blocks.py`."""

from collections import OrderedDict
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from unet.blocks import zero_module


class Attention(nn.Module):
    """Multi-head attention, softmax(Q K^T / sqrt(D / heads)) V (Vaswani et al. 2017, section 3.2):
    queries from x (B, N, D), keys and values from the context (B, M, context_dim) or x itself."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"expected a width divisible by {heads} heads, got {dim}")
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)      # (B, N or M, D)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v)         # (B, heads, N, D/heads), as q
        return self.to_out(h.transpose(1, 2).flatten(2))    # (B, N, D)


class GEGLU(nn.Module):
    """Gated linear unit with an exact GELU (Shazeer 2020). The gate is the second half."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Sequential):
    """Two linear layers, four times as wide between them."""

    def __init__(self, dim: int):
        # Identity: a dropout of 0 in the original, so the published name of the last layer is net.2
        layers = GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)
        super().__init__(OrderedDict(net=nn.Sequential(*layers)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward: three residuals."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(dim, dim, heads)
        self.attn2 = Attention(dim, context_dim, heads)
        self.ff = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)  # eps 1e-5
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels, as a residual (Rombach et al. 2022, section 3.3). Around
    it are 1x1 convolutions (SD 1.x) or linear layers (SD 2.x): the same map, another shape."""

    def __init__(self, channels: int, context_dim: int, heads: int, groups: int, linear: bool):
        super().__init__()
        projection = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        self.linear = linear
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in the ResBlocks
        self.proj_in = projection(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = zero_module(projection(channels, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        size = x.shape[-2:]
        h = self.norm(x)                                                # (B, C, H, W)
        if self.linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))              # (B, HW, C)
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)              # (B, HW, C)
        h = self.transformer_blocks[0](h, context)
        if self.linear:
            h = self.proj_out(h).transpose(1, 2).unflatten(2, size)     # (B, C, H, W)
        else:
            h = self.proj_out(h.transpose(1, 2).unflatten(2, size))     # (B, C, H, W)
        return x + h
