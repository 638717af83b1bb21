"""What the frozen networks make of a data set, computed once, before the first step: the latents of
every picture, and the text states of every prompt and of the empty one.

After that no target picture is opened. The keys are contents: of the picture's file, of the prompt,
of the network's weights. So what has changed is computed again, and nothing else.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.devices import to_device
from common.files import in_bytes, sha256
from data.dataset import Dataset
from text import TOKENS, CLIPText
from training.parallel import cores
from training.rows import KEY_BYTES, Rows
from training.settings import Settings
from vae import DOWNSCALE, VAE

OWN_FOLDER = ".light_controlnet"  # inside --data
LARGEST_IN_MEMORY = 4 * 2**30     # bytes, in the memory of every process
PROMPTS_AT_ONCE = 32
EMPTY = ""                        # the prompt that others are dropped for
Shape = tuple[int, int]           # height, width, in pixels


class Prepared:
    """A data set as the loader reads it: by (index, epoch) the condition as bytes (3, H, W), the
    prompt's text states as `context` (N, D), and the picture as `moments` (2, 4, H/8, W/8), mean
    and log variance of its latents, or as `target`, bytes (3, H, W), where it changes with the
    epoch. Moments and text states are in half precision.

    `pictures`: the rows of each shape. `keys`: by index."""

    def __init__(self, data: Dataset, texts: Rows, pictures: dict[Shape, Rows] | None,
                 keys: dict[int, bytes]):
        self.data, self.texts, self.pictures, self.keys = data, texts, pictures, keys

    def __len__(self) -> int:
        return len(self.data)

    def shape(self, i: int) -> Shape:
        return self.data.shape(i)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        i, epoch = place
        context = self._text_states(self.data.prompt(i))
        if self.pictures is None:
            target, condition = self.data.pair(i, epoch)
            return {"target": target, "condition": condition, "context": context}
        shape = self.data.shape(i)
        row = self.pictures[shape][self.keys[i]]
        condition = (_unpacked(row["condition"], shape) if self.data.keeps_conditions
                     else self.data.condition(i))
        return {"moments": _tensor(row["moments"]), "condition": condition, "context": context}

    def _text_states(self, prompt: str) -> Tensor:
        return _tensor(self.texts[_key(prompt)]["states"])

    @property
    def empty_prompt(self) -> Tensor:
        """Its text states (N, D), float32."""
        return self._text_states(EMPTY).float()


def prepare(vae: VAE, text: CLIPText, data: Dataset, indices: Iterable[int],
            folder: Path | None = None, *, keep_latents: bool = True,
            show: bool = True) -> Prepared:
    """Compute what is missing of the pictures `indices` of a data set, and of their prompts, and
    keep it in `folder` (None: in memory). Any number of processes may do this at the same time,
    and be killed.

    Raises ValueError for a broken picture, and for more than memory should hold.
    """
    indices = list(indices)
    prompts = {_key(prompt): prompt
               for prompt in (EMPTY, *map(data.prompt, indices))}
    text_row = np.dtype([("states", np.float16, (TOKENS, text.config.width))])
    by_shape: dict[Shape, list[int]] = {}
    for i in indices:
        by_shape.setdefault(data.shape(i), []).append(i)
    picture_rows = {shape: _picture_row(vae, data, shape) for shape in by_shape}
    size = len(prompts) * text_row.itemsize
    if keep_latents:
        size += sum(len(by_shape[shape]) * row.itemsize for shape, row in picture_rows.items())
    if folder is None and size > LARGEST_IN_MEMORY:
        raise ValueError(f"latents and text states need {in_bytes(size)}: name a folder for "
                         "them with --cache")
    if folder:
        require_disk(folder, size)
    if folder and show:
        print(f"latents and text states of {len(indices):,} pictures: {in_bytes(size)} in "
              f"{folder}")
    texts = Rows(folder and folder / f"text-{_digest(text)}", text_row)
    texts.fill(prompts, lambda prompts: _text_rows(text, prompts, text_row), "prompts", show)
    if not keep_latents:
        return Prepared(data, texts, None, {})
    encoder = nn.ModuleList([vae.encoder, vae.quant_conv])
    with ThreadPoolExecutor(cores()) as pool:
        keys = _picture_keys(data, indices, folder, pool, show)
        digest, pictures = _digest(encoder), {}
        for (height, width), row in picture_rows.items():
            side = f"{height}" if height == width else f"{width}x{height}"
            name = f"latents-{digest}-{side}{'-conditions' * data.keeps_conditions}"
            pictures[height, width] = rows = Rows(folder and folder / name, row)
            rows.fill({keys[i]: i for i in by_shape[height, width]},
                      lambda chunk, row=row: _picture_rows(vae, data, chunk, row, pool),
                      "pictures" if height == width else f"pictures {width} x {height}", show)
    return Prepared(data, texts, pictures, keys)


def require_disk(folder: Path, size: int) -> None:
    """Raises OSError if a folder cannot grow to `size` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    held = sum(path.stat().st_size for path in folder.rglob("rows"))
    free = shutil.disk_usage(folder).free
    if free < size - held:
        raise OSError(f"latents and text states need {in_bytes(size)} in {folder}, its disk has "
                      f"{in_bytes(free)} free: name another folder with --cache")


# --- The rows ---


def _text_rows(text: CLIPText, prompts: list[str], row: np.dtype) -> np.ndarray:
    rows = np.empty(len(prompts), row)
    rows["states"] = encode_prompts(text, prompts).cpu().numpy()
    return rows


