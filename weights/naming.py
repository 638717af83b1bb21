"""How files name tensors. The modules' own names are the original files', so others need a table,
used in both directions: diffusers' for a ControlNet, a UNet and an autoencoder, and Hugging Face's
for CLIP in SD 1.x files.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from controlnet.condition import is_paper_encoder
from unet import UNetConfig
from weights.files import Tensors

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model."
TEXT_1X = TEXT + "transformer."  # SD 1.x: Hugging Face's names follow; 2.x: open_clip's, after TEXT
CONTROL = "control_model."
OTHER_PREFIXES = {  # prefixes of other programs -> Stable Diffusion's own
    "conditioner.embedders.0.model": TEXT + "model",  # SD-Turbo, by Stability's later code
    **{TEXT_1X + part: f"{TEXT_1X}text_model.{part}"  # 1.x, merged by early tools
       for part in ("embeddings", "encoder", "final_layer_norm")},
}
RESBLOCK = {  # original -> diffusers; inside a transformer both have the same names
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}

VAE_ATTENTION = {  # original -> diffusers
    "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
VAE_ATTENTION_BEFORE = {  # its names until 2023, which published files still have
    "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def rename(tensors: Tensors, table: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace of every name the longest prefix, up to a dot, that is in the table."""
    renamed = {}
    for name, tensor in tensors.items():
        prefix = name
        while prefix and prefix not in table:
            prefix = prefix.rpartition(".")[0]
        renamed[table.get(prefix, "") + name[len(prefix):]] = tensor
    return renamed


