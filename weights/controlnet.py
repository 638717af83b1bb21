"""Control network files. A ControlNet is recognized by its shapes, a student by its metadata."""

import json
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from controlnet import ControlNet, ControlNetwork
from controlnet.ablations import FinetunedEncoder
from controlnet.condition import is_paper_encoder
from controlnet.lite import Lite
from kd.students import BUILDERS
from unet import UNet, UNetConfig, infer_config
from weights.files import (
    Tensors,
    cast,
    check_tensors,
    fill,
    read_tensors,
    shapes_of,
    strip_prefix,
    without_weights,
    write_tensors,
)
from weights.kinds import CONTROLNET, WHOLE, kind_of
from weights.naming import CONTROL, from_diffusers, to_diffusers

METADATA = {"format": "pt", "format_version": "1", "architecture": "controlnet"}  # the default
# Every architecture that a file can name -> its network, from the base's config.
ARCHITECTURES = {"controlnet": ControlNet, **BUILDERS,
                 "lite_encoder": partial(Lite, connects_to="encoder"), "finetune": FinetunedEncoder}
ENCODER = ("time_embed.", "input_blocks.", "middle_block.")  # what a ControlNet has as a copy
INFERRED = ("controlnet", "original")  # from shapes: E(c) may be the paper's or the released one
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}  # by width of the text states
DIFFUSERS_FILES = [f"diffusion_pytorch_model.{suffix}"
                   for suffix in ("safetensors", "fp16.safetensors", "bin")]


def controlnet_file(path: str | Path) -> Path:
    """The file itself, or in a folder of diffusers its ControlNet's. Raises ValueError."""
    path = Path(path)
    if not path.is_dir():
        return path
    for file in (path / folder / name for folder in ("", "controlnet") for name in DIFFUSERS_FILES):
        if file.is_file():
            return file
    raise ValueError(f"{path} is a folder without {' or '.join(DIFFUSERS_FILES)}")


def read_controlnet(path: str | Path, base: Tensors | None = None) -> tuple[
        dict[str, Tensor], dict[str, str]]:
    """Tensors of a control network in the original naming, without prefix, and its metadata. The
    file may have Stable Diffusion around it, or be one of diffusers', also a folder. `base`: the
    UNet's tensors, which a "difference" ControlNet, of offsets from their encoder, needs. Raises
    ValueError if it is something else."""
    tensors, metadata, is_difference = _read(controlnet_file(path))
    return add_encoder(tensors, base, path) if is_difference else tensors, metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bool]:
    """The same of a file, and whether its encoder is a difference from the base's."""
    tensors, metadata = read_tensors(path)
    own = metadata.get("architecture") in ARCHITECTURES
    kind = CONTROLNET if own else kind_of(tensors)
    if kind not in (CONTROLNET, WHOLE):
        raise ValueError(f"expected a control network, {path} is {kind}")
    _refuse_other_conditions(path, tensors, published=not own)
    metadata = METADATA | metadata
    if metadata["format_version"] != METADATA["format_version"]:
        raise ValueError(f"{path} has another format: a newer version of this project wrote it")
    is_difference = bool({"difference", CONTROL + "difference"} & tensors.keys())
    tensors = from_diffusers(strip_prefix(tensors, CONTROL) or tensors)
    tensors.pop("difference", None)
    return tensors, metadata, is_difference


def _refuse_other_conditions(path: Path, tensors: Tensors, published: bool) -> None:
    """Two published ControlNets look like any other and compute something else; they are known by
    diffusers' configuration, or by the names of their files. Raises ValueError."""
    config = path.parent / "config.json"
    pooled = path.name in DIFFUSERS_FILES and config.is_file() and re.search(
        r'"global_pool_conditions"\s*:\s*true', config.read_text(encoding="utf-8"))
    names = path.parent.name if path.name in DIFFUSERS_FILES else path.name
    found = re.search(r"control(?:net|lora)?[-_].*(shuffle|inpaint)", names, re.IGNORECASE) \
        if published else None
    which = "shuffle" if pooled else found and found[1].lower()
    if which:
        why = {"shuffle": "its outputs are averaged over a picture",
               "inpaint": "its conditions are photos with -1 where the mask is"}[which]
        raise ValueError(f"{path} is ControlNet's {which}, which is not supported: {why}")
    hints = [tensor.shape[1] for name, tensor in tensors.items()
             if name.endswith(("input_hint_block.0.weight",
                               "controlnet_cond_embedding.conv_in.weight")) and tensor.ndim == 4]
    if hints and hints[0] != 3:
        raise ValueError(f"{path} takes conditions of {hints[0]} channels, which is not supported: "
                         "expected RGB")


