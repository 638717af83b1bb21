"""Floor 1: the text encoder of Stable Diffusion. How files name its tensors is in weights/."""

from text.clip import (
    CLIP_VIT_L,
    OPENCLIP_VIT_H,
    TOKENS,
    CLIPText,
    TextConfig,
    infer_text_config,
    windows_for,
)

__all__ = ["CLIP_VIT_L", "OPENCLIP_VIT_H", "TOKENS", "CLIPText", "TextConfig", "infer_text_config",
           "windows_for"]
