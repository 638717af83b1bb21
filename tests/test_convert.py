"""Conversion and transfer of ControlNets: only names and number format change, and diffusers takes
the result."""

import pytest
import torch
from conftest import randomize, relative_error, same
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from common.cli import run
from controlnet import ControlNet
from kd import build_student
from unet import SD21, TINY
from weights import convert, load_controlnet, load_stable_diffusion, save_controlnet, save_stable_diffusion, transfer


@pytest.fixture(scope="module")
def net():
    return randomize(ControlNet(TINY), seed=6)


@pytest.fixture
def source(net, tmp_path):
    save_controlnet(tmp_path / "net.safetensors", net)
    return tmp_path / "net.safetensors"


def convert_main(*arguments) -> None:
    convert.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("between", ["d.safetensors", "folder"])
def test_the_round_trip_through_diffusers_naming_gives_the_same_bytes(source, tmp_path, between):
    convert_main(source, tmp_path / between, "--naming", "diffusers")
    convert_main(tmp_path / between, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_half_is_float16_of_every_tensor(source, net, tmp_path):
    convert_main(source, tmp_path / "half.safetensors", "--half")
    half = load_file(tmp_path / "half.safetensors")
    assert half.keys() == net.state_dict().keys() and all(
        torch.equal(half[name], tensor.half()) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("kind", ["prefixed .safetensors", ".pth", ".ckpt with a state_dict"])
def test_any_published_form_becomes_the_same_file(net, tmp_path, kind, capsys):
    tensors = {"control_model." + name: tensor for name, tensor in net.state_dict().items()}
    source = tmp_path / f"in{kind.split()[-1] if kind.startswith('prefixed') else kind.split()[0]}"
    if kind.startswith("prefixed"):
        save_file(tensors, source)
    else:
        torch.save({"state_dict": tensors} if "state_dict" in kind else tensors, source)
    convert_main(source, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == net.state_dict().keys() and all(
        torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())
    assert capsys.readouterr().out.strip() == str(tmp_path / "out.safetensors")


@pytest.mark.parametrize("config", [TINY, SD21], ids=["1.x", "2.x"])
def test_diffusers_reads_the_folder_and_computes_the_same(tmp_path, config):
    net = randomize(
        ControlNet(
            config if config is TINY else config.__class__(
                64,
                (1, 1, 2, 2),
                context_dim=64,
                num_heads=None,
                head_dim=64,
                # fmt: skip
                linear_projections=True)),
        seed=7)
    save_controlnet(tmp_path / "net.safetensors", net)
    convert_main(tmp_path / "net.safetensors", tmp_path / "folder", "--naming", "diffusers")
    theirs = ControlNetModel.from_pretrained(tmp_path / "folder").eval()
    generator = torch.Generator().manual_seed(0)
    x, condition, context = (
        torch.randn(shape, generator=generator)
        for shape in ((1, 4, 8, 8), (1, 3, 64, 64), (1, 77, 64)))
    with torch.no_grad():
        ours = net(x, condition, torch.tensor([500]), context)
        down, middle = theirs(x, 500, context, condition, return_dict=False)
    assert max(relative_error(a, b) for a, b in zip(ours, [*down, middle], strict=True)) < 1e-5


def test_a_student_is_halved_but_has_no_names_in_diffusers(sd, tmp_path, capsys):
    student = randomize(build_student("reduced_layer", sd.unet), seed=8)
    save_controlnet(tmp_path / "s.safetensors", student)
    convert_main(tmp_path / "s.safetensors", tmp_path / "half.safetensors", "--half")
    loaded = load_controlnet(tmp_path / "half.safetensors", sd.unet)
    assert loaded.architecture == "reduced_layer" and same(loaded, student.half().float())
    assert run(lambda: convert_main(tmp_path / "s.safetensors", tmp_path / "d", "--naming",
                                    "diffusers")) == 2
    assert "diffusers has no names for" in capsys.readouterr().err and not (tmp_path / "d").exists()


@pytest.mark.parametrize("paper_encoder", [False, True])
@pytest.mark.parametrize(
    "name", ["zero_convs.3.0.bias", "input_hint_block.0.weight", "input_blocks.0.0.weight"])
def test_an_incomplete_file_is_neither_converted_nor_transferred(base_file, tmp_path, capsys,
                                                                 paper_encoder, name):
    tensors = ControlNet(TINY, paper_encoder=paper_encoder).state_dict()
    del tensors[name]
    save_file(tensors, tmp_path / "bad.safetensors")
    assert run(
        lambda: convert_main(tmp_path / "bad.safetensors", tmp_path / "out.safetensors")) == 2
    assert run(lambda: transferred(tmp_path / "bad.safetensors", base_file, base_file, tmp_path /
                                   "out.safetensors")) == 2
    errors = capsys.readouterr().err
    assert errors.count("error:") == errors.count("\n") == 2 and errors.count(name) >= 2 and not (
        tmp_path / "out.safetensors").exists()


# --- Difference transfer ---


@pytest.fixture
def community_file(sd, tmp_path):
    """Another base model of the same shape."""
    other = load_stable_diffusion(save(tmp_path / "community.safetensors", sd))
    randomize(other.unet, seed=99)
    return save(tmp_path / "community.safetensors", other)


def save(path, sd):
    save_stable_diffusion(path, sd, dtype=torch.float32)
    return path


def transferred(control, base, target, out) -> None:
    transfer.main([str(control), "--base", str(base), "--target", str(target), "--out", str(out)])


def test_transfer_adds_the_difference_of_the_bases_to_the_copied_encoder_alone(
        source, net, base_file, community_file, sd, tmp_path):
    transferred(source, base_file, community_file, tmp_path / "new.safetensors")
    new, target = load_controlnet(
        tmp_path / "new.safetensors",
        sd.unet).state_dict(), load_stable_diffusion(community_file).unet.state_dict()
    for name, tensor in net.state_dict().items():
        copied = name.startswith(
            ("time_embed", "input_blocks", "middle_block.0", "middle_block.1", "middle_block.2"))
        assert torch.equal(
            new[name],
            tensor + (target[name] - sd.unet.state_dict()[name]) if copied else tensor), name


def test_transfer_of_an_untrained_copy_gives_the_targets_encoder(sd, base_file, community_file,
                                                                 tmp_path):
    save_controlnet(tmp_path / "copy.safetensors", ControlNet.from_unet(sd.unet))
    transferred(tmp_path / "copy.safetensors", base_file, community_file,
                tmp_path / "new.safetensors")
    new, target = load_controlnet(
        tmp_path / "new.safetensors",
        sd.unet).state_dict(), load_stable_diffusion(community_file).unet.state_dict()
    assert all(
        torch.allclose(new[name], tensor, atol=1e-6) for name, tensor in target.items()
        if name in new)


def test_transfer_to_the_own_base_changes_nothing(source, base_file, tmp_path):
    transferred(source, base_file, base_file, tmp_path / "new.safetensors")
    old, new = load_file(source), load_file(tmp_path / "new.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_transfer_of_a_student_is_refused_in_one_line(sd, base_file, community_file, tmp_path,
                                                      capsys):
    save_controlnet(tmp_path / "s.safetensors", build_student("reduced_layer", sd.unet))
    assert run(lambda: transferred(tmp_path / "s.safetensors", base_file, community_file, tmp_path /
                                   "new.safetensors")) == 2
    error = capsys.readouterr().err
    assert "expected the same encoder in control network, base and target" in error and error.count(
        "\n") == 1
    assert not (tmp_path / "new.safetensors").exists()
