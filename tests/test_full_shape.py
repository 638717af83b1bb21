"""Slow: Stable Diffusion 1.5 and 2.1 at their real size, random weights under the published names,
against diffusers. Run with `pytest -m slow`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import relative_error
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import sample
from weights import convert, load_controlnet, load_stable_diffusion

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_grad")]

MANIFESTS = Path(__file__).parent / "manifests"
FAMILIES = {"1.5": ("sd15_ldm", "controlnet_sd15_ldm"),
            "2.1": ("sd21base_ldm", "controlnet_sd21_ldm")}


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def write_random(path: Path, manifest: str, seed: int) -> Path:
    """A file with a manifest's names and shapes. Weights keep a signal's size; nothing is zero."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in json.loads((MANIFESTS / f"{manifest}.json").read_text()).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(77)[None]
        elif len(shape) > 1:
            tensors[name] = noise * noise[0].numel() ** -0.5
        else:
            tensors[name] = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def files(request, tmp_path_factory):
    """Checkpoint and ControlNet of one family, original naming; removed afterwards (6 GB)."""
    folder = tmp_path_factory.mktemp("full")
    sd, control = FAMILIES[request.param]
    yield (write_random(folder / "sd.safetensors", sd, seed=0),
           write_random(folder / "control.safetensors", control, seed=1))
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


@pytest.mark.filterwarnings("ignore:.*no prediction type")
def test_one_forward_of_every_network_is_diffusers_forward(files):
    sd = load_stable_diffusion(files[0])
    net, tensors = load_controlnet(files[1], sd.unet), load_file(files[0])
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 32, 32, generator=generator)
    context = torch.randn(1, 77, sd.unet.config.context_dim, generator=generator)
    condition = torch.rand(1, 3, 256, 256, generator=generator)
    picture = torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1
    timesteps = torch.tensor([321])

    control = net(latents, condition, timesteps, context)
    down, middle = oracle.controlnet(net.config, load_file(files[1]))(
        latents, timesteps, context, condition, return_dict=False)
    assert max(relative_error(a, b) for a, b in zip(control, [*down, middle], strict=True)) <= 1e-5

    theirs = oracle.unet(sd.unet.config, tensors)
    expected = theirs(latents, timesteps, context).sample
    assert relative_error(sd.unet(latents, timesteps, context), expected) <= 1e-5
    expected = theirs(latents, timesteps, context, down_block_additional_residuals=down,
                      mid_block_additional_residual=middle).sample
    assert relative_error(sd.unet(latents, timesteps, context, control), expected) <= 1e-5
    del theirs

    theirs = oracle.vae(sd.vae.config, tensors)
    expected = theirs.encode(picture).latent_dist.mean
    assert relative_error(sd.vae.encode(picture)[0], expected) <= 1e-5
    assert relative_error(sd.vae.decode(latents), theirs.decode(latents).sample) <= 1e-5
    del theirs

    theirs = oracle.text(sd.text.config, tensors)
    tokens = sd.text.tokenize(["a photo of an astronaut riding a horse on mars", ""])
    states = theirs(tokens).last_hidden_state  # of 2.x after 23 of the 24 layers
    assert relative_error(sd.text(tokens), states) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*no prediction type")
def test_sample_py_makes_diffusers_picture_from_every_naming(files, tmp_path):
    checkpoint, control = files
    bare = control.with_name("bare.safetensors")
    diffusers = control.with_name("diffusers.safetensors")
    folder = control.with_name("folder")
    convert.convert(control, bare)
    convert.convert(control, diffusers, naming="diffusers")
    convert.convert(control, folder, naming="diffusers")
    condition = Image.new("RGB", (256, 256))
    ImageDraw.Draw(condition).ellipse((40, 60, 200, 220), outline="white", width=3)
    condition.save(tmp_path / "condition.png")
    prompt, negative = "a photo of an astronaut riding a horse", "blurry"

    pictures = []
    for source in (control, bare, diffusers, folder):
        arguments = {
            "checkpoint": checkpoint, "controlnet": source, "condition": tmp_path / "condition.png",
            "prompt": prompt, "negative-prompt": negative, "steps": 4, "guidance": 9, "seed": 1,
            "device": "cpu", "out": tmp_path / "out.png"}
        sample.main([f"--{name}={value}" for name, value in arguments.items()])
        pictures.append(np.asarray(Image.open(tmp_path / "out.png")).astype(int))
    assert all(np.array_equal(pictures[0], other) for other in pictures[1:])

    sd = load_stable_diffusion(checkpoint)
    theirs = oracle.pipeline(sd, checkpoint, [control], oracle.scheduler())
    image = theirs(prompt, condition, negative_prompt=negative, num_inference_steps=4,
                   guidance_scale=9.0, generator=torch.Generator().manual_seed(1)).images[0]
    difference = np.abs(pictures[0] - np.asarray(image).astype(int))
    print(f"mean difference {difference.mean():.5f}, max {difference.max()} of 255; "
          f"picture: mean {pictures[0].mean():.1f}, std {pictures[0].std():.1f}")
    assert difference.mean() < 0.5 and difference.max() <= 3
    assert pictures[0].std() > 20 and np.isin(pictures[0], (0, 255)).mean() < 0.5


LOAD = """
import resource, sys, warnings
from pathlib import Path
from weights import load_stable_diffusion
warnings.simplefilter("ignore")
def peak():
    lines = open("/proc/self/status")
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
before, size = peak(), Path(sys.argv[1]).stat().st_size
sd = load_stable_diffusion(sys.argv[1])
for network in (sd.unet, sd.vae, sd.text):
    sum(p.double().sum().item() for p in network.parameters())  # every page is read
print(before, peak(), size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_little_more_memory_than_the_file_is_long(files):
    done = subprocess.run([sys.executable, "-c", LOAD, str(files[0])], capture_output=True,
                          text=True, check=True)
    before, peak, size = map(int, done.stdout.split())
    print(f"file {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, {before / 1e9:.2f} GB before "
          f"loading: {(peak - before) / size:.3f} times the file")
    assert peak - before <= 1.15 * size
