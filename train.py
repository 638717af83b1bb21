"""Train a ControlNet, or distil one into a lighter student.

    python train.py --student reduced_layer     distil a student from the teacher ControlNet
    python train.py                             train a ControlNet itself
    python train.py --ablation gaussian         train an ablation of the ControlNet paper
    torchrun --nproc-per-node 2 train.py ...    the same on two GPUs; --batch-size is each one's

Without further arguments it trains on the tiny model of weights/tiny/ and on generated circles.
"""

import math
import shlex
import signal
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from common.cli import answer, flag, run, sampling_given
from training.settings import Settings, parse

if __name__ == "__main__":  # before PyTorch is imported
    answer(lambda argv: parse(argv, __doc__))

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.devices import DTYPES, compile_blocks, to_device, tune
from controlnet import ControlledUNet, ControlNetwork
from data.circles import Circles
from data.dataset import Dataset
from data.folder import Reading
from data.own import training_data
from diffusion import q_sample, training_target
from evaluation.fidelity import control_fidelity, print_fidelity
from kd.losses import distillation_losses, weighted_sum
from training import parallel
from training.batches import ShuffledConditions, batches, drawn, loader_workers, shapes_of
from training.breakdown import add_to, averages, breakdown, gradient_norm
from training.defaults import check_disk, what_fits, with_batch, with_recipe
from training.ema import EMA
from training.log import Log, event_writer
from training.prepared import OWN_FOLDER, Prepared, cache_folder, on_device, prepare
from training.previews import (
    base_pictures,
    preview_samples,
    print_buckets,
    print_networks,
    save_sample_grid,
)
from training.probe import PROBE_SAMPLES, Probe
from training.run_folder import claimed
from training.start import start
from training.state import begin, read_state, resume, save
from training.stop_signal import StopSignal
from training.timesteps import error_weights, training_timesteps
from unet import UNet
from unet.attention import SpatialTransformer
from unet.blocks import ResBlock
from vae import sample_latents
from weights import tiny
from weights.controlnet import load_controlnet, save_controlnet
from weights.stable_diffusion import StableDiffusion, load_stable_diffusion, save_stable_diffusion

GENERATED = 5000  # circles in the generated training set: a tenth of Fill50k


def main(argv: list[str] | None = None) -> None:
    settings = parse(argv, __doc__)
    sd = load_stable_diffusion(settings.checkpoint, given=sampling_given(settings),
                               vae=settings.vae)
    size = settings.resolution or sd.resolution
    teacher = load_controlnet(settings.teacher, sd.unet) if settings.teacher else None
    settings = with_recipe(settings, sd, teacher)
    tune(size, settings.precision)
    generator = torch.Generator().manual_seed(settings.seed)
    net = start(settings, sd.unet, teacher, generator)
    settings = with_batch(settings, sd, net, teacher, forward_backward)
    data = Circles(size, GENERATED, settings.seed)
    if settings.data:
        reading = Reading(settings.caption_column, settings.condition_resize, settings.skip_broken,
                          settings.cache or settings.data / OWN_FOLDER, settings.buckets)
        data = training_data(settings.data, size, settings.seed, settings.canny, settings.held_out,
                             reading)
        settings = replace(settings, data_fingerprint=data.fingerprint)
    if settings.buckets and parallel.rank() == 0:
        print_buckets(data, settings.batch_size * settings.processes)
    # Fail before the run has a folder: on a broken picture, or a missing package.
    preview_samples(data, PROBE_SAMPLES)
    if settings.tensorboard:
        event_writer()
    try:
        is_main_process = parallel.rank() == 0
        with (claimed(settings.out, settings.resume, is_main_process),
              parallel.group(settings.device)):
            stop_signal, ema = train(settings, sd, net, teacher, data, generator)
    except torch.OutOfMemoryError as problem:
        hint = what_fits(settings, sd, net, teacher, forward_backward)
        raise torch.OutOfMemoryError(f"out of memory in a training step; {hint} "
                                     f"({' '.join(str(problem).split())[:100]})") from None
    if stop_signal == signal.SIGINT:
        raise KeyboardInterrupt
    if not stop_signal and parallel.rank() == 0:
        networks = {"teacher": teacher} if teacher else {}
        networks[settings.name] = net
        if ema:
            networks[f"{settings.name}, EMA"] = ema.net
        report(settings, sd, networks, data)


