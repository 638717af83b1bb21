"""UNet, ControlNet and autoencoder compute what diffusers' do, on random weights."""

from collections import Counter

import oracle
import pytest
import torch
from conftest import randomize, relative_error

from controlnet import ControlNet
from unet import UNet, UNetConfig
from vae import DOWNSCALE, LATENT_CHANNELS, VAE, VAEConfig

pytestmark = pytest.mark.usefixtures("no_grad")

TOLERANCE = 1e-5
SD1 = UNetConfig(model_channels=32, context_dim=48, num_heads=4, groups=8)
SD2 = UNetConfig(model_channels=32, context_dim=48, num_heads=None, head_dim=16,
                 linear_projections=True, groups=8)
VAES = [
    VAEConfig(channels=16, groups=8),
    VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, groups=4),
]
# of the latents; 9 x 11 is odd at several levels: 9 x 11, 5 x 6, 3 x 3, 2 x 2
SIZES = [(8, 8), (16, 8), (9, 11)]


@pytest.fixture(scope="module", params=[SD1, SD2], ids=["1.x", "2.x"])
def config(request):
    return request.param


@pytest.fixture(scope="module")
def unets(config):
    ours = randomize(UNet(config), seed=0)
    return ours, oracle.unet(config, oracle.prefixed("model.diffusion_model.", ours.state_dict()))


@pytest.fixture(scope="module")
def controlnets(config):
    ours = randomize(ControlNet(config), seed=1)
    return ours, oracle.controlnet(config, oracle.prefixed("control_model.", ours.state_dict()))


def vae_pair(config: VAEConfig):
    ours = randomize(VAE(config), seed=3)
    return ours, oracle.vae(config, oracle.prefixed("first_stage_model.", ours.state_dict()))


@pytest.fixture(scope="module", params=VAES, ids=["published levels", "other levels"])
def vaes(request):
    return vae_pair(request.param)


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def inputs(request, config):
    """Latents, timesteps, text states, and a condition."""
    height, width = request.param
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, LATENT_CHANNELS, height, width, generator=generator)
    context = torch.randn(2, 77, config.context_dim, generator=generator)
    condition = torch.rand(2, 3, DOWNSCALE * height, DOWNSCALE * width, generator=generator)
    return latents, torch.tensor([17, 801]), context, condition


def test_unet_predicts_the_same_noise(unets, inputs):
    ours, theirs = unets
    latents, timesteps, context, _ = inputs
    expected = theirs(latents, timesteps, context).sample
    assert relative_error(ours(latents, timesteps, context), expected) < TOLERANCE


def test_controlnet_has_the_same_13_outputs(controlnets, inputs):
    ours, theirs = controlnets
    latents, timesteps, context, condition = inputs
    skips, middle = theirs(latents, timesteps, context, condition, return_dict=False)
    outputs, expected = ours(latents, condition, timesteps, context), [*skips, middle]
    assert len(outputs) == len(expected) == 13
    for output, reference in zip(outputs, expected, strict=True):
        assert relative_error(output, reference) < TOLERANCE


def test_unet_under_control_predicts_the_same_noise(unets, controlnets, inputs):
    latents, timesteps, context, condition = inputs
    control = controlnets[0](latents, condition, timesteps, context)
    ours = unets[0](latents, timesteps, context, control)
    skips, middle = controlnets[1](latents, timesteps, context, condition, return_dict=False)
    theirs = unets[1](latents, timesteps, context, down_block_additional_residuals=skips,
                      mid_block_additional_residual=middle).sample
    assert relative_error(ours, theirs) < TOLERANCE
    assert relative_error(ours, unets[0](latents, timesteps, context)) > 0.01  # the control counts


def epsilons(module: torch.nn.Module) -> Counter:
    """How many norms of each kind and width there are for each epsilon."""
    norms = [m for m in module.modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))]
    return Counter((type(norm).__name__, len(norm.weight), norm.eps) for norm in norms)


# 1e-5 or 1e-6: on signals of normal size the difference could hide in the tolerance.
def test_every_norm_of_unet_and_controlnet_has_the_same_epsilon(unets, controlnets):
    for ours, theirs in (unets, controlnets):
        assert epsilons(ours) == epsilons(theirs)


def test_every_norm_of_the_vae_has_the_same_epsilon(vaes):
    assert epsilons(vaes[0]) == epsilons(vaes[1])


def test_vae_encodes_to_the_same_mean_and_log_variance(vaes):
    images = 2 * torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(4)) - 1
    mean, logvar = vaes[0].encode(images)
    expected = vaes[1].encode(images).latent_dist
    assert relative_error(mean, expected.mean) < TOLERANCE
    assert relative_error(logvar, expected.logvar) < TOLERANCE


def test_vae_bounds_the_log_variance_as_diffusers_does():
    ours, theirs = vae_pair(VAES[0])
    ours.quant_conv.weight *= 100
    theirs.quant_conv.weight *= 100
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    logvar = ours.encode(images)[1]
    assert (logvar.min(), logvar.max()) == (-30, 20)
    assert relative_error(logvar, theirs.encode(images).latent_dist.logvar) < TOLERANCE


def test_vae_decodes_to_the_same_picture(vaes):
    latents = torch.randn(2, LATENT_CHANNELS, 5, 7, generator=torch.Generator().manual_seed(6))
    assert relative_error(vaes[0].decode(latents), vaes[1].decode(latents).sample) < TOLERANCE
