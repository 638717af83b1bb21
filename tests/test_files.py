"""Checkpoints: what is written reads back bit for bit, and what does not fit is refused in one line
that names it."""

import io
import json
import os
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import randomize, same
from safetensors.torch import load_file, save_file

from controlnet import ControlNet
from kd import build_student
from unet import TINY
from weights import load_controlnet, load_stable_diffusion, save_controlnet, save_stable_diffusion
from weights.files import read_tensors
from weights.pickles import NOT_NEEDED


def test_a_base_model_reads_back_bit_for_bit_and_frozen(sd, base_file):
    loaded = load_stable_diffusion(base_file)
    for network in ("unet", "vae", "text"):
        assert same(getattr(loaded, network), getattr(sd, network))
        assert getattr(loaded, network).config == getattr(sd, network).config
        assert not any(p.requires_grad for p in getattr(loaded, network).parameters())
    for setting in ("sampling", "lr", "resolution"):
        assert getattr(loaded, setting) == getattr(sd, setting)


def test_a_half_precision_file_loads_as_float32(sd, tmp_path):
    save_stable_diffusion(tmp_path / "half.safetensors", sd, dtype=torch.float16)
    loaded = load_stable_diffusion(tmp_path / "half.safetensors")
    weight = loaded.unet.input_blocks[0][0].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, sd.unet.input_blocks[0][0].weight.half().float())


