"""Control network files: ControlNets as published, read off their shapes, and students, whose files say what they are."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from controlnet import ControlNet
from controlnet.ablations import FinetunedEncoder
from controlnet.condition import is_paper_encoder
from controlnet.lite import Lite
from kd import STUDENTS
from unet import UNet, UNetConfig, infer_config
from weights.files import fill, mismatches, raise_if, read_tensors, shapes_of, strip_prefix, write_tensors
from weights.kinds import CONTROLNET, WHOLE, kind_of
from weights.naming import from_diffusers, is_diffusers, to_diffusers

FORMAT_VERSION = 1
# Every architecture that a file can name, besides the ControlNet (which shapes tell): the base's config -> network.
ARCHITECTURES = STUDENTS | {"lite_encoder": lambda config: Lite(config, connects_to="encoder"), "finetune": FinetunedEncoder}
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}  # by the width of the text states
SHAPES_TELL = ("controlnet", "original")  # a ControlNet's E(c) may be the paper's or the released one: its shapes say
DIFFUSERS_FILES = [f"diffusion_pytorch_model.{end}" for end in ("safetensors", "fp16.safetensors", "bin")]  # in a folder of diffusers


def controlnet_file(path: str | Path) -> Path:
    """The file itself, or in a folder of diffusers the file of its ControlNet. Raises ValueError if there is none."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = [path / folder / name for folder in ("", "controlnet") for name in DIFFUSERS_FILES if (path / folder / name).is_file()]
    if not found:
        raise ValueError(f"expected a control network, {path} is a folder without {' or '.join(DIFFUSERS_FILES)}")
    return found[0]


