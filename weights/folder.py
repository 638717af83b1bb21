"""A base model as diffusers keeps it: a folder with a folder for each network."""

import json
from pathlib import Path

from torch import Tensor

from common.files import atomic_write
from diffusion import SD_TURBO, Sampling
from text import TextConfig
from text.tokenizer import write_tokenizer
from unet import UNetConfig
from vae import LATENT_CHANNELS, VAEConfig
from weights import naming
from weights.files import Tensors, read_safetensors, strip_prefix, write_tensors
from weights.naming import TEXT_1X, UNET

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
         "text_encoder": "model"}
ATTENTION = "CrossAttnDownBlock2D"  # a level that looks at the prompt
DDIM = "DDIMScheduler"
SCALE = 0.18215                     # of the latents, which another autoencoder may have otherwise


def part_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors of one network: a file, or parts by their index, else the same of the variant
    fp16. Raises ValueError if they are missing."""
    for variant in ("", ".fp16"):
        file = folder / f"{stem}{variant}.safetensors"
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if file.is_file():
            return [file]
        if index.is_file():
            parts = sorted(set(_json(index).get("weight_map", {}).values()))
            files = [folder / Path(part).name for part in parts]
            if missing := [str(file) for file in files if not file.is_file()]:
                raise ValueError(f"{index} names parts that are missing: {', '.join(missing)}")
            if files:
                return files
    what = "only pickles" if list(folder.glob("*.bin")) else "no weights"
    raise ValueError(f"expected {stem}.safetensors (or its variant fp16, or parts) in {folder}, it "
                     f"has {what}")


def base_files(path: Path) -> list[Path]:
    """The files that hold a base model: itself, or those in a folder of diffusers. Raises
    ValueError if there is none."""
    if not path.is_dir():
        return [path]
    if not (path / "unet").is_dir():
        raise ValueError(f"{path} is a folder without unet, vae and text_encoder: expected Stable "
                         "Diffusion in one file, or a whole folder of diffusers")
    return [file for part, stem in STEMS.items() if (path / part).is_dir()
            for file in part_files(path / part, stem)]


def read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A base model's tensors in the original naming, with prefixes, and metadata. A part that is
    missing is left out. Raises ValueError for another model or without safetensors."""
    parts, metadata = {}, {}
    for file in base_files(path):
        tensors, own = read_safetensors(file)
        parts.setdefault(file.parent.name, {}).update(tensors)
        if "stable_diffusion" in own:  # this project wrote it
            metadata = own
    if (path / "text_encoder_2").is_dir():
        raise ValueError(f"expected Stable Diffusion 1.x or 2.x, {path} is an SDXL model")
    tensors = {UNET + name: tensor for name, tensor in naming.from_diffusers(parts["unet"]).items()}
    tensors |= {naming.VAE + name: tensor
                for name, tensor in naming.vae_from_others(parts.get("vae", {})).items()}
    tensors |= {TEXT_1X + name: tensor for name, tensor in parts.get("text_encoder", {}).items()}
    return tensors, metadata or {"stable_diffusion": json.dumps(_settings(path))}


def _settings(path: Path) -> dict[str, object]:
    """What diffusers' configurations say and shapes do not show."""
    unet, vae, scheduler = (
        _json(path / name) for name in ("unet/config.json", "vae/config.json",
                                        "scheduler/scheduler_config.json"))
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError(f"{path} was trained with zero terminal SNR, which is not supported")
    if abs(vae.get("scaling_factor", SCALE) - SCALE) > 1e-6:
        raise ValueError(f"expected latents scaled by {SCALE}, {path} has {vae['scaling_factor']}")
    widths, heads = unet.get("block_out_channels", [320]), unet.get("attention_head_dim", 8)
    equal = isinstance(heads, int) or len(set(heads)) == 1
    first = heads if isinstance(heads, int) else heads[0]  # despite its name, the number of heads
    settings = {"groups": unet.get("norm_num_groups", 32), "num_heads": first if equal else None,
                "head_dim": None if equal else widths[0] // first,
                "vae_groups": vae.get("norm_num_groups", 32)}
    predictions = {"epsilon": "noise", "v_prediction": "v"}
    if (predicts := scheduler.get("prediction_type")) is not None:
        if predicts not in predictions:
            raise ValueError(f"expected a model that predicts epsilon or v, {path} predicts "
                             f"{predicts}")
        settings["prediction"] = predictions[predicts]
    if scheduler.get("timestep_spacing") == "trailing":
        settings["spacing"] = "trailing"
        if scheduler.get("_class_name", "").startswith("Euler") and unet.get(
                "use_linear_projection"):  # SD-Turbo's scheduler, and the shape of 2.x
            settings |= {"steps": SD_TURBO.steps, "guidance": SD_TURBO.guidance}
    return settings


