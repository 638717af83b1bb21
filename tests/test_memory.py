"""The counter of a step's memory: exact on programs that can be counted by hand, and it sees what
each setting saves."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from benchmarks.memory import card, peaks
from controlnet import ControlNet
from text.clip import TINY_TEXT, CLIPText
from training.defaults import fitting_batch
from training.memory import RESERVE, LiveBytes, peak_bytes, rehearse
from training.settings import parse
from unet import TINY, UNet
from vae import TINY_VAE, VAE
from weights import StableDiffusion


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


def test_weights_gradients_and_moments_are_counted():
    """A ControlNet of the tiny model's shape in float32: weights, gradients and two moments, and
    the frozen networks."""
    trained = 4_029_232
    frozen = 3_490_816 + 5_114_468 + 2_725_623 + 3_267_136
    step, between = peaks("tiny", "", batch_size=1)
    assert step > 4 * (4 * trained + frozen)
    assert 4 * (3 * trained + frozen) < between  # gradients are gone by then


def test_every_economy_lowers_the_peak():
    def peak(more: str = "", batch_size: int = 8) -> int:
        return peaks("tiny", f"--student reduced_layer {more}", batch_size)[0]

    whole = peak()
    assert peak(batch_size=2) < whole
    assert peak("--precision bf16") < whole and peak("--checkpointing") < whole
    assert peak("--teacher none") < whole < peak("--mode large")


def test_what_happens_between_steps_needs_no_more_than_the_step():
    """At the size of Stable Diffusion, where it counts (in the large mode not even nearly)."""
    for options in ("", "--student reduced_layer --precision bf16", "--student mlp"):
        step, between = peaks("sd15", options, batch_size=1)
        assert between < step, options


def test_the_count_is_what_a_step_on_real_tensors_holds():
    with LiveBytes() as counter:
        settings = replace(parse([]), precision="float32", loss_layer=1.0)
        unet, vae, text, net = UNet(TINY), VAE(TINY_VAE), CLIPText(TINY_TEXT), ControlNet(TINY)
        networks = unet, vae, text, net, None, 64, 2
        before = counter.now
        measured = rehearse(counter, train.forward_backward, settings, *networks)[0] - before
    assert peak_bytes(train.forward_backward, settings, *networks)[0] == pytest.approx(
        measured, rel=0.01)


def test_the_batch_is_the_largest_that_has_room():
    """And checkpointing comes in only where a single picture has none without."""
    unet, vae, text, net = UNet(TINY), VAE(TINY_VAE), CLIPText(TINY_TEXT), ControlNet(TINY)
    sd = StableDiffusion(unet, vae, text, resolution=256)
    settings = replace(parse([]), precision="float32", loss_layer=1.0)

    def fitting(free: int) -> tuple[int, bool, int]:
        return fitting_batch(settings, sd, net, None, train.forward_backward, 8, free)

    def need(batch: int) -> int:
        return RESERVE + max(peak_bytes(train.forward_backward, settings, unet, vae, text, net,
                                        None, 256, batch))

    assert fitting(need(8)) == (8, False, need(8))
    assert fitting(need(8) - 1)[:2] == (4, False)
    assert fitting(need(1) - 1)[:2] == (1, True)
    batch, _, needed = fitting(RESERVE)
    assert batch == 0 and RESERVE < needed < need(1)


def test_a_card_needs_more_than_the_tensors_take():
    assert [card(int(gib * 2**30)) for gib in (6.9, 7.1, 10.9, 100)] == ["8", "12", "12", "more"]
