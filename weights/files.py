"""Weights files: read with a clear word when a file is not what it should be, checked against a module, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import atomic_write


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped, on the CPU) and metadata of a weights file. Raises ValueError with what the file is instead.

    safetensors, or a `.ckpt` or `.pth` of PyTorch that holds tensors and nothing else: a pickle can run any program when it is opened,
    so it is read with `weights_only=True` alone.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a weights file, {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"expected a weights file, {path} is empty")
    if head[8:9] != b"{":  # of safetensors: eight bytes of length, then a JSON object
        if head[:2] == b"PK" or head[:1] == b"\x80":
            return _read_pickle(path), {}
        if head.lstrip()[:1] == b"<":
            raise ValueError(f"expected a weights file, {path} is a web page (a download that went wrong?)")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as problem:
        raise ValueError(f"expected a whole safetensors file, {path} is truncated or damaged: {problem}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except Exception as problem:  # a damaged pickle can fail in any way
        reason = " ".join(str(problem).split())[:120] or type(problem).__name__
        raise ValueError(f"expected weights, {path} is a pickle that is damaged or holds more than tensors, and is refused ({reason})") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    content = content if isinstance(content, dict) else {}
    tensors = {name: tensor for name, tensor in content.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not tensors:
        raise ValueError(f"expected weights, {path} is a pickle without tensors")
    return tensors


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it. The same tensors and metadata give the same bytes. Raises OSError."""
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask says; safetensors would let nobody else read
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as problem:  # how safetensors says that a write failed
            raise OSError(f"{path} could not be written, is the disk full? What was there before is kept ({problem})") from None
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:  # safetensors writes the metadata's keys in random order: 8 bytes of length, then a JSON header
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name[len(prefix):]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def mismatches(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """Every way in which `tensors` differ from what `module` needs, one line each; names are printed with `prefix`, as in the file."""
    wanted, found = shapes_of(module.state_dict()), shapes_of(tensors)
    return (
        [f"missing {prefix}{name} {list(wanted[name])}" for name in wanted if name not in found]
        + [f"unexpected {prefix}{name} {list(found[name])}" for name in found if name not in wanted]
        + [f"{prefix}{name} has shape {list(found[name])}, expected {list(wanted[name])}" for name in wanted if name in found and found[name] != wanted[name]]
    )


def raise_if(problems: list[str], path: str | Path) -> None:
    """All problems of a file in one ValueError of one line: the first five, and how many there are."""
    if problems:
        rest = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit: " + "; ".join(problems[:5]) + rest)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give a module built on the meta device its tensors, in `dtype`, frozen and in eval mode."""
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, strict=True, assign=True)
    return module.requires_grad_(False).eval()
