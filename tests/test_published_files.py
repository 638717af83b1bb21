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
from weights.controlnet import ENCODER, read_controlnet
from weights.files import read_tensors
from weights.naming import (
    VAE_ATTENTION,
    VAE_ATTENTION_BEFORE,
    to_huggingface,
    vae_to_diffusers,
)

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
    "an IP-Adapter": {"ip_adapter.1.to_k_ip.weight": (320, 768),
                      "ip_adapter.0.to_q_lora.down.weight": (128, 320)},  # FaceID's
    "a ControlNet-LLLite": {
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": (32, 640)},
    "a style adapter": {"style_embedding": (1, 8, 1024), "transformer_layes.0.ln_1.bias": (1024,)},
    "a ControlNet-XS": {"control_model.input_hint_block.0.weight": (16, 3, 3, 3),
                        "control_model.enc_zero_convs_out.0.0.weight": (320, 320, 1, 1)},
    "a ControlNet for several conditions at once": {
        "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "task_embedding": (6, 320)},
    "a T2I-Adapter": {"body.0.block1.weight": (320, 320, 3, 3)},
    "a LoRA, low-rank differences": {"lora_unet_mid_block_resnets_0_conv1.hada_w1_a": (32, 8)},
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
        assert load_stable_diffusion(base_2x).sampling.prediction == "epsilon"


@pytest.mark.parametrize(("prediction", "resolution"), [("epsilon", 512), ("v", 768)])
def test_a_requested_prediction_is_taken_without_a_warning(
        base_2x, recwarn, prediction, resolution):
    sd = load_stable_diffusion(base_2x, given={"prediction": prediction})
    assert (sd.sampling.prediction, sd.resolution) == (prediction, resolution) and not list(recwarn)


@pytest.mark.parametrize(("metadata", "marker", "expected"), [
    ({"modelspec.prediction_type": "v"}, None, "v"),
    ({"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
    ({"modelspec.prediction_type": "v_prediction"}, None, "v"),
    ({}, "v_pred", "v"),
])
def test_a_prediction_type_that_others_write_is_taken_without_a_warning(
        base_2x, recwarn, metadata, marker, expected):
    markers = {marker: torch.tensor([])} if marker else {}
    save_file(load_file(base_2x) | markers, base_2x, metadata)
    assert load_stable_diffusion(base_2x).sampling.prediction == expected and not list(recwarn)
    given = {"prediction": "noise"}
    assert load_stable_diffusion(base_2x, given=given).sampling.prediction == "epsilon"


def test_zero_terminal_snr_and_an_unknown_prediction_type_are_refused(base_2x):
    tensors = load_file(base_2x)
    save_file(tensors | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, base_2x)
    with pytest.raises(ValueError, match="was trained with zero terminal SNR"):
        load_stable_diffusion(base_2x)
    save_file(tensors, base_2x, {"modelspec.prediction_type": "x0"})
    with pytest.raises(ValueError, match="unusable setting prediction: x0"):
        load_stable_diffusion(base_2x)


@torch.no_grad()
def test_a_2x_text_encoder_under_hugging_faces_names_computes_as_2x(base_2x):
    """As programs write it that convert a folder of diffusers: the UNet tells, not the names."""
    expected = load_stable_diffusion(base_2x, given={"prediction": "epsilon"}).text
    save_file(to_huggingface(load_file(base_2x), layers=1), base_2x)
    with pytest.warns(UserWarning, match="has the shape of Stable Diffusion 2.x"):
        text = load_stable_diffusion(base_2x).text
    assert text.config == expected.config and text.config.openclip and same(text, expected)
    assert text.tokenize(["x"])[0, 10] == 0  # padding
    assert torch.equal(text.encode(["a house"]), expected.encode(["a house"]))


def test_the_text_encoder_of_sd_turbo_is_read_from_its_later_prefix(base_2x):
    expected = load_stable_diffusion(base_2x, given={"prediction": "epsilon"}).text
    prefix = "conditioner.embedders.0.model."
    tensors = {name.replace("cond_stage_model.model.", prefix): tensor
               for name, tensor in load_file(base_2x).items()}
    tensors |= {prefix + "logit_scale": torch.tensor(1.0),
                prefix + "text_projection": torch.zeros(64, 64)}
    save_file(tensors, base_2x)
    assert same(load_stable_diffusion(base_2x, given={"prediction": "epsilon"}).text, expected)


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


@pytest.mark.parametrize("names", [VAE_ATTENTION, VAE_ATTENTION_BEFORE])
def test_an_autoencoder_whose_attention_has_diffusers_names_is_read(
        base_file, sd, tmp_path, names):
    tensors, metadata = read_tensors(base_file)
    for half in ("encoder", "decoder"):
        place = f"first_stage_model.{half}.mid.attn_1."
        for ours, theirs in names.items():
            tensors[f"{place}{theirs}.weight"] = tensors.pop(f"{place}{ours}.weight").flatten(1) \
                if ours != "norm" else tensors.pop(f"{place}{ours}.weight")
            tensors[f"{place}{theirs}.bias"] = tensors.pop(f"{place}{ours}.bias")
    save_file(tensors, tmp_path / "sd.safetensors", metadata)
    assert same(load_stable_diffusion(tmp_path / "sd.safetensors").vae, sd.vae)


@pytest.mark.parametrize(("prefix", "naming"), [("", ""), ("first_stage_model.", ""),
                                                ("", "diffusers")])
def test_an_autoencoder_of_its_own_replaces_the_checkpoints_or_stands_in(
        base_file, sd, tmp_path, prefix, naming):
    other = randomize(VAE(sd.vae.config), seed=21)
    tensors = other.state_dict()
    if naming:
        tensors = vae_to_diffusers(tensors, 4, 1)
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()},
              tmp_path / "vae.safetensors")
    whole, metadata = read_tensors(base_file)
    without = {name: t for name, t in whole.items() if not name.startswith("first_stage_model.")}
    save_file(without, tmp_path / "without.safetensors", metadata)
    for base in (base_file, tmp_path / "without.safetensors"):
        loaded = load_stable_diffusion(base, vae=tmp_path / "vae.safetensors")
        assert same(loaded.vae, other) and same(loaded.unet, sd.unet)
    with pytest.raises(ValueError, match=r"without.safetensors has no autoencoder .*--vae"):
        load_stable_diffusion(tmp_path / "without.safetensors")
    with pytest.raises(ValueError, match=r"expected an autoencoder \(VAE\), .* is a control"):
        save_controlnet(tmp_path / "c.safetensors", ControlNet(TINY))
        load_stable_diffusion(base_file, vae=tmp_path / "c.safetensors")


def test_a_file_without_a_text_encoder_is_refused_by_that_name(base_file, tmp_path):
    tensors, metadata = read_tensors(base_file)
    kept = {name: t for name, t in tensors.items() if not name.startswith("cond_stage_model.")}
    save_file(kept, tmp_path / "sd.safetensors", metadata)
    with pytest.raises(ValueError, match="sd.safetensors has no text encoder"):
        load_stable_diffusion(tmp_path / "sd.safetensors")


# --- ControlNets that look like others ---


def as_difference(net: ControlNet, sd: StableDiffusion) -> dict[str, torch.Tensor]:
    base = sd.unet.state_dict()
    return {name: tensor - base[name] if name.startswith(ENCODER) else tensor
            for name, tensor in net.state_dict().items()} | {"difference": torch.tensor([])}


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_the_base_is_added_to_a_difference_controlnet(sd, tmp_path, prefix):
    net = randomize(ControlNet(TINY), seed=31)
    path = tmp_path / "difference.safetensors"
    save_file({prefix + name: t for name, t in as_difference(net, sd).items()}, path)
    loaded = load_controlnet(path, sd.unet).state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.allclose(loaded[name], tensor, atol=1e-6), name
    with pytest.raises(ValueError, match="is a difference ControlNet, .* with --base"):
        read_controlnet(path)
    narrow = {name: torch.zeros(1) for name in sd.unet.state_dict()}
    with pytest.raises(ValueError, match="is a difference from another base model"):
        read_controlnet(path, narrow)


@pytest.mark.parametrize(("name", "message"), [
    ("control_v11e_sd15_shuffle.safetensors", "ControlNet's shuffle, .* averaged over a picture"),
    ("control_v11p_sd15_inpaint_fp16.safetensors", "ControlNet's inpaint, .* -1 where the mask is"),
    ("control_v11p_sd15_inpaint/diffusion_pytorch_model.safetensors", "ControlNet's inpaint"),
])
def test_published_controlnets_of_another_kind_are_known_by_their_names(
        sd, tmp_path, name, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    save_file(ControlNet(TINY).state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_controlnet(tmp_path / name, sd.unet)
    save_controlnet(tmp_path / name, ControlNet(TINY))  # one's own may have such a name
    assert load_controlnet(tmp_path / name, sd.unet).config == TINY


def test_conditions_that_are_not_rgb_are_refused(sd, tmp_path):
    tensors = ControlNet(TINY).state_dict()
    tensors["input_hint_block.0.weight"] = torch.zeros(16, 4, 3, 3)
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="takes conditions of 4 channels, which is not supported"):
        load_controlnet(tmp_path / "c.safetensors", sd.unet)


def test_an_ip_adapter_of_pytorch_is_called_by_its_name(sd, tmp_path):
    torch.save({"image_proj": {"proj.weight": torch.zeros(4, 4)},
                "ip_adapter": {"1.to_k_ip.weight": torch.zeros(4, 4)}}, tmp_path / "ip.bin")
    with pytest.raises(ValueError, match="ip.bin is an IP-Adapter"):
        load_controlnet(tmp_path / "ip.bin", sd.unet)


def test_a_folder_of_a_controlnet_with_averaged_outputs_is_refused(sd, tmp_path):
    net = randomize(ControlNet(TINY), seed=5)
    save_controlnet(tmp_path / "diffusion_pytorch_model.safetensors", net, naming="diffusers")
    (tmp_path / "config.json").write_text('{"global_pool_conditions":true}')
    with pytest.raises(ValueError, match="outputs are averaged over a picture"):
        load_controlnet(tmp_path, sd.unet)
