"""A control network trained here does in diffusers' pipeline what it does here, and what diffusers'
own ControlNetModel does there."""

import copy
import re
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import randomize, relative_error
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from controlnet import ControlNet
from controlnet.sampling import Control, generate, initial_latents
from data.circles import Circles
from data.pictures import to_image
from diffusion import Sampling
from kd import build_student
from unet import SD15, SD21, TINY
from weights import load_controlnet, save_controlnet
from weights.controlnet import ENCODER
from weights.for_diffusers import ControlNetForDiffusers, for_diffusers, unet_config

pytestmark = pytest.mark.usefixtures("no_grad")

ROOT = Path(__file__).parents[1]
PROMPT, NEGATIVE = "red circle with blue background", "blurry, low quality"
STEPS, GUIDANCE = 3, 5.0


@pytest.fixture(scope="module")
def files(sd, tmp_path_factory) -> dict[str, Path]:
    """Two ControlNets and a student."""
    folder = tmp_path_factory.mktemp("control")
    nets = {"first": ControlNet(sd.unet.config), "second": ControlNet(sd.unet.config),
            "student": build_student("reduced_layer", sd.unet)}
    for seed, (name, net) in enumerate(nets.items(), start=10):
        save_controlnet(folder / f"{name}.safetensors", randomize(net, seed))
    return {name: folder / f"{name}.safetensors" for name in nets}


@pytest.fixture(scope="module")
def pipeline(sd, base_file, files) -> StableDiffusionControlNetPipeline:
    """diffusers' pipeline with diffusers' own class."""
    return oracle.pipeline(sd, base_file, [files["first"]], oracle.scheduler())


@pytest.fixture(scope="module")
def theirs(sd, files, pipeline) -> dict[str, ControlNetModel]:
    """The two ControlNets in diffusers' own class."""
    second = oracle.controlnet(sd.unet.config, load_file(files["second"]))
    return {"first": pipeline.controlnet, "second": second}


@pytest.fixture(scope="module")
def ours(files, pipeline) -> dict[str, ControlNetForDiffusers]:
    """All three as this project gives them to diffusers."""
    return {name: for_diffusers(path, pipeline.unet) for name, path in files.items()}


@pytest.fixture(scope="module")
def conditions() -> list[torch.Tensor]:
    """Two conditions (1, 3, 64, 64)."""
    circles = Circles(64, 2)
    return [circles[i]["condition"][None] for i in range(2)]


@pytest.fixture(scope="module")
def inputs(conditions):
    """Latents, text states and conditions of a batch of two."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 77, TINY.context_dim, generator=generator)
    return latents, context, torch.cat(conditions)


def with_control(pipeline, controlnet) -> StableDiffusionControlNetPipeline:
    """The same pipeline with another control network, or with a list of them."""
    components = pipeline.components | {"controlnet": controlnet}
    changed = StableDiffusionControlNetPipeline(**components, requires_safety_checker=False)
    changed.set_progress_bar_config(disable=True)
    return changed


def sample(pipeline, condition, **options) -> np.ndarray:
    options = {"negative_prompt": NEGATIVE, "num_inference_steps": STEPS,
               "guidance_scale": GUIDANCE, "generator": torch.Generator().manual_seed(3)} | options
    images = pipeline(PROMPT, condition, **options).images
    return np.stack([np.asarray(image) for image in images]).astype(int)


def is_the_same_picture(actual: np.ndarray, expected: np.ndarray) -> bool:
    """At most one level of 255 apart, and that seldom: where a value falls just beside half a
    level, rounding errors decide."""
    assert actual.shape == expected.shape
    # It is a picture, not black, white or grey.
    assert expected.std() > 20 and np.isin(expected, (0, 255)).mean() < 0.2
    return np.abs(actual - expected).max() <= 1 and (actual != expected).mean() < 0.01


@pytest.mark.parametrize(
    ("timestep", "options"),
    [
        (torch.tensor(501), {}),
        (torch.tensor([17, 801]), {"conditioning_scale": 0.7}),
        (501, {"guess_mode": True}),
        (501.0, {"guess_mode": True, "conditioning_scale": 0.7}),
    ],
    ids=["scalar", "batch", "int", "float"],
)
def test_the_outputs_are_those_of_diffusers_class(ours, theirs, inputs, timestep, options):
    latents, context, condition = inputs
    outputs, expected = (
        outputs_of(nets["first"](latents, timestep, context, condition, **options))
        for nets in (ours, theirs))
    assert len(outputs) == len(expected) == 13
    assert max(map(relative_error, outputs, expected)) <= 1e-5


def outputs_of(output) -> list[torch.Tensor]:
    """The 13 tensors of diffusers' ControlNetOutput."""
    return [*output.down_block_res_samples, output.mid_block_res_sample]


