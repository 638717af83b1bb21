"""CLIP's text tower and tokenizer, both from open_clip. Letters: B batch, D width; 77 tokens.

SD 1.x uses CLIP ViT-L/14 (QuickGELU, last hidden state, prompts padded with the end token), SD 2.x
OpenCLIP ViT-H/14 (GELU, penultimate state, padded with 0); the final LayerNorm follows in both.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

TOKENS = 77  # the context length of every CLIP
END = 49407  # the end token: the last of CLIP's vocabulary of 49,408
TOKENIZER = SimpleTokenizer(context_length=TOKENS)  # its vocabulary comes with open_clip


@dataclass(frozen=True)
class TextConfig:
    """Numbers of a text encoder. The defaults are CLIP ViT-L/14's, of Stable Diffusion 1.x."""

    width: int = 768
    layers: int = 12
    openclip: bool = False  # OpenCLIP as in SD 2.x


class CLIPText(nn.Module):
    """Prompts -> text states (B, 77, D), the context of the UNet's cross-attention."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.model = TextTransformer(
            context_length=TOKENS, vocab_size=END + 1, width=config.width,
            heads=config.width // 64,  # CLIP's text towers all have heads of width 64
            layers=config.layers, act_layer=nn.GELU if config.openclip else QuickGELU,
            no_causal_mask=True,  # made in `forward`, so that a module on the meta device works
            proj_type="none")     # Stable Diffusion uses the tokens' states, no pooled embedding

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token ids (B, 77): start, words, end, padding. Warns of what it cuts off."""
        for prompt in prompts:
            if lost := TOKENIZER.encode(prompt)[TOKENS - 2:]:
                warnings.warn(f"CLIP reads {TOKENS - 2} tokens of a prompt; cut off: "
                              f"{TOKENIZER.decode(lost).strip()!r}", stacklevel=2)
        tokens = TOKENIZER(list(prompts))
        if not self.config.openclip:
            tokens = tokens.masked_fill((tokens == END).cumsum(dim=1).bool(), END)
        return tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, 77) -> text states (B, 77, D)."""
        blocks = self.model.transformer.resblocks
        # diffusers stores ViT-H without the last of its 24 layers, so 23 are all needed.
        if self.config.openclip and self.config.layers != 23:
            blocks = blocks[:-1]
        h = self.model.token_embedding(tokens) + self.model.positional_embedding
        mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=h.dtype, device=h.device).triu(1)
        for block in blocks:
            h = block(h, attn_mask=mask)
        return self.model.ln_final(h)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text states (B, 77, D) on the device of the weights."""
        return self(self.tokenize(prompts).to(self.model.positional_embedding.device))


def infer_text_config(shapes: Mapping[str, tuple[int, ...]]) -> TextConfig:
    """Read the config off the shapes of an SD file's tensors, names without `cond_stage_model.`:
    open_clip's (2.x) or Hugging Face's (1.x). Raises ValueError for other tensors."""
    openclip = any(name.startswith("model.transformer.resblocks.") for name in shapes)
    embedding = ("model.token_embedding.weight" if openclip
                 else "transformer.text_model.embeddings.token_embedding.weight")
    if embedding not in shapes:
        raise ValueError(f"expected the tensors of a CLIP text encoder, {embedding} is missing")
    layers = re.findall(r"\.(?:resblocks|encoder\.layers)\.(\d+)\.", "\n".join(shapes))
    return TextConfig(shapes[embedding][1], 1 + max(map(int, layers), default=0), openclip)


CLIP_VIT_L = TextConfig()
OPENCLIP_VIT_H = TextConfig(width=1024, layers=24, openclip=True)
TINY_TEXT = TextConfig(width=64, layers=2)  # weights/tiny: CLIP's vocabulary, two layers, one head
