"""A base model as a folder of diffusers: read in every form that is published, written so that
diffusers reads it, and bit for bit the same on the way back."""

import json
import shutil

import pytest
import torch
from conftest import randomize, relative_error, same
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from common.cli import run
from diffusion import Sampling
from text import CLIPText, TextConfig
from text.tokenizer import tokenizer
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import (
    StableDiffusion,
    convert,
    load_stable_diffusion,
    save_stable_diffusion,
    tiny,
)


def convert_main(*arguments) -> None:
    convert.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(base_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "folder"
    convert_main(base_file, path, "--naming", "diffusers")
    return path


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "folder")
    return tmp_path / "folder"


def test_a_base_model_makes_the_round_trip_through_a_folder_in_the_same_bytes(tmp_path):
    convert_main(tiny.SD, tmp_path / "folder", "--naming", "diffusers")
    convert_main(tmp_path / "folder", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == tiny.SD.read_bytes()


def test_a_folder_is_loaded_as_the_file_is(folder, base_file, sd):
    loaded = load_stable_diffusion(folder)
    for network in ("unet", "vae", "text"):
        assert same(getattr(loaded, network), getattr(sd, network))
    assert (loaded.sampling, loaded.resolution) == (sd.sampling, sd.resolution)


@torch.no_grad()
def test_diffusers_reads_the_folder_and_computes_the_same(folder, sd):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([1, 700])
    ids = pipeline.tokenizer(["a red circle", "größe"], padding="max_length").input_ids
    assert ids == sd.text.tokenize(["a red circle", "größe"]).tolist()
    states = pipeline.text_encoder(torch.tensor(ids))[0]
    assert relative_error(states, sd.text.encode(["a red circle", "größe"])) < 1e-5
    noise_pred = pipeline.unet(latents, timesteps, states).sample
    assert relative_error(noise_pred, sd.unet(latents, timesteps, states)) < 1e-5
    assert relative_error(pipeline.vae.decode(latents).sample, sd.vae.decode(latents)) < 1e-5


def small_2x() -> StableDiffusion:
    unet = UNet(UNetConfig(64, (1, 1), (True, False), 1, 64, None, 64, True))
    text = CLIPText(TextConfig(64, 3, True))
    return StableDiffusion(randomize(unet, 1), randomize(VAE(VAEConfig(32, (1, 1), 1)), 2),
                           randomize(text, 3), Sampling(prediction="v"), resolution=768)


@torch.no_grad()
def test_a_2x_model_keeps_its_prediction_and_text_states(tmp_path):
    sd = small_2x()
    save_stable_diffusion(tmp_path / "sd.safetensors", sd, dtype=torch.float32)
    convert_main(tmp_path / "sd.safetensors", tmp_path / "folder", "--naming", "diffusers")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    ids = pipeline.tokenizer(["a house"], padding="max_length").input_ids
    assert ids == sd.text.tokenize(["a house"]).tolist()  # padded with "!", number 0
    assert relative_error(pipeline.text_encoder(torch.tensor(ids))[0],
                          sd.text.encode(["a house"])) < 1e-5


@torch.no_grad()
def test_what_diffusers_writes_is_read_with_what_its_configurations_say(tmp_path):
    """Number of heads, groups and the prediction are not in the shapes."""
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=64,
        attention_head_dim=4, norm_num_groups=8, layers_per_block=1)
    vae = AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16,
                        down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4)
    randomize(unet, 1).save_pretrained(tmp_path / "unet")
    randomize(vae, 2).save_pretrained(tmp_path / "vae")
    text = {name: tensor for name, tensor in load_file(tiny.SD).items()
            if name.startswith("cond_stage_model.transformer.")}
    (tmp_path / "text_encoder").mkdir()
    save_file({name.removeprefix("cond_stage_model.transformer."): tensor
               for name, tensor in text.items()}, tmp_path / "text_encoder" / "model.safetensors")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        '{"prediction_type": "v_prediction"}')
    sd = load_stable_diffusion(tmp_path)
    assert (sd.unet.config.num_heads, sd.unet.config.groups, sd.vae.config.groups) == (4, 8, 16)
    assert (sd.sampling.prediction, sd.resolution) == ("v", 512)
    latents, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    context = sd.text.encode(["x"])
    assert relative_error(sd.unet(latents, timesteps, context),
                          unet(latents, timesteps, context).sample) < 1e-5
    assert relative_error(sd.vae.decode(latents), vae.decode(latents).sample) < 1e-5


