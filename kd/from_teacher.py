"""A student that does not start from nothing: what of the teacher's layers fits it is copied (`train.py --init teacher`)."""

import re
from copy import deepcopy

import torch
from torch import Tensor

from controlnet import ControlNet
from kd.loha import LoHaLinear

NOISE = 0.1           # on the spare ranks of a LoHa layer's first factor, where the ones are 1
INPUT_SCALE = 2**0.5  # of a layer that sees every second channel: keeps the variance of its sum. Measured: see `every_second_channel`


def every_second_channel(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Shrink a tensor to `shape` by taking every second channel of its outputs (dimension 0) and inputs (dimension 1).

    Channels 0, 2, 4 ... are half of every GroupNorm's group, half of every attention head, half of GEGLU's values and half of its gates,
    and of the time embedding they are the very frequencies that an embedding of half the width has: all structure survives. The inputs
    that are kept make up for their neighbours by INPUT_SCALE: on the tiny model L_layer after 150 steps is 0.148 with a scale of 1, 0.125
    with the square root of 2, 0.130 with 2.
    """
    if tensor.shape[0] == 2 * shape[0]:
        tensor = tensor[::2]
    if len(shape) > 1 and tensor.shape[1] == 2 * shape[1]:
        tensor = INPUT_SCALE * tensor[:, ::2]
    return tensor


def teacher_name(name: str, own_blocks: int, teacher_blocks: int) -> str:
    """Where in the teacher to find a student's tensor; both have so many encoder blocks a level.

    A student with fewer has the first of each level: the change of resolution, and the residual block that changes the width.
    """
    if name.startswith("input_blocks."):
        _, number, rest = name.split(".", 2)
        level, place = divmod(int(number), own_blocks)
        return f"input_blocks.{level * teacher_blocks + place}.{rest}"
    if name.startswith(("zero_convs.", "middle_block_out.")):
        return re.sub(r"\.\d+\.(weight|bias)$", r".0.\1", name)  # a modulation may stand before the zero convolution
    return name


@torch.no_grad()
def from_teacher(student: ControlNet, teacher: ControlNet, generator: torch.Generator, copy_zero_convs: bool = False) -> ControlNet:
    """Copy into a fresh student what fits it: all of `original`, every second channel for `reduced_channel`, blocks for `reduced_layer` and
    `modulated`, their best low-rank approximation for `loha`. Returns the student.

    The zero convolutions stay zero, so that it starts at the base model (y_c = y), unless `copy_zero_convs`. E(c) is copied if both have
    it in the same form; `original` takes the teacher's form. Raises ValueError for a student that has no layer like a ControlNet's, and
    for another kind of teacher.
    """
    if not isinstance(student, ControlNet):
        raise ValueError(f"no layer of a ControlNet fits {student.architecture}: use --init random")
    if teacher.architecture not in ("controlnet", "original") or teacher.config != student.target:
        raise ValueError(f"expected a ControlNet as the teacher to start from, got {teacher.architecture}")
    tensors = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
    blocks = student.config.num_res_blocks + 1, teacher.config.num_res_blocks + 1
    kept = () if copy_zero_convs else ("zero_convs.", "middle_block_out.")
    if student.architecture == "original":
        student.input_hint_block = deepcopy(teacher.input_hint_block).cpu().requires_grad_(True)
    elif student.input_hint_block[0].weight.shape != teacher.input_hint_block[0].weight.shape:
        kept += ("input_hint_block.",)
    for name, parameter in student.named_parameters():
        source = teacher_name(name, *blocks)
        if source in tensors and not name.startswith(kept):
            parameter.copy_(every_second_channel(tensors[source], parameter.shape))
    for name, layer in student.named_modules():
        if isinstance(layer, LoHaLinear):
            layer.approximate(tensors[teacher_name(name, *blocks) + ".weight"], NOISE, generator)
    return student
