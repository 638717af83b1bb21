"""The README's first picture: line drawings that no network has seen, coloured by the base, the
teacher and every student of weights/drawings: python -m benchmarks.gallery"""

import sys
from argparse import Namespace
from pathlib import Path

from common.cli import Parser, answer, non_negative, positive, run
from weights import drawings

# Held-out drawings (names in weights/drawings/data/held_out), each of another kind.
SHOWN = ("1F422", "1F413", "26F5", "1F337", "1F368")


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__)
    p.add_argument("names", nargs="*", default=SHOWN, metavar="NAME",
                   help=f"held-out drawings (default: {' '.join(SHOWN)})")
    p.add_argument("--steps", type=positive, default=20, help="of DDIM (default: 20)")
    p.add_argument("--seed", type=non_negative, default=0, help="of the noise (default: 0)")
    p.add_argument("--out", type=Path, default=Path("runs/gallery.png"),
                   help="(default: runs/gallery.png)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before PyTorch is imported
    answer(parse)

from torch.utils.data import default_collate

from common.devices import tune
from controlnet import ControlNetwork
from controlnet.sampling import sample_pictures
from data.grids import grid
from data.own import evaluation_data
from data.pictures import write_png
from weights import load_controlnet, load_stable_diffusion


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sd = load_stable_diffusion(drawings.SD).sampled(args.steps)
    tune(sd.resolution)
    held_out = evaluation_data(drawings.DATA, sd.resolution)
    places = {pair.files[0].stem: i for i, pair in enumerate(held_out.pairs)}
    unknown = [name for name in args.names if name not in places]
    if unknown:
        raise ValueError(f"expected names of held-out drawings, got {unknown[0]!r}")
    samples = default_collate([held_out[places[name]] for name in args.names])

    files = [*drawings.STUDENTS.glob("*.safetensors"), drawings.CONTROLNET]
    networks = [load_controlnet(file, sd.unet) for file in files]
    columns = {"line art": samples["condition"], "base": None}
    columns |= {f"{name(net)} {size(net) / 1e6:.2f} M": net for net in sorted(networks, key=size)}
    for title, net in columns.items():
        if title != "line art":
            columns[title] = sample_pictures(sd, net, samples["condition"], samples["prompt"],
                                             seed=args.seed, name=title)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    write_png(args.out, grid(list(columns), rows, cell=160))
    print(args.out)


def name(net: ControlNetwork) -> str:
    return "ControlNet" if net.architecture == "controlnet" else net.architecture


def size(net: ControlNetwork) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


if __name__ == "__main__":
    sys.exit(run(main))
