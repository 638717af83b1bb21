"""What a weights file holds, by its tensors' names: so that errors can name a wrong file's kind."""

from vae import LATENT_CHANNELS
from weights.files import Tensors
from weights.naming import CONTROL, UNET

STABLE_DIFFUSION = "a Stable Diffusion checkpoint"
CONTROLNET = "a control network"
WHOLE = "Stable Diffusion and a ControlNet in one file"  # as the first ControlNets were published

# What else a file can hold -> parts of its tensors' names; the first that fits.
FOREIGN = {
    "an IP-Adapter": ("ip_adapter.",),
    "a ControlNet-LLLite, made for SDXL": ("lllite_",),
    "a style adapter (T2I-Adapter)": ("style_embedding",),
    "a ControlNet-XS": ("enc_zero_convs_", "ctrl_to_base.", "base_to_ctrl.", "up_connections."),
    "a ControlNet for several conditions at once (union)": ("task_embedding", "control_type_proj"),
    "a Control-LoRA, low-rank differences from an SDXL model": ("lora_controlnet",),
    "a LoRA, low-rank differences": ("lora_down.", "lora_A.", "lora.", ".hada_w", ".lokr_w"),
    "a Flux model": ("double_blocks.", "single_transformer_blocks."),
    "a Stable Diffusion 3 model": ("joint_blocks.", ".norm1_context."),
    "an unCLIP model of Stable Diffusion 2.1": ("embedder.model.visual.",),
    "an SDXL model": ("conditioner.embedders.1.", "label_emb.", "add_embedding."),
}
PARTIAL = {
    "a UNet in diffusers' naming": ("down_blocks.0.resnets.0.time_emb_proj.",),
    "an autoencoder in diffusers' naming": ("down_blocks.0.resnets.0.",),
    "a UNet without autoencoder and text encoder": ("input_blocks.0.0.",),
    "an autoencoder (VAE) alone": ("encoder.down.0.block.0.",),
    "a CLIP text encoder alone": ("text_model.encoder.layers.0.",),
    "a T2I-Adapter": ("adapter.body.", "body.0."),
    "a textual inversion": ("emb_params", "string_to_param"),
}
CHANNELS = {5: "a depth model", 7: "an upscaler", 8: "InstructPix2Pix", 9: "an inpainting model"}


def kind_of(tensors: Tensors) -> str:
    """One of the three constants above for files this project reads, else what the file is."""

    def find(kinds: dict[str, tuple[str, ...]]) -> str | None:
        return next((kind for kind, parts in kinds.items()
                     if any(part in name for name in tensors for part in parts)), None)

    hints = ("input_hint_block.", "controlnet_cond_embedding.")
    control = any(name.removeprefix(CONTROL).startswith(hints) for name in tensors)
    if kind := find(FOREIGN):
        return "a ControlNet for SDXL" if control and kind == "an SDXL model" else kind
    unet = f"{UNET}input_blocks.0.0.weight" in tensors
    if control:
        return WHOLE if unet else CONTROLNET
    if unet:
        channels = tensors[f"{UNET}input_blocks.0.0.weight"].shape[1]
        if channels == LATENT_CHANNELS:
            return STABLE_DIFFUSION
        return f"{CHANNELS.get(channels, 'a UNet')} ({channels} input channels)"
    unknown = f"a file of an unknown kind (its first tensors are {', '.join(list(tensors)[:3])})"
    return find(PARTIAL) or unknown
