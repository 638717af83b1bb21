"""Where a control network starts: a copy of the SD encoder, fresh weights, the teacher's, a file's,
or an ablation's own way."""

import torch

from controlnet import ControlNet, ControlNetwork
from controlnet.ablations import ABLATIONS
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
    student = settings.student
    if settings.ablation:
        return ABLATIONS[settings.ablation](unet, generator)
    if settings.init == "random":
        if student:
            return build_student(student, unet, generator)
        return initialize(ControlNet(unet.config), generator)
    if settings.init == "teacher":
        net = build_student(student, unet, generator)
        return from_teacher(net, teacher, generator, settings.copy_zero_convs)
    if settings.init == "base":
        if student not in (None, "original"):
            raise ValueError("--init base copies the SD encoder, which a student's layers do not "
                             "fit: use random or a control network file")
        return ControlNet.from_unet(unet, generator=generator, architecture=student or "controlnet")
    net = load_controlnet(settings.init, unet)
    return as_student(net, student, unet, settings.init) if student else net


def as_student(net: ControlNetwork, student: str, unet: UNet, path: str) -> ControlNetwork:
    """A network from a file under a student's name, if it has its architecture."""
    expected = build_student(student, unet)
    shapes = shapes_of(expected.state_dict())
    if net.config != expected.config or shapes_of(net.state_dict()) != shapes:
        raise ValueError(f"expected a {student} file in --init, {path} holds another architecture: "
                         f"{net.architecture}, {net.config}")
    expected.load_state_dict(net.state_dict())
    return expected
