"""Prompts before they are tokens: the ControlNet paper's default one, and what other programs
understand in a prompt and CLIP reads as words."""

import re

# ControlNet paper, first version, section 4: for a control without a prompt
DEFAULT_PROMPT = "a professional, detailed, high-quality image"

SYNTAX = re.compile(
    r"<(?:lora|lyco|hypernet|embedding)\s*:[^<>]*>"  # files to load
    r"|\bembedding:\w+"
    r"|\([^()]*:\s*-?\d*\.?\d+\s*\)"                 # (word:1.3)
    r"|\({2,}[^()]+\){2,}"                           # ((word))
    r"|\[[^\[\]]*:[^\[\]]*\]"                        # [from:to:when]
    r"|\bBREAK\b")


def with_suffix(prompt: str, suffix: str | None) -> str:
    """As the released apps append "best quality, extremely detailed"; to nothing, alone."""
    return ", ".join(filter(None, (prompt, suffix)))


def taken_literally(prompt: str) -> list[str]:
    """The parts of a prompt that A1111's web interface or ComfyUI would not read as words: weights,
    changes on the way, files, chunk ends. Plain brackets are left alone: captions have them."""
    return SYNTAX.findall(prompt)
