"""Published files: every naming is read, what they add is ignored, and a wrong file is called by
its name."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomize, same
from safetensors.torch import load_file, save_file

from controlnet import ControlNet
from text import CLIPText, TextConfig
from unet import SD15, SD21, TINY, UNet, UNetConfig
from vae import VAE, VAEConfig
from weights import (
    StableDiffusion,
    load_controlnet,
    load_stable_diffusion,
    save_controlnet,
    save_stable_diffusion,
)
from weights.files import read_tensors

UNET = "model.diffusion_model."
SDXL = {"conditioner.embedders.1.model.ln_final.weight": (1280,),
        UNET + "input_blocks.0.0.weight": (320, 4, 3, 3)}
OTHERS = {  # the name of a kind of file -> tensors by which it is recognized
    "a UNet in diffusers' naming": {
        "conv_in.weight": (320, 4, 3, 3),
        "down_blocks.0.resnets.0.time_emb_proj.weight": (320, 1280)},
    "an autoencoder in diffusers' naming": {
        "encoder.down_blocks.0.resnets.0.conv1.weight": (128, 128, 3, 3)},
    "an SDXL model": SDXL,
    "a ControlNet for SDXL": {
        "control_model.input_hint_block.0.weight": (16, 3, 3, 3),
        "control_model.label_emb.0.0.weight": (1280, 2816)},
    "a Flux model": {UNET + "double_blocks.0.img_attn.qkv.weight": (9216, 3072)},
    "a Stable Diffusion 3 model": {UNET + "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320, 1, 1)},
    "a LoRA, low-rank": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
        ".to_q_lora.down.weight": (4, 320)},
    "an unCLIP model": {UNET + "label_emb.0.0.weight": (1280, 1536),
                        "embedder.model.visual.proj": (1280, 1024)},
    "a Control-LoRA": {"lora_controlnet": (), "input_blocks.1.0.in_layers.2.up": (320, 16)},
    "an inpainting model (9 input channels": {UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)},
    "InstructPix2Pix (8 input channels": {UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)},
    "a UNet without autoencoder and text encoder": {"input_blocks.0.0.weight": (320, 4, 3, 3)},
    "an autoencoder (VAE) alone": {"encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3)},
    "a CLIP text encoder alone": {"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)},
    "an IP-Adapter": {"ip_adapter.1.to_k_ip.weight": (320, 768)},
    "a T2I-Adapter": {"body.0.block1.weight": (320, 320, 3, 3)},
    "a file of an unknown kind (its first tensors are what.is.this)": {"what.is.this": (1,)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_called_by_its_name(sd, tmp_path, kind):
    path = tmp_path / "other.safetensors"
    tensors = {name: torch.zeros(shape, dtype=torch.int8) for name, shape in OTHERS[kind].items()}
    save_file(tensors, path)
    expected = "expected Stable Diffusion 1.x or 2.x in one file, original naming; .* is "
    with pytest.raises(ValueError, match=expected + re.escape(kind)):
        load_stable_diffusion(path)
    with pytest.raises(ValueError, match="expected a control network, .* is " + re.escape(kind)):
        load_controlnet(path, sd.unet)


def test_a_control_network_is_no_base_model_and_a_base_model_no_control_network(
        base_file, sd, tmp_path):
    save_controlnet(tmp_path / "control.safetensors", ControlNet.from_unet(sd.unet))
    with pytest.raises(ValueError, match="control.safetensors is a control network"):
        load_stable_diffusion(tmp_path / "control.safetensors")
    with pytest.raises(ValueError, match="is a Stable Diffusion checkpoint"):
        load_controlnet(base_file, sd.unet)


@pytest.mark.parametrize(("net", "base"), [(SD15, SD21), (SD21, SD15)])
def test_a_control_network_of_another_base_is_refused_by_the_names_of_both(tmp_path, net, base):
    small = replace(net, model_channels=64)
    save_controlnet(tmp_path / "control.safetensors", ControlNet(small))
    with torch.device("meta"):
        other = UNet(base)
    names = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
    own, expected = names[net.context_dim], names[base.context_dim]
    message = f"is a control network for {own} .*, the base model is {expected}"
    with pytest.raises(ValueError, match=message):
        load_controlnet(tmp_path / "control.safetensors", other)


def test_stable_diffusion_and_a_controlnet_in_one_file_are_read_as_either(base_file, sd, tmp_path):
    net = randomize(ControlNet(TINY), seed=4)
    tensors, metadata = read_tensors(base_file)
    tensors |= {"control_model." + name: tensor for name, tensor in net.state_dict().items()}
    save_file(tensors, tmp_path / "whole.safetensors", metadata)
    assert same(load_controlnet(tmp_path / "whole.safetensors", sd.unet), net)
    assert same(load_stable_diffusion(tmp_path / "whole.safetensors").unet, sd.unet)


def test_names_that_early_merges_and_published_files_add_do_not_disturb(base_file, sd, tmp_path):
    tensors, metadata = read_tensors(base_file)
    early = {name.replace("transformer.text_model.", "transformer."): tensor
             for name, tensor in tensors.items()}
    early |= {
        "model_ema.decay": torch.tensor(0.9), "betas": torch.zeros(1000),
        "first_stage_model.loss.logvar": torch.zeros(1),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(early, tmp_path / "early.safetensors", metadata)
    assert same(load_stable_diffusion(tmp_path / "early.safetensors").text, sd.text)


@pytest.fixture
def base_2x(tmp_path):
    """A small base model with the text encoder of 2.x, and its tensors in a file without metadata
    of this project's."""
    text = randomize(CLIPText(TextConfig(width=64, layers=1, openclip=True)), seed=2)
    unet = randomize(UNet(UNetConfig(64, (1, 1), (True, False), 1, 64, None, 64, True)), seed=0)
    sd = StableDiffusion(unet, randomize(VAE(VAEConfig(32, (1, 1), 1)), seed=1), text)
    save_stable_diffusion(tmp_path / "sd2.safetensors", sd, dtype=torch.float16)
    save_file(load_file(tmp_path / "sd2.safetensors"), tmp_path / "sd2.safetensors")
    return tmp_path / "sd2.safetensors"


