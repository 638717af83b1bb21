"""A tour of ControlNet: open this file cell by cell in an IDE, or run `python tour.py`.

It takes less than three minutes on two CPU cores, downloads nothing, and saves its pictures in
runs/tour/. docs/tour.md is the same with the pictures, written by `python -m benchmarks.tour`. For
a notebook: pip install jupytext notebook && jupytext --to ipynb tour.py
"""

import sys

from common.cli import Parser, answer

if __name__ == "__main__" and "ipykernel" not in sys.modules:  # before PyTorch is imported
    answer(Parser(__doc__).parse_args)

# %% [markdown]
# # A tour of ControlNet
#
# Stable Diffusion paints *what* a prompt says, and a ControlNet makes it paint it *where* a drawing
# says. This tour goes from one convolution to a distilled network, one idea at a time, each with a
# number or a picture that the code above it made.
#
# All networks here are small: a hundredth of Stable Diffusion's weights, but every one of its
# blocks, for drawings of 128 x 128 pixels. Once the project is [installed](../README.md#start),
# `python tour.py` runs it all in less than three minutes on two CPU cores;
# [tour.py](../tour.py) can also be opened cell by cell in an IDE.

# %% [markdown]
# ## The networks
#
# Stable Diffusion is three networks: a text encoder, a UNet that removes noise step by step, and an
# autoencoder, because the UNet works on *latents*, eight times smaller than the picture. The fourth
# network controls the UNet.

# %%
import torch

from weights import drawings, load_controlnet, load_stable_diffusion

sd = load_stable_diffusion(drawings.SD)
controlnet = load_controlnet(drawings.CONTROLNET, sd.unet)
parts = {"text encoder": sd.text, "UNet": sd.unet, "autoencoder": sd.vae, "ControlNet": controlnet}
for name, network in parts.items():
    print(f"{name:14}{sum(p.numel() for p in network.parameters()) / 1e6:6.2f} M parameters")

# %% [markdown]
# ## An example
#
# The *condition* is a line drawing, white on black, which these networks have never seen; the
# *prompt* names the kind of thing, its colours and the background. All drawings are
# [OpenMoji's](drawings.md), under CC BY-SA 4.0.

# %%
from data.folder import Folder

turtle = Folder(drawings.DATA / "held_out", size=128)[79]
condition, prompt = turtle["condition"][None], turtle["prompt"]
print(prompt)

# %% [markdown]
# ## From noise to pictures
#
# Sampling starts from noise and lets the UNet remove it in 20 steps; guidance exaggerates what the
# prompt adds. To compare pictures we always start from the same noise; `sheet` puts them side by
# side, and `show` saves them.

# %%
from controlnet.sampling import Control, generate, initial_latents


def paint(controls, prompts, guess=False):
    """A picture for each prompt, all from the same noise."""
    noise = initial_latents(1, 128, 128, torch.Generator().manual_seed(1))
    noise = noise.repeat(len(prompts), 1, 1, 1)
    context, empty = sd.text.encode(prompts), sd.text.encode([""])
    return generate(sd.unet, sd.vae, controls, noise, context, empty.expand_as(context),
                    sd.sampling, guess=guess)

# %%
import sys
from pathlib import Path

from data.grids import sheet


