"""The counter of a step's memory: exact on programs that can be counted by hand, and it sees what
each setting saves."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from benchmarks.costs import BASES
from benchmarks.memory import TEXT_PARAMETERS, card, peaks
from controlnet import ControlNet
from text.clip import TINY_TEXT, CLIPText
from training import defaults
from training.memory import LiveBytes, peak_bytes, rehearse
from training.settings import parse
from unet import TINY, UNet
from vae import TINY_VAE, VAE


def test_the_peak_is_of_what_is_alive_together():
    with FakeTensorMode(), LiveBytes() as counter:
        a = torch.zeros(100)                # 400
        b = torch.zeros(50)                 # 600
        view, same = a[10:].reshape(9, 10), a.detach()
        assert counter.now == counter.peak == 600
        del a, view
        assert counter.now == 600           # `same` still holds it
        del same, b
        assert counter.now == 0
        c = a = torch.zeros(10)
        c.add_(1)
        assert counter.now == 40 and counter.peak == 600
        d = c + 1 + 1                       # the first sum is a temporary
        assert counter.now == 80 and counter.peak == 600
        e = torch.zeros(110, dtype=torch.float64)
    assert counter.peak == 960 and len(a) + len(d) + len(e) == 130


@pytest.fixture
def small(monkeypatch):
    """A base model with half of the tiny one's levels and of their blocks, and so with fewer
    operations to be counted."""
    unet = replace(TINY, channel_mult=(1, 2), attention=(True, False), num_res_blocks=1)
    base = unet, TINY_VAE, 64
    monkeypatch.setitem(BASES, "small", base)
    monkeypatch.setitem(TEXT_PARAMETERS, "small", 1_000_000)
    return base


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_weights_gradients_and_moments_are_counted(small):
    """A ControlNet in float32: weights, gradients and two moments, and the frozen networks."""
    unet, vae, _ = small
    trained, frozen = parameters(ControlNet(unet)), parameters(UNet(unet)) + parameters(VAE(vae))
    step, between = peaks("small", "", batch_size=1)
    assert step > 4 * (4 * trained + frozen + 1_000_000)
    assert 4 * (3 * trained + frozen + 1_000_000) < between  # gradients are gone by then


def test_the_large_mode_counts_what_it_unlocks(small):
    """Two moments for each weight, and a gradient, which is gone between two steps."""
    unet = UNet(small[0])
    decoder = parameters(unet.output_blocks) + parameters(unet.out)
    between = [peaks("small", f"--student lite --mode large --unlock {what}", batch_size=1)[1]
               for what in ("decoder", "all")]
    assert between[1] - between[0] == 4 * 2 * (parameters(unet) - decoder)


def test_every_economy_lowers_the_peak(small):
    def peak(more: str = "", batch_size: int = 8) -> int:
        return peaks("small", f"--student reduced_layer {more}", batch_size)[0]

    whole = peak()
    assert peak(batch_size=2) < whole
    assert peak("--precision bf16") < whole and peak("--checkpointing") < whole
    assert whole < peak("--mode large") < peak("--mode large --unlock all")


def test_what_happens_between_steps_needs_no_more_than_the_step():
    """At the size of Stable Diffusion, where it counts (in the large mode not even nearly)."""
    for options in ("", "--student reduced_layer --precision bf16", "--student mlp"):
        step, between = peaks("sd15", options, batch_size=1)
        assert between < step, options


def test_the_count_is_what_a_step_on_real_tensors_holds(small):
    with LiveBytes() as counter:
        settings = replace(parse([]), precision="float32", loss_layer=1.0)
        config, vae, size = small
        networks = UNet(config), VAE(vae), CLIPText(TINY_TEXT), ControlNet(config), None, size, 2
        before = counter.now
        measured = rehearse(counter, train.forward_backward, settings, *networks)[0] - before
    assert peak_bytes(train.forward_backward, settings, *networks)[0] == pytest.approx(
        measured, rel=0.01)


def test_the_batch_is_the_largest_that_has_room(monkeypatch):
    """And checkpointing comes in only where a single picture has none without."""
    gib = 2**30

    def peaks(step, settings, unet, vae, text, net, teacher, size, batch) -> tuple[int, int]:
        return (4 + batch * (1 if settings.checkpointing else 2)) * gib, 6 * gib

    monkeypatch.setattr(defaults, "peak_bytes", peaks)
    sd = SimpleNamespace(unet=None, vae=None, text=None, resolution=512)

    def fitting(free: int) -> tuple[int, bool, int]:
        return defaults.fitting_batch(parse([]), sd, None, None, train.forward_backward, 8,
                                      free * gib)

    assert fitting(21) == (8, False, 21 * gib)      # 4 + 8 * 2, and RESERVE
    assert fitting(20) == (4, False, 13 * gib)
    assert fitting(8) == (1, False, 7 * gib)
    assert fitting(7) == (1, False, 7 * gib)        # what happens between steps needs 6
    assert fitting(6) == (0, True, 7 * gib)


def test_a_card_needs_more_than_the_tensors_take():
    assert [card(int(gib * 2**30)) for gib in (6.9, 7.1, 10.9, 100)] == ["8", "12", "12", "more"]