def add_encoder(tensors: Tensors, base: Tensors | None, path: str | Path) -> dict[str, Tensor]:
    """The ControlNet whose copied encoder is this difference from the base's (names without
    prefix). Raises ValueError without a base, or for one that does not fit."""
    if base is None:
        raise ValueError(f"{path} is a difference ControlNet, of offsets from Stable Diffusion's "
                         "weights: name the checkpoint that they are added to with --base")
    whole = dict(tensors)
    for name, offset in tensors.items():
        if name.startswith(ENCODER):
            if name not in base or base[name].shape != offset.shape:
                raise ValueError(f"{path} is a difference from another base model: {name} has "
                                 f"shape {list(offset.shape)}")
            dtype = torch.promote_types(offset.dtype, base[name].dtype)
            whole[name] = (offset.float() + base[name].float()).to(dtype)
    return whole


def load_controlnet(path: str | Path, unet: UNet,
                    dtype: torch.dtype = torch.float32) -> ControlNetwork:
    """Load a control network for this UNet: frozen, in eval mode, in `dtype`, on the CPU. `path` as
    for `read_controlnet`. Raises ValueError if the file does not fit the UNet."""
    tensors, metadata, is_difference = _read(controlnet_file(path))
    if metadata["architecture"] not in ARCHITECTURES:
        raise ValueError(f"{path} holds an unknown architecture, {metadata['architecture']!r}; "
                         f"known are {', '.join(ARCHITECTURES)}")
    network = _empty_network(path, tensors, metadata, unet.config)
    if is_difference:
        encoder = {name: tensor.cpu() for name, tensor in unet.state_dict().items()
                   if name.startswith(ENCODER)}
        tensors = add_encoder(tensors, encoder, path)
    return fill(network, tensors, dtype)


def check_controlnet(path: str | Path, tensors: dict[str, Tensor],
                     metadata: dict[str, str]) -> UNetConfig | None:
    """The config of a ControlNet, or ValueError if tensors are missing. None for a student, which
    cannot be checked without its base model."""
    if metadata["architecture"] not in INFERRED:
        return None
    return _empty_network(path, tensors, metadata).config


def _empty_network(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str],
                   base: UNetConfig | None = None) -> ControlNetwork:
    """The network that the tensors fit, on the meta device. Groups and heads of a ControlNet, which
    its shapes do not show, are the base's, without a base those of the metadata."""
    name = metadata["architecture"]
    try:
        config = base if base and name in INFERRED else _metadata_config(metadata)
        if name in INFERRED:
            config = infer_config(shapes_of(tensors), config.groups, config.num_heads,
                                  config.head_dim)
            build = partial(ControlNet, config, base, is_paper_encoder(tensors), name)
        else:
            rank = config.rank if isinstance(config.rank, int) else None
            build = partial(ARCHITECTURES[name], replace(base, rank=rank))
    except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as problem:
        raise ValueError(f"{path} is not a whole control network, or its metadata is damaged: "
                         f"{problem}") from None
    own, other = (f"{BASES.get(c.context_dim, 'another model')} (text states of width "
                  f"{c.context_dim}, {len(c.channel_mult)} levels)"
                  for c in (config, base or config))
    if own != other:
        raise ValueError(f"{path} is a control network for {own}, the base model is {other}")
    with without_weights():
        net = build()
    if net.config != config:
        raise ValueError(f"{path} is for another base model: {config}, expected {net.config}")
    check_tensors(net.state_dict(), tensors, path)
    return net


def _metadata_config(metadata: dict[str, str]) -> UNetConfig:
    numbers = json.loads(metadata.get("config", '{"num_heads": null}'))  # heads by the shapes
    return UNetConfig(**{key: tuple(value) if isinstance(value, list) else value
                         for key, value in numbers.items()})


def save_controlnet(path: str | Path, net: ControlNetwork, naming: str = "ldm", *, base: str = "",
                    step: int = 0, dtype: torch.dtype | None = None) -> None:
    """Write a control network and metadata; `dtype` None: the weights' own. `naming`: ldm, the
    original, or diffusers, where a student or the paper's condition encoder is a ValueError."""
    if naming not in ("ldm", "diffusers"):
        raise ValueError(f"expected naming ldm or diffusers, got {naming!r}")
    tensors = net.state_dict()
    if naming == "diffusers":
        published = net.config == net.target and net.architecture in INFERRED
        tensors = to_diffusers(tensors, net.config if published else None)
    if dtype:
        tensors = cast(tensors, dtype, path)
    write_tensors(path, tensors, METADATA | {
        "architecture": net.architecture, "config": json.dumps(asdict(net.config)), "base": base,
        "step": str(step)})
