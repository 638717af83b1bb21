"""A folder of pairs, in any of the layouts that `data/index.py` reads, as a data set."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data.annotators import annotate, canny
from data.buckets import bucket_shapes, nearest_shape
from data.checks import Header, first_fault, look_at, why_not_a_pair
from data.dataset import Dataset
from data.fidelity import measure_of
from data.index import Pair, read_pairs
from data.pictures import BLACK, WHITE, read_condition, read_target


def _edges(target: Tensor) -> Tensor:
    return canny(target / 255).mul(255).byte()


@dataclass(frozen=True)
class Reading:
    """How a folder is read."""

    caption_column: str | None = None    # of the prompts; None: text, caption or prompt
    condition_resize: str | None = None  # nearest or lanczos; None: by the file (`read_condition`)
    skip_broken: bool = False            # leave out what is not a pair, and decode all to find it
    cache: Path | None = None            # a folder that keeps what was found in the files
    buckets: bool = False                # pictures keep their aspect (`data/buckets.py`)


DEFAULT = Reading()


class Folder(Dataset):
    """A folder's pairs, scaled and cropped around the centre to squares, or to buckets. With
    `edges` the condition is not read, it is the picture's Canny edges. Raises ValueError for a
    folder without pairs, and for a row that is none, with its number: a file that is missing or
    damaged, a condition of another shape than its picture.

    `annotator`: what made the conditions, for pictures' obedience to be measured by what it finds
    in them. `held_out`: pairs that are never trained on; without, the first are the preview. In
    buckets the preview is of the pictures of the most frequent size."""

    def __init__(self, folder: str | Path, size: int, edges: bool = False,
                 annotator: str | None = None, held_out: "Folder | None" = None,
                 reading: Reading = DEFAULT):
        self.folder = Path(folder)
        self.size, self.keeps_conditions = size, edges
        self.annotator = "canny" if edges else annotator
        self.held_out = held_out
        resize = reading.condition_resize
        self.nearest = None if resize is None else resize == "nearest"
        pairs, faults = read_pairs(self.folder, edges, reading.caption_column)
        count = len(pairs) + len(faults)
        if faults and not reading.skip_broken:  # before all the files are looked at
            first_fault(faults, count, skip=False)
        headers = self._headers(pairs, reading)
        for pair in pairs:
            if fault := _fault([headers[path] for path in pair.files]):
                faults[pair.where] = f"{pair.where}: {fault}"
        first_fault(faults, count, reading.skip_broken)
        self.pairs = [pair for pair in pairs if pair.where not in faults]
        self.shapes = self._shapes(headers, reading.buckets)
        self._warn_of_turned(headers)
        self.fingerprint = _fingerprint(self.pairs, headers)

    def _headers(self, pairs: list[Pair], reading: Reading) -> dict[Path, Header]:
        headers = look_at([pair.files[0] for pair in pairs], WHITE, reading.skip_broken,
                          reading.cache, "targets")
        if self.keeps_conditions:
            return headers
        # Last: a file that is both is a condition too, with what that may not have.
        return headers | look_at([pair.files[1] for pair in pairs], BLACK, reading.skip_broken,
                                 reading.cache, "conditions")

    def _shapes(self, headers: dict[Path, Header], buckets: bool) -> list[tuple[int, int]]:
        shapes = bucket_shapes(self.size) if buckets else [(self.size, self.size)]
        pictures = (headers[pair.files[0]] for pair in self.pairs)
        return [nearest_shape(picture.height, picture.width, shapes) for picture in pictures]

    def _warn_of_turned(self, headers: dict[Path, Header]) -> None:
        """Of a turned photo that has the same shape upright or not nobody can see whether its
        condition is upright."""
        if self.keeps_conditions:
            return
        pairs = [[headers[path] for path in pair.files] for pair in self.pairs]
        doubtful = sum(target.orientation > 1 == condition.orientation
                       and (target.orientation < 5 or target.width == target.height)
                       for target, condition in pairs)
        if doubtful:
            warnings.warn(f"{doubtful} pictures of {self.folder} are turned by their EXIF data: "
                          "their conditions have to be upright", stacklevel=3)

    def __len__(self) -> int:
        return len(self.pairs)

    def shape(self, i: int) -> tuple[int, int]:
        return self.shapes[i]

    def target(self, i: int) -> Tensor:
        with self._named(i):
            return read_target(self.pairs[i].files[0], self.shapes[i])

    def condition(self, i: int) -> Tensor:
        if self.keeps_conditions:
            return _edges(self.target(i))
        target, condition = self.pairs[i].files
        with self._named(i):
            return read_condition(condition, target, self.shapes[i], self.nearest)

    @contextmanager
    def _named(self, i: int) -> Iterator[None]:
        """Whatever is damaged inside is found here, and named with its row."""
        try:
            yield
        except ValueError as problem:
            raise ValueError(f"{self.pairs[i].where}: {problem}") from None

    def pair(self, i: int, epoch: int = 0) -> tuple[Tensor, Tensor]:
        target = self.target(i)  # opened once, also for its edges
        return target, _edges(target) if self.keeps_conditions else self.condition(i)

    def prompt(self, i: int) -> str:
        return self.pairs[i][1]

    def sources(self, i: int) -> list[Path | str]:
        return self.pairs[i][0][:1]

    def preview(self, count: int) -> "Folder":
        data = self.held_out or self
        shape, _ = Counter(data.shapes).most_common(1)[0]
        chosen = [i for i in range(len(data)) if data.shapes[i] == shape][:count]
        first = copy(data)
        first.pairs, first.shapes = [data.pairs[i] for i in chosen], [shape] * len(chosen)
        return first

    def fidelity(self, pictures: Tensor, conditions: Sequence[int],
                 prompts: Sequence[int] | None) -> dict[str, float]:
        measure = self.annotator and measure_of(self.annotator)
        if not measure:
            return {}
        name, compare = measure
        scores = [compare(annotate(self.annotator, picture), self.condition(i) / 255)
                  for picture, i in zip(pictures, conditions, strict=True)]
        return {name: sum(scores) / len(scores)}


def _fault(headers: list[Header]) -> str:
    """What is wrong with the files of a pair, "" if nothing is."""
    faults = [header.fault for header in headers if header.fault]
    if faults or len(headers) == 1:
        return faults[0] if faults else ""
    return why_not_a_pair(*headers)


def _fingerprint(pairs: list[Pair], headers: dict[Path, Header]) -> str:
    """Of what the pairs are, wherever they lie."""
    digest = hashlib.sha256()
    for files, prompt, _ in pairs:
        digest.update(repr((*(headers[path].digest for path in files), prompt)).encode())
    return digest.hexdigest()[:16]
