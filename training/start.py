"""Where a control network starts."""

import torch

from controlnet import ControlNet, ControlNetwork, ablations
from controlnet.condition import is_paper_encoder
from kd import build_student
from kd.from_teacher import from_teacher
from training.settings import Settings
from unet import UNet
from unet.blocks import initialize
from weights import load_controlnet
from weights.files import shapes_of


def start(settings: Settings, unet: UNet, teacher: ControlNetwork | None,
          generator: torch.Generator) -> ControlNetwork:
    """The control network at step 0, by --init, --student and --ablation. Fresh weights come from
    `generator`. Raises ValueError for a start that the network cannot have."""
    student, paper = settings.student, settings.condition_encoder == "paper"
    if settings.ablation:
        return ablations.BUILDERS[settings.ablation](unet, generator)
    if settings.init == "base":
        if student not in (None, "original"):
            raise ValueError("--init base copies the SD encoder, which a student's layers do not "
                             "fit: use random or a control network file")
        return ControlNet.from_unet(unet, paper, generator, student or "controlnet")
    if settings.init == "random" and not student:
        return initialize(ControlNet(unet.config, paper_encoder=paper), generator)
    if settings.init == "random":
        return build_student(student, unet, generator)
    if settings.init == "teacher":
        net = build_student(student, unet, generator)
        return from_teacher(net, teacher, generator, settings.copy_zero_convs)
    loaded = load_controlnet(settings.init, unet)
    if not student:
        if settings.condition_encoder and is_paper_encoder(loaded.state_dict()) != paper:
            raise ValueError(f"expected the {settings.condition_encoder} --condition-encoder, "
                             f"{settings.init} has the other one")
        return loaded
    net = build_student(student, unet)
    if loaded.config != net.config or (
            shapes_of(loaded.state_dict()) != shapes_of(net.state_dict())):
        raise ValueError(f"expected a {student} file in --init, {settings.init} holds another "
                         f"architecture: {loaded.architecture}, {loaded.config}")
    net.load_state_dict(loaded.state_dict())
    return net
