"""Floor 2: ControlNet. A frozen denoiser, a trainable copy of its encoder, and the zero
convolutions between them; the interface of everything that controls; sampling under control; the
ablations of the ControlNet paper. Nothing about teachers and students."""

from common.lazy import on_first_use

# The ablations' names. Each is the name of a function in controlnet/ablations.py.
ABLATIONS = ("gaussian", "lite_encoder", "lite_decoder", "lite_decoder_zero", "finetune")

__getattr__ = on_first_use(__name__, {
    "controlled": ["ControlledUNet", "Prediction"],
    "model": ["ControlNet"],
    "network": ["ControlNetwork"],
})