def read_controlnet(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a control network in the original naming, without prefix, and the file's metadata.

    The file may be in the original naming, with or without `control_model.`, with or without Stable Diffusion around it; or in diffusers'
    naming, as a file or as a folder. Raises ValueError with what the file is instead.
    """
    path = controlnet_file(path)
    tensors, metadata = read_tensors(path)
    if (kind := kind_of(shapes_of(tensors))) not in (CONTROLNET, WHOLE):
        raise ValueError(f"expected a control network, {path} is {kind}")
    if metadata.get("format_version", str(FORMAT_VERSION)) != str(FORMAT_VERSION):
        raise ValueError(f"expected format version {FORMAT_VERSION}, {path} has {metadata['format_version']}: a newer version of this project wrote it")
    config = path.parent / "config.json"
    if path.name in DIFFUSERS_FILES and config.is_file() and re.search(r'"global_pool_conditions"\s*:\s*true', config.read_text(encoding="utf-8")):
        raise ValueError(f"{path.parent} is a ControlNet whose outputs are averaged over the picture (shuffle), which is not supported")
    tensors = strip_prefix(tensors, "control_model.") or tensors
    return (from_diffusers(tensors) if is_diffusers(tensors) else tensors), metadata


def load_controlnet(path: str | Path, unet: UNet, dtype: torch.dtype = torch.float32) -> ControlNet:
    """Load a ControlNet or a student for this UNet, frozen, in eval mode, on the CPU, from a file or a folder of any naming (`read_controlnet`).

    Raises ValueError if the file is no control network, is made for another kind of base model, or has missing, unexpected or wrongly
    shaped tensors (all in one error).
    """
    tensors, metadata = read_controlnet(path)
    name = metadata.get("architecture", "controlnet")
    if name in SHAPES_TELL:
        base = unet.config
        config = infer_controlnet_config(tensors, path, base.groups, base.num_heads, base.head_dim)
        _require_base(path, config, base)
        net = empty_controlnet(config, tensors, base, name)
    else:
        net = _named(name, metadata, unet, path)
    raise_if(mismatches(net, tensors), path)
    return fill(net, tensors, dtype)


def infer_controlnet_config(
    tensors: Mapping[str, Tensor], path: str | Path, groups: int = 32, num_heads: int | None = None, head_dim: int | None = None
) -> UNetConfig:
    """The config of a ControlNet, read off its shapes as by `unet.infer_config`. Raises ValueError that names the file."""
    try:
        if len(shapes_of(tensors)["input_hint_block.0.weight"]) != 4:
            raise ValueError("input_hint_block.0.weight is no convolution's")
        return infer_config(shapes_of(tensors), groups, num_heads, head_dim)
    except (ValueError, KeyError, IndexError, ZeroDivisionError) as problem:
        raise ValueError(f"{path} is not a whole control network: {problem}") from None


def empty_controlnet(
    config: UNetConfig, tensors: Mapping[str, Tensor], target: UNetConfig | None = None, architecture: str = "controlnet"
) -> ControlNet:
    """A ControlNet of this config on the meta device, with the form of E(c) that the tensors have."""
    with torch.device("meta"):
        return ControlNet(config, target=target, paper_encoder=is_paper_encoder(tensors), architecture=architecture)


def require_whole(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: str | Path) -> UNetConfig | None:
    """Check a ControlNet's tensors without its base model and return its config; None for a student, whose shapes need the base to be checked."""
    if metadata.get("architecture", "controlnet") not in SHAPES_TELL:
        return None
    try:
        told = dict(json.loads(metadata.get("config", "{}")))
    except (ValueError, TypeError) as problem:
        raise ValueError(f"the metadata of {path} is damaged: {problem}") from None
    config = infer_controlnet_config(tensors, path, told.get("groups", 32), told.get("num_heads"), told.get("head_dim"))
    raise_if(mismatches(empty_controlnet(config, tensors), tensors), path)
    return config


def _require_base(path: str | Path, config: UNetConfig, base: UNetConfig) -> None:
    if (config.context_dim, len(config.channel_mult)) != (base.context_dim, len(base.channel_mult)):
        its, ours = (f"{BASES.get(c.context_dim, 'another model')} (text states of width {c.context_dim}, {len(c.channel_mult)} levels)"
                     for c in (config, base))  # fmt: skip
        raise ValueError(f"{path} is a control network for {its}, the base model is {ours}")


def _named(name: str, metadata: dict[str, str], unet: UNet, path: str | Path) -> torch.nn.Module:
    """The network that a file's metadata names, on the meta device. Shapes do not tell a student's numbers of groups and heads; its config does."""
    if name not in ARCHITECTURES:
        raise ValueError(f"{path} holds an unknown architecture, {name!r}; known are controlnet, {', '.join(ARCHITECTURES)}")
    try:
        told = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(metadata["config"]).items()}
        config = UNetConfig(**told)
        with torch.device("meta"):
            net = ARCHITECTURES[name](replace(unet.config, rank=config.rank))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} does not say what {name} it holds: its metadata is wrong ({problem})") from None
    _require_base(path, config, unet.config)
    if net.config != config:
        raise ValueError(f"{path} is for another base model: expected a {name} of {net.config}, got {config}")
    return net


def save_controlnet(
    path: str | Path, net: ControlNet, naming: str = "ldm", *, base: str = "", step: int = 0, dtype: torch.dtype | None = None
) -> None:
    """Write a control network with metadata that says what it is. `dtype` None keeps the weights' own.

    `naming`: ldm, the original, or diffusers. Raises ValueError for diffusers' naming of a network that diffusers has no names for
    (a student, the paper's condition encoder).
    """
    tensors = net.state_dict()
    if naming == "diffusers":
        if net.config != net.target or net.architecture not in SHAPES_TELL or is_paper_encoder(tensors):
            raise ValueError("expected a ControlNet as published for diffusers' naming, this is a student or has the paper's condition encoder")
        tensors = to_diffusers(tensors, len(net.config.channel_mult), net.config.num_res_blocks)
    elif naming != "ldm":
        raise ValueError(f"expected naming ldm or diffusers, got {naming!r}")
    metadata = {
        "format": "pt",
        "format_version": str(FORMAT_VERSION),
        "architecture": net.architecture,
        "config": json.dumps(asdict(net.config)),
        "base": base,
        "step": str(step),
    }
    write_tensors(path, {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}, metadata)