def show(name, picture):
    """Save a picture or a chart as runs/tour/NAME.png; in a notebook, show it too."""
    path = Path("runs/tour", f"{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture.savefig if hasattr(picture, "savefig") else picture.save)(path)
    print(path)
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display
        display(Image(path))

# %% [markdown]
# ## Without and with control
#
# Without control the colours are as the prompt says and the shapes are anyone's guess. With control
# the UNet, whose weights are the same, puts them between the given lines.

# %%
without = paint([], [prompt])
controlled = paint([Control(controlnet, condition)], [prompt])
original = turtle["target"][None] / 2 + 0.5
show("control", sheet(["condition", "original", "without control", "with control"],
                      [*condition, *original, *without, *controlled], cell=160))

# %% [markdown]
# ## What the UNet is asked
#
# In training, noise is added to the latents of a picture, more for a larger timestep t, and the
# UNet has to predict that noise. At t = 999 nothing of the picture is left, so the first steps of
# sampling decide what goes where.

# %%
from diffusion import q_sample
from vae import LATENT_SCALE

latents = LATENT_SCALE * sd.vae.encode(turtle["target"][None])[0]  # scaled to unit variance
noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
noisy = {t: q_sample(latents, torch.tensor([t]), noise) for t in (0, 50, 100, 200, 300, 600, 999)}
pictures = [sd.vae.to_images(x)[0] for x in noisy.values()]
show("noise", sheet([f"t = {t}" for t in noisy], pictures))

# %% [markdown]
# ## A zero convolution
#
# A ControlNet is attached by convolutions whose weights w and biases b are zero, and so is their
# output y = w x + b. Such a layer can learn, because the gradient of w is x and not w; only x gets
# no gradient, until w has moved off zero.

# %%
from controlnet.zero_convolution import zero_convolution

layer, x = zero_convolution(1, 1), torch.full((1, 1, 1, 1), 3.0, requires_grad=True)
for step in (1, 2):
    x.grad = layer.weight.grad = None
    layer(x).sum().backward()  # the loss is y itself
    w, dw, dx = layer.weight.item(), layer.weight.grad.item(), x.grad.item()
    print(f"step {step}: w = {w:.1f}, dL/dw = {dw:.1f}, dL/dx = {dx:.1f}")
    layer.weight.data -= 0.1 * layer.weight.grad

# %% [markdown]
# ## How it wakes up
#
# A new ControlNet is a copy of the UNet's encoder between zero convolutions: those after the copy,
# and the last one of E(c), the small encoder of the condition. Which of these parts get a gradient
# in the first three steps of training?

# %%
def part_of(name):
    """The part of a ControlNet that a parameter belongs to."""
    if name.startswith(("zero_convs", "middle_block_out")):
        return "zero convolutions"
    if not name.startswith("input_hint_block"):
        return "copy"
    return "end of E(c)" if name.startswith("input_hint_block.14") else "rest of E(c)"

# %%
from collections import Counter

from controlnet import ControlNet
from kd import diffusion_loss

net = ControlNet.from_unet(sd.unet, generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
inputs = noisy[600], condition, torch.tensor([600]), sd.text.encode([prompt])
steps = [Counter(), Counter(), Counter()]
for squares in steps:
    optimizer.zero_grad()
    diffusion_loss(sd.unet(inputs[0], *inputs[2:], net(*inputs)), noise).backward()
    for name, parameter in net.named_parameters():
        squares[part_of(name)] += parameter.grad.square().sum().item()
    optimizer.step()

# %% [markdown]
# In the first step only the zero convolutions do; then the copy and the end of E(c), which is a
# zero convolution too; then all. What lies behind a zero convolution waits for it, and nothing is
# stuck.

# %%
from matplotlib.figure import Figure

figure = Figure(figsize=(8, 2.2), layout="constrained")
for step, axes in enumerate(figure.subplots(1, 3, sharey=True)):
    axes.barh(list(steps[step]), [square**0.5 for square in steps[step].values()])
    axes.set(title=f"step {step + 1}", xscale="log", xlim=(1e-6, 1), xlabel="norm of the gradient")
show("gradients", figure)

# %% [markdown]
# ## y_c = y
#
# So nothing is damaged when training begins: under control the UNet's output y_c is its output y,
# to the last bit. This holds for the ControlNet and for every student of this project.

# %%
from kd import STUDENTS, build_student

y = sd.unet(inputs[0], *inputs[2:])
fresh = {name: build_student(name, sd.unet, torch.Generator().manual_seed(0)) for name in STUDENTS}
fresh["ControlNet"] = ControlNet.from_unet(sd.unet)
for name, net in fresh.items():
    y_c = sd.unet(inputs[0], *inputs[2:], net.control(*inputs, sd.unet))
    print(f"{name:16} y_c = y: {torch.equal(y_c, y)}")

# %% [markdown]
# ## Thirteen outputs
#
# The UNet's encoder hands its decoder twelve skip connections and the middle's output, and a
# ControlNet adds a tensor to each ([drawn here](figures.md#the-architecture)). These are their
# shapes in Stable Diffusion 1.5 for 512 x 512 pixels; on the meta device networks take no memory.

# %%
from unet import SD15

with torch.device("meta"):
    inputs_512 = (torch.empty(1, 4, 64, 64), torch.empty(1, 3, 512, 512), torch.empty(1),
                  torch.empty(1, 77, 768))
    outputs = ControlNet(SD15)(*inputs_512)
for i, output in enumerate(outputs):
    print(f"{'middle' if i == 12 else f'skip {i}':8}", *output.shape[1:])

# %% [markdown]
# ## One output at a time
#
# Which of the thirteen matter? We multiply each by a weight of its own, and here all weights are 0
# but one. None suffices; the three finest at least change something.

# %%
from controlnet import ControlNetwork


class Weighted(ControlNetwork):
    """A control network whose output j is multiplied by weights[i, j] in picture i."""

    def __init__(self, net, weights):
        super().__init__()
        self.net, self.weights, self.hint = net, weights, net.hint

    def control(self, latents, *inputs):
        columns = self.weights.repeat(2, 1).T[..., None, None, None]  # guidance doubles the batch
        return [w * output for w, output in zip(columns, self.net.control(latents, *inputs))]

# %%
names = [f"skip {i}" for i in range(12)] + ["middle"]
weights = torch.eye(13)
pictures = paint([Control(Weighted(controlnet, weights), condition)], [prompt] * 13)
show("one_on", sheet([f"only {name}" for name in names] + ["all"], [*pictures, *controlled]))

# %% [markdown]
# ## All but one
#
# The other way round: all weights are 1 but one. For this turtle, skip 0 and skip 2, two of the
# three finest, are needed; any other can be spared.

# %%
weights = 1 - torch.eye(13)
pictures = paint([Control(Weighted(controlnet, weights), condition)], [prompt] * 13)
show("one_off", sheet([f"no {name}" for name in names] + ["all"], [*pictures, *controlled]))

# %% [markdown]
# ## Control scale
#
# One weight for all thirteen is the control scale. A third hardly works; above 1, which the UNet
# never met in training, the lines stay and the colours suffer.

# %%
scales = torch.tensor([0, 0.33, 0.67, 1, 1.33, 1.67, 2])
pictures = paint([Control(Weighted(controlnet, scales[:, None].expand(7, 13)), condition)],
                 [prompt] * 7)
show("scale", sheet([f"scale {scale:g}" for scale in scales.tolist()], pictures))

# %% [markdown]
# ## When control matters
#
# Control may set in later or stop earlier, at a fraction of the 20 steps. The beginning counts
# more: the first three quarters nearly suffice, the last three do not.

# %%
spans = [(0, 0.25), (0, 0.5), (0, 0.75), (0, 1), (0.25, 1), (0.5, 1), (0.75, 1)]
pictures = [paint([Control(controlnet, condition, start=start, end=end)], [prompt])[0]
            for start, end in spans]
show("spans", sheet([f"{start:g} to {end:g}" for start, end in spans], pictures))

# %% [markdown]
# ## Prompt against condition
#
# The condition says where, the prompt says what: if they disagree, each wins at its own. The upper
# row is without control; an empty prompt leaves the colours to chance.

# %%
prompts = {"its own": prompt, "other colours": "animal, red, dark red, white background",
           "other thing": "vehicle, grey, rose background", "no background": "animal, green",
           "empty": ""}
for_each = list(prompts.values())
pictures = [*paint([], for_each), *paint([Control(controlnet, condition)], for_each)]
show("prompts", sheet([*prompts] + ["with control"] * 5, pictures, columns=5, cell=144))

# %% [markdown]
# ## Guess mode
#
# Guess mode is made for sampling without a prompt: guidance exaggerates what the *control* adds,
# and the finer an output, the more it is weakened. Here it fails, because this ControlNet's lines
# come through its finest outputs, which are cut to a tenth.

# %%
control = Control(controlnet, condition)
pictures = [paint([control], [p], guess=guess)[0] for p in (prompt, "") for guess in (False, True)]
show("guess", sheet(["prompt", "prompt, guess", "no prompt", "no prompt, guess"], pictures,
                    cell=160))

# %% [markdown]
# ## Sudden convergence
#
# A ControlNet ignores its condition for a while and then learns it suddenly, which the loss hardly
# shows. The *probe* does: the loss with the right condition minus that with a wrong one, on the
# same noise. In this stored log of a ControlNet on circles it leaves zero at step 300
# ([how to make such a log](training.md#is-it-learning)).

# %%
from evaluation.plot import read_log, series, smoothed

log = read_log(Path("docs/tour"))
figure = Figure(figsize=(8, 2.6), layout="constrained")
titles = {"L_d": "loss", "probe": "probe", "overlap": "overlap with the circle"}
for axes, (key, title) in zip(figure.subplots(1, 3), titles.items()):
    steps, values = series(log, key)
    if key == "L_d":
        axes.plot(steps, values, linewidth=0.4, alpha=0.5)
        values = smoothed(values[:, 0])
    axes.plot(steps, values, color="C0")
    axes.set(title=title, xlabel="step")
show("convergence", figure)

# %% [markdown]
# ## A student beside its teacher
#
# The ControlNet adds a third to the UNet's work, so we replace it by a lighter *student*, trained
# to do what the ControlNet does. `reduced_layer` has one residual block a level instead of two and
# half of the weights, and draws the same lines.

# %%
student = load_controlnet(drawings.STUDENTS / "reduced_layer.safetensors", sd.unet)
data = Folder(drawings.DATA / "held_out", size=128)
pictures = []
for net in (controlnet, student):
    for i in (79, 203, 15, 29, 88):
        pictures += paint([Control(net, data[i]["condition"][None])], [data[i]["prompt"]])
show("student", sheet(["teacher"] * 5 + ["student"] * 5, pictures, columns=5, cell=144))

# %% [markdown]
# ## Where a student differs
#
# Distillation compares the thirteen outputs of student and teacher: L_layer is their squared
# difference over the variance of the teacher's. On circles, for each output, from fine to coarse,
# and each timestep: four students are near, and `lite`, which is built of other layers, is not, but
# has [nine tenths](../README.md#results) of the teacher's overlap all the same.

# %%
from data.circles import HELD_OUT, Circles
from weights import tiny

circles = load_stable_diffusion(tiny.SD)
teacher = load_controlnet(tiny.CONTROLNET, circles.unet)
samples = [Circles(64, 8, first=HELD_OUT)[i] for i in range(8)]
latents = LATENT_SCALE * circles.vae.encode(torch.stack([s["target"] for s in samples]))[0]
lines = torch.stack([s["condition"] for s in samples])
context = circles.text.encode([s["prompt"] for s in samples])
noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
timesteps = range(50, 1000, 100)
inputs = []
for t in timesteps:
    t = torch.full((8,), t)
    inputs.append((q_sample(latents, t, noise), lines, t, context))

# %%
def outputs_of(net):
    """13 tensors (timesteps, everything else)."""
    with torch.no_grad():
        outputs = [net.control(*at_t, circles.unet) for at_t in inputs]
    return [torch.stack(of_output).flatten(1) for of_output in zip(*outputs)]


names = "original", "reduced_channel", "reduced_layer", "loha", "lite"
errors = {}
for name in names:
    student = load_controlnet(tiny.STUDENTS / f"{name}.safetensors", circles.unet)
    errors[name] = torch.stack([(a_s - a_t).square().mean(1) / a_t.var()
                                for a_s, a_t in zip(outputs_of(student), outputs_of(teacher))])

# %%
from matplotlib.colors import LogNorm

figure = Figure(figsize=(8, 3), layout="constrained")
for axes, (name, error) in zip(figure.subplots(1, 5, sharey=True), errors.items()):
    image = axes.imshow(error, norm=LogNorm(0.003, 3), aspect="auto", extent=(0, 1000, 12.5, -0.5))
    axes.set_title(name, fontsize=9)
    axes.set(xlabel="timestep", xticks=[0, 500, 1000])
figure.axes[0].set_yticks(range(13), [*range(12), "middle"])
figure.axes[0].set_ylabel("output")
figure.colorbar(image, ax=figure.axes, label="L_layer")
show("layers", figure)

# %% [markdown]
# ## What LoHa stores
#
# `loha` stores no weight matrix W, but four thin ones: W = (B1 A1) * (B2 A2), multiplied entry by
# entry. Two factors of rank 6 make a W of a far higher rank, from 1,536 numbers instead of 4,096.
# The first began as all ones and has learned to scale the second.

# %%
student = load_controlnet(tiny.STUDENTS / "loha.safetensors", circles.unet)
layer = student.input_blocks[3][1].transformer_blocks[0].attn1.to_q
factors = {"B1 A1": layer.b1 @ layer.a1, "B2 A2": layer.b2 @ layer.a2, "W": layer.weight()}
figure = Figure(figsize=(8, 3), layout="constrained")
for axes, (name, matrix) in zip(figure.subplots(1, 3), factors.items()):
    limit = matrix.abs().max().item()
    image = axes.imshow(matrix.detach(), cmap="RdBu", vmin=-limit, vmax=limit)
    figure.colorbar(image, ax=axes, orientation="horizontal")
    rank = torch.linalg.matrix_rank(matrix, rtol=1e-3).item()
    axes.set(title=f"{name}: rank {rank}", xticks=[], yticks=[])
show("loha", figure)

# %% [markdown]
# ## What each student costs
#
# Counted at Stable Diffusion 1.5's size, in percent of the ControlNet's. Weights and work are
# different numbers: a step of sampling is mostly the UNet, so a student that is thirty times
# smaller makes it only a quarter cheaper.

# %%
from evaluation.costs import sizes_and_work
from unet import UNet

with torch.device("meta"):
    unet = UNet(SD15)
    networks = {"ControlNet": ControlNet(SD15)} | {n: build_student(n, unet) for n in STUDENTS[1:]}
costs = {name: sizes_and_work(unet, net, 512) for name, net in reversed(networks.items())}
figure = Figure(figsize=(8, 2.8), layout="constrained")
titles = {"parameters stored": "weights", "MACs of a guided step": "work of a sampling step"}
for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
    values = [100 * cost[key] / costs["ControlNet"][key] for cost in costs.values()]
    axes.bar_label(axes.barh(list(costs), values), fmt="%.0f %%", padding=2)
    axes.set(title=title, xlim=(0, 120), xticks=[])
show("costs", figure)

# %% [markdown]
# ## Where to go on
#
# - See the architecture, the students and distillation in [five figures](figures.md).
# - Read the code in [the README's order](../README.md#how-it-works); each file is one idea.
# - Train a student in four minutes: `python train.py --student reduced_layer`
#   ([what it prints](training.md#the-first-run)).
# - See [what distillation is worth](experiments.md#does-distillation-work), and
#   [how drawings are judged](drawings.md#how-networks-are-judged).
