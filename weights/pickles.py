"""PyTorch's own files, which are pickles. A pickle is a program; here none is run: tensors are
read, the few classes that published checkpoints name beside them become empty objects, and anything
else is refused by its name."""

import re
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor


class Inert:
    """Stands for an object of a class that is not needed. Whatever is done to it does nothing."""

    def __new__(cls, *_: object) -> "Inert":
        return object.__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


NOT_NEEDED = [  # what Stable Diffusion's own .ckpt files hold beside tensors: how training went
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
]


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, from its `state_dict` if it has one. Raises ValueError."""
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in NOT_NEEDED]), \
                open(path, "rb") as file:
            # By its name PyTorch would take a .safetensors for what it is not.
            mapped = is_zipfile(path) and path.suffix != ".safetensors"
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True,
                                 mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as problem:  # a damaged pickle can fail in any way
        named = re.search(r"GLOBAL ([\w.]+)", str(problem))
        more = f"holds more than tensors ({named[1]})" if named else "is damaged or holds more " \
            "than tensors"
        raise ValueError(f"{path} is a pickle that {more}, and is refused: opening it could run a "
                         "program. Look for the same weights as .safetensors") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    tensors = _named(content)
    if not tensors and isinstance(content, dict):  # groups of tensors, as of an IP-Adapter
        tensors = {f"{group}.{name}": tensor for group, members in content.items()
                   for name, tensor in _named(members).items()}
    if not tensors:
        raise ValueError(f"expected weights, {path} is a pickle without tensors")
    return tensors


def _named(content: object) -> dict[str, Tensor]:
    items = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in items
            if isinstance(name, str) and isinstance(value, Tensor)}
