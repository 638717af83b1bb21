"""On a GPU: nothing of a step or of sampling is on the wrong device, nothing makes the CPU wait.

Where there is no GPU, the same code runs at Stable Diffusion 1.5's shape on tensors that have a
device and no content (FakeTensorMode): two devices in one operation, and every read of a number,
are errors there. Only the backward pass is left to autograd: without a GPU it cannot run. That
shape is slow; without `-m slow` networks of fewer blocks stand for it, with all of its operations.
"""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SHORT, randomize
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from common.devices import DTYPES
from controlnet import ABLATIONS, ControlNet, ControlNetwork, ablations
from controlnet.sampling import Control, generate, guess_scales
from diffusion import Sampling
from kd import STUDENTS, build_student
from text import TOKENS
from training.memory import empty_copy
from training.settings import parse
from unet import SD15, TINY, UNet
from vae import SD_VAE, TINY_VAE, VAE

CUDA = torch.device("cuda", 0)
# A level with attention and one without, of one residual block each.
FEWER_BLOCKS = replace(SD15, channel_mult=(1, 2), attention=(True, False), num_res_blocks=1)
SIZE, BATCH = 256, 2


class OneWay(TorchDispatchMode):
    """No operation brings what is on the GPU back to the CPU, for which it would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        before, after = ({t.device.type for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
                         for tree in ((args, kwargs), outputs))
        assert not ("cuda" in before and "cpu" in after), func
        return outputs


class Read(Exception):
    """Raised where training first reads numbers of the device: for the log."""


@pytest.fixture(scope="module", params=[
    pytest.param((FEWER_BLOCKS, TINY_VAE), id="fewer blocks"),
    pytest.param((SD15, SD_VAE), id="sd15", marks=pytest.mark.slow)])
def meta(request):
    """The networks, without memory."""
    config, autoencoder = request.param
    with torch.device("meta"):
        return SimpleNamespace(unet=UNet(config), vae=VAE(autoencoder), teacher=ControlNet(config),
                               text=nn.Linear(1, 1))


@pytest.fixture(scope="module")
def fake():
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def cuda_without_cuda(monkeypatch, fake):
    """Fake tensors on "cuda". What asks for real hardware is replaced by what it comes to."""

    def backward(loss: torch.Tensor) -> None:
        """A gradient for every leaf that the loss depends on."""
        todo, done = [loss.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in done:
                continue
            done.add(node)
            if hasattr(node, "variable"):
                node.variable.grad = torch.zeros_like(node.variable)
            todo += [following for following, _ in node.next_functions]

    @contextmanager
    def autocast(settings):
        torch.set_autocast_enabled("cuda", settings.precision != "float32")
        torch.set_autocast_dtype("cuda", DTYPES[settings.precision])
        yield
        torch.set_autocast_enabled("cuda", False)

    monkeypatch.setattr(train, "autocast", autocast)
    monkeypatch.setattr(train, "gradient_scaler",
                        lambda *_: torch.amp.GradScaler("cuda", enabled=False))
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)  # they are there already
    monkeypatch.setattr(ControlNetwork, "connect_only_middle",
                        lambda self: setattr(self, "only_middle", True))  # it looks at values
    with fake, OneWay():
        yield


def on_cuda(meta, dtype: torch.dtype, learns: torch.dtype | None = None) -> SimpleNamespace:
    """The base model on the fake GPU."""
    return SimpleNamespace(
        unet=empty_copy(meta.unet, CUDA, learns or dtype), sampling=Sampling(prediction="v"),
        vae=empty_copy(meta.vae, CUDA, torch.float32), text=empty_copy(meta.text, CUDA, dtype))


@pytest.fixture(scope="module")
def frozen(meta, fake):
    """The same for sampling, which changes nothing of it."""
    with fake:
        return on_cuda(meta, torch.bfloat16)


def batches(*_, **__):
    """As the loader gives them: from the CPU."""
    side = SIZE // 8
    while True:
        yield {"moments": torch.zeros(BATCH, 2, 4, side, side, dtype=torch.float16),
               "condition": torch.zeros(BATCH, 3, SIZE, SIZE, dtype=torch.uint8),
               "context": torch.zeros(BATCH, TOKENS, SD15.context_dim, dtype=torch.float16)}


SETTINGS = [
    *(["--student", name, "--layer-only-steps", n] for name in STUDENTS for n in ("0", "1")),
    *(["--ablation", name] for name in ABLATIONS),
    ["--ablation", "finetune", "--mode", "large"],
    ["--student", "lite", "--layer-only-steps", "1", "--layer-statistics", "channel"],
    [], ["--mode", "small"], ["--mode", "large", "--unlock-at", "1"],
    ["--student", "reduced_layer", "--mode", "large", "--layer-only-steps", "0"],
    *(["--student", name, "--mode", "large", "--unlock", "all", "--layer-only-steps", "0"]
      for name in ("reduced_layer", "mlp")),
    ["--student", "loha", "--ema", "0.9", "--clip", "1", "--accumulate", "2"],
    ["--student", "modulated", "--precision", "float32", "--checkpointing"],
]


@pytest.mark.parametrize("options", SETTINGS, ids=" ".join)
def test_a_step_stays_on_its_device_and_reads_no_number(
        meta, fake, monkeypatch, tmp_path, options):
    steps = 2 if "--unlock-at" in options else 1
    settings = parse(["--steps", str(steps), "--batch-size", str(BATCH), *options,
                      "--out", str(tmp_path / "run")])
    settings = replace(
        settings, device=CUDA, lr=1e-5, precision=settings.precision or "bf16", loss_layer=1.0,
        accumulate=settings.accumulate or 1, layer_only_steps=settings.layer_only_steps or 0,
        unlock_at=settings.unlock_at or 0, log_every=100)
    with torch.device("meta"):
        net = ControlNet(meta.unet.config)
        if settings.student:
            net = build_student(settings.student, meta.unet)
        elif settings.ablation == "finetune":
            net = ablations.FinetunedEncoder(meta.unet.config)
        elif settings.ablation and "lite" in settings.ablation:
            net = ablations.Lite(meta.unet.config, settings.ablation.split("_")[1])
    read = []
    monkeypatch.setattr(train, "begin", lambda *_: (0, None, {}))
    monkeypatch.setattr(train, "Probe", lambda *_: None)
    monkeypatch.setattr(train, "preview_samples", lambda *_: [])
    monkeypatch.setattr(train, "base_pictures", lambda *_: None)
    monkeypatch.setattr(train, "Log", lambda *_: None)
    monkeypatch.setattr(train, "check_disk", lambda *_: None)
    monkeypatch.setattr(train, "batches", batches)
    monkeypatch.setattr(train, "prepare_data", lambda *_: SimpleNamespace(
        empty_prompt=torch.zeros(TOKENS, SD15.context_dim)))

    def all_reduce_sum(sums: dict) -> None:
        read.append({tensor.device for tensor in sums.values()})
        raise Read

    monkeypatch.setattr(train.parallel, "all_reduce_sum", all_reduce_sum)
    with cuda_without_cuda(monkeypatch, fake):
        dtype = DTYPES[settings.precision]
        sd = on_cuda(meta, dtype, torch.float32 if settings.mode == "large" else None)
        net = empty_copy(net, CUDA, torch.float32)
        teacher = empty_copy(meta.teacher, CUDA, dtype) if settings.teacher else None
        first_read = settings.layer_only_steps or steps  # the end of the first phase is logged
        counted = []
        monkeypatch.setattr(train, "gradient_norm", lambda norm: counted.append(norm) or {})
        with pytest.raises(Read):
            train.train(settings, sd, net, teacher, None, torch.Generator())
        assert len(counted) == first_read and read == [{CUDA}]
        assert all(p.device == CUDA for p in net.parameters())
        if not settings.ablation and settings.mode != "small":
            assert all(p.grad is None for p in net.parameters())  # freed before what is measured


WAYS = [{}, {"guess": True}, {"guess": True, "guidance": 1.0}, {"eta": 1.0},
        {"spacing": "trailing", "guidance": 1.0}, {"prediction": "v"}, {"scale": 0.5},
        {"start": 0.5}, {"end": 0.5}, {"two": True}]


# Every way of sampling with a network beside the UNet and with the one inside its encoder, which
# take different turns; of the others' own work, which is the same in every way, once.
@pytest.mark.parametrize(("name", "options"), [
    *((name, way) for name in ("controlnet", "mlp") for way in WAYS),
    *((name, {}) for name in STUDENTS if name != "mlp")], ids=str)
def test_sampling_stays_on_its_device_and_reads_no_number(
        meta, frozen, fake, monkeypatch, name, options):
    options = dict(options)
    guess_scales(1 + len(meta.unet.config.encoder_blocks()))  # made once
    with torch.device("meta"):
        net = meta.teacher if name == "controlnet" else build_student(name, meta.unet)
        net = net if name == "loha" else net.for_inference()
    strength = {key: options.pop(key) for key in ("scale", "start", "end") if key in options}
    count = 1 + options.pop("two", False)
    sampling = Sampling(2, **{key: options.pop(key) for key in ("guidance", "spacing", "prediction")
                              if key in options})
    with cuda_without_cuda(monkeypatch, fake), torch.no_grad():
        dtype = torch.bfloat16
        net = empty_copy(net, CUDA, dtype)
        context = torch.zeros(1, TOKENS, SD15.context_dim, device=CUDA, dtype=dtype)
        condition = torch.zeros(1, 3, SIZE, SIZE, device=CUDA)
        noise = torch.randn(1, 4, SIZE // 8, SIZE // 8, device=CUDA)
        controls = [Control(net, condition, **strength)] * count
        picture = generate(frozen.unet, frozen.vae, controls, noise, context, context, sampling,
                           generator=torch.Generator(), **options)
        assert picture.device == CUDA and picture.shape == (1, 3, SIZE, SIZE)
        assert picture.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", SETTINGS, ids=" ".join)
def test_a_training_on_a_gpu_ends_with_a_network_and_a_log(tmp_path, options):
    train.main([*SHORT, "--steps", "3", "--batch-size", "2", *options, "--device", "cuda",
                "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "controlnet.safetensors").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"guess": True}, {"start": 0.3, "end": 0.7}], ids=str)
def test_a_recorded_step_gives_the_same_pictures_as_one_that_is_not(options):
    options = dict(options)
    strength = {key: options.pop(key) for key in ("start", "end") if key in options}
    torch.manual_seed(0)
    unet, vae, net = UNet(TINY).to(CUDA), VAE(TINY_VAE).to(CUDA), ControlNet(TINY).to(CUDA)
    randomize(nn.ModuleList([unet, vae, net]))
    context = torch.randn(3, TOKENS, TINY.context_dim, device=CUDA)
    control = Control(net, torch.rand(3, 3, 64, 64, device=CUDA), **strength)
    noise = torch.randn(3, 4, 8, 8, device=CUDA)
    plain, recorded = (generate(unet, vae, [control], noise, context, context.flip(0),
                                Sampling(12, 3.0), cuda_graph=cuda_graph, **options)
                       for cuda_graph in (False, True))
    assert (plain - recorded).abs().max() < 1e-3 < plain.std()
