"""Weights files: read with an error that names what is wrong, written whole or not at all."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.files import atomic_write
from weights.pickles import read_pickle

Tensors = Mapping[str, Tensor]  # by name
PART = re.compile(r"-(\d{5})-of-(\d{5})\.")  # of a model in several files


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (memory-mapped, on the CPU) and metadata of safetensors, or of a pickle, without
    running it. Raises ValueError that says what else the file is."""
    path = Path(path)
    expected = f"expected a weights file, {path}"
    if not path.is_file():
        raise ValueError(f"{expected} {'is a folder' if path.is_dir() else 'does not exist'}")
    with open(path, "rb") as file:
        head = file.read(2000)
    if not head:
        raise ValueError(f"{expected} is empty")
    if head[8:9] != b"{":  # safetensors begins with eight bytes of length, then a JSON object
        if head.startswith((b"PK", b"\x80")):
            return read_pickle(path), {}
        if other := _other_format(head):
            raise ValueError(f"{expected} is {other}")
    if part := PART.search(path.name):
        raise ValueError(f"{expected} is part {int(part[1])} of {int(part[2])}: give the folder of "
                         "the whole model")
    return read_safetensors(path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same of a file that is known to be safetensors, whole or a part."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as problem:
        raise ValueError(f"expected a weights file, {path} is truncated or damaged: "
                         f"{problem}") from None


def _other_format(head: bytes) -> str | None:
    """What a file is that begins like this and is no weights file."""
    start = head.lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file: run git lfs pull, or download it"
    if start.startswith(b"<"):
        return "a web page (a failed download?)"
    if start.startswith(b"{") and b'"weight_map"' in head:
        return "the index of a model in several files: give their folder"
    if start.startswith(b"GGUF"):
        return "a GGUF file, which is not read"
    if head.isascii() and b"\x00" not in head:
        return f"a text (a failed download?): {head[:60].decode().strip()!r}"
    return None


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


def require_replaceable(target: Path, sources: Sequence[Path]) -> None:
    """Raise ValueError if `target` is one of the sources, or something there that this project did
    not write."""
    if not target.exists():
        return
    if any(source.exists() and target.samefile(source) for source in sources):
        raise ValueError(f"expected another name for the output, {target} is an input")
    if target.is_dir():
        files = sorted(path for path in target.rglob("*") if path.is_file())
    else:
        files = [target]
    weights = [file for file in files if file.suffix == ".safetensors"]
    if files and not (weights and all(_written_here(file) for file in weights)):
        raise ValueError(f"{target} is there already and was not written by this program: choose "
                         "another name, or remove it")


def _written_here(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as opened:
            return bool({"format_version", "stable_diffusion"} & (opened.metadata() or {}).keys())
    except (SafetensorError, OSError):
        return False


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def strip_prefix(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name[len(prefix):]: tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}


def check_tensors(expected: Tensors, actual: Tensors, path: str | Path) -> None:
    """Require the same names and shapes, and finite numbers. One ValueError lists the first five
    problems."""
    check_finite(actual, path)
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


def check_finite(tensors: Tensors, path: str | Path) -> None:
    """Raise ValueError for NaN or infinity, which a merge or half precision can leave in a file."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        wide = tensor.float() if tensor.element_size() == 1 else tensor
        if not torch.stack(torch.aminmax(wide)).isfinite().all():  # NaN is its own extreme
            bad = (~wide.isfinite()).sum().item()
            raise ValueError(f"{path} is damaged: {name} has values that are not numbers or "
                             f"infinite ({bad} of {tensor.numel()})")


def cast(tensors: Tensors, dtype: torch.dtype, path: str | Path) -> dict[str, Tensor]:
    """The tensors in another dtype. Raises ValueError for a value that is too large for it."""
    result = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in result.items():
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ValueError(f"{path} would not hold {name} in {dtype}: it has values of "
                             f"{tensors[name].abs().max():g}, the largest there is "
                             f"{torch.finfo(dtype).max:g}. Keep float32")
    return result


class _Undrawn(TorchFunctionMode):
    """Leaves out the functions of torch.nn.init, which return the tensor that they fill."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that are made in here are for `fill`: on the meta device, and no first weights are
    drawn, which would be a third of the time."""
    with torch.device("meta"), _Undrawn():
        yield


def fill(module: nn.Module, tensors: Tensors, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give a module made `without_weights` its tensors, in `dtype`, frozen and in eval mode."""
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.requires_grad_(False).eval()
