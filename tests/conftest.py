"""What several test files share: modules whose every weight counts, and the measure of
agreement."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import train
from diffusion import Sampling
from text.clip import TINY_TEXT, CLIPText
from unet import TINY, UNet, UNetConfig
from vae import TINY_VAE, VAE
from weights import StableDiffusion, save_stable_diffusion

# these networks are too small to share among threads, which would mostly wait for each other
torch.set_num_threads(1)
# nor does a run have to measure itself on 32 pictures, each of which is encoded by itself
train.PROBE_SAMPLES = 4


# The tiny model's first two levels, for what does not depend on how many there are: a training run
# takes little more than half the time.
TWO_LEVELS = replace(TINY, channel_mult=(1, 2), attention=(True, False))


def random_base(config: UNetConfig) -> StableDiffusion:
    networks = [
        randomize(network, seed).requires_grad_(False)
        for seed, network in enumerate((UNet(config), VAE(TINY_VAE), CLIPText(TINY_TEXT)))
    ]
    return StableDiffusion(*networks, Sampling(guidance=3.0), lr=1e-3, resolution=64)


def written(sd: StableDiffusion, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "sd.safetensors"
    save_stable_diffusion(path, sd, dtype=torch.float32)
    return path


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A network that a test leaves as it was made has the same weights in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sd() -> StableDiffusion:
    """A base model of the tiny model's shape with random weights, frozen."""
    return random_base(TINY)


@pytest.fixture(scope="session")
def base_file(sd, tmp_path_factory) -> Path:
    """The same base model as a file, in float32."""
    return written(sd, tmp_path_factory)


@pytest.fixture(scope="session")
def two_levels() -> StableDiffusion:
    """The same of two levels."""
    return random_base(TWO_LEVELS)


@pytest.fixture(scope="session")
def two_levels_file(two_levels, tmp_path_factory) -> Path:
    return written(two_levels, tmp_path_factory)


@pytest.fixture
def uncounted(monkeypatch) -> None:
    """evaluate.py does not count what networks cost, which takes seconds."""
    monkeypatch.setattr("evaluate.sizes_and_work", lambda *_: {"parameters stored": 1})


# Options that keep a training short: small pictures, few of them sampled, and no final table.
SHORT = ["--resolution", "32", "--sample-steps", "1", "--fidelity-samples", "1",
         "--report-samples", "0", "--log-every", "1"]


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with seeded noise and return the module in eval mode. Nothing stays
    zero: a network whose last layer is zero proves nothing.

    Weights have a standard deviation of 1/sqrt(fan_in), which keeps a signal's size, biases of 0.1;
    norms scale by about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(parameter[0].numel() ** -0.5 * noise)
        elif name.endswith("weight"):
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.copy_(0.1 * noise)
    return module.eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute value expected, which must not be all
    zeros or one constant."""
    assert actual.shape == expected.shape
    assert expected.std() > 0
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules have the same tensors, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
