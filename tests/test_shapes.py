"""Names, shapes and parameter counts of the published checkpoints, on the meta device: nothing is
allocated."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from controlnet import ControlNet
from kd import build_student
from text import CLIP_VIT_L, OPENCLIP_VIT_H, CLIPText, TextConfig, infer_text_config
from unet import SD15, SD21, TINY, Encoder, UNet, infer_config
from vae import SD_VAE, TINY_VAE, VAE, infer_vae_config
from weights.files import shapes_of, strip_prefix
from weights.naming import (
    OTHER_PREFIXES,
    from_diffusers,
    huggingface_names,
    rename,
    to_diffusers,
)
from weights.stable_diffusion import IGNORED, IGNORED_PREFIXES

MANIFESTS = Path(__file__).parent / "manifests"


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    shapes = json.loads((MANIFESTS / f"{name}.json").read_text())
    return {key: tuple(shape) for key, shape in shapes.items()}


def is_ignored(name: str) -> bool:
    return name in IGNORED or name.startswith(IGNORED_PREFIXES)


def on_meta(make):
    with torch.device("meta"):
        return make()


def meta_shapes(make) -> dict[str, tuple[int, ...]]:
    return shapes_of(on_meta(make).state_dict())


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: UNet(SD15), 859_520_964),
        (lambda: UNet(SD21), 865_910_724),
        (lambda: ControlNet(SD15), 361_279_120),
        (lambda: ControlNet(SD21), 364_228_240),
        (lambda: VAE(SD_VAE), 83_653_863),
        (lambda: CLIPText(CLIP_VIT_L), 123_060_480),
        (lambda: CLIPText(OPENCLIP_VIT_H), 352_984_064),
    ],
)
def test_parameter_counts_are_the_published_ones(make, count):
    assert size(on_meta(make)) == count


@pytest.mark.parametrize(("name", "config"), [("sd15_ldm", SD15), ("sd21base_ldm", SD21)])
def test_unet_and_vae_have_the_published_names_and_shapes(name, config):
    published = manifest(name)
    assert meta_shapes(lambda: UNet(config)) == strip_prefix(published, "model.diffusion_model.")
    assert meta_shapes(lambda: VAE(SD_VAE)) == strip_prefix(published, "first_stage_model.")


@pytest.mark.parametrize(
    ("name", "config"), [("controlnet_sd15_ldm", SD15), ("controlnet_sd21_ldm", SD21)])
def test_controlnet_has_the_340_published_tensors(name, config):
    published = manifest(name)
    assert len(published) == 340
    assert meta_shapes(lambda: ControlNet(config)) == strip_prefix(published, "control_model.")


@pytest.mark.parametrize(
    ("name", "config"),
    [("sd15_diffusers_controlnet", SD15), ("sd21base_diffusers_controlnet", SD21)])
def test_controlnet_translates_into_diffusers_published_names_and_back(name, config):
    ours, published = on_meta(lambda: ControlNet(config)).state_dict(), manifest(name)
    theirs = to_diffusers(ours, config)
    assert shapes_of(theirs) == published
    back = from_diffusers(theirs)
    assert back.keys() == ours.keys() and all(back[name] is ours[name] for name in ours)


def test_text_encoders_have_the_published_names_and_shapes():
    openclip = strip_prefix(manifest("sd21base_ldm"), "cond_stage_model.")
    ours = meta_shapes(lambda: CLIPText(OPENCLIP_VIT_H))
    assert openclip.keys() - ours.keys() == {"model.text_projection", "model.logit_scale"}
    assert ours == {name: openclip[name] for name in ours}

    huggingface = {name: shape for name, shape in manifest("sd15_ldm").items()
                   if name.startswith("cond_stage_model.") and not is_ignored(name)}
    ours = {"cond_stage_model." + name: shape
            for name, shape in meta_shapes(lambda: CLIPText(CLIP_VIT_L)).items()}
    names = huggingface_names(CLIP_VIT_L.layers)
    assert names.keys() == ours.keys()
    assert {part for parts in names.values() for part in parts} == huggingface.keys()
    for name, parts in names.items():
        assert sum(huggingface[part][0] for part in parts) == ours[name][0]


@pytest.mark.parametrize(("name", "count"), [("sd15_ldm", 1145), ("sd21base_ldm", 1242)])
def test_every_other_tensor_of_a_published_file_is_on_the_ignore_list(name, count):
    published = manifest(name)
    assert len(published) == count
    weights = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    rest = [n for n in published if not n.startswith(weights)]
    assert rest
    assert all(is_ignored(n) for n in rest)


def test_a_tensor_that_only_begins_like_an_ignored_one_is_not_ignored():
    for name in ("betas", "logvar", "cond_stage_model.logit_scale"):
        assert is_ignored(name) and not is_ignored(name + "_of_another_network.weight")


def test_sd_turbos_later_names_are_those_of_2x():
    turbo = rename(manifest("sdturbo_sgm"), OTHER_PREFIXES)
    kept = {name: shape for name, shape in turbo.items() if not is_ignored(name)}
    published = manifest("sd21base_ldm").items()
    assert kept == {name: shape for name, shape in published if not is_ignored(name)}
    assert len(turbo) > len(kept)


@pytest.mark.parametrize("config", [SD15, SD21])
def test_config_is_inferred_from_shapes(config):
    assert infer_config(meta_shapes(lambda: UNet(config))) == config
    assert infer_config(meta_shapes(lambda: Encoder(config))) == config


def test_what_shapes_do_not_show_is_passed_in():
    tiny = meta_shapes(lambda: UNet(TINY))
    assert infer_config(tiny, groups=TINY.groups, num_heads=TINY.num_heads) == TINY
    narrow = replace(TINY, num_heads=None, head_dim=16, linear_projections=True)
    shapes = meta_shapes(lambda: UNet(narrow))
    assert infer_config(shapes, groups=narrow.groups, head_dim=16) == narrow
    tiny_vae = meta_shapes(lambda: VAE(TINY_VAE))
    assert infer_vae_config(tiny_vae, groups=TINY_VAE.groups) == TINY_VAE
    assert infer_vae_config(meta_shapes(lambda: VAE(SD_VAE))) == SD_VAE
    sd15 = strip_prefix(manifest("sd15_ldm"), "cond_stage_model.")
    assert infer_text_config(sd15) == CLIP_VIT_L
    sd21 = strip_prefix(manifest("sd21base_ldm"), "cond_stage_model.")
    assert infer_text_config(sd21) == OPENCLIP_VIT_H
    assert TextConfig() == CLIP_VIT_L


def test_shapes_of_something_else_are_refused():
    with pytest.raises(ValueError, match="expected the tensors of a Stable Diffusion encoder"):
        infer_config({"conv.weight": (3, 3)})


@pytest.mark.parametrize("config", [SD15, SD21])
def test_reduced_layer_is_at_least_twice_as_small(config):
    unet = on_meta(lambda: UNet(config))
    student = on_meta(lambda: build_student("reduced_layer", unet))
    original = on_meta(lambda: ControlNet(config))
    assert size(original) / size(student) >= 2
    # 12 skip connections from 8 encoder blocks
    assert student.taps == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    outputs = [zero[0].weight.shape[0] for zero in student.zero_convs]
    assert outputs == [channels for _, channels in config.encoder_blocks()]