def test_a_2x_file_without_a_prediction_type_is_taken_to_predict_epsilon_with_a_warning(base_2x):
    message = "has the shape of Stable Diffusion 2.x and no prediction type: epsilon is assumed"
    with pytest.warns(UserWarning, match=message):
        assert load_stable_diffusion(base_2x).prediction == "epsilon"


@pytest.mark.parametrize(("prediction", "resolution"), [("epsilon", 512), ("v", 768)])
def test_a_requested_prediction_is_taken_without_a_warning(
        base_2x, recwarn, prediction, resolution):
    sd = load_stable_diffusion(base_2x, prediction=prediction)
    assert (sd.prediction, sd.resolution) == (prediction, resolution) and not list(recwarn)


def test_the_text_encoder_of_sd_turbo_is_read_from_its_later_prefix(base_2x):
    expected = load_stable_diffusion(base_2x, prediction="epsilon").text
    prefix = "conditioner.embedders.0.model."
    tensors = {name.replace("cond_stage_model.model.", prefix): tensor
               for name, tensor in load_file(base_2x).items()}
    tensors |= {prefix + "logit_scale": torch.tensor(1.0),
                prefix + "text_projection": torch.zeros(64, 64)}
    save_file(tensors, base_2x)
    assert same(load_stable_diffusion(base_2x, prediction="epsilon").text, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_in_the_requested_dtype_is_not_copied(base_file):
    """The weights stay in the memory-mapped file: their pages can be dropped and read again, and
    there is no second copy."""
    sd = load_stable_diffusion(base_file)
    weight = sd.unet.out[2].weight
    half = load_stable_diffusion(base_file, torch.float16).unet.out[2].weight
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(base_file)):
            low, high = line.split()[0].split("-")
            mapped.append(range(int(low, 16), int(high, 16)))
    assert any(weight.data_ptr() in addresses for addresses in mapped)
    assert not any(half.data_ptr() in addresses for addresses in mapped)
    assert half.dtype == torch.float16


def test_a_folder_of_diffusers_is_read_also_as_part_of_a_pipeline(sd, tmp_path):
    net = randomize(ControlNet(TINY), seed=5)
    for folder in (tmp_path, tmp_path / "controlnet"):
        save_controlnet(folder / "diffusion_pytorch_model.safetensors", net, naming="diffusers")
        assert same(load_controlnet(tmp_path, sd.unet), net)
        (folder / "diffusion_pytorch_model.safetensors").unlink()
    message = "is a folder without diffusion_pytorch_model.safetensors or"
    with pytest.raises(ValueError, match=message):
        load_controlnet(tmp_path, sd.unet)


def test_a_folder_of_a_controlnet_with_averaged_outputs_is_refused(sd, tmp_path):
    net = randomize(ControlNet(TINY), seed=5)
    save_controlnet(tmp_path / "diffusion_pytorch_model.safetensors", net, naming="diffusers")
    (tmp_path / "config.json").write_text('{"global_pool_conditions":true}')
    with pytest.raises(ValueError, match="outputs are averaged over a picture"):
        load_controlnet(tmp_path, sd.unet)