def test_return_dict_false_returns_a_tuple_as_the_pipeline_needs_it(ours, inputs):
    latents, context, condition = inputs
    skips, middle = ours["student"](latents, 501, context, condition, return_dict=False)
    again = outputs_of(ours["student"](latents, 501, context, condition))
    assert all(torch.equal(a, b) for a, b in zip([*skips, middle], again, strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"guess_mode": True, "controlnet_conditioning_scale": 0.8}],
    ids=["guidance", "guess mode"])
def test_the_pipeline_makes_the_picture_that_it_makes_with_diffusers_class(
        ours, pipeline, conditions, options):
    expected = sample(pipeline, conditions[0], **options)
    picture = sample(with_control(pipeline, ours["first"]), conditions[0], **options)
    assert is_the_same_picture(picture, expected)


def test_a_student_makes_in_a_pipeline_read_from_a_folder_the_picture_that_it_makes_here(
        sd, files, pipeline, conditions, tmp_path):
    components = {name: part for name, part in pipeline.components.items() if name != "controlnet"}
    StableDiffusionPipeline(**components, requires_safety_checker=False).save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    controlled = StableDiffusionControlNetPipeline.from_pretrained(
        tmp_path, unet=unet, controlnet=for_diffusers(files["student"], unet))
    controlled.set_progress_bar_config(disable=True)

    latents = initial_latents(1, 64, 64, torch.Generator().manual_seed(3))
    control = Control(load_controlnet(files["student"], sd.unet), conditions[0])
    context, negative = sd.text.encode([PROMPT]), sd.text.encode([NEGATIVE])
    here = generate(
        sd.unet, sd.vae, [control], latents, context, negative,
        Sampling(STEPS, GUIDANCE))
    expected = np.asarray(to_image(here[0]))[None].astype(int)
    assert is_the_same_picture(sample(controlled, conditions[0], latents=latents), expected)


def test_two_networks_with_two_scales_work_within_their_shares_of_the_steps(
        ours, theirs, pipeline, conditions):
    whole = {"controlnet_conditioning_scale": [0.9, 0.6]}
    shares = whole | {"control_guidance_start": [0.0, 0.4], "control_guidance_end": [0.5, 1.0]}
    with_ours, with_theirs = (
        with_control(pipeline, [nets["first"], nets["second"]]) for nets in (ours, theirs))
    expected = sample(with_theirs, conditions, **shares)
    assert is_the_same_picture(sample(with_ours, conditions, **shares), expected)
    # The control counts, and so do the shares.
    assert not is_the_same_picture(sample(with_ours, conditions, **whole), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_comes_with_the_unet_or_by_casting(files, theirs, pipeline, inputs, dtype):
    latents, context, condition = (tensor[:1] for tensor in inputs)
    exact = theirs["first"](latents, 501, context, condition, guess_mode=True).mid_block_res_sample
    net = for_diffusers(files["first"], copy.deepcopy(pipeline.unet).to(dtype))
    cast = for_diffusers(files["first"], pipeline.unet).to(dtype)
    assert net.dtype == cast.dtype == dtype
    assert all(map(torch.equal, net.parameters(), cast.parameters()))
    outputs = outputs_of(
        net(latents.to(dtype), 501, context.to(dtype), condition.to(dtype), guess_mode=True))
    assert {tensor.dtype for tensor in outputs} == {dtype}
    assert relative_error(outputs[-1].float(), exact) < 10 * torch.finfo(dtype).eps


def test_the_network_is_frozen_in_eval_mode_and_moves_to_a_device(files, pipeline):
    net = for_diffusers(files["student"], pipeline.unet)
    assert not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert net.to("meta").device == torch.device("meta")


def test_a_plain_controlnet_in_diffusers_naming_needs_no_adapter(
        sd, files, theirs, pipeline, tmp_path):
    first = load_controlnet(files["first"], sd.unet)
    save_controlnet(tmp_path / "plain.safetensors", first, naming="diffusers")
    net = ControlNetModel.from_unet(pipeline.unet)
    net.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    assert all(map(torch.equal, net.parameters(), theirs["first"].parameters()))


def test_saving_in_diffusers_format_is_refused_with_what_to_do_instead(ours, tmp_path):
    with pytest.raises(ValueError, match="keep its file, or weights.convert"):
        ours["student"].save_pretrained(tmp_path)


def test_a_network_that_injects_into_the_encoder_is_refused(sd):
    with pytest.raises(ValueError, match="mlp needs the encoder, diffusers offers the decoder"):
        ControlNetForDiffusers(build_student("mlp", sd.unet))


SD2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024,
       "use_linear_projection": True}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def published(**numbers) -> UNet2DConditionModel:
    """A UNet of published shape, without weights; by default Stable Diffusion 1.x's."""
    with torch.device("meta"):
        return UNet2DConditionModel(**{"cross_attention_dim": 768} | numbers)


