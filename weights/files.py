"""Weights files: read with an error that names what is wrong, written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import atomic_write

Tensors = Mapping[str, Tensor]  # by name


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped, on the CPU) and metadata of safetensors, or of a pickle that has
    nothing but tensors: any other can run a program when it is opened. Raises ValueError."""
    path = Path(path)
    expected = f"expected a weights file, {path}"
    if not path.is_file():
        raise ValueError(f"{expected} {'is a folder' if path.is_dir() else 'does not exist'}")
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{expected} is empty")
    if head[8:9] != b"{":  # safetensors begins with eight bytes of length, then a JSON object
        if head.startswith((b"PK", b"\x80")):
            return _read_pickle(path), {}
        if head.lstrip().startswith(b"<"):
            raise ValueError(f"{expected} is a web page (a failed download?)")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as problem:
        raise ValueError(f"{expected} is truncated or damaged: {problem}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except (OSError, MemoryError):
        raise
    except Exception as problem:  # a damaged pickle can fail in any way
        reason = " ".join(str(problem).split())[:120] or type(problem).__name__
        raise ValueError(f"{path} is a pickle that is damaged or holds more than tensors, and is "
                         f"refused ({reason})") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    items = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in items
               if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"expected weights, {path} is a pickle without tensors")
    return tensors


def write_tensors(path: str | Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write safetensors, whole or not at all; equal content in equal bytes. Raises OSError, and
    ValueError for another ending."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"expected a name that ends in .safetensors, got {path}")
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the user's umask; safetensors lets nobody else read
        try:
            save_file({name: tensor.detach().cpu().contiguous()
                       for name, tensor in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as problem:  # how safetensors reports a failed write
            raise OSError(f"{path} was not written, is the disk full? ({problem})") from None
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:  # safetensors writes metadata keys in random order
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
            file.seek(8)
            file.write(text.encode().ljust(length))


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def strip_prefix(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name[len(prefix):]: tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}


def check_tensors(expected: Tensors, actual: Tensors, path: str | Path) -> None:
    """Require the same names and shapes. One ValueError lists the first five problems."""
    expected, actual = shapes_of(expected), shapes_of(actual)
    problems = [f"missing {name} {list(shape)}"
                for name, shape in expected.items() if name not in actual]
    problems += [f"{name} has shape {list(actual[name])}, expected {list(shape)}"
                 for name, shape in expected.items() if actual.get(name, shape) != shape]
    problems += [f"unexpected {name} {list(shape)}"
                 for name, shape in actual.items() if name not in expected]
    if problems:
        rest = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit: " + "; ".join(problems[:5]) + rest)


def fill(module: nn.Module, tensors: Tensors, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give a module on the meta device its tensors, in `dtype`, frozen and in eval mode."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.requires_grad_(False).eval()
