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
from unet import TINY, UNetConfig
from weights import (
    convert,
    load_controlnet,
    load_stable_diffusion,
    save_controlnet,
    save_stable_diffusion,
    transfer,
)
from weights.controlnet import ENCODER

TINY_2X = UNetConfig(64, (1, 1, 2, 2), context_dim=64, num_heads=None, head_dim=64,
                     linear_projections=True)


@pytest.fixture(scope="module")
def net():
    return randomize(ControlNet(TINY), seed=6)


@pytest.fixture
def source(net, tmp_path):
    save_controlnet(tmp_path / "net.safetensors", net)
    return tmp_path / "net.safetensors"


def convert_main(*arguments) -> None:
    convert.main([str(argument) for argument in arguments])


def have_equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("between", ["d.safetensors", "folder"])
def test_the_round_trip_through_diffusers_naming_gives_the_same_bytes(source, tmp_path, between):
    convert_main(source, tmp_path / between, "--naming", "diffusers")
    convert_main(tmp_path / between, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_half_is_float16_of_every_tensor(source, net, tmp_path):
    convert_main(source, tmp_path / "half.safetensors", "--half")
    half = {name: tensor.half() for name, tensor in net.state_dict().items()}
    assert have_equal_tensors(load_file(tmp_path / "half.safetensors"), half)


def test_half_of_a_value_that_float16_does_not_hold_is_refused(source, net, tmp_path, capsys):
    tensors = load_file(source)
    tensors["zero_convs.0.0.weight"][0, 0, 0, 0] = -1e5
    save_file(tensors, tmp_path / "large.safetensors")
    out = tmp_path / "half.safetensors"
    assert run(lambda: convert_main(tmp_path / "large.safetensors", out, "--half")) == 2
    error = capsys.readouterr().err
    assert "half.safetensors would not hold zero_convs.0.0.weight in torch.float16" in error
    assert "100000, the largest there is 65504" in error and not out.exists()


@pytest.mark.parametrize(("name", "nested"), [("in.safetensors", False), ("in.pth", False),
                                              ("in.ckpt", True)])
def test_any_published_form_becomes_the_same_file(net, tmp_path, name, nested, capsys):
    tensors = {"control_model." + name: tensor for name, tensor in net.state_dict().items()}
    if name.endswith(".safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        torch.save({"state_dict": tensors} if nested else tensors, tmp_path / name)
    convert_main(tmp_path / name, tmp_path / "out.safetensors")
    assert have_equal_tensors(load_file(tmp_path / "out.safetensors"), net.state_dict())
    assert capsys.readouterr().out.strip() == str(tmp_path / "out.safetensors")


@pytest.mark.parametrize("config", [TINY, TINY_2X], ids=["1.x", "2.x"])
def test_diffusers_reads_the_folder_and_computes_the_same(tmp_path, config):
    net = randomize(ControlNet(config), seed=7)
    save_controlnet(tmp_path / "net.safetensors", net)
    convert_main(tmp_path / "net.safetensors", tmp_path / "folder", "--naming", "diffusers")
    theirs = ControlNetModel.from_pretrained(tmp_path / "folder").eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    condition = torch.randn(1, 3, 64, 64, generator=generator)
    context = torch.randn(1, 77, 64, generator=generator)
    with torch.no_grad():
        ours = net(latents, condition, torch.tensor([500]), context)
        down, middle = theirs(latents, 500, context, condition, return_dict=False)
    assert max(relative_error(a, b) for a, b in zip(ours, [*down, middle], strict=True)) < 1e-5


def test_a_student_is_halved_but_has_no_names_in_diffusers(sd, tmp_path, capsys):
    student = randomize(build_student("reduced_layer", sd.unet), seed=8)
    save_controlnet(tmp_path / "s.safetensors", student)
    convert_main(tmp_path / "s.safetensors", tmp_path / "half.safetensors", "--half")
    loaded = load_controlnet(tmp_path / "half.safetensors", sd.unet)
    assert loaded.architecture == "reduced_layer" and same(loaded, student.half().float())
    source, folder = tmp_path / "s.safetensors", tmp_path / "d"
    assert run(lambda: convert_main(source, folder, "--naming", "diffusers")) == 2
    assert "diffusers has no names for" in capsys.readouterr().err and not folder.exists()


@pytest.mark.parametrize("paper_encoder", [False, True])
@pytest.mark.parametrize(
    "name", ["zero_convs.3.0.bias", "input_hint_block.0.weight", "input_blocks.0.0.weight"])
def test_an_incomplete_file_is_neither_converted_nor_transferred(
        base_file, tmp_path, capsys, paper_encoder, name):
    tensors = ControlNet(TINY, paper_encoder=paper_encoder).state_dict()
    del tensors[name]
    bad, out = tmp_path / "bad.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, bad)
    assert run(lambda: convert_main(bad, out)) == 2
    assert run(lambda: transfer_main(bad, base_file, base_file, out)) == 2
    errors = capsys.readouterr().err
    assert errors.count("error:") == errors.count("\n") == 2 and errors.count(name) >= 2
    assert not out.exists()


def test_an_output_of_another_ending_is_refused(source, base_file, tmp_path, capsys):
    out = tmp_path / "out.ckpt"
    assert run(lambda: convert_main(source, out)) == 2
    assert run(lambda: transfer_main(source, base_file, base_file, out)) == 2
    message = f"error: expected a name that ends in .safetensors, got {out}\n"
    assert capsys.readouterr().err == 2 * message and not out.exists()


# --- ControlNets of offsets, and difference transfer ---


def test_a_difference_controlnet_becomes_an_ordinary_one_with_its_base(
        source, net, base_file, community_file, sd, tmp_path, capsys):
    base = sd.unet.state_dict()
    tensors = {name: tensor - base[name] if name.startswith(ENCODER) else tensor
               for name, tensor in net.state_dict().items()}
    save_file(tensors | {"difference": torch.tensor([])}, tmp_path / "difference.safetensors")
    out = tmp_path / "whole.safetensors"
    assert run(lambda: convert_main(tmp_path / "difference.safetensors", out)) == 2
    assert "is a difference ControlNet" in capsys.readouterr().err
    convert_main(tmp_path / "difference.safetensors", out, "--base", base_file)
    whole = load_file(out)
    assert whole.keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.allclose(whole[name], tensor, atol=1e-6), name
    moved, expected = tmp_path / "moved.safetensors", tmp_path / "expected.safetensors"
    transfer_main(tmp_path / "difference.safetensors", base_file, community_file, moved)
    transfer_main(source, base_file, community_file, expected)
    expected = load_file(expected)
    assert all(torch.allclose(tensor, expected[name], atol=1e-5)
               for name, tensor in load_file(moved).items())


@pytest.fixture
def community_file(sd, tmp_path):
    """Another base model of the same shape."""
    other = load_stable_diffusion(save(tmp_path / "community.safetensors", sd))
    randomize(other.unet, seed=99)
    return save(tmp_path / "community.safetensors", other)


def save(path, sd):
    save_stable_diffusion(path, sd, dtype=torch.float32)
    return path


def transfer_main(control, base, target, out) -> None:
    transfer.main([str(control), "--base", str(base), "--target", str(target), "--out", str(out)])


def test_transfer_adds_the_difference_of_the_bases_to_the_copied_encoder_alone(
        source, net, base_file, community_file, sd, tmp_path):
    transfer_main(source, base_file, community_file, tmp_path / "new.safetensors")
    new = load_file(tmp_path / "new.safetensors")
    base = sd.unet.state_dict()
    target = load_stable_diffusion(community_file).unet.state_dict()
    encoder = ("time_embed.", "input_blocks.", "middle_block.")
    for name, tensor in net.state_dict().items():
        moved = tensor + (target[name] - base[name]) if name.startswith(encoder) else tensor
        assert torch.equal(new[name], moved), name
    assert load_controlnet(tmp_path / "new.safetensors", sd.unet).architecture == "controlnet"


def test_transfer_of_an_untrained_copy_gives_the_targets_encoder(
        sd, base_file, community_file, tmp_path):
    save_controlnet(tmp_path / "copy.safetensors", ControlNet.from_unet(sd.unet))
    transfer_main(tmp_path / "copy.safetensors", base_file, community_file,
                  tmp_path / "new.safetensors")
    new = load_controlnet(tmp_path / "new.safetensors", sd.unet).state_dict()
    target = load_stable_diffusion(community_file).unet.state_dict()
    common = new.keys() & target.keys()
    assert common and all(torch.allclose(new[n], target[n], atol=1e-6) for n in common)


def test_transfer_to_the_own_base_changes_nothing(source, base_file, tmp_path):
    transfer_main(source, base_file, base_file, tmp_path / "new.safetensors")
    assert have_equal_tensors(load_file(source), load_file(tmp_path / "new.safetensors"))


def test_transfer_of_a_student_is_refused_in_one_line(
        sd, base_file, community_file, tmp_path, capsys):
    student, out = tmp_path / "s.safetensors", tmp_path / "new.safetensors"
    save_controlnet(student, build_student("reduced_layer", sd.unet))
    assert run(lambda: transfer_main(student, base_file, community_file, out)) == 2
    error = capsys.readouterr().err
    assert "expected the same encoder in control network, base and target" in error
    assert "s.safetensors is a student, reduced_layer" in error
    assert error.count("\n") == 1 and not out.exists()