@pytest.mark.parametrize(
    ("numbers", "config"),
    [({}, SD15), ({"attention_head_dim": [8, 8, 8, 8]}, SD15), (SD2, SD21)],
    ids=["1.x", "1.x listed", "2.x"])
def test_the_shape_of_stable_diffusion_is_read_off_diffusers_configuration(numbers, config):
    assert unet_config(published(**numbers).config) == config


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        (SDXL, "its transformer_layers_per_block is [1, 2, 10], not 1, "
               "addition_embed_type is text_time, not None"),
        ({"in_channels": 9}, "its in_channels is 9, not 4"),
        ({"layers_per_block": [2, 2, 2, 1]}, "its layers_per_block is [2, 2, 2, 1], not 2"),
        ({"attention_head_dim": [5, 8, 20, 20]},
         "its attention_head_dim is [5, 8, 20, 20], not [5, 10, 20, 20]"),
        ({"block_out_channels": [320, 480, 640, 640]},
         "its block_out_channels is [320, 480, 640, 640], not [320, 320, 640, 640]"),
    ],
    ids=["SDXL", "inpainting", "blocks", "heads", "widths"],
)
def test_another_unet_is_refused_in_one_line(files, numbers, words):
    message = f"expected a UNet of Stable Diffusion 1.x or 2.x, {words}"
    with pytest.raises(ValueError, match=re.escape(message)):
        for_diffusers(files["first"], published(**numbers))


def test_our_own_unet_is_refused(sd, files):
    message = "expected the configuration of diffusers' UNet2DConditionModel, got UNetConfig"
    with pytest.raises(ValueError, match=message):
        for_diffusers(files["first"], sd.unet)


def test_nothing_else_imports_diffusers():
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    sources = [*ROOT.glob("*.py"), *(path for room in packages for path in room.rglob("*.py"))]
    imports = re.compile(
        r"^\s*(from|import)\s+(diffusers|weights\.for_diffusers)\b"
        r"|^\s*from\s+weights\s+import\s.*for_diffusers", re.MULTILINE)
    assert len(sources) > 20
    importing = sorted(path.relative_to(ROOT).as_posix() for path in sources
                       if imports.search(path.read_text(encoding="utf-8")))
    assert importing == [
        "benchmarks/speed.py", "benchmarks/speed_diffusers.py", "weights/for_diffusers.py"]


def test_a_difference_controlnet_takes_the_encoder_of_diffusers_unet(
        files, ours, pipeline, sd, tmp_path):
    base = sd.unet.state_dict()
    tensors = {name: tensor - base[name] if name.startswith(ENCODER) else tensor
               for name, tensor in load_file(files["first"]).items()}
    save_file(tensors | {"difference": torch.tensor([])}, tmp_path / "difference.safetensors")
    net = for_diffusers(tmp_path / "difference.safetensors", pipeline.unet).net.state_dict()
    for name, tensor in ours["first"].net.state_dict().items():
        assert torch.allclose(net[name], tensor, atol=1e-6), name
