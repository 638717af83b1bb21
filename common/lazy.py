"""Public names of a room that are imported when they are first used.

`from weights import tiny` and `python -m weights.convert --help` run weights/__init__.py first. If
it imported what the room has, it would import PyTorch, which takes two seconds.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def on_first_use(room: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """A room's `__getattr__` (PEP 562). `names`: a module of the room -> what comes from it."""
    module_of = {name: module for module, its_names in names.items() for name in its_names}

    def get(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(import_module(f"{room}.{module_of[name]}"), name)

    return get