def _json(path: Path) -> dict:
    """A configuration; nothing if it is missing."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path} is no JSON: {problem}") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}")
    return content


def encoder_settings(config: UNetConfig) -> dict:
    """The config as diffusers writes it for a UNet or ControlNet."""
    widths = [mult * config.model_channels for mult in config.channel_mult]
    return {
        "block_out_channels": widths, "layers_per_block": config.num_res_blocks,
        "down_block_types": [ATTENTION if attention else "DownBlock2D"
                             for attention in config.attention],
        "attention_head_dim": [config.heads(width) for width in widths],
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projections, "norm_num_groups": config.groups,
    }


def write_folder(path: Path, tensors: Tensors, metadata: dict[str, str], unet: UNetConfig,
                 vae: VAEConfig, text: TextConfig, sampling: Sampling, resolution: int) -> None:
    """Write a base model's tensors, in the original naming, as a folder that diffusers'
    StableDiffusionPipeline.from_pretrained reads. Of a text encoder of 2.x only the layers that are
    used: diffusers takes the last one's states. Raises OSError."""
    layers = text.layers - (text.openclip and text.layers != 23)
    words = naming.to_huggingface(naming.from_huggingface(tensors, text.layers), text.layers)
    unused = f"text_model.encoder.layers.{layers}."
    parts = {
        "unet": naming.rename(strip_prefix(tensors, UNET),
                              naming.diffusers_table(unet.attention, unet.num_res_blocks)),
        "vae": naming.vae_to_diffusers(strip_prefix(tensors, naming.VAE), len(vae.channel_mult),
                                       vae.num_res_blocks),
        "text_encoder": {name: tensor for name, tensor in strip_prefix(words, TEXT_1X).items()
                         if not name.startswith(unused)}}
    for part, stem in STEMS.items():
        write_tensors(path / part / f"{stem}.safetensors", parts[part], metadata)
    # What `ddim_sample` equals at each spacing.
    scheduler = DDIM if sampling.spacing == "leading" else "EulerDiscreteScheduler"
    latents = resolution // 8
    levels = len(vae.channel_mult)
    configurations = {
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel", **encoder_settings(unet),
            "up_block_types": [ATTENTION.replace("Down", "Up") if attention else "UpBlock2D"
                               for attention in reversed(unet.attention)],
            "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS,
            "sample_size": latents},
        "vae/config.json": {
            "_class_name": "AutoencoderKL", "layers_per_block": vae.num_res_blocks,
            "block_out_channels": [mult * vae.channels for mult in vae.channel_mult],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels, "norm_num_groups": vae.groups,
            "latent_channels": vae.latent_channels, "scaling_factor": SCALE,
            "sample_size": resolution},
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
            "hidden_size": text.width, "intermediate_size": 4 * text.width,
            "num_hidden_layers": layers, "num_attention_heads": text.width // 64,
            "hidden_act": "gelu" if text.openclip else "quick_gelu", "projection_dim": text.width,
            "max_position_embeddings": 77, "vocab_size": 49408},
        "scheduler/scheduler_config.json": {
            "_class_name": scheduler, "beta_start": 0.00085, "beta_end": 0.012,
            "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1,
            "timestep_spacing": sampling.spacing,
            "prediction_type": "v_prediction" if sampling.prediction == "v" else "epsilon",
            **({"clip_sample": False, "set_alpha_to_one": False} if scheduler == DDIM else {})},
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.32.0",
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "scheduler": ["diffusers", scheduler], "safety_checker": [None, None],
            "feature_extractor": [None, None], "requires_safety_checker": False}}
    write_tokenizer(path / "tokenizer", padding="!" if text.openclip else "<|endoftext|>")
    for name, content in configurations.items():
        write_json(path / name, content)


def write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