def train(settings: Settings, sd: StableDiffusion, net: ControlNetwork,
          teacher: ControlNetwork | None, data: Dataset,
          generator: torch.Generator) -> tuple[signal.Signals | None, EMA | None]:
    """Train until --steps or a signal, starting at step 0 or at the saved step of --out. Returns
    the signal that stopped it, and the moving average."""
    freeze(sd.unet, sd.vae, sd.text, teacher)
    student, teacher_unet, trained = set_up(settings, sd, net, teacher)
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, fused=True)
    ema = EMA(net, settings.ema) if settings.ema is not None else None
    scaler = gradient_scaler(settings)
    parts = {"net": net, "optimizer": optimizer, "generator": generator}  # what is resumed
    if settings.precision == "fp16":
        parts["scaler"] = scaler
    if ema:
        parts["ema"] = ema.net
    if settings.mode == "large":
        parts["unet" if settings.unlock == "all" else "decoder"] = student.unlockable
    is_main_process = parallel.rank() == 0
    if is_main_process:
        check_disk(settings, sd, net, trained)
    state = read_state(settings) if settings.resume else None
    if is_main_process:
        with autocast(settings):  # before a state is restored in which the base has learned
            base = base_pictures(sd, data, settings.seed)
    step, entry, sums = (resume(settings, state, parts, is_main_process) if state
                         else begin(settings, is_main_process))
    del state  # which may be large
    parallel.barrier()
    trained_at = training_timesteps(settings.timesteps)
    weights_at = error_weights(settings.timesteps, settings.weighting, sd.sampling.prediction)
    if is_main_process:
        probe = Probe(sd, preview_samples(data, PROBE_SAMPLES), trained_at)
        log = Log(settings.out, step, settings.tensorboard)
        if settings.resume:  # it may have been killed after a state, before the rest of its step
            write_networks(settings, sd, net, ema, step)
            if entry and log.last_step < step:
                show(settings, sd, net, probe, data, base, log, entry)

    batch_size = settings.batch_size * settings.processes  # of all processes together
    random = parallel.ShardedRandom(generator, batch_size)
    prepared = prepare_data(settings, sd, data, batch_size, step)
    empty_prompt = to_device(prepared.empty_prompt, settings.device)
    loader = batches(prepared, batch_size, settings.seed, first=step * settings.accumulate,
                     part=parallel.shard, workers=loader_workers(settings.device))
    images = batch_size * settings.accumulate
    progress = tqdm(total=settings.steps * images, initial=step * images, unit="image",
                    desc="training", smoothing=0.05, disable=not is_main_process)
    ddp_student = stop_signal = None
    with progress, StopSignal() as stop:
        while step < settings.steps and not stop_signal:
            if ddp_student is None or settings.mode == "large" and step == settings.unlock_at:
                ddp_student = None  # two wrappers must not average the same gradients
                ddp_student = begin_phase(settings, step, sd, student, teacher)
            layer_only = step < settings.layer_only_steps
            optimizer.param_groups[0]["lr"] = settings.lr * lr_factor(settings, step)
            for i in range(settings.accumulate):
                moments, condition, context = on_device(next(loader), sd.vae)
                # Random numbers come from the CPU, so that they are the same on every device.
                sampling_noise = random.normal(moments.shape[2:])
                noise = random.normal(moments.shape[2:])
                timesteps = trained_at[random.integers(len(trained_at))]
                weights = None if weights_at is None else weights_at[timesteps].to(settings.device)
                dropped = random.uniform() < settings.drop_prompt
                sampling_noise, noise, timesteps, dropped = (
                    to_device(tensor, settings.device)
                    for tensor in (sampling_noise, noise, timesteps, dropped))

                latents = sample_latents(*moments.unbind(dim=1), sampling_noise)  # (B, 4, h, w)
                noisy_latents = q_sample(latents, timesteps, noise)
                target = training_target(latents, timesteps, noise, sd.sampling.prediction)
                # Without a prompt, all comes from the condition (ControlNet paper, section 3.4).
                context = drop_prompts(context, empty_prompt, dropped)            # (B, N, D)
                inputs = noisy_latents, condition, timesteps, context
                with parallel.gradient_sync(ddp_student, last=i == settings.accumulate - 1):
                    losses = forward_backward(settings, sd.unet, ddp_student, teacher_unet, inputs,
                                              target, scaler, layer_only, weights)
                add_to(sums, losses)

            scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            if settings.clip:
                torch.nn.utils.clip_grads_with_norm_(trained, settings.clip, norm)
            scaler.step(optimizer)  # not taken if a gradient is infinite or not a number
            scaler.update()
            optimizer.zero_grad()   # already now: their memory is free for what is measured
            add_to(sums, gradient_norm(norm))
            if ema:
                ema.update(net)
            step += 1
            progress.update(images)

            # Until here the device was not waited for: whatever reads a number of it comes below.
            is_last = step == settings.steps
            logs = (step in (settings.steps, settings.layer_only_steps)
                    or step % settings.log_every == 0 or step % settings.sample_every == 0)
            if logs or parallel.world_size() == 1:
                stop_signal = parallel.agree_on_stop(stop.received)
            saves = is_last or step % settings.save_every == 0 or stop_signal
            if not (logs or saves):
                continue
            sums = parallel.all_reduce_sum(sums)
            entry = {"step": step, **averages(sums), "lr": optimizer.param_groups[0]["lr"]}
            require_finite(entry, scaler, settings.out)
            if not is_main_process:
                sums = {}
                continue
            if saves:  # before measuring, which may run out of memory
                save(settings, step, entry if logs else None, sums, parts)
                write_networks(settings, sd, net, ema, step)
            if logs:
                progress.set_postfix(loss=f"{entry['loss']:.4f}", refresh=False)
                show(settings, sd, net, probe, data, base, log, entry)
                sums = {}
    if is_main_process:
        log.close()
        if stop_signal:
            print(f"stopped by {stop_signal.name} after step {step} of {settings.steps}, which is "
                  "saved: continue with --resume")
    return stop_signal, ema


