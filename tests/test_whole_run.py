"""The memory that the documents promise for a run is enough for all of it: train.py's own code,
preparing, saving, resuming, a step and measuring, at Stable Diffusion 1.5's shape, on a card that
is simulated.

Tensors have a shape and no content. What is on the CPU here stands for the card, and what is
without a place ("meta") for the computer's memory.
"""

import re
import warnings
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import train
from benchmarks.docs import ROOT
from benchmarks.memory import LAYER_ONLY, ROWS, TEXT_PARAMETERS
from controlnet import ControlNet, ControlNetwork
from data.dataset import Dataset
from diffusion import Sampling
from kd import build_student
from text import TOKENS
from training import previews
from training.log import Log
from training.memory import RESERVE, LiveBytes, norms_in_float32
from training.prepared import encode_targets
from training.probe import Probe
from training.settings import parse
from unet import SD15, UNet
from vae import SD_VAE, VAE
from weights import controlnet

GIB, SIZE = 2**30, 512
CELL = r"\s+([\d.]+) \((\d+)\)"  # of the table: GiB, and the smallest card
BETWEEN = r"\s+([\d.]+)"
ROW = re.compile(rf"^(a ControlNet|--[^\n]*?){3 * (CELL + CELL + BETWEEN)}", re.MULTILINE)


def promises() -> dict[tuple[str, str], tuple[float, int]]:
    """Of docs/costs.md by options and precision, at batch size 1: GiB of a step or, if that is
    more, between two; and the card."""
    rows = ROW.findall((ROOT / "docs" / "costs.md").read_text())
    return {(name, precision): (max(float(cells[i]), float(cells[i + 4])), int(cells[i + 1]))
            for name, *cells in rows for precision, i in (("float32", 0), ("bf16", 10))}


class Card(LiveBytes):
    """A card of so many GiB. Every number that is read from it is 1."""

    def __init__(self, gib: int):
        super().__init__()
        self.room = gib * GIB - RESERVE

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self.add(tensor.untyped_storage())
        if self.now > self.room:
            raise torch.OutOfMemoryError(f"{self.now / GIB:.2f} GiB")
        return outputs


class Blank(Dataset):
    """Pictures that show nothing."""

    size = SIZE

    def __init__(self, count: int = 1000):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def target(self, i: int) -> Tensor:
        return torch.zeros(3, SIZE, SIZE, dtype=torch.uint8, device="meta")

    condition = target

    def prompt(self, i: int) -> str:
        return "a house"

    def preview(self, count: int) -> Dataset:
        return Blank(count)

    def fidelity(self, *_: object) -> dict[str, float]:
        return {"overlap": 1.0}


class Text(nn.Module):
    """The text encoder's weights, and states of the shape that it gives."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(TEXT_PARAMETERS["sd15"]))

    def encode(self, prompts: list[str]) -> Tensor:
        return self.weight.new_zeros(len(prompts), TOKENS, SD15.context_dim)


class ShortProbe(Probe):
    """It keeps all its samples, and measures one."""

    def __call__(self, net: ControlNetwork) -> float:
        self.target = self.target[:1]
        return super().__call__(net)


@pytest.fixture(scope="module")
def sd():
    with torch.device("meta"):
        return SimpleNamespace(unet=UNet(SD15), vae=VAE(SD_VAE), text=Text(), sampling=Sampling(1),
                               teacher=ControlNet(SD15))


def move(network: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """`nn.Module.to`, which fake tensors do not allow."""
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            moved = torch.empty(p.shape, device=device, dtype=dtype or p.dtype)
            setattr(module, name, nn.Parameter(moved, p.requires_grad))
    return network


def connect_only_middle(net: ControlNetwork) -> None:
    """Without a look at the values."""
    net.only_middle = True
    net.zero_convs.requires_grad_(False)


def prepare_data(settings, sd, data, *_) -> SimpleNamespace:
    encode_targets(sd.vae, torch.stack([data.target(i) for i in range(8)]))
    return SimpleNamespace(empty_prompt=torch.zeros(TOKENS, SD15.context_dim, device="meta"))


def batches(*_, **__):
    half = {"dtype": torch.float16, "device": "meta"}
    yield {"moments": torch.zeros(1, 2, 4, SIZE // 8, SIZE // 8, **half),
           "condition": Blank().condition(0)[None],
           "context": torch.zeros(1, TOKENS, SD15.context_dim, **half)}


def gradients_alone(settings, unet, student, teacher, inputs, target, scaler, *_):
    """In place of the first step's passes: AdamW makes its moments from them."""
    for p in student.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return {"loss": scaler.scale(torch.zeros(()))}


