"""What ControlNet claims about itself, checked: the zero start, the gradients of a zero
convolution, and how learning sets in."""

import pytest
import torch
from conftest import randomize

from controlnet import ControlNet
from controlnet.zero_convolution import zero_convolution
from kd import (
    ALTERNATIVES,
    STUDENTS,
    build_student,
    diffusion_loss,
    layerwise_loss,
    teacher_loss,
)
from unet import TINY, UNet
from unet.blocks import timestep_embedding

B = 2


@pytest.fixture(scope="module")
def unet() -> UNet:
    """A random base whose last convolution is not zero: one that outputs zero whatever comes in
    would prove nothing."""
    return randomize(UNet(TINY), seed=0).requires_grad_(False)


@pytest.fixture
def inputs():
    return random_inputs(side=8)


def random_inputs(side):
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(B, 4, side, side, generator=g)
    condition = torch.rand(B, 3, 8 * side, 8 * side, generator=g)
    return latents, condition, torch.tensor([10, 700]), torch.randn(
        B, 77, TINY.context_dim, generator=g)


def networks(unet):
    return {
        "controlnet":
        ControlNet.from_unet(unet, generator=torch.Generator().manual_seed(2)),
        "controlnet, paper's E(c)":
        ControlNet.from_unet(unet, paper_encoder=True, generator=torch.Generator().manual_seed(2)),
    } | {name: build_student(name, unet,
                             torch.Generator().manual_seed(2))
         for name in (*STUDENTS, *ALTERNATIVES)}


def predict(unet, net, inputs):
    latents, _, t, context = inputs
    return unet(latents, t, context, control(unet, net, inputs))


def control(unet, net, inputs):
    latents, condition, t, context = inputs
    with torch.no_grad():
        features = unet.encode(latents, t, context)
    return net.control(latents, condition, t, context, unet, features)


def test_every_network_starts_exactly_at_the_base(unet, inputs):
    latents, _, t, context = inputs
    plain = unet(latents, t, context)
    assert plain.std() > 0.1
    for name, net in networks(unet).items():
        assert torch.equal(predict(unet, net, inputs), plain), name


def test_control_reaches_all_13_places_of_the_decoder(unet, inputs):
    latents, _, t, context = inputs
    plain, features = unet(latents, t, context), unet.encode(latents, t, context)
    zeros = [torch.zeros_like(h) for h in [*features.skips, features.middle]]
    assert len(zeros) == 13
    for i in range(13):
        control = [z + (i == j) for j, z in enumerate(zeros)]
        assert not torch.allclose(unet.decode(features, control), plain), i


def test_decoding_changes_neither_the_features_nor_the_control_it_is_given(unet, inputs):
    latents, _, t, context = inputs
    features = unet.encode(latents, t, context)
    control = [torch.ones_like(h) for h in [*features.skips, features.middle]]
    first = unet.decode(features, control)
    assert torch.equal(unet.decode(features, control), first)
    assert all(torch.equal(c, torch.ones_like(c)) for c in control) and len(features.skips) == 12


def test_a_wrong_number_of_control_tensors_is_refused(unet, inputs):
    latents, _, t, context = inputs
    with pytest.raises(ValueError, match="expected 13 control tensors"):
        unet(latents, t, context, [torch.zeros(B, 32, 8, 8)] * 9)


def test_the_trainable_copy_is_the_encoder(unet):
    net, original = ControlNet.from_unet(unet).state_dict(), unet.state_dict()
    copied = [
        name for name in net
        if not name.startswith(("input_hint_block", "zero_convs", "middle_block_out"))
    ]
    assert copied and all(torch.equal(net[name], original[name]) for name in copied)


def test_gradients_of_a_zero_convolution_are_as_derived():
    """y = w x + b at w = b = 0: dL/dw = dL/dy * x and dL/db = dL/dy, summed over pictures and
    pixels, and dL/dx = 0. After one step of gradient descent dL/dx = w^T dL/dy."""
    g = torch.Generator().manual_seed(3)
    layer = zero_convolution(3, 5).double()
    x = torch.randn(2, 3, 4, 6, generator=g, dtype=torch.double, requires_grad=True)
    dy = torch.randn(2, 5, 4, 6, generator=g, dtype=torch.double)
    y = layer(x)
    y.backward(dy)
    assert torch.equal(y, torch.zeros_like(y)) and torch.equal(x.grad, torch.zeros_like(x))
    assert torch.allclose(layer.weight.grad[:, :, 0, 0],
                          torch.einsum("bohw,bihw->oi", dy, x.detach()))
    assert torch.allclose(layer.bias.grad, dy.sum((0, 2, 3)))
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    layer(x).backward(dy)
    weight = layer.weight.detach()[:, :, 0, 0]
    assert weight.any() and torch.allclose(x.grad, torch.einsum("oi,bohw->bihw", weight, dy))


