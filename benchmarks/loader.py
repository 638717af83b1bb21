"""Can the loader keep a GPU busy? python -m benchmarks.loader

Pictures a second that reach the training loop, at Stable Diffusion's shapes, from PNG pairs: with
latents and text states prepared, by the number of processes that load; and as a loop would have
them that opens both pictures, and hashes the target to find its latents. Medians of runs that take
turns.

Beside it, what an H100 would take: an estimate from the operations of a training step, counted, and
a share of the card's published rate.
"""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter

from common.cli import Parser, answer, picture_side, positive, run

H100 = 989e12       # operations per second in bf16, dense (NVIDIA's data sheet, SXM)
REACHED = 0.4       # of that, in training a UNet: an assumption
WORKERS = (0, 1, 2, 4)


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--size", type=picture_side, default=512, help="in pixels (default: 512)")
    p.add_argument("--pairs", type=positive, default=64, help="files (default: 64)")
    p.add_argument("--pictures", type=positive, default=256,
                   help="loaded for one time that is taken (default: 256)")
    p.add_argument("--batch-size", type=positive, default=4, help="(default: 4)")
    p.add_argument("--repeats", type=positive, default=3, help="a median is over (default: 3)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import numpy as np
import torch

from benchmarks.costs import count
from data import fill50k
from data.folder import Folder
from text import TOKENS
from training.batches import batches, order, shapes_of
from training.parallel import cores
from training.prepared import Prepared
from training.rows import Rows
from unet import SD15
from vae import DOWNSCALE


def prepared(data: Folder) -> Prepared:
    """As `prepare` gives it, with zeros for latents and text states: they are only copied."""
    texts = Rows(None, np.dtype([("states", np.float16, (TOKENS, SD15.context_dim))]))
    side = data.size // DOWNSCALE
    pictures = Rows(None, np.dtype([
        ("moments", np.float16, (2, SD15.latent_channels, side, side))]))
    keys = {i: sha256(str(i).encode()).digest()[:16] for i in range(len(data))}
    prompts = {sha256(data.prompt(i).encode()).digest()[:16]: i for i in range(len(data))}
    for rows, items in ((texts, prompts), (pictures, {key: i for i, key in keys.items()})):
        rows.fill(items, lambda chunk, rows=rows: np.zeros(len(chunk), rows.dtype), "rows", False)
    return Prepared(data, texts, {(data.size, data.size): pictures}, keys)


def opening_both(data: Folder, batch_size: int) -> Iterator[dict]:
    """The loop that looks latents up by what the target shows."""
    for batch in order(shapes_of(data), batch_size, seed=0):
        samples = [data[i] for i, _ in batch]
        for sample in samples:
            sha256(sample["target"].numpy().tobytes()).digest()
        yield {"condition": torch.stack([sample["condition"] for sample in samples])}


def rate(make: Callable[[], Iterator], args: Namespace) -> float:
    """Pictures a second, once the first batch is there."""
    loader = make()
    next(loader)
    start = perf_counter()
    number = args.pictures // args.batch_size
    for _ in islice(loader, number):
        pass
    return number * args.batch_size / (perf_counter() - start)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pairs"
        fill50k.main(["--out", str(folder), "--count", str(args.pairs), "--size", str(args.size)])
        data = Folder(folder, args.size)
        ready = prepared(data)
        ways = {"both pictures opened, target hashed": lambda: opening_both(data, args.batch_size)}
        for workers in WORKERS:
            ways[f"prepared, {workers} worker{'s' * (workers != 1)}"] = (
                lambda workers=workers: batches(ready, args.batch_size, seed=0, workers=workers))
        rates = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, make in ways.items():
                rates[way].append(rate(make, args))
    first = median(next(iter(rates.values())))
    print(f"{args.size} pixels, batches of {args.batch_size}, {cores()} cores, medians of "
          f"{args.repeats}\n{'':40}{'pictures/s':>12}{'times':>8}")
    for way, measured in rates.items():
        print(f"{way:40}{median(measured):>12,.0f}{median(measured) / first:>8.1f}")
    for network in ("controlnet", "reduced_layer"):
        macs = count("sd15", network, args.size)["MACs of training"]
        print(f"{f'estimate: an H100 trains {network}':40}{REACHED * H100 / (2 * macs):>12,.0f}")


if __name__ == "__main__":
    sys.exit(run(main))