# --- What happens around a step ---


def freeze(*networks: nn.Module | None) -> None:
    """No gradient for their weights; they stay differentiable, so that one can pass through."""
    for network in filter(None, networks):
        network.requires_grad_(False).eval()


def set_up(settings: Settings, sd: StableDiffusion, net: ControlNetwork,
           teacher: ControlNetwork | None,
           ) -> tuple[ControlledUNet, ControlledUNet | None, list[nn.Parameter]]:
    """Everything on its device and in its precision. Returns the UNet under the student's control,
    the one under the teacher's, and the parameters that training may ever change."""
    for network in filter(None, (sd.unet, sd.text, sd.vae, teacher, net)):
        # What learns stays in float32, and the autoencoder, which runs once per picture.
        learns = network is net or network is sd.unet and settings.mode == "large"
        in_float32 = learns or network is sd.vae
        network.to(settings.device, None if in_float32 else DTYPES[settings.precision])
    sd.unet.set_checkpointing(settings.checkpointing)
    net.set_checkpointing(settings.checkpointing)
    if settings.compile:
        for network in filter(None, (sd.unet, teacher, net)):
            compile_blocks(network, (ResBlock, SpatialTransformer))
    net.requires_grad_(True)
    if settings.mode == "small":
        net.connect_only_middle()
    student = ControlledUNet(sd.unet, net, whole=settings.unlock == "all")
    teacher_unet = ControlledUNet(sd.unet, teacher) if teacher else None
    trained = list(net.parameters())
    if settings.mode == "large":
        trained += student.unlockable.parameters()
        if teacher:  # which keeps the UNet that it was trained with
            teacher_unet = ControlledUNet(deepcopy(sd.unet), teacher)
    return student, teacher_unet, trained


