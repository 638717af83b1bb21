"""The text encoder of Stable Diffusion: CLIP's text tower and tokenizer, both from open_clip.

SD 1.x runs CLIP ViT-L/14 (QuickGELU), takes the last hidden state and pads prompts with the end token; its files use Hugging Face's
names. SD 2.x runs OpenCLIP ViT-H/14 (GELU), takes the penultimate hidden state and pads with 0; its files use open_clip's names.
Both apply the final LayerNorm to the state they take.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

TOKENS = 77  # the context length of every CLIP
END = 49407  # the end token: the last of CLIP's vocabulary of 49,408


@dataclass(frozen=True)
class TextConfig:
    """Numbers of a text encoder. The defaults are CLIP ViT-L/14's, of Stable Diffusion 1.x."""

    width: int = 768
    layers: int = 12
    openclip: bool = False  # True: OpenCLIP as SD 2.x uses it (GELU, penultimate hidden state, padding with 0)


@lru_cache(maxsize=1)
def tokenizer() -> SimpleTokenizer:
    """CLIP's byte-pair tokenizer; its vocabulary comes with open_clip."""
    return SimpleTokenizer(context_length=TOKENS)


class CLIPText(nn.Module):
    """Prompts -> text states (B, 77, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.model = TextTransformer(
            context_length=TOKENS,
            vocab_size=END + 1,
            width=config.width,
            heads=config.width // 64,  # CLIP's text towers all have heads of width 64
            layers=config.layers,
            act_layer=nn.GELU if config.openclip else QuickGELU,
            no_causal_mask=True,  # it is made in `forward`, so that the module can be built on the meta device
            proj_type="none",  # Stable Diffusion uses the tokens' states, not the pooled embedding
        )

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token ids (B, 77): start, words, end, padding. Longer prompts are cut, the end token kept, with a warning of what is lost."""
        for prompt in prompts:
            if lost := tokenizer().encode(prompt)[TOKENS - 2 :]:
                warnings.warn(f"CLIP reads {TOKENS - 2} tokens of a prompt; cut off: {tokenizer().decode(lost).strip()!r}", stacklevel=2)
        tokens = tokenizer()(list(prompts))
        if not self.config.openclip:
            after_end = (tokens == END).cumsum(dim=1).bool()
            tokens = tokens.masked_fill(after_end, END)
        return tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, 77) -> text states (B, 77, D)."""
        m = self.model
        h = m.token_embedding(tokens) + m.positional_embedding
        causal = torch.full((TOKENS, TOKENS), float("-inf"), dtype=h.dtype, device=h.device).triu(1)
        penultimate = self.config.openclip and self.config.layers != 23  # diffusers stores ViT-H's 24 layers without the last one
        blocks = m.transformer.resblocks[:-1] if penultimate else m.transformer.resblocks
        for block in blocks:
            h = block(h, attn_mask=causal)
        return m.ln_final(h)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text states (B, 77, D) on the device of the weights."""
        return self(self.tokenize(prompts).to(self.model.positional_embedding.device))


def huggingface_names(layers: int) -> dict[str, list[str]]:
    """open_clip's name of every tensor -> Hugging Face's names, three where open_clip keeps queries, keys and values in one tensor."""
    names = {
        "model.token_embedding.weight": ["text_model.embeddings.token_embedding.weight"],
        "model.positional_embedding": ["text_model.embeddings.position_embedding.weight"],
    }
    for i in range(layers):
        ours, theirs = f"model.transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            names[f"{ours}.attn.in_proj_{kind}"] = [f"{theirs}.self_attn.{x}_proj.{kind}" for x in "qkv"]
            names[f"{ours}.attn.out_proj.{kind}"] = [f"{theirs}.self_attn.out_proj.{kind}"]
            for a, b in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                names[f"{ours}.{a}.{kind}"] = [f"{theirs}.{b}.{kind}"]
    for kind in ("weight", "bias"):
        names[f"model.ln_final.{kind}"] = [f"text_model.final_layer_norm.{kind}"]
    return names


def from_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Hugging Face's tensors to open_clip's. A tensor whose parts are incomplete is left out; unknown names stay as they are."""
    tensors = dict(tensors)
    layers = 1 + max((int(name.split(".")[3]) for name in tensors if name.startswith("text_model.encoder.layers.")), default=-1)
    renamed = {}
    for ours, theirs in huggingface_names(layers).items():
        if all(name in tensors for name in theirs):
            parts = [tensors.pop(name) for name in theirs]
            renamed[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return renamed | tensors


def to_huggingface(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The opposite of `from_huggingface`."""
    renamed = {}
    for ours, theirs in huggingface_names(layers).items():
        renamed |= dict(zip(theirs, tensors[ours].chunk(len(theirs)), strict=True))
    return renamed


def infer_text_config(shapes: Mapping[str, tuple[int, ...]]) -> TextConfig:
    """Read the config off the shapes of tensors named as in an SD file without `cond_stage_model.` (transformer.... or model....)."""
    openclip = any(name.startswith("model.transformer.resblocks.") for name in shapes)
    embedding = "model.token_embedding.weight" if openclip else "transformer.text_model.embeddings.token_embedding.weight"
    if embedding not in shapes:
        raise ValueError(f"expected the tensors of a CLIP text encoder, {embedding} is missing")
    layer_at = 3 if openclip else 4  # place of the layer's number in model.transformer.resblocks.N and transformer.text_model.encoder.layers.N
    numbers = [name.split(".")[layer_at] for name in shapes if ".resblocks." in name or ".encoder.layers." in name]
    return TextConfig(width=shapes[embedding][1], layers=1 + max((int(n) for n in numbers), default=0), openclip=openclip)


CLIP_VIT_L, OPENCLIP_VIT_H = TextConfig(), TextConfig(width=1024, layers=24, openclip=True)
TINY_TEXT = TextConfig(width=64, layers=2)  # weights/tiny: CLIP's real vocabulary, two layers, one head
