"""The counter of a step's memory: exact on programs that can be counted by hand, and it sees what
each setting saves."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import SETTINGS, LiveBytes, card, peak_bytes

CONTROLNET = next(setting for setting in SETTINGS if setting.name == "ControlNet")


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
    peak = peak_bytes("tiny", CONTROLNET, bf16=False, checkpointing=False, batch=1)
    assert peak > 4 * (4 * trained + frozen)


def test_every_economy_lowers_the_peak():
    def peak(bf16=False, checkpointing=False, batch=8) -> int:
        return peak_bytes("tiny", SETTINGS[0], bf16, checkpointing, batch)

    whole = peak()
    assert peak(batch=2) < whole and peak(bf16=True) < whole and peak(checkpointing=True) < whole


def test_a_card_needs_more_than_the_tensors_take():
    assert [card(int(gib * 2**30)) for gib in (6.9, 7.1, 10.9, 100)] == ["8", "12", "12", "more"]
