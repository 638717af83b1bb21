"""A student that starts from its teacher: whatever of the teacher's layers fits it is copied
(`train.py --init teacher`)."""

import re
from copy import deepcopy

import torch
from torch import Tensor

from controlnet import ControlNet, ControlNetwork
from kd.loha import LoHaLinear

NOISE = 0.1           # on the spare ranks of a LoHa layer's first factor, where the ones are 1
INPUT_SCALE = 2**0.5  # of a layer that keeps every second input; measured, docs/experiments.md


def every_second_channel(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Shrink a tensor to `shape` by taking every second channel of its outputs (dimension 0) and
    inputs (dimension 1).

    Channels 0, 2, 4 ... are half of every GroupNorm's group, half of every attention head, half of
    GEGLU's values and half of its gates, and of the time embedding they are the very frequencies
    that an embedding of half the width has: all structure survives. The inputs that are kept stand
    in for their neighbours, which INPUT_SCALE makes up for.
    """
    if tensor.shape[0] == 2 * shape[0]:
        tensor = tensor[::2]
    if len(shape) > 1 and tensor.shape[1] == 2 * shape[1]:
        tensor = INPUT_SCALE * tensor[:, ::2]
    return tensor


def teacher_name(name: str, own_blocks: int, teacher_blocks: int) -> str:
    """The teacher's name for a student's tensor; the numbers are their encoder blocks per level.

    A student with fewer has the first of each level: the one that changes the resolution, and the
    residual block that changes the width.
    """
    if name.startswith("input_blocks."):
        _, index, rest = name.split(".", 2)
        level, position = divmod(int(index), own_blocks)
        return f"input_blocks.{level * teacher_blocks + position}.{rest}"
    if name.startswith(("zero_convs.", "middle_block_out.")):
        # A modulation may stand before the zero convolution.
        return re.sub(r"\.\d+\.(weight|bias)$", r".0.\1", name)
    return name


def why_not_from(student: ControlNetwork, teacher: ControlNetwork) -> str | None:
    """Why a student cannot start from this teacher."""
    if not isinstance(student, ControlNet):
        return f"no layer of a ControlNet fits {student.architecture}"
    if teacher.architecture not in ("controlnet", "original") or teacher.config != student.target:
        return f"expected a ControlNet as the teacher to start from, got {teacher.architecture}"
    return None


@torch.no_grad()
def from_teacher(student: ControlNetwork, teacher: ControlNetwork, generator: torch.Generator,
                 copy_zero_convs: bool = False) -> ControlNetwork:
    """Copy into a fresh student what fits it: all of `original`, every second channel for
    `reduced_channel`, blocks for `reduced_layer` and `modulated`, their best low-rank approximation
    for `loha`. Returns the student.

    The zero convolutions stay zero, so that it starts at the base model (y_c = y), unless
    `copy_zero_convs`. E(c) is copied if both have the same form of it; `original` takes the
    teacher's form. Raises ValueError for a student that has no layer like a ControlNet's, and for
    another kind of teacher.
    """
    if problem := why_not_from(student, teacher):
        raise ValueError(f"{problem}: use --init random")
    tensors = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
    blocks = student.config.num_res_blocks + 1, teacher.config.num_res_blocks + 1
    skipped = () if copy_zero_convs else ("zero_convs.", "middle_block_out.")
    own_kernel = student.input_hint_block[0].weight
    if student.architecture == "original":
        student.input_hint_block = deepcopy(teacher.input_hint_block).cpu().requires_grad_(True)
    elif own_kernel.shape != teacher.input_hint_block[0].weight.shape:
        skipped += ("input_hint_block.",)
    for name, parameter in student.named_parameters():
        source = teacher_name(name, *blocks)
        if source in tensors and not name.startswith(skipped):
            parameter.copy_(every_second_channel(tensors[source], parameter.shape))
    for name, layer in student.named_modules():
        if isinstance(layer, LoHaLinear):
            weight = tensors[teacher_name(name, *blocks) + ".weight"]
            layer.approximate(weight, NOISE, generator)
    return student