def prepare_data(settings: Settings, sd: StableDiffusion, data: Dataset, batch_size: int,
                 step: int) -> Prepared:
    """The latents and text states of all that the steps to come will draw."""
    if settings.shuffle_conditions:
        data = ShuffledConditions(data)
    indices = drawn(shapes_of(data), batch_size, settings.seed, first=step * settings.accumulate,
                    last=settings.steps * settings.accumulate)
    keep_latents = not (settings.no_cache or data.augmented)
    prepared = prepare(sd.vae, sd.text, data, indices, cache_folder(settings),
                       keep_latents=keep_latents, show=parallel.rank() == 0)
    parallel.wait_for_all()
    return prepared


def begin_phase(settings: Settings, step: int, sd: StableDiffusion, student: ControlledUNet,
                teacher: ControlNetwork | None) -> nn.Module:
    """At the first step and when the SD decoder or all of the UNet is unlocked: print what is
    trainable, and return the student's module with gradients averaged over all processes."""
    if settings.mode == "large" and step >= settings.unlock_at:
        student.unlockable.requires_grad_(True)
    if parallel.rank() == 0:
        if step < settings.layer_only_steps:
            last = min(settings.layer_only_steps, settings.steps)
            then = (f"then all losses to step {settings.steps}" if last < settings.steps
                    else f"L_d and L_td never, because --steps is {settings.steps}")
            tqdm.write(f"steps {step + 1} to {last}: L_layer alone, {then}")
        encoder = nn.ModuleList([sd.unet.time_embed, sd.unet.input_blocks, sd.unet.middle_block])
        decoder = nn.ModuleList([sd.unet.output_blocks, sd.unet.out])
        print_networks(f"from step {step + 1}", {
            settings.name: student.net, "teacher": teacher, "SD encoder": encoder,
            "SD decoder": decoder, "autoencoder": sd.vae, "text encoder": sd.text})
    return parallel.wrap(student)


def lr_factor(settings: Settings, step: int) -> float:
    """The learning rate of a step, counted from 0, as a fraction of --lr."""
    rise = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    fall = min(1.0, (settings.steps - step) / settings.decay) if settings.decay else 1.0
    return rise * (0.5 - 0.5 * math.cos(math.pi * fall) if settings.cosine else fall)


def drop_prompts(context: Tensor, empty_prompt: Tensor, dropped: Tensor) -> Tensor:
    """Text states (B, N, D), of the empty prompt (N, D) where `dropped` (B,) is true."""
    return torch.where(dropped[:, None, None], empty_prompt, context)


def forward_backward(settings: Settings, unet: UNet, student: nn.Module,
                     teacher_unet: ControlledUNet | None, inputs: tuple[Tensor, ...],
                     target: Tensor, scaler: torch.amp.GradScaler,
                     layer_only: bool = False,
                     weights: Tensor | None = None) -> dict[str, Tensor]:
    """One forward and backward pass; returns the losses, and sums of them for the log.

    `inputs`: noisy latents, condition, timesteps and text states. `target`: what the UNet has to
    predict, the noise or v. `student`, `teacher_unet`: the UNet under their control. `weights`:
    (B,), what each sample counts in L_d and L_td; None: all the same."""
    noisy_latents, _, timesteps, context = inputs
    with autocast(settings):
        with torch.no_grad():
            # A frozen encoder never sees the control: one pass serves both. One that learns gets a
            # gradient, and is no longer the teacher's: each computes its own.
            shared = None
            if not layer_only and settings.unlock != "all":
                shared = unet.encode(noisy_latents, timesteps, context)
            teacher_out = teacher_unet and teacher_unet(*inputs, shared, not layer_only)
        student_out = student(*inputs, shared, not layer_only)  # control and noise_pred
    by_channel = settings.layer_statistics == "channel"
    variance = parallel.variances(teacher_out.control, by_channel) if teacher_out else None
    losses = distillation_losses(student_out, teacher_out, target, variance, weights)
    losses["loss"] = weighted_sum(losses, settings.loss_weights)
    scaler.scale(losses["loss"] / settings.accumulate).backward()
    return losses | breakdown(student_out, teacher_out, target, timesteps, variance)


def autocast(settings: Settings) -> torch.autocast:
    """Matrix products and convolutions in --precision; sums, norms and losses in float32."""
    dtype = DTYPES[settings.precision]
    return torch.autocast(settings.device.type, dtype, enabled=dtype != torch.float32)