def test_what_published_files_hold_besides_weights_is_ignored(sd, base_file, tmp_path):
    tensors, metadata = read_tensors(base_file)
    extra = {
        "betas": torch.zeros(1000),
        "model_ema.decay": torch.zeros(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    save_file(tensors | extra, tmp_path / "more.safetensors", metadata)
    assert same(load_stable_diffusion(tmp_path / "more.safetensors").text, sd.text)


@pytest.mark.parametrize("make", [
    lambda unet: ControlNet.from_unet(unet),
    lambda unet: ControlNet.from_unet(unet, paper_encoder=True),
    lambda unet: build_student("reduced_layer", unet),
])
@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_a_control_network_is_known_by_its_shapes_alone(sd, tmp_path, make, prefix):
    net = randomize(make(sd.unet), seed=1)
    tensors = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    save_file(tensors, tmp_path / "bare.safetensors")
    loaded = load_controlnet(tmp_path / "bare.safetensors", sd.unet)
    assert same(loaded, net) and loaded.config == net.config and loaded.taps == net.taps


def test_a_controlnet_makes_the_round_trip_through_diffusers_naming(sd, tmp_path):
    net = randomize(ControlNet.from_unet(sd.unet), seed=2)
    save_controlnet(tmp_path / "d.safetensors", net, naming="diffusers")
    assert "controlnet_mid_block.weight" in load_file(tmp_path / "d.safetensors")
    assert same(load_controlnet(tmp_path / "d.safetensors", sd.unet), net)
    student = build_student("reduced_layer", sd.unet)
    with pytest.raises(ValueError, match="this is a student"):
        save_controlnet(tmp_path / "s.safetensors", student, naming="diffusers")
    assert not (tmp_path / "s.safetensors").exists()


def test_a_control_network_file_describes_itself(sd, tmp_path):
    net = build_student("reduced_layer", sd.unet)
    save_controlnet(tmp_path / "s.safetensors", net, base="sd.safetensors", step=7)
    _, metadata = read_tensors(tmp_path / "s.safetensors")
    expected = {"architecture": "reduced_layer", "base": "sd.safetensors", "step": "7",
                "format_version": "1"}
    assert expected.items() <= metadata.items()
    assert load_controlnet(tmp_path / "s.safetensors", sd.unet).architecture == "reduced_layer"


class Dangerous:
    """What a poisoned checkpoint looks like: opening it would call a function of its choice."""

    def __reduce__(self):
        return print, ("a program ran",)


def saved(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


CORRUPTIONS = {
    "is empty": lambda good: b"",
    "is truncated or damaged": lambda good: good[:len(good) // 2],
    "is a web page": lambda good: b"<!DOCTYPE html><html>404</html>",
    "is a pickle without tensors": lambda good: saved({"weights": 1}),
    "is a pickle that is damaged": lambda good: saved({"weights": torch.zeros(9)})[:-40],
    r"holds more than tensors \(print\), and": lambda good: saved({"weights": Dangerous()}),
    "more than tensors, and is refused": lambda good: pickle.dumps(Dangerous(), protocol=4),
    "truncated or damaged": lambda good: b"\x00" * 100,
    "is a Git LFS pointer, not the file": lambda good: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n"),
    "is the index of a model in several files": lambda good: (
        b'{"metadata": {"total_size": 1}, "weight_map": {"a": "b-00001-of-00002.safetensors"}}'),
    "is a text .a failed download..: 'Entry not found'": lambda good: b"Entry not found",
}


@pytest.mark.parametrize("word", CORRUPTIONS)
def test_a_file_that_is_no_weights_file_is_refused(base_file, sd, tmp_path, word, capsys):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(CORRUPTIONS[word](base_file.read_bytes()))
    for load in (load_stable_diffusion, lambda p: load_controlnet(p, sd.unet)):
        with pytest.raises(ValueError, match=word):
            load(path)
    assert "a program ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in NOT_NEEDED if "lightning" in name])
def test_classes_that_published_checkpoints_name_become_empty_objects(tmp_path, monkeypatch, name):
    """As Stable Diffusion 1.4's own file names them. Nothing is imported: there is no Lightning."""
    module, _, short = name.rpartition(".")
    callback = type(short, (), {"__module__": module})
    instance = callback()
    instance.best = 0.5
    parts = module.split(".")
    with monkeypatch.context() as patched:
        for i in range(len(parts)):
            patched.setitem(sys.modules, ".".join(parts[:i + 1]), ModuleType(parts[i]))
        setattr(sys.modules[module], short, callback)
        torch.save({"callbacks": {callback: {"score": instance}},
                    "state_dict": {"x": torch.ones(2)}}, tmp_path / "sd.ckpt")
    assert read_tensors(tmp_path / "sd.ckpt")[0]["x"].tolist() == [1, 1]
    assert module not in sys.modules


def test_numpy_scalars_beside_the_tensors_are_no_obstacle(tmp_path):
    content = {"best_model_score": np.float64(0.5), "state_dict": {"x": torch.ones(2)}}
    torch.save(content, tmp_path / "sd.ckpt")
    assert read_tensors(tmp_path / "sd.ckpt")[0]["x"].tolist() == [1, 1]


class Hostile(Dangerous):
    """Calls a function with what has been accepted before."""

    def __reduce__(self):
        return os.system, ("echo a program ran; touch ran",)


@pytest.mark.parametrize("place", ["callbacks", "state_dict"])
def test_a_hostile_file_runs_nothing_beside_accepted_classes(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    content = {"score": np.float64(0.5), "state_dict": {"x": torch.ones(2)}, place: Hostile()}
    torch.save(content, "sd.ckpt")
    with pytest.raises(ValueError, match=r"\(posix.system\), and is refused: .*as .safetensors"):
        read_tensors("sd.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["sd.ckpt"]


@pytest.mark.parametrize("content", [{"x": torch.ones(2)}, {"x": Dangerous()}])
def test_a_pickle_named_safetensors_is_read_as_the_pickle_that_it_is(tmp_path, content):
    torch.save(content, tmp_path / "x.safetensors")
    if isinstance(content["x"], torch.Tensor):
        assert read_tensors(tmp_path / "x.safetensors")[0]["x"].tolist() == [1, 1]
    else:
        with pytest.raises(ValueError, match="x.safetensors is a pickle that holds more"):
            read_tensors(tmp_path / "x.safetensors")


def test_a_part_of_a_model_is_called_that(tmp_path):
    path = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is part 2 of 3: give the folder of the whole model"):
        read_tensors(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_no_numbers_are_found_by_file_and_tensor(
        base_file, sd, tmp_path, value, dtype):
    name = "model.diffusion_model.out.2.weight"
    tensors, metadata = read_tensors(base_file)
    tensors[name] = tensors[name].to(dtype)
    tensors[name][0, 0, 0, 0] = value
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(ValueError, match=r"bad.safetensors is damaged: .*out.2.weight has .*\(1 o"):
        load_stable_diffusion(tmp_path / "bad.safetensors")
    tensors = dict(ControlNet(TINY).state_dict())
    tensors["zero_convs.0.0.weight"][0, 0, 0, 0] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"bad.safetensors is damaged: zero_convs.0.0.weight has"):
        load_controlnet(tmp_path / "bad.safetensors", sd.unet)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pytorch_file_of_tensors_is_read_without_running_it(sd, tmp_path, nested):
    tensors = ControlNet.from_unet(sd.unet).state_dict()
    content = {"state_dict": tensors, "global_step": 7} if nested else tensors
    torch.save(content, tmp_path / "control.pth")
    assert load_controlnet(tmp_path / "control.pth", sd.unet).config == sd.unet.config


# They begin like a pickle, a web page and a zip archive.
@pytest.mark.parametrize("length", [0x0280, 0x3C20, 0x4B50])
def test_a_header_whose_length_looks_like_another_format_is_no_obstacle(tmp_path, length):
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert read_tensors(tmp_path / "a.safetensors")[0]["x"].tolist() == [0.0]


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], {"state_dict": [torch.zeros(1)]}, {"state_dict": None}])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="is a pickle without tensors"):
        read_tensors(tmp_path / "a.ckpt")


def test_a_base_model_of_tensors_alone_loads_from_a_ckpt(base_file, sd, tmp_path, recwarn):
    tensors, _ = read_tensors(base_file)
    torch.save({"state_dict": tensors, "global_step": 1}, tmp_path / "sd.ckpt")
    result, _ = read_tensors(tmp_path / "sd.ckpt")
    assert result.keys() == tensors.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in tensors.items())


def test_a_written_file_has_the_permissions_of_the_users_umask(sd, tmp_path):
    save_controlnet(tmp_path / "control.safetensors", ControlNet(TINY))
    (tmp_path / "plain").touch()
    assert (tmp_path / "control.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_stable_diffusion(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        load_stable_diffusion(tmp_path)


WRONG = ["[]", "{", {"groups": "x"}, {"groups": 7}, {"prediction": "zzz"}, {"guidance": "a"},
         {"color": 1}, {"num_heads": 3}]


@pytest.mark.parametrize("settings", WRONG)
def test_wrong_metadata_of_a_base_model_is_refused_by_name_of_the_file(
        base_file, tmp_path, settings):
    tensors, metadata = read_tensors(base_file)
    if isinstance(settings, dict):
        settings = json.dumps(json.loads(metadata["stable_diffusion"]) | settings)
    save_file(tensors, tmp_path / "bad.safetensors", {"stable_diffusion": settings})
    message = "bad.safetensors is no whole Stable Diffusion checkpoint, or its metadata is wrong"
    with pytest.raises(ValueError, match=message):
        load_stable_diffusion(tmp_path / "bad.safetensors")


def test_a_file_has_the_word_noise_for_epsilon_and_either_is_read(sd, base_file, tmp_path):
    tensors, metadata = read_tensors(base_file)
    settings = json.loads(metadata["stable_diffusion"])
    assert sd.sampling.prediction == "epsilon" and settings["prediction"] == "noise"
    settings = json.dumps(settings | {"prediction": "epsilon"})
    save_file(tensors, tmp_path / "new.safetensors", {"stable_diffusion": settings})
    for path in (base_file, tmp_path / "new.safetensors"):
        assert load_stable_diffusion(path).sampling.prediction == "epsilon"
    given = {"prediction": "noise"}
    assert load_stable_diffusion(base_file, given=given).sampling.prediction == "epsilon"


@pytest.mark.parametrize("config", ["[]", "{", '{"color": 1}', '{"rank": "x"}', "{}"])
def test_wrong_metadata_of_a_student_is_refused_by_name_of_the_file(sd, tmp_path, config):
    metadata = {"architecture": "loha", "config": config}
    save_file(build_student("loha", sd.unet).state_dict(), tmp_path / "bad.safetensors", metadata)
    with pytest.raises(ValueError, match="bad.safetensors"):
        load_controlnet(tmp_path / "bad.safetensors", sd.unet)


def test_a_file_of_a_newer_format_is_refused(sd, tmp_path):
    save_file(ControlNet(TINY).state_dict(), tmp_path / "new.safetensors", {"format_version": "99"})
    with pytest.raises(ValueError, match="a newer version of this project wrote it"):
        load_controlnet(tmp_path / "new.safetensors", sd.unet)


def test_all_problems_of_a_checkpoint_come_in_one_error(base_file, tmp_path):
    tensors, metadata = read_tensors(base_file)
    del tensors["model.diffusion_model.out.2.bias"]
    del tensors["first_stage_model.decoder.conv_in.weight"]
    del tensors["cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.k_proj.weight"]
    tensors["model.diffusion_model.out.0.bias"] = torch.zeros(5)
    tensors["a.word.too.many"] = torch.zeros(2)
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(ValueError) as error:
        load_stable_diffusion(tmp_path / "bad.safetensors")
    message = str(error.value)
    assert "\n" not in message
    for word in ("missing model.diffusion_model.out.2.bias [4]",
                 "out.0.bias has shape [5], expected [32]", "unexpected a.word.too.many [2]",
                 "more"):
        assert word in message


def test_a_missing_tensor_of_a_control_network_is_named(sd, tmp_path):
    save_controlnet(tmp_path / "control.safetensors", ControlNet(TINY))
    tensors = load_file(tmp_path / "control.safetensors")
    del tensors["zero_convs.3.0.weight"]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"missing zero_convs.3.0.weight \[32, 32, 1, 1\]"):
        load_controlnet(tmp_path / "bad.safetensors", sd.unet)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(sd, tmp_path, monkeypatch):
    path = tmp_path / "control.safetensors"
    save_controlnet(path, ControlNet(TINY))
    old = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        filename.write_bytes(b"half of i")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weights.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_controlnet(path, ControlNet(TINY))
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["control.safetensors"]
