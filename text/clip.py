"""CLIP's text encoder. Letters: B batch, D width; 77 tokens.

SD 1.x uses CLIP ViT-L/14 (QuickGELU, last hidden state, prompts padded with the end token), SD 2.x
OpenCLIP ViT-H/14 (GELU, penultimate state, padded with 0); the final LayerNorm follows in both.
"""

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from text.tokenizer import END, START, tokenizer

TOKENS = 77      # the context length of every CLIP ...
WORDS = 75       # ... with a start and an end
HEAD_WIDTH = 64  # of all CLIP's text encoders


@dataclass(frozen=True)
class TextConfig:
    """Numbers of a text encoder. The defaults are CLIP ViT-L/14's, of Stable Diffusion 1.x."""

    width: int = 768
    layers: int = 12
    openclip: bool = False  # OpenCLIP as in SD 2.x


class QuickGELU(nn.Module):
    """The GELU's sigmoid approximation, with which CLIP was trained (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Self-attention and an MLP four times as wide, both residual, each behind its LayerNorm."""

    def __init__(self, width: int, activation: nn.Module):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)  # eps 1e-5
        self.attn = nn.MultiheadAttention(width, width // HEAD_WIDTH, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=activation, c_proj=nn.Linear(4 * width, width)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """CLIP's text tower (Radford et al. 2021, section 2.4) up to its hidden states. The names are
    open_clip's, as in SD 2.x files. Stable Diffusion has no use for its pooled embedding."""

    def __init__(self, config: TextConfig):
        super().__init__()
        # Without its own random start, for which PyTorch would import its compiler.
        self.token_embedding = nn.Embedding.from_pretrained(
            torch.zeros(END + 1, config.width), freeze=False)
        self.positional_embedding = nn.Parameter(torch.zeros(TOKENS, config.width))
        blocks = (Block(config.width, nn.GELU() if config.openclip else QuickGELU())
                  for _ in range(config.layers))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, layers: int) -> Tensor:
        """Token ids (B, 77) -> the normalised hidden states (B, 77, D) after so many layers."""
        h = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=h.dtype, device=h.device).triu(1)
        for block in self.transformer["resblocks"][:layers]:
            h = block(h, mask)
        return self.ln_final(h)


class CLIPText(nn.Module):
    """Prompts -> text states (B, 77, D), the context of the UNet's cross-attention."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.model = TextTransformer(config)

    def tokenize(self, prompts: Sequence[str], windows: int = 1) -> Tensor:
        """Prompts -> token ids (B * windows, 77): start, words, end, padding; of every prompt one
        window of 75 words' tokens after the other. Warns of what it cuts off."""
        padding = 0 if self.config.openclip else END
        rows = []
        for prompt in prompts:
            words = tokenizer().encode(prompt)
            if lost := words[windows * WORDS:]:
                warnings.warn(f"CLIP reads {windows * WORDS} tokens of a prompt; cut off: "
                              f"{tokenizer().decode(lost)!r}", stacklevel=2)
            for first in range(0, windows * WORDS, WORDS):
                row = [START, *words[first : first + WORDS], END]
                rows.append(row + [padding] * (TOKENS - len(row)))
        return torch.tensor(rows)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, 77) -> text states (B, 77, D)."""
        layers = self.config.layers
        # diffusers stores ViT-H without the last of its 24 layers, so 23 are all needed.
        if self.config.openclip and layers != 23:
            layers -= 1
        return self.model(tokens, layers)

    def encode(self, prompts: Sequence[str], windows: int = 1) -> Tensor:
        """Prompts -> text states (B, 77 * windows, D) on the device of the weights. Windows after
        the first are for long prompts: each is read alone, and their states follow each other, as
        in A1111's web interface."""
        tokens = self.tokenize(prompts, windows).to(self.model.positional_embedding.device)
        return self(tokens).reshape(len(prompts), windows * TOKENS, -1)


def windows_for(prompts: Sequence[str]) -> int:
    """How many windows the longest of these prompts fills."""
    return max(1, *(math.ceil(len(tokenizer().encode(prompt)) / WORDS) for prompt in prompts))


def infer_text_config(shapes: Mapping[str, tuple[int, ...]], openclip: bool = False) -> TextConfig:
    """Read the config off the shapes of an SD file's tensors, names without `cond_stage_model.`:
    open_clip's (2.x) or Hugging Face's (1.x, or 2.x through diffusers: then the UNet tells, and
    `openclip` is set). Raises ValueError for other tensors."""
    own_names = any(name.startswith("model.transformer.resblocks.") for name in shapes)
    embedding = ("model.token_embedding.weight" if own_names
                 else "transformer.text_model.embeddings.token_embedding.weight")
    if embedding not in shapes:
        raise ValueError(f"expected the tensors of a CLIP text encoder, {embedding} is missing")
    layers = re.findall(r"\.(?:resblocks|encoder\.layers)\.(\d+)\.", "\n".join(shapes))
    return TextConfig(shapes[embedding][1], 1 + max(map(int, layers), default=0),
                      openclip or own_names)


CLIP_VIT_L = TextConfig()
OPENCLIP_VIT_H = TextConfig(width=1024, layers=24, openclip=True)
TINY_TEXT = TextConfig(width=64, layers=2)  # weights/tiny: CLIP's vocabulary, two layers, one head