def gradient_scaler(settings: Settings) -> torch.amp.GradScaler:
    """Multiplies the loss, so that gradients in fp16 do not vanish, and divides them again. In
    other precisions by 1: there it only leaves out a step whose gradient is not finite, without the
    device being waited for. Every such step halves its scale."""
    is_fp16 = settings.precision == "fp16"
    scale, never = 2.0**16, 2**31 - 1       # 2^16 is PyTorch's own start
    return torch.amp.GradScaler(settings.device.type, init_scale=scale if is_fp16 else 1.0,
                                growth_interval=2000 if is_fp16 else never)


def require_finite(entry: dict, scaler: torch.amp.GradScaler, out: Path) -> None:
    """Raises FloatingPointError if training has become unsound. Steps that would have been are not
    taken, so no unsound weights are ever saved."""
    if not math.isfinite(entry["loss"]):
        problem = f"the loss became {entry['loss']}"
    elif scaler.get_scale() < 1:
        problem = "the gradient became infinite or not a number"
    else:
        return
    raise FloatingPointError(f"{problem} by step {entry['step']}; the state last saved in {out} is "
                             "kept. Try a lower --lr")


# --- What a run shows and saves ---


def show(settings: Settings, sd: StableDiffusion, net: ControlNetwork, probe: Probe, data: Dataset,
         base: Tensor, log: Log, entry: dict) -> None:
    """Log a step; when they are due also the probe, control fidelity and a sample grid."""
    step = entry["step"]
    try:
        with autocast(settings):
            if step % settings.sample_every == 0 or step == settings.steps:
                save_sample_grid(sd, net, data, base, settings.out / "samples", step,
                                 seed=settings.seed)
            if step % settings.sample_every == 0:
                held_out = data.preview(settings.fidelity_samples)
                fidelity = control_fidelity(sd, net, held_out)
                entry = entry | {"probe": probe(net)} | fidelity
    except torch.OutOfMemoryError as problem:
        warnings.warn(f"step {step} is not measured, its memory is full: {problem}", stacklevel=2)
    log.write(entry)


def write_networks(settings: Settings, sd: StableDiffusion, net: ControlNetwork, ema: EMA | None,
                   step: int) -> None:
    """The network files for every other program."""
    out, base = settings.out, settings.checkpoint.name
    save_controlnet(out / "controlnet.safetensors", net, base=base, step=step)
    if ema:
        save_controlnet(out / "controlnet_ema.safetensors", ema.net, base=base, step=step)
    if settings.mode == "large" and step > settings.unlock_at:
        save_stable_diffusion(out / "sd.safetensors", sd, torch.float32)


def report(settings: Settings, sd: StableDiffusion, networks: dict[str, ControlNetwork],
           data: Dataset) -> None:
    """Control fidelity of the base, the teacher and what was trained, and what to do next."""
    out = settings.out
    changed = settings.mode == "large" and settings.steps > settings.unlock_at
    if settings.report_samples:
        if changed:
            print("\nbase and teacher are measured on the base as it has become, not as it was")
        with autocast(settings):
            print_fidelity(sd, {"base without control": None} | networks,
                           data.preview(settings.report_samples))
    base = out / "sd.safetensors" if changed else settings.checkpoint
    command = ["python", "sample.py", "--controlnet", out / "controlnet.safetensors"]
    if base != tiny.SD:
        command += ["--checkpoint", base]
    if settings.vae and not changed:
        command += ["--vae", settings.vae]
    for name in ("prediction", "sample_steps", "guidance", "spacing"):
        if (value := getattr(settings, name)) is not None:
            command += [flag(name), value]
    command += ["--condition", out / "samples" / "condition.png"]
    prompt = preview_samples(data, 1)[0]["prompt"]
    command += [f"--prompt={prompt}"] if prompt.startswith("-") else ["--prompt", prompt]
    print(f"\npicture: {out / 'samples' / f'{settings.steps:06}.png'}")
    print(f"weights: {out / 'controlnet.safetensors'}")
    print(f"try it:  {shlex.join(map(str, command))}")


if __name__ == "__main__":
    sys.exit(run(main))
