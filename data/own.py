"""Which class reads a folder of pairs, and which of the pairs are held out.

A folder has its index itself, or in train/ and, of pairs that are only ever measured and sampled,
in held_out/."""

from pathlib import Path

from data.dataset import Dataset
from data.drawings import Drawings, HeldOutDrawings, is_drawings
from data.folder import DEFAULT, Folder, Reading
from data.index import index_of


def training_data(folder: Path, size: int, seed: int = 0, edges: bool = False,
                  held_out: Path | None = None, reading: Reading = DEFAULT) -> Dataset:
    """What --data names. `held_out`: where its held-out pairs are, if not in `folder`/held_out.
    Raises ValueError as `Folder` does."""
    pairs = folder if index_of(folder) or not index_of(folder / "train") else folder / "train"
    if held_out is None and index_of(folder / "held_out"):
        held_out = folder / "held_out"
    if held_out and not edges and pairs != folder and is_drawings(pairs):
        return Drawings(folder, size, seed, held_out=held_out)
    others = held_out and Folder(held_out, size, edges, reading=reading)
    return Folder(pairs, size, edges, held_out=others, reading=reading)


def evaluation_data(folder: Path, size: int, edges: bool = False,
                    annotator: str | None = None, reading: Reading = DEFAULT) -> Folder:
    """The pairs that networks are measured on: `folder`/held_out, if it is there. `annotator`: what
    made the conditions (of drawings it is known)."""
    if index_of(folder / "held_out"):
        folder = folder / "held_out"
    elif not index_of(folder) and index_of(folder / "train"):
        folder = folder / "train"
    if is_drawings(folder) and not edges and annotator in (None, "lines"):
        return HeldOutDrawings(folder, size)
    return Folder(folder, size, edges, annotator, reading=reading)