def test_a_trained_block_adds_what_the_papers_equation_says(unet, inputs):
    """y_c = F(x) + Z(F_copy(x + Z(c))), with no weight zero: F is the UNet's second block, x its
    first block's output, Z(c) is E(c)."""
    latents, condition, t, context = inputs
    net = randomize(ControlNet.from_unet(unet), seed=9)

    def block(encoder, added):  # the second block's output
        time = encoder.time_embed(timestep_embedding(t, TINY.model_channels))
        x = encoder.input_blocks[0](latents, time, context) + added
        return encoder.input_blocks[1](x, time, context)

    f = block(unet, 0)
    z = net.zero_convs[1][0]
    f_copy = block(net, net.input_hint_block(condition))
    assert torch.allclose(f, unet.encode(latents, t, context).skips[1], atol=1e-5)
    expected = f + torch.einsum("oi,bihw->bohw", z.weight[:, :, 0, 0], f_copy) \
        + z.bias[:, None, None]
    assert torch.allclose(f + control(unet, net, inputs)[1], expected, atol=1e-4)
    assert not torch.allclose(f, expected, atol=0.1)


def parts_with_gradient(net: ControlNet) -> set[str]:
    """Which of the four parts of a ControlNet get a gradient; of the hint block, its last
    convolution is a part of its own."""
    last = f"input_hint_block.{len(net.input_hint_block) - 1}."
    parts = set()
    for name, parameter in net.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            if name.startswith(("zero_convs", "middle_block_out")):
                parts.add("zero convolutions")
            elif name.startswith("input_hint_block"):
                parts.add("last of E(c)" if name.startswith(last) else "rest of E(c)")
            else:
                parts.add("copy")
    return parts


@pytest.mark.parametrize("paper_encoder", [False, True])
def test_learning_sets_in_over_three_steps(unet, inputs, paper_encoder):
    """Step 1: only the zero convolutions. Step 2: the copy, and E(c)'s last (zero) convolution.
    Step 3: all of E(c)."""
    net = ControlNet.from_unet(unet, paper_encoder, torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    target, seen = torch.randn(B, 4, 8, 8, generator=torch.Generator().manual_seed(4)), []
    for _ in range(3):
        optimizer.zero_grad()
        diffusion_loss(predict(unet, net, inputs), target).backward()
        seen.append(parts_with_gradient(net))
        optimizer.step()
    assert seen == [
        {"zero convolutions"},
        {"zero convolutions", "copy", "last of E(c)"},
        {"zero convolutions", "copy", "last of E(c)", "rest of E(c)"},
    ]


def test_after_three_steps_every_trainable_tensor_has_a_gradient_and_no_frozen_one(unet):
    # Of 8 x 8 latents the lowest level keeps one pixel, whose attention has no gradient.
    inputs = random_inputs(side=16)
    teacher = randomize(ControlNet(TINY), seed=5).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    before_teacher = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    latents, _, t, context = inputs
    control_t = control(unet, teacher, inputs)
    taught = unet(latents, t, context, control_t)
    for name, net in networks(unet).items():
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            control_s = control(unet, net, inputs)
            loss = teacher_loss(unet(latents, t, context, control_s), taught) \
                + layerwise_loss(control_s, control_t)
            loss.backward()
            optimizer.step()
        without = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == [], name
    assert all(p.grad is None for p in [*unet.parameters(), *teacher.parameters()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(
        torch.equal(tensor, before_teacher[name]) for name, tensor in teacher.state_dict().items())


def test_gradient_checkpointing_gives_the_same_gradients(unet, inputs):
    grads = []
    for checkpointing in (False, True):
        net = randomize(ControlNet(TINY), seed=6)
        net.set_checkpointing(checkpointing)
        unet.set_checkpointing(checkpointing)
        predict(unet, net, inputs).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    unet.set_checkpointing(False)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(*grads, strict=True))


def test_layerwise_loss_normalises_both_with_the_teachers_statistics():
    g = torch.Generator().manual_seed(7)
    teacher = [torch.randn(2, 3, 4, 4, generator=g) * scale + 5 for scale in (0.1, 100.0)]
    student = [t + t.std() for t in teacher]  # one deviation off, in every layer
    assert layerwise_loss(student, teacher).item() == pytest.approx(1.0, rel=1e-5)
    assert layerwise_loss(teacher, teacher).item() == 0
    by_hand = [(((t - t.mean()) / t.std() - (s - t.mean()) / t.std())**2).mean()
               for s, t in zip([0.5 * t for t in teacher], teacher, strict=True)]
    assert layerwise_loss([0.5 * t for t in teacher], teacher).item() == pytest.approx(
        torch.stack(by_hand).mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="expected as many outputs"):
        layerwise_loss(student[:1], teacher)


def test_no_loss_sends_a_gradient_to_the_teacher():
    student, teacher = torch.ones(2, 4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    (teacher_loss(student, teacher) +
     layerwise_loss([student], [teacher + torch.arange(4.0)])).backward()
    assert student.grad.any() and teacher.grad is None


def test_an_unknown_student_is_refused_with_the_known_names(unet):
    with pytest.raises(ValueError, match="expected a student among original, .*got 'tiny'"):
        build_student("tiny", unet)