def diffusers_table(attention: Sequence[bool], blocks: int) -> dict[str, str]:
    """Original prefix -> diffusers' prefix, for a ControlNet or UNet of so many residual blocks per
    level, with attention on these levels. diffusers counts within a level: input_blocks.4, the
    second level's first residual block, is down_blocks.1.resnets.0."""
    levels = len(attention)
    table = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
             "input_blocks.0.0": "conv_in", "middle_block.1": "mid_block.attentions.0",
             "middle_block_out.0": "controlnet_mid_block", "out.0": "conv_norm_out",
             "out.2": "conv_out"}
    resblocks = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    for level in range(levels):
        first = level * (blocks + 1) + 1
        for i in range(blocks):
            resblocks[f"input_blocks.{first + i}.0"] = f"down_blocks.{level}.resnets.{i}"
            table[f"input_blocks.{first + i}.1"] = f"down_blocks.{level}.attentions.{i}"
        table[f"input_blocks.{first + blocks}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        first, up = level * (blocks + 1), f"up_blocks.{level}"  # from the coarsest level
        for i in range(blocks + 1):
            resblocks[f"output_blocks.{first + i}.0"] = f"{up}.resnets.{i}"
            table[f"output_blocks.{first + i}.1"] = f"{up}.attentions.{i}"
        last = 2 if attention[levels - 1 - level] else 1
        table[f"output_blocks.{first + blocks}.{last}.conv"] = f"{up}.upsamplers.0.conv"
    for ours, theirs in resblocks.items():
        table |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESBLOCK.items()}
    for i in range(levels * (blocks + 1)):
        table[f"zero_convs.{i}.0"] = f"controlnet_down_blocks.{i}"
    for i, name in enumerate(["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]):
        table[f"input_hint_block.{2 * i}"] = f"controlnet_cond_embedding.{name}"
    return table


def to_diffusers(tensors: Tensors, config: UNetConfig | None) -> dict[str, Tensor]:
    """Original names -> diffusers'. `config`: None for a student, which is a ValueError."""
    if config is None or is_paper_encoder(tensors):
        raise ValueError("diffusers has no names for this network: this is a student or has the "
                         "paper's condition encoder, use weights.for_diffusers")
    return rename(tensors, diffusers_table(config.attention, config.num_res_blocks))


def from_diffusers(tensors: Tensors) -> dict[str, Tensor]:
    """diffusers' names -> original names. Other names stay, so original ones do not change."""
    levels = {name.split(".")[1] for name in tensors if name.startswith("down_blocks.")}
    blocks = {name.split(".")[3] for name in tensors if name.startswith("down_blocks.0.resnets.")}
    attention = [any(name.startswith(f"down_blocks.{level}.attentions.") for name in tensors)
                 for level in range(len(levels))]
    table = diffusers_table(attention, len(blocks))
    return rename(tensors, {theirs: ours for ours, theirs in table.items()})


def vae_table(levels: int, blocks: int) -> dict[str, str]:
    """The same for an autoencoder. diffusers numbers the decoder's levels from the coarsest."""
    table = {}
    for half, side, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        resblocks = {f"{half}.mid.block_{i + 1}": f"{half}.mid_block.resnets.{i}" for i in (0, 1)}
        sampler = f"{side}sample"
        for level in range(levels):
            ours = f"{half}.{side}.{level if side == 'down' else levels - 1 - level}"
            theirs = f"{half}.{side}_blocks.{level}"
            resblocks |= {f"{ours}.block.{i}": f"{theirs}.resnets.{i}" for i in range(count)}
            table[f"{ours}.{sampler}.conv"] = f"{theirs}.{sampler}rs.0.conv"
        for ours, theirs in resblocks.items():  # all other parts of a block have the same names
            table |= {ours: theirs, f"{ours}.nin_shortcut": f"{theirs}.conv_shortcut"}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        table |= {f"{half}.mid.attn_1.{ours}": f"{half}.mid_block.attentions.0.{theirs}"
                  for ours, theirs in VAE_ATTENTION.items()}
    return table


def vae_to_diffusers(tensors: Tensors, levels: int, blocks: int) -> dict[str, Tensor]:
    """An autoencoder's original names (without prefix) -> diffusers', whose attention is linear."""
    return {name: tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
            for name, tensor in rename(tensors, vae_table(levels, blocks)).items()}


def vae_from_others(tensors: Tensors) -> dict[str, Tensor]:
    """diffusers' names of an autoencoder, also its older ones, -> original names. Original ones do
    not change, but for attention that a program has left in diffusers' form."""
    levels = {name.split(".")[2] for name in tensors if name.startswith("encoder.down_blocks.")}
    blocks = {name.split(".")[4] for name in tensors
              if name.startswith("encoder.down_blocks.0.resnets.")}
    table = {theirs: ours for ours, theirs in vae_table(len(levels), len(blocks)).items()}
    for half in ("encoder", "decoder"):
        for place in (f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"):
            for names in (VAE_ATTENTION, VAE_ATTENTION_BEFORE):
                table |= {f"{place}.{theirs}": f"{half}.mid.attn_1.{ours}"
                          for ours, theirs in names.items()}
    return {name: tensor[..., None, None]
            if ".attn_1." in name and name.endswith("weight") and tensor.ndim == 2 else tensor
            for name, tensor in rename(tensors, table).items()}


def huggingface_names(layers: int) -> dict[str, list[str]]:
    """A text encoder's name in 2.x files, open_clip's -> those in 1.x files, Hugging Face's: three
    for queries, keys and values in one tensor."""
    names = {"model.token_embedding.weight": ["text_model.embeddings.token_embedding.weight"],
             "model.positional_embedding": ["text_model.embeddings.position_embedding.weight"]}
    pairs = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        for i in range(layers):
            ours, theirs = f"model.transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
            names[f"{ours}.attn.in_proj_{kind}"] = [f"{theirs}.self_attn.{part}_proj.{kind}"
                                                    for part in "qkv"]
            names |= {f"{ours}.{a}.{kind}": [f"{theirs}.{b}.{kind}"] for a, b in pairs.items()}
        names[f"model.ln_final.{kind}"] = [f"text_model.final_layer_norm.{kind}"]
    return {TEXT + ours: [TEXT_1X + name for name in theirs] for ours, theirs in names.items()}


def from_huggingface(tensors: Tensors, layers: int) -> dict[str, Tensor]:
    """Hugging Face's names -> open_clip's. Other names, and incomplete parts of a tensor, stay."""
    tensors = dict(tensors)
    for ours, theirs in huggingface_names(layers).items():
        if all(name in tensors for name in theirs):
            parts = [tensors.pop(name) for name in theirs]
            tensors[ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return tensors


def to_huggingface(tensors: Tensors, layers: int) -> dict[str, Tensor]:
    """The opposite of `from_huggingface`."""
    tensors = dict(tensors)
    for ours, theirs in huggingface_names(layers).items():
        tensors.update(zip(theirs, tensors.pop(ours).chunk(len(theirs)), strict=True))
    return tensors