@torch.no_grad()
def encode_prompts(text: CLIPText, prompts: list[str]) -> Tensor:
    """Prompts -> text states (B, N, D), float16."""
    padded = prompts + [EMPTY] * (-len(prompts) % PROMPTS_AT_ONCE)
    states = [text.encode(padded[start : start + PROMPTS_AT_ONCE]).half()
              for start in range(0, len(padded), PROMPTS_AT_ONCE)]
    return torch.cat(states)[: len(prompts)]


@torch.no_grad()
def encode_targets(vae: VAE, targets: Tensor) -> Tensor:
    """Bytes (B, 3, H, W) -> mean and log variance of the latents (B, 2, 4, H/8, W/8), float16.

    Batches have one size, whatever B is, so that not even the last bit of a picture's latents
    depends on the pictures that it comes with. One of 512 x 512, or four smaller ones, need less
    memory than a training step, in a resumed run too, whose optimizer is there already.
    """
    weight, (height, width) = next(vae.parameters()), targets.shape[-2:]
    at_once = min(4, max(1, 512**2 // (height * width)))
    targets = targets.to(weight.device, non_blocking=True)
    filler = targets[-1:].expand(-len(targets) % at_once, -1, -1, -1)
    moments = [torch.stack(vae.encode(batch.to(weight.dtype) / 127.5 - 1), dim=1).half()
               for batch in torch.cat([targets, filler]).split(at_once)]
    return torch.cat(moments)[: len(targets)]


def _picture_row(vae: VAE, data: Dataset, shape: Shape) -> np.dtype:
    height, width = shape
    row = [("moments", np.float16, (2, vae.config.latent_channels, height // DOWNSCALE,
                                    width // DOWNSCALE))]
    if data.keeps_conditions:
        row.append(("condition", np.uint8, (height * width // 8,)))
    return np.dtype(row)


def _picture_rows(vae: VAE, data: Dataset, indices: list[int], row: np.dtype,
                  pool: ThreadPoolExecutor) -> np.ndarray:
    rows = np.empty(len(indices), row)
    if data.keeps_conditions:
        pairs = list(pool.map(data.pair, indices))
        rows["condition"] = [_packed(condition) for _, condition in pairs]
        targets = [target for target, _ in pairs]
    else:
        targets = list(pool.map(data.target, indices))
    rows["moments"] = encode_targets(vae, torch.stack(targets)).cpu().numpy()
    return rows


def _packed(condition: Tensor) -> np.ndarray:
    """A condition that is black or white, in bits."""
    white = condition[0] > 127
    if not torch.equal(condition, (white * 255).byte().expand_as(condition)):
        raise ValueError("expected conditions that are black or white, as `keeps_conditions` says")
    return np.packbits(white.numpy())


def _unpacked(bits: np.ndarray, shape: Shape) -> Tensor:
    white = torch.from_numpy(np.unpackbits(bits)).view(1, *shape)
    return (white * 255).expand(3, -1, -1)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())  # what it is a part of may be mapped, and read-only


# --- The keys ---


def _key(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()[:KEY_BYTES]


def _picture_keys(data: Dataset, indices: list[int], folder: Path | None,
                  pool: ThreadPoolExecutor, show: bool) -> dict[int, bytes]:
    """By index, from what a picture is made of: files count by content, which is read only if size
    or time of change are new."""
    sources = {i: data.sources(i) for i in indices}
    stamps = {source: _stamp(source) for parts in sources.values() for source in parts
              if isinstance(source, Path)}
    contents = stamps
    if folder:
        row = np.dtype([("sha256", "S64")])
        files = Rows(folder / "files", row)
        files.fill({_key(stamp): path for path, stamp in stamps.items()},
                   lambda paths: np.array([(digest,) for digest in pool.map(sha256, paths)], row),
                   "files", show)
        contents = {path: files[_key(stamp)]["sha256"].decode() for path, stamp in stamps.items()}
    return {i: _key(repr([contents.get(source, source) for source in parts]))
            for i, parts in sources.items()}


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{os.path.abspath(file)} {status.st_size} {status.st_mtime_ns}"


def _digest(network: nn.Module) -> str:
    """A hash of all weights of a network, and of the products' precision."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    if tensor.is_cuda and torch.backends.cudnn.allow_tf32:
        digest.update(b"TF32")
    return digest.hexdigest()[:16]


# --- Where they are kept, and how they come into a step ---


def cache_folder(settings: Settings) -> Path | None:
    """--cache; without it a folder of our own inside --data; None, in memory, for generated data
    and where that cannot be written."""
    if settings.cache or not settings.data:
        return settings.cache
    folder = settings.data / OWN_FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        pass
    if os.access(folder, os.W_OK):
        return folder
    print(f"{settings.data} cannot be written to: its latents are kept in memory and computed anew "
          "in the next run, without --cache FOLDER")
    return None


def on_device(batch: dict[str, Tensor], vae: VAE) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of `Prepared` on the autoencoder's device, in float32: mean and log variance of the
    latents (B, 2, 4, h, w), the condition (B, 3, 8h, 8w) in [0, 1], text states (B, N, D)."""
    device = next(vae.parameters()).device
    batch = {name: to_device(tensor, device) for name, tensor in batch.items()}
    moments = (batch["moments"] if "moments" in batch else encode_targets(vae, batch["target"]))
    return moments.float(), batch["condition"] / 255, batch["context"].float()
