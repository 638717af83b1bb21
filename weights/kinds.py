"""What a weights file holds, told from its tensors' names: so that a wrong file is called by its name."""

from collections.abc import Mapping

STABLE_DIFFUSION = "a Stable Diffusion checkpoint"
CONTROLNET = "a control network"
WHOLE = "Stable Diffusion and a ControlNet in one file"  # as the first ControlNets were published

UNET = "model.diffusion_model."
INPUTS = {5: "the depth model of Stable Diffusion 2", 7: "an upscaler", 8: "InstructPix2Pix", 9: "an inpainting model"}  # by the UNet's input channels


def kind_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """One of the three constants above for files this project reads, else a phrase that says what the file is."""

    def has(*parts: str) -> bool:
        """Whether some tensor's name contains one of these parts."""
        return any(part in name for name in shapes for part in parts)

    control = any(name.removeprefix("control_model.").startswith(("input_hint_block.", "controlnet_cond_embedding.")) for name in shapes)
    if "lora_controlnet" in shapes:
        return "a Control-LoRA, low-rank differences from an SDXL model"
    if has("lora_up.", "lora_down.", "lora_A.", "lora_B.", "lora.up.", "lora.down.", "_lora.", ".hada_w", ".lokr_w"):
        return "a LoRA, low-rank differences to be added to another model's weights"
    if has("double_blocks.", "single_transformer_blocks."):
        return "a Flux model"
    if has("joint_blocks.", ".norm1_context."):
        return "a Stable Diffusion 3 model"
    if has("embedder.model.visual."):
        return "an unCLIP model of Stable Diffusion 2.1"
    if has("conditioner.embedders.1.", "label_emb.", "add_embedding."):
        return "a ControlNet for SDXL" if control else "an SDXL model"
    if control:
        return WHOLE if f"{UNET}input_blocks.0.0.weight" in shapes else CONTROLNET
    if shape := shapes.get(f"{UNET}input_blocks.0.0.weight"):
        return STABLE_DIFFUSION if shape[1:2] == (4,) else f"{INPUTS.get(shape[1], 'a UNet')} ({shape[1]} input channels; 4 expected)"
    for part, what in {
        "down_blocks.0.resnets.0.time_emb_proj.": "a UNet in diffusers' naming, without autoencoder and text encoder",
        "down_blocks.0.resnets.0.": "an autoencoder in diffusers' naming",
        "input_blocks.0.0.": "a UNet without autoencoder and text encoder",
        "encoder.down.0.block.0.": "an autoencoder (VAE) alone",
        "text_model.encoder.layers.0.": "a CLIP text encoder alone",
        "ip_adapter.": "an IP-Adapter",
        "adapter.body.": "a T2I-Adapter",
        "body.0.": "a T2I-Adapter",
        "emb_params": "a textual inversion",
        "string_to_param": "a textual inversion",
    }.items():
        if has(part):
            return what
    return f"a file of an unknown kind (its first tensors are {', '.join(list(shapes)[:3])})"
