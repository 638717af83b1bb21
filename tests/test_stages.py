"""The scripts that make the shipped models: a stage survives a kill, and what is done is kept."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data.drawings import Drawings
from unet import TINY, UNet
from vae import LATENT_SCALE
from weights import drawings, load_stable_diffusion, stages, tiny
from weights.stages import normalize_latents, stage, train, train_unet


def fit(generator: torch.Generator, steps: int, state: Path, dies_at: int = -1) -> nn.Module:
    """A linear layer on random numbers; KeyboardInterrupt at a step."""
    network = nn.Linear(3, 1)
    nn.init.normal_(network.weight, generator=generator)
    nn.init.zeros_(network.bias)
    calls = iter(range(10_000))

    def loss_of_step() -> Tensor:
        if next(calls) == dies_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator)
        return (network(x) - x.sum(1, keepdim=True)).square().mean()

    return train(network, loss_of_step, steps, lr=0.05, ema=0.9, generator=generator, state=state)


def test_a_stage_that_was_killed_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "SAVE_EVERY", 10)
    whole = stage(nn.Linear(3, 1), tmp_path / "whole", 600, fit)
    with pytest.raises(KeyboardInterrupt):
        stage(nn.Linear(3, 1), tmp_path / "killed", 600, lambda *a: fit(*a, dies_at=337))
    assert torch.load(tmp_path / "killed_600_steps.pt", weights_only=True)["step"] == 330
    resumed = stage(nn.Linear(3, 1), tmp_path / "killed", 600, fit)
    assert torch.equal(whole.weight, resumed.weight)
    assert (whole.weight - 1).abs().max() < 0.1
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "killed_600_steps.safetensors", "whole_600_steps.safetensors"]


def test_a_stage_that_is_done_is_read_and_frozen(tmp_path):
    made = stage(nn.Linear(3, 1), tmp_path / "x", 20, fit)
    read = stage(nn.Linear(3, 1), tmp_path / "x", 20, lambda *_: pytest.fail("trained again"))
    assert torch.equal(made.weight, read.weight) and not read.weight.requires_grad


def test_normalized_latents_have_unit_variance_and_decode_to_the_same():
    vae = load_stable_diffusion(tiny.SD).vae
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = vae.decode(vae.encode(images)[0])
    for parameter in (vae.quant_conv.weight, vae.post_quant_conv.weight):
        parameter.data *= 1 + torch.arange(parameter.shape[1])[:, None, None] / 9
    after = vae.decode(vae.encode(images)[0])
    normalize_latents(vae, images)
    mean, logvar = vae.encode(images)
    latents = mean * LATENT_SCALE
    variance = latents.var((0, 2, 3)) + LATENT_SCALE**2 * logvar.exp().mean((0, 2, 3))
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert (variance - 1).abs().max() < 1e-2
    assert torch.allclose(vae.decode(mean), after, atol=1e-3)
    assert not torch.allclose(before, after, atol=1e-3)


def test_the_denoiser_learns_from_drawings(tmp_path):
    """Two steps of the real thing: shapes, gradients, the file that it would go on from.

    At its size, too: of 64 pixels the lowest level keeps one, which can attend to nothing but
    itself, so that its queries and keys have no gradient.
    """
    base = load_stable_diffusion(tiny.SD)
    data = Drawings(drawings.DATA, 128, variants=1)
    data.pairs, data.entries = data.pairs[:8], data.entries[:8]
    generator = torch.Generator().manual_seed(0)
    unet = UNet(TINY)
    unet.load_state_dict(base.unet.state_dict())
    made = train_unet(unet, base.vae, base.text, data, 4, generator, 2, tmp_path / "u.pt")
    changed = [not torch.equal(a, b) for a, b in zip(made.parameters(), base.unet.parameters(),
                                                     strict=True)]
    assert all(changed) and (tmp_path / "u.pt").exists()
