"""The part of a training step that has gradients, from noisy latents to the losses, as one module: what DistributedDataParallel can wrap."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from controlnet import ControlNet
from kd.losses import diffusion_loss, layer_errors, teacher_loss
from training.parallel import variances
from training.probe import by_timestep, in_bucket
from unet import UNet

Losses = Signals = dict[str, Tensor]


class Step(nn.Module):
    """Losses by name (L_d, and with a teacher L_td and L_layer), and beside them what the log shows.

    The modes of the ControlNet paper's discussion of training: `small` connects only the middle block, `large` unlocks the SD decoder
    later (`unlock`). What learns is what `requires_grad` says; the optimizer is given all that ever may.
    """

    def __init__(self, unet: UNet, net: ControlNet, teacher: ControlNet | None = None, mode: str = "default", bf16: bool = False):
        super().__init__()
        self.net, self.decoder = net.requires_grad_(True), nn.ModuleList([unet.output_blocks, unet.out])
        # Frozen networks are no part of this module, lest they be sent to every process. A teacher's prediction is made with the
        # decoder that the teacher was trained with, even when the student's has been unlocked.
        self.frozen = (unet, teacher, deepcopy(unet) if teacher and mode == "large" else unet)
        self.mode, self.bf16 = mode, bf16
        if mode == "small":
            connect_only_middle(net)

    def unlock(self) -> None:
        """Train the SD decoder too."""
        self.decoder.requires_grad_(True)

    def forward(self, x_t: Tensor, target: Tensor, t: Tensor, context: Tensor, condition: Tensor, layer_only: bool) -> tuple[Losses, Signals]:
        """Noisy latents and what is to be predicted (B, 4, H, W), timesteps (B,), text states (B, N, D), condition (B, 3, 8H, 8W) ->
        losses with gradient, and signals without, which `training.probe.averages` reads. `layer_only`: L_layer alone, for which no UNet is needed."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            return self._forward(x_t, target, t, context, condition, layer_only)

    def _forward(self, x_t: Tensor, target: Tensor, t: Tensor, context: Tensor, condition: Tensor, layer_only: bool) -> tuple[Losses, Signals]:
        unet, teacher, teachers_unet = self.frozen
        losses, signals = {}, {"samples by timestep": in_bucket(t)}
        with torch.no_grad():  # the frozen encoder does not see the control: it runs once, for student and teacher, if anyone needs it
            needed = not layer_only or "encoder" in (self.net.connects_to, teacher.connects_to)
            features = unet.encode(x_t, t, context) if needed else None

        def control_of(network: ControlNet) -> list[Tensor | None]:
            return network.control(unet, features, x_t, condition, t) if features else network(x_t, condition, t, context)

        control = control_of(self.net)
        if teacher:
            with torch.no_grad():
                control_t = control_of(teacher)
            connected = slice(-1, None) if self.mode == "small" else slice(None)
            said, wanted = control[connected], control_t[connected]
            variance = variances(wanted)
            errors = layer_errors(said, wanted, variance)
            losses["L_layer"], signals["L_layer shares"] = errors.mean(), errors.detach()
            with torch.no_grad():
                signals["L_layer by timestep"] = by_timestep(layer_errors(said, wanted, variance, by_sample=True).mean(dim=0), t)
            if layer_only:
                return losses, signals
        eps_s = unet.decode(features, control).float()  # frozen, as a rule, but the gradient has to pass through it to reach the control
        losses["L_d"] = diffusion_loss(eps_s, target)
        signals["L_d by timestep"] = by_timestep(map(diffusion_loss, eps_s, target), t)
        if teacher:
            with torch.no_grad():
                eps_t = teachers_unet.decode(features, control_t).float()
            losses["L_td"] = teacher_loss(eps_s, eps_t)
            signals["L_td by timestep"] = by_timestep(map(teacher_loss, eps_s, eps_t), t)
        return losses, signals


def connect_only_middle(net: ControlNet) -> None:
    """Disconnect the 12 outputs that belong to skip connections, and freeze what leads to nothing else.

    They must be zero, as they are in a fresh network, because the network's file does not tell that they were not there in training.
    Raises ValueError if they are not, or if the network has no such outputs.
    """
    if net.connects_to != "decoder":
        raise ValueError(f"--mode small disconnects outputs to the SD decoder, expected a network that has them, {net.architecture} enters the SD encoder")
    if any(layer.weight.any() or layer.bias.any() for layer in net.zero_convs.modules() if isinstance(layer, nn.Conv2d)):
        raise ValueError("--mode small begins with zero convolutions that are zero, but for the middle's; those of --init are trained already")
    net.only_middle = True
    net.zero_convs.requires_grad_(False)
