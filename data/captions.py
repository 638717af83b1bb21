"""A caption for a picture that has none, by BLIP: ControlNet's paper calls it "automatic prompt".

Not through transformers' pipeline of this name, "image-to-text": its version 5 has none."""

from functools import lru_cache

import torch
from torch import Tensor

from data.pictures import to_image

BLIP = "Salesforce/blip-image-captioning-base"
# The decoding of BLIP's own demonstration: beam search, so that nothing is drawn.
DECODING = {"num_beams": 3, "max_length": 20, "min_length": 5}


@torch.no_grad()
def caption(picture: Tensor, model: str = BLIP) -> str:
    """What a BLIP model says of a picture (3, H, W) in [0, 1]. `model`: a name on the hub, whose
    files are fetched when first used, or a folder. Raises ValueError if transformers is missing or
    the model cannot be had, is damaged or of another kind."""
    processor, network = _blip(model)
    inputs = processor(images=to_image(picture), return_tensors="pt")
    words = processor.decode(network.generate(**inputs, **DECODING)[0], skip_special_tokens=True)
    return " ".join(words.split())


def require_blip(model: str = BLIP) -> None:
    """Before work that `caption` is to follow: raises what it would raise."""
    _blip(model)


@lru_cache(maxsize=1)  # its weights are loaded once for many pictures
def _blip(model: str) -> tuple:
    try:
        from transformers import AutoConfig, BlipForConditionalGeneration, BlipProcessor
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(f"captions by BLIP need transformers ({error}): "
                         'pip install -e ".[captions]"') from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        kind = AutoConfig.from_pretrained(model).model_type
        if kind == "blip":  # another would be loaded into random weights
            network = BlipForConditionalGeneration.from_pretrained(model, use_safetensors=True)
            return BlipProcessor.from_pretrained(model), network.eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"the captions' model {model} could not be fetched or read: {error}"
                         ) from None
    raise ValueError(f"expected a BLIP captioning model, {model} is of kind {kind}")
