"""The two namings of a ControlNet's tensors, the original one (ours) and diffusers': one table, used in both directions.

diffusers numbers blocks within their level, the original counts through: input_blocks.4 is the first residual block of the second
level, down_blocks.1.resnets.0. Inside a transformer both use the same names.
"""

from collections.abc import Mapping

from torch import Tensor

RESBLOCK = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip


def diffusers_table(levels: int, blocks: int) -> dict[str, str]:
    """Original prefix -> diffusers' prefix, for a ControlNet of so many levels and residual blocks a level (4 and 2 in Stable Diffusion)."""
    table = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in"}

    def resblock(ours: str, theirs: str) -> None:
        table.update({f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESBLOCK.items()})

    for level in range(levels):
        for i in range(blocks):
            number = level * (blocks + 1) + 1 + i
            resblock(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{i}")
            table[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{i}"
        if level < levels - 1:
            table[f"input_blocks.{(level + 1) * (blocks + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    resblock("middle_block.0", "mid_block.resnets.0")
    resblock("middle_block.2", "mid_block.resnets.1")
    table |= {"middle_block.1": "mid_block.attentions.0", "middle_block_out.0": "controlnet_mid_block"}
    table |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(levels * (blocks + 1))}
    hint = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    return table | {f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{name}" for i, name in enumerate(hint)}


def _rename(tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        prefix = next((p for p in (".".join(parts[:n]) for n in range(len(parts), 0, -1)) if p in table), None)
        renamed[name if prefix is None else table[prefix] + name[len(prefix):]] = tensor
    return renamed


def is_diffusers(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a ControlNet's tensors in diffusers' naming."""
    return "controlnet_cond_embedding.conv_in.weight" in tensors


def to_diffusers(tensors: Mapping[str, Tensor], levels: int, blocks: int) -> dict[str, Tensor]:
    """Original names -> diffusers' names."""
    return _rename(tensors, diffusers_table(levels, blocks))


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names -> original names; names that are not in the table stay as they are, for the strict load to complain about."""
    levels = len({name.split(".")[1] for name in tensors if name.startswith("down_blocks.")})
    blocks = len({name.split(".")[3] for name in tensors if name.startswith("down_blocks.0.resnets.")})
    return _rename(tensors, {theirs: ours for ours, theirs in diffusers_table(levels, blocks).items()})
