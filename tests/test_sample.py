"""The sampling program: sizes, seeds, metadata, errors. That its pictures are right is
test_parity_sampling.py's."""

import json
import sys
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TWO_LEVELS, randomize, relative_error, two_levels, two_levels_file
from PIL import Image
from torch import nn

import sample
from common.cli import run
from common.devices import CudaGraph, compile_blocks
from controlnet import ControlNet
from controlnet.sampling import generate, initial_latents
from data.pictures import write_png
from diffusion import Sampling, ddim_sample
from unet import TINY, UNet
from unet.attention import SpatialTransformer
from unet.blocks import ResBlock
from weights import save_controlnet, tiny
from weights.convert import convert

sd, base_file = two_levels, two_levels_file  # fixtures in place of conftest's


@pytest.fixture(scope="module")
def controlnet_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("controlnet") / "controlnet.safetensors"
    save_controlnet(path, randomize(ControlNet(TWO_LEVELS), seed=12))
    return path


@pytest.fixture
def draw(base_file, controlnet_file, tmp_path):
    """Run sample.py with two steps, on any device in the exact mode; returns its first picture."""

    def draw(*arguments: str) -> Image.Image:
        sample.main([
            "--checkpoint",
            str(base_file), "--controlnet",
            str(controlnet_file), "--precision", "float32", "--steps", "2", "--out",
            str(tmp_path / "out.png"), *arguments
        ])
        with Image.open(tmp_path / "out-0.png" if "--num" in arguments else tmp_path /
                        "out.png") as image:
            image.load()
            return image

    return draw


def write_condition(path, width: int, height: int) -> str:
    write_png(
        path,
        Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)))
    return str(path)


def test_without_condition_a_held_out_circle_is_drawn(draw, sd):
    picture = draw()
    assert picture.size == (sd.resolution,
                            sd.resolution) and "circle with" in picture.text["prompt"]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 40), (136, 88)])
def test_any_size_divisible_by_8_works_and_is_the_conditions(draw, tmp_path, width, height):
    assert draw("--condition", write_condition(tmp_path / "c.png", width,
                                               height)).size == (width, height)


def test_a_condition_is_scaled_to_the_size_asked_for(draw, tmp_path):
    assert draw("--condition", write_condition(tmp_path / "c.png", 100, 50), "--width", "96",
                "--height", "48").size == (96, 48)


def test_the_same_seed_makes_the_same_picture_and_the_control_counts(draw):
    def pixels(*arguments):
        return np.array(draw("--prompt", "x", *arguments)).astype(int)

    first = pixels("--seed", "1")
    assert (first == pixels("--seed", "1")).all()
    for other in (
        ["--seed", "2"],
        ["--seed", "1", "--scale", "0"],
        ["--seed", "1", "--controlnet", "none"],
        ["--seed", "1", "--guidance", "1"],
            # fmt: skip
        ["--seed", "1", "--eta", "1"],
        ["--seed", "1", "--negative-prompt", "y"]):
        assert (first != pixels(*other)).any(), other
    assert (pixels("--scale", "0") == pixels("--controlnet", "none")).all()


def test_several_pictures_have_a_seed_each_and_are_those_of_that_seed_alone(draw, tmp_path):
    draw("--num", "2", "--seed", "3", "--prompt", "größe")
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["out-0.png", "out-1.png"]
    with Image.open(tmp_path / "out-0.png") as a, Image.open(tmp_path / "out-1.png") as b:
        assert (np.array(a) != np.array(b)).any()
        assert (a.text["prompt"], a.text["seed"], a.text["steps"], b.text["seed"]) == ("größe", "3",
                                                                                       "2", "4")
    second = (tmp_path / "out-1.png").read_bytes()
    draw("--seed", "4", "--prompt", "größe")
    assert (tmp_path / "out.png").read_bytes() == second


