"""A data set of line art alone: python -m benchmarks.teacher_pictures --out runs/teacher_pictures

Samples the shipped ControlNet on the line art of the training drawings, placed as for training.
Nothing of the true pictures is used: a prompt names the kind of thing and the ground, and up to
three colours at random. --out is a folder for --data; its held-out pairs are the true ones. About
20 minutes on one core; what was interrupted goes on where it was.
"""

import json
import random
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, answer, positive, run

BATCH = 20  # pictures that are sampled together


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("--images", type=positive, default=1_720,
                   help="pictures to make (default: 1720, one of each drawing)")
    p.add_argument("--out", type=Path, default=Path("runs/teacher_pictures"),
                   help="the folder (default: runs/teacher_pictures)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

import torch
from tqdm import tqdm

from common.devices import tune
from common.files import atomic_write
from controlnet.sampling import sample_pictures
from data.drawings import Drawings, prompt, random_placement
from data.palette import PALETTE
from data.pictures import to_image, write_png
from weights import drawings, load_controlnet, load_stable_diffusion

COLORS = [name for name in PALETTE if name not in ("black", "white")]


def invented_prompt(line_art: Drawings, i: int) -> str:
    """What somebody could ask for who sees the lines and nothing else."""
    rng = random.Random(repr(("colors", i)))
    colors = rng.sample(COLORS, rng.randint(1, 3))
    kind = line_art.entries[i % len(line_art.pairs)]["kind"]
    return prompt(kind, colors, random_placement(line_art.seed, i).ground)


def make_pictures(folder: Path, count: int) -> None:
    """The pictures that are not there yet, in batches, then the index of all, beside the drawings
    that are held out."""
    sd = load_stable_diffusion(drawings.SD)
    tune(sd.resolution)
    net = load_controlnet(drawings.CONTROLNET, sd.unet).for_inference()
    line_art = Drawings(drawings.DATA, sd.resolution)
    prompts = [invented_prompt(line_art, i) for i in range(count)]
    (folder / "train" / "lines").mkdir(parents=True, exist_ok=True)
    lines = []
    for first in tqdm(range(0, count, BATCH), desc="batches"):
        batch = range(first, min(first + BATCH, count))
        names = [f"{i:05}.png" for i in batch]
        if not all((folder / "train" / name).exists() for name in names):
            conditions = torch.stack([line_art.condition(i) for i in batch]).float() / 255
            texts = [prompts[i] for i in batch]
            pictures = sample_pictures(sd, net, conditions, texts, seed=first, name="teacher")
            for name, picture, condition in zip(names, pictures, conditions, strict=True):
                write_png(folder / "train" / "lines" / name, to_image(condition))
                write_png(folder / "train" / name, to_image(picture))
        lines += [{"file_name": name, "conditioning_image": f"lines/{name}", "text": prompts[i]}
                  for name, i in zip(names, batch, strict=True)]
    shutil.copytree(drawings.DATA / "held_out", folder / "held_out", dirs_exist_ok=True)
    with atomic_write(folder / "train" / "metadata.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    make_pictures(args.out, args.images)
    print(f"{args.images} pictures in {args.out / 'train'}")


if __name__ == "__main__":
    sys.exit(run(main))