@pytest.fixture
def run(sd, monkeypatch, tmp_path):
    """A function of the card and train.py's options: prepare and save a first step; then resume,
    prepare again, train a step, save it, and measure. Returns the peaks until that step is done and
    after it, and the log."""
    states, log, peaks = [], [], []
    show, write, forward_backward = train.show, Log.write, train.forward_backward

    def save(state: dict, file: object) -> None:
        states.append(tree_map(lambda x: x.to("meta") if isinstance(x, FakeTensor) else x, state))

    def run_on(card: Card, options: list[str]) -> tuple[int, int, list[dict]]:
        def show_and_count(*args: object) -> None:
            peaks.append(card.peak)
            card.reset_peak()
            show(*args)

        def write_and_keep(writer: Log, entry: dict) -> None:
            log.append(entry)
            write(writer, entry)

        for owner, name, stand_in in (
                (nn.Module, "to", move), (ControlNetwork, "connect_only_middle",
                                          connect_only_middle),
                (train, "prepare_data", prepare_data), (train, "batches", batches),
                (train, "show", lambda *args: write_and_keep(*args[-2:])),
                (train, "forward_backward", gradients_alone), (train, "Probe", ShortProbe),
                (train, "averages", lambda sums: {"loss": 1.0}),
                (train, "check_disk", lambda *_: None), (previews, "GRID_SAMPLES", 1),
                (previews, "write_png", lambda *_: None), (previews, "to_image", lambda *_: None),
                (previews, "grid", lambda *_, **__: None),
                (controlnet, "write_tensors", lambda *_: None),
                (train, "save_stable_diffusion", lambda *_: None),
                (torch, "save", save), (torch, "load", lambda *_, **__: states[-1]),
                (Log, "write", write_and_keep)):
            monkeypatch.setattr(owner, name, stand_in)
        settings = parse(["--batch-size", "1", "--steps", "1", "--sample-every", "1",
                          "--sample-steps", "1", "--fidelity-samples", "1", *options,
                          "--out", str(tmp_path)])
        settings = replace(settings, device=torch.device("cpu"), accumulate=1, lr=1e-5,
                           unlock_at=0, loss_layer=1.0)
        with torch.device("meta"):
            net = ControlNet(SD15)
            if settings.student:
                net = build_student(settings.student, sd.unet)
        teacher = sd.teacher if settings.teacher else None
        norms = norms_in_float32 if settings.precision == "bf16" else nullcontext
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake, card, norms():
            train.train(settings, *deepcopy((sd, net, teacher)), Blank(), torch.Generator())
        monkeypatch.setattr(train, "show", show_and_count)
        monkeypatch.setattr(train, "forward_backward", forward_backward)
        settings = replace(settings, steps=2, resume=True)
        with fake, card, norms():
            train.train(settings, *deepcopy((sd, net, teacher)), Blank(), torch.Generator())
        step, = peaks
        return step, card.peak, log

    return run_on


OFTEN = [("--student reduced_layer", "bf16")]  # the others are slow


@pytest.mark.parametrize(("row", "precision"), [
    pytest.param(*promise, marks=() if promise in OFTEN else pytest.mark.slow)
    for promise in promises()])
def test_a_whole_run_stays_within_the_card_that_is_promised(run, row, precision):
    gib, card = promises()[row, precision]
    options = row.replace("a ControlNet", "").replace(f", {LAYER_ONLY}", "").split()
    if "--student" in options:
        options = ["--teacher", "tiny", *options]
    options += ["--precision", precision, "--layer-only-steps", "2" if LAYER_ONLY in row else "0"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not measured")
        step, after, log = run(Card(card), options)
    assert log[1].keys() == {"step", "loss", "lr", "probe", "overlap"} and log[1]["step"] == 2
    assert max(step, after) / GIB == pytest.approx(gib, abs=0.2)  # the table's count is right
    if "large" not in row and LAYER_ONLY not in row:
        assert after < step  # what happens between steps needs no more than they do


def test_a_run_that_needs_more_than_the_card_is_noticed(run):
    with pytest.raises(torch.OutOfMemoryError):
        run(Card(4), ["--precision", "float32", "--layer-only-steps", "0"])


def test_the_table_has_a_promise_for_every_row_of_the_benchmark():
    assert {name for name, _ in promises()} == {row or "a ControlNet" for row in ROWS}