EVERY_OPTION = [
    "--prompt",
    "-a- 'quoted' größe",
    "--negative-prompt",
    "x",
    "--steps",
    "3",
    "--guidance",
    "3",
    "--eta",
    "0.5",
    "--spacing",
    "trailing",
    "--seed",
    "5",
    "--guess",
    "--start",
    "0.1",
    "0",
    "--end",
    "0.9",
    "--scale",
    "0.5",
    "0.7",
    "--height",
    "72",
    "--width",
    "56",
    "--dtype",
    "bfloat16",
]  # fmt: skip


@pytest.mark.parametrize("case", ["defaults", "every option", "canny", "no control", "SD-Turbo"])
def test_like_makes_the_same_file_again(draw, tmp_path, controlnet_file, case):
    condition, photo = write_condition(tmp_path / "c.png", 64, 64), write_condition(
        tmp_path / "photo.png", 100, 80)
    draw(
        *{
            "defaults": [],
            "every option": [
                "--prompt=" + EVERY_OPTION[1], *EVERY_OPTION[2:], "--controlnet",
                str(controlnet_file),
                str(controlnet_file), "--condition", condition, photo
            ],
            "canny": ["--canny", photo, "--num", "2", "--seed", "8"],
            "no control": ["--controlnet", "none", "--height", "40"],
            "SD-Turbo": ["--guidance", "0", "--spacing", "trailing"],
        }[case])  # fmt: skip
    made = tmp_path / ("out-1.png" if case == "canny" else "out.png")
    (tmp_path / "original.png").write_bytes(made.read_bytes())
    sample.main(["--like", str(tmp_path / "original.png"), "--out", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "original.png").read_bytes()


def test_another_base_is_sampled_without_control_if_none_is_named(base_file, tmp_path, sd):
    """The shipped ControlNet is the tiny model's."""
    alone = ["--checkpoint", str(base_file), "--steps", "2", "--prompt", "x"]
    sample.main([*alone, "--out", str(tmp_path / "alone.png")])
    sample.main([*alone, "--controlnet", "none", "--out", str(tmp_path / "none.png")])
    with Image.open(tmp_path / "alone.png") as a, Image.open(tmp_path / "none.png") as b:
        assert np.array_equal(a, b) and a.size == (sd.resolution, sd.resolution)
    sample.main(["--like", str(tmp_path / "alone.png"), "--out", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
    assert sample.parse([])[0].controlnets == [str(tiny.CONTROLNET)]


def test_another_base_given_with_like_changes_the_default_control_without_a_warning(
        base_file, tmp_path, recwarn):
    small = ["--steps", "1", "--height", "32", "--width", "32"]
    sample.main([*small, "--out", str(tmp_path / "tiny.png")])
    sample.main(["--like", str(tmp_path / "tiny.png"), "--checkpoint", str(base_file),
                 "--out", str(tmp_path / "other.png")])
    assert not [w for w in recwarn if "has changed since" in str(w.message)]


@pytest.mark.parametrize("source", ["condition", "canny", "annotator"])
def test_a_condition_for_another_base_needs_its_control_network(tmp_path, capsys, source):
    values = ["openpose", "good.png"] if source == "annotator" else ["good.png"]
    with pytest.raises(SystemExit, match="2"):
        sample.parse(["--checkpoint", "other.safetensors", f"--{source}", *values])
    assert capsys.readouterr().err == (
        f"error: --{source} needs a --controlnet for this --checkpoint; or --controlnet none, to "
        "take no more than its size\n")


def test_without_control_a_condition_gives_its_size(draw, tmp_path):
    photo = write_condition(tmp_path / "photo.png", 100, 50)
    assert draw("--controlnet", "none", "--canny", photo).size == (128, 64)
    again = ["--condition", str(tmp_path / "out-condition.png")]
    assert draw("--controlnet", "none", *again).size == (128, 64)


def test_further_arguments_change_single_settings_of_like(draw, tmp_path):
    draw("--prompt", "x", "--seed", "3", "--scale", "0.5")
    sample.main(
        ["--like",
         str(tmp_path / "out.png"), "--seed", "4", "--out",
         str(tmp_path / "other.png")])
    with Image.open(tmp_path / "other.png") as other:
        assert [other.text[name] for name in ("prompt", "seed", "scale")] == ["x", "4", "[0.5]"]


def test_a_picture_cannot_say_where_to_write(base_file, tmp_path):
    arguments = [
        "--checkpoint",
        str(base_file), "--controlnet", "none", "--steps=1", f"--out={tmp_path / 'elsewhere.png'}",
        "--num=3"
    ]
    write_png(tmp_path / "foreign.png", Image.new("RGB", (8, 8)),
              {"arguments": json.dumps(arguments), "files": "{}"})
    sample.main(["--like", str(tmp_path / "foreign.png"), "--out", str(tmp_path / "mine.png")])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["foreign.png", "mine.png"]


def test_like_says_when_a_file_has_changed(draw, tmp_path):
    path = write_condition(tmp_path / "c.png", 64, 64)
    draw("--condition", path)
    write_png(path, Image.new("RGB", (64, 64)))
    with pytest.warns(UserWarning, match="a file of --condition has changed since"):
        sample.main(["--like", str(tmp_path / "out.png"), "--out", str(tmp_path / "other.png")])


def test_canny_edges_of_a_photo_are_the_condition_and_are_saved(draw, tmp_path, sd):
    photo = Image.new("RGB", (200, 100))
    photo.paste("white", (60, 30, 140, 70))
    photo.save(tmp_path / "photo.png")
    picture = draw("--canny", str(tmp_path / "photo.png"))
    with Image.open(tmp_path / "out-condition.png") as saved:
        edges = np.asarray(saved)
    # the shorter side is the model's resolution, the other a multiple of 64
    assert edges.shape == (64, 128, 3) and picture.size == (128, 64)
    assert set(np.unique(edges)) == {0, 255} and 0.01 < (edges == 255).mean() < 0.2
    # the rectangle's rim, not its inside
    assert edges[32, 64].max() == 0 and edges[15:24, 40:88].max() == 255
    with_edges = (tmp_path / "out.png").read_bytes()
    draw("--condition", str(tmp_path / "out-condition.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")),
                          np.asarray(picture)) and (tmp_path / "out.png").read_bytes() == with_edges


def test_a_prompt_that_is_too_long_is_cut_with_a_warning_that_quotes_what_is_lost(draw):
    with pytest.warns(UserWarning, match="CLIP reads 75 tokens of a prompt; cut off: 'the end'"):
        long = draw("--prompt", "word " * 75 + "the end")
    assert np.array_equal(np.asarray(long), np.asarray(draw("--prompt", "word " * 75)))


@pytest.mark.parametrize(("dtype", "close"), [("bfloat16", 8), ("float16", 3)])
def test_a_half_precision_dtype_makes_nearly_the_same_picture(draw, dtype, close):
    full, half = (
        np.asarray(draw("--prompt", "x", *more)).astype(int) for more in ([], ["--dtype", dtype]))
    assert 0 < np.abs(full - half).mean() < close


def test_a_gpu_samples_in_the_half_precision_that_it_has_unless_told_otherwise(monkeypatch):
    def chosen(*arguments: str) -> str:
        return sample.parse(list(arguments))[0].precision

    assert chosen("--device", "cpu") == "float32" and chosen("--dtype", "float16") == "fp16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for has_bf16, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, has=has_bf16: has or including_emulation)
        assert chosen() == expected and chosen("--device", "cpu") == "float32"
        for exact in ("--precision", "--dtype"):
            assert chosen(exact, "float32") == "float32"


def test_a_picture_remembers_its_precision_and_an_older_one_was_in_float32(draw, tmp_path,
                                                                           monkeypatch):
    draw("--dtype", "bfloat16")
    with Image.open(tmp_path / "out.png") as picture:
        text = dict(picture.text)
    older = json.loads(text["arguments"])
    older.remove("--precision=bf16")
    write_png(tmp_path / "older.png", Image.new("RGB", (8, 8)),
              text | {"arguments": json.dumps(older)})
    monkeypatch.setattr("common.devices.default_precision", lambda _: ("fp16", ""))
    for name, more, expected in (
            ("out", [], "bf16"), ("older", [], "float32"), ("out", ["--dtype", "fp16"], "fp16")):
        like = ["--like", str(tmp_path / f"{name}.png"), *more]
        assert sample.parse(like)[0].precision == expected
    assert sample.parse([])[0].precision == "fp16"


def test_in_half_precision_the_autoencoder_and_the_sampler_stay_in_float32(
        base_file, controlnet_file, monkeypatch):
    settings, _ = sample.parse(["--checkpoint", str(base_file), "--device", "cpu", "--precision",
                                "fp16", "--controlnet", str(controlnet_file)])
    sd, networks = sample.load(settings)
    for network, expected in ((sd.unet, torch.float16), (sd.text, torch.float16),
                              (networks[0], torch.float16), (sd.vae, torch.float32)):
        assert {p.dtype for p in network.parameters()} == {expected}
    seen = []

    def recorded(predict, *rest, **options):
        def both(latents, timesteps):
            output = predict(latents, timesteps)
            seen.extend([latents.dtype, output.dtype])
            return output

        return ddim_sample(both, *rest, **options)

    monkeypatch.setattr("controlnet.sampling.ddim_sample", recorded)
    noise = initial_latents(1, 32, 32, torch.Generator().manual_seed(0))
    context = sd.text.encode(["x"])
    with torch.no_grad():
        picture = generate(sd.unet, sd.vae, [], noise, context, context, Sampling(2))
    assert seen == 4 * [torch.float32] and picture.dtype == torch.float32


def test_compiling_gives_the_same_picture(draw, monkeypatch):
    """Through torch.compile's own tracing, without its code generation, which takes minutes on a
    CPU."""
    plain = draw("--prompt", "x")
    monkeypatch.setattr(sample, "compile_blocks", partial(compile_blocks, backend="eager"))
    assert np.abs(np.asarray(draw("--prompt", "x", "--compile")).astype(int) -
                  np.asarray(plain)).max() <= 1


@pytest.mark.parametrize(("arguments", "message"), [
    (["--condition", "odd.png"], "expected a height and width divisible by 8, got 50 x 100"),
    (["--condition", "nowhere.png"], "nowhere.png does not exist"),
    (["--condition", "broken.png"], "broken.png is not one or is damaged"),
    (["--steps", "0"], "expected 1 to 1000 sampling steps"),
    (["--steps", "1001"], "expected 1 to 1000 sampling steps"),
    (["--num", "-2"], "expected a positive whole number"),
    (["--guidance", "nan"], "expected a number of at least 0"),
    (["--height", "60"], "divisible by 8"),
    (["--controlnet", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
    (["--spacing", "sideways"], "invalid choice"),
    (["--scale", "1", "2", "3"
      ], "expected one --scale for all or one for each of 1 control networks, got 3"),
    (["--controlnet", "none", "--scale", "1", "2"
      ], "expected one --scale for all or one for each of 0 control networks, got 2"),
    (["--condition", "good.png", "good.png"
      ], "expected a --condition for each of 1 control networks, got 2"),
    (["--condition", "good.png", "--canny", "good.png"
      ], "expected one of --condition, --canny and --annotator"),
    (["--canny", "nowhere.png"], "nowhere.png does not exist"),
    (["--annotator", "openpose", "good.png"], "annotator openpose needs controlnet_aux"),
    (["--canny", "good.png", "--height", "60"], "divisible by 8"),
    (["--canny", "good.png", "--steps", "1001"], "expected 1 to 1000 sampling steps"),
    (["--controlnet", "none", "x.safetensors"], "expected --controlnet none alone"),
    (["--start", "0.6", "--end", "0.4"], "expected every --start before its --end"),
    (["--out", "o.jpg"], "expected a name that ends in .png in --out, got o.jpg"),
    (["--like", "good.png"], "good.png does not record how it was made"),
    (["--like", "nowhere.png"], "nowhere.png does not exist"),
    (["--like", "damaged.png"], "damaged.png of how it was made is damaged"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(
        draw, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)  # as if it were not installed
    write_condition(tmp_path / "odd.png", 100, 50)
    write_condition(tmp_path / "good.png", 64, 64)
    write_png(tmp_path / "damaged.png", Image.new("RGB", (8, 8)), {"arguments": "[", "files": "{}"})
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    try:
        code = run(lambda: draw(*arguments))
    except SystemExit as leaving:  # argparse
        code = leaving.code
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and message in errors[0] and "Traceback" not in err
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


def test_torch_draws_the_initial_noise_as_documented():
    latents = initial_latents(2, 64, 48, torch.Generator().manual_seed(7))
    assert torch.equal(latents,
                       torch.randn((2, 4, 8, 6), generator=torch.Generator("cpu").manual_seed(7)))


def test_blocks_are_compiled_without_graph_breaks_and_equal_ones_once():
    """For sampling and for training. The backend that only traces is enough to see it."""
    unet, net = UNet(TINY), ControlNet(TINY)
    randomize(nn.ModuleList([unet, net]))
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([1, 500])
    context, condition = torch.randn(2, 77, 64), torch.rand(2, 3, 64, 64)

    def result() -> tuple[torch.Tensor, torch.Tensor]:
        net.zero_grad()
        noise_pred = unet(latents, timesteps, context,
                          net(latents, condition, timesteps, context))
        noise_pred.square().sum().backward()
        return noise_pred.detach(), net.input_blocks[1][0].in_layers[2].weight.grad.clone()

    before = result()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for network in (unet, net):
        compile_blocks(network, (ResBlock, SpatialTransformer), backend="eager")
    for plain, compiled in zip(before, result(), strict=True):
        assert relative_error(compiled, plain) < 1e-5
    counters = torch._dynamo.utils.counters
    blocks = sum(isinstance(m, (ResBlock, SpatialTransformer))
                 for network in (unet, net) for m in network.modules())
    assert not counters["graph_break"] and 0 < counters["stats"]["unique_graphs"] < blocks / 2


def test_a_recorded_function_reads_its_inputs_anew_and_keeps_what_it_returned(monkeypatch):
    """With a stand-in for CUDA's graph, which plays back what was recorded on the same memory."""
    class Graph:
        def replay(self):
            graphed.output.copy_(graphed.function(*graphed.inputs))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    graphed = CudaGraph(lambda x, y: x - 2 * y)
    inputs = [(torch.randn(3), torch.randn(3)) for _ in range(6)]
    outputs = [graphed(x, y) for x, y in inputs]
    for (x, y), output in zip(inputs, outputs, strict=True):
        assert torch.equal(output, x - 2 * y)


def test_long_prompt_makes_another_picture_only_of_a_long_prompt(draw, recwarn):
    def pixels(*arguments):
        return np.asarray(draw(*arguments))

    short, long = ["--prompt", "a circle"], ["--prompt", "word " * 75 + "red circle"]
    assert np.array_equal(pixels(*short), pixels(*short, "--long-prompt"))
    assert not [w for w in recwarn if "cut off" in str(w.message)]
    whole = pixels(*long, "--long-prompt")
    assert not [w for w in recwarn if "cut off" in str(w.message)]
    assert not np.array_equal(pixels(*long), whole)
    assert [w for w in recwarn if "cut off: 'red circle'" in str(w.message)]


def test_a_folder_and_an_autoencoder_of_its_own_make_the_same_picture_again(
        draw, base_file, tmp_path):
    convert(base_file, tmp_path / "folder", "diffusers")
    expected = np.asarray(draw("--prompt", "x"))
    files = ["--checkpoint", str(tmp_path / "folder"), "--vae", str(base_file)]
    assert np.array_equal(np.asarray(draw("--prompt", "x", *files)), expected)
    made = (tmp_path / "out.png").read_bytes()
    sample.main(["--like", str(tmp_path / "out.png"), "--out", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").read_bytes() == made
