"""Where a control network starts: a copy of the SD encoder, fresh weights, the teacher's, a file's, or an ablation's own way."""

from argparse import Namespace

import torch

from controlnet import ControlNet
from controlnet.ablations import ABLATIONS
from kd import build_student
from kd.from_teacher import from_teacher
from unet import UNet
from unet.blocks import initialize
from weights.controlnet import load_controlnet
from weights.files import shapes_of


def start(args: Namespace, unet: UNet, teacher: ControlNet | None, generator: torch.Generator) -> ControlNet:
    """The control network at step 0, as train.py's --init, --student and --ablation say. Fresh weights are drawn from `generator`.

    Raises ValueError for a start that the network cannot have.
    """
    if args.ablation:
        return ABLATIONS[args.ablation](unet, generator)
    if args.init == "teacher":
        return from_teacher(build_student(args.student, unet, generator), teacher, generator, args.copy_zero_convs)
    if args.init == "base":
        if args.student not in (None, "original"):
            raise ValueError("--init base copies the SD encoder, which a student's layers do not fit: use random or a control network file")
        net = ControlNet.from_unet(unet, generator=generator)
        net.architecture = args.student or net.architecture
        return net
    if args.init == "random":
        return build_student(args.student, unet, generator) if args.student else initialize(ControlNet(unet.config), generator)
    net = load_controlnet(args.init, unet)
    if args.student:
        with torch.device("meta"):
            wanted = build_student(args.student, unet)
        if net.config != wanted.config or shapes_of(net.state_dict()) != shapes_of(wanted.state_dict()):
            raise ValueError(f"expected a {args.student} file in --init, {args.init} holds another architecture: {net.architecture}, {net.config}")
    net.architecture = args.student or net.architecture
    return net