@pytest.mark.parametrize("form", ["fp16", "parts", "fp16 parts"])
def test_variants_and_parts_of_a_folder_are_read(copy, sd, form):
    unet = copy / "unet"
    whole = unet / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    variant = ".fp16" if "fp16" in form else ""
    if "fp16" in form:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    if form == "fp16":
        save_file(tensors, unet / "diffusion_pytorch_model.fp16.safetensors")
    else:
        names, files = list(tensors), {}
        for i in range(2):
            file = f"diffusion_pytorch_model{variant}-0000{i + 1}-of-00002.safetensors"
            save_file({name: tensors[name] for name in names[i::2]}, unet / file)
            files |= dict.fromkeys(names[i::2], file)
        index = unet / f"diffusion_pytorch_model.safetensors.index{variant}.json"
        index.write_text(json.dumps({"weight_map": files}))
    weight = load_stable_diffusion(copy).unet.state_dict()["out.2.weight"]
    expected = sd.unet.state_dict()["out.2.weight"]
    assert torch.equal(weight, expected.half().float() if "fp16" in form else expected)
    if "parts" in form:
        (unet / file).unlink()
        with pytest.raises(ValueError, match="names parts that are missing: .*-00002-of-00002"):
            load_stable_diffusion(copy)


def only_a_pickle(copy):
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(
        copy / "unet" / "diffusion_pytorch_model.bin")


def setting(file, key, value):
    def change(copy):
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps(content | {key: value}))
        unmark(copy)
    return change


def unmark(copy):
    for file in copy.rglob("*.safetensors"):
        save_file(load_file(file), file)


@pytest.mark.parametrize(("change", "message"), [
    (only_a_pickle, "expected diffusion_pytorch_model.safetensors .* it has only pickles"),
    (lambda copy: shutil.rmtree(copy / "vae"), r"has no autoencoder \(VAE\): .* --vae"),
    (lambda copy: shutil.rmtree(copy / "text_encoder"), "has no text encoder"),
    (lambda copy: shutil.rmtree(copy / "unet"), "is a folder without unet"),
    (lambda copy: (copy / "text_encoder_2").mkdir(), "is an SDXL model"),
    (setting("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True), "terminal SNR"),
    (setting("scheduler/scheduler_config.json", "prediction_type", "sample"), "predicts sample"),
    (setting("vae/config.json", "scaling_factor", 0.13025), "has 0.13025"),
])
def test_a_folder_that_is_something_else_is_refused_by_what_it_is(copy, change, message):
    change(copy)
    with pytest.raises(ValueError, match=message):
        load_stable_diffusion(copy)


def test_an_autoencoder_and_a_prediction_are_put_into_a_base_model(base_file, folder, tmp_path):
    other = randomize(VAE(tiny_vae(base_file)), seed=5)
    save_file(other.state_dict(), tmp_path / "vae.safetensors")
    convert_main(base_file, tmp_path / "new.safetensors", "--vae", tmp_path / "vae.safetensors",
                 "--prediction", "v")
    loaded = load_stable_diffusion(tmp_path / "new.safetensors")
    assert same(loaded.vae, other) and loaded.sampling.prediction == "v"


def tiny_vae(base_file) -> VAEConfig:
    return load_stable_diffusion(base_file).vae.config


def test_what_is_there_and_was_not_made_here_is_not_written_over(base_file, tmp_path, capsys):
    theirs = tmp_path / "theirs.safetensors"
    save_file({"x": torch.ones(2)}, theirs)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.png").touch()
    before = theirs.read_bytes()
    assert run(lambda: convert_main(base_file, theirs)) == 2
    assert run(lambda: convert_main(base_file, tmp_path / "holiday", "--naming", "diffusers")) == 2
    assert run(lambda: convert_main(base_file, base_file)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "theirs.safetensors is there already and was not written by this program" in errors[0]
    assert "holiday is there already" in errors[1] and "is an input" in errors[2]
    assert theirs.read_bytes() == before
    for _ in range(2):  # its own file is written again
        convert_main(base_file, tmp_path / "mine.safetensors")


def test_transformers_reads_the_tokenizer(folder):
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text = "A photo of the Eiffel-Tower, 1920s: größe & naïveté; don't"
    assert theirs(text).input_ids[1:-1] == tokenizer().encode(text)
