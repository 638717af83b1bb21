"""What other programs understand in a prompt and CLIP reads as words."""

import re

SYNTAX = re.compile(
    r"<(?:lora|lyco|hypernet|embedding)\s*:[^<>]*>"  # files to load
    r"|\bembedding:\w+"
    r"|\([^()]*:\s*-?\d*\.?\d+\s*\)"                 # (word:1.3)
    r"|\({2,}[^()]+\){2,}"                           # ((word))
    r"|\[[^\[\]]*:[^\[\]]*\]"                        # [from:to:when]
    r"|\bBREAK\b")


def taken_literally(prompt: str) -> list[str]:
    """The parts of a prompt that A1111's web interface or ComfyUI would not read as words: weights,
    changes on the way, files, chunk ends. Plain brackets are left alone: captions have them."""
    return SYNTAX.findall(prompt)
