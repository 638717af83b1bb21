"""Architecture choices that the sources make otherwise: each can be built, saved, loaded and
trained, and is what it says. docs/experiments.md has what they are worth."""

import pytest
import torch
from conftest import SHORT, TWO_LEVELS, randomize, relative_error, same
from torch import nn

import sample
import train
from benchmarks import ablations as ablation_rows
from benchmarks import choices, docs, resources
from common.cli import run
from controlnet import ABLATIONS, ControlledUNet, ControlNet, Prediction, ablations
from controlnet.condition import is_paper_encoder
from controlnet.sampling import Control, controlled
from kd import build_student
from kd.from_teacher import from_teacher
from kd.loha import LoHaConv2d, LoHaLinear
from kd.losses import layer_errors, layerwise_loss
from kd.modulation import Modulation
from training import parallel
from training.breakdown import breakdown
from training.settings import parse
from training.start import start
from unet import TINY
from weights import load_controlnet, load_stable_diffusion, save_controlnet


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs() -> tuple[torch.Tensor, ...]:
    """Latents, condition, timesteps, text states."""
    g = generator(1)
    return (torch.randn(1, 4, 8, 8, generator=g), torch.rand(1, 3, 64, 64, generator=g),
            torch.tensor([10]), torch.randn(1, 77, TINY.context_dim, generator=g))


@pytest.fixture
def go(two_levels_file, tmp_path):
    """Train in a folder of this name."""

    def go(name: str, *arguments: str):
        train.main([*SHORT, "--checkpoint", str(two_levels_file), "--batch-size", "2", "--out",
                    str(tmp_path / name), *arguments])
        return tmp_path / name / "controlnet.safetensors"

    return go


def refused(capsys, tmp_path, *arguments: str) -> str:
    """The one line that a command line is refused with."""
    try:
        code = run(lambda: train.main([*arguments, "--out", str(tmp_path / "refused")]))
    except SystemExit as leaving:
        code = leaving.code
    message = capsys.readouterr().err
    assert code == 2 and message.startswith("error:") and message.count("\n") == 1
    assert not (tmp_path / "refused").exists()
    return message


# --- E(c) of a ControlNet ---


def test_a_controlnet_starts_with_the_condition_encoder_that_is_named_or_in_its_file(
        sd, tmp_path):
    def started(*arguments: str) -> ControlNet:
        settings = parse(["--init", "base", *arguments])
        return start(settings, sd.unet, None, generator())

    assert same(started(), started("--condition-encoder", "released"))
    paper = started("--condition-encoder", "paper")
    fresh = started("--condition-encoder", "paper", "--init", "random")
    forms = [is_paper_encoder(net.state_dict()) for net in (started(), paper, fresh)]
    assert forms == [False, True, True]
    file = str(tmp_path / "paper.safetensors")
    save_controlnet(file, paper)
    assert same(started("--init", file), paper)
    assert same(started("--init", file, "--condition-encoder", "paper"), paper)
    with pytest.raises(ValueError, match="expected the released --condition-encoder.*other one"):
        started("--init", file, "--condition-encoder", "released")


@pytest.mark.parametrize("what", [["--student", "lite"], ["--ablation", "gaussian"]])
def test_what_has_a_condition_encoder_of_its_own_is_not_given_one(capsys, tmp_path, what):
    message = refused(capsys, tmp_path, *what, "--condition-encoder", "paper")
    assert "--condition-encoder is a ControlNet's choice" in message


# --- L_layer's variance ---


def test_by_channel_the_teachers_variance_is_each_channels_own():
    """One deviation off in each channel is an error of 1, whatever a channel's size; as a whole,
    the channel of small values hardly counts."""
    teacher = torch.randn(4, 2, 8, 8, generator=generator())
    teacher *= torch.tensor([0.1, 10.0]).view(2, 1, 1)
    variance, = parallel.variances([teacher], by_channel=True)
    assert torch.allclose(variance, teacher.var(dim=(0, 2, 3)))
    student = teacher.clone()
    student[:, 0] += teacher[:, 0].std()
    assert layer_errors([student], [teacher], [variance]).item() == pytest.approx(0.5)
    assert layerwise_loss([student], [teacher]).item() < 1e-3


def test_the_log_has_the_same_errors_by_channel():
    control = [torch.randn(2, 3, 4, 4, generator=generator(i)) for i in (0, 1)]
    student, teacher = (Prediction([h], None) for h in control)
    variance = parallel.variances(teacher.control, by_channel=True)
    sums = breakdown(student, teacher, None, torch.tensor([0, 999]), variance)
    loss = layerwise_loss(student.control, teacher.control, variance)
    assert sums["L_layer by timestep"].sum().item() == pytest.approx(2 * loss.item())


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("pictures", [1, 3])
def test_two_processes_know_the_variance_of_the_whole_batch(monkeypatch, by_channel, pictures):
    """Also where each has a single value of a channel, whose own variance it cannot know."""
    whole = [torch.randn(2 * pictures, 3, 1, 1, generator=generator()) + 5,
             torch.randn(2 * pictures, 5, 4, 4, generator=generator()) * 2]
    halves = [[tensor.chunk(2)[i] for tensor in whole] for i in (0, 1)]
    messages = []

    def all_gather(gathered: list[torch.Tensor], own: torch.Tensor) -> None:
        messages.append(own)
        for place, message in zip(gathered, messages[:2], strict=False):
            place.copy_(message)

    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "all_gather", all_gather)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for half in halves:  # what each process sends
        parallel.variances(half, by_channel)
    for variance, tensor in zip(parallel.variances(halves[0], by_channel), whole, strict=True):
        expected = tensor.var(dim=(0, 2, 3)) if by_channel else tensor.var()
        assert variance.shape == expected.shape and torch.allclose(variance, expected)


def test_the_variance_of_a_single_value_is_refused(capsys, tmp_path):
    arguments = ["--student", "lite", "--layer-statistics", "channel"]
    with pytest.raises(ValueError, match="at least two values in a channel .*--batch-size 2"):
        train.main([*SHORT, *arguments, "--batch-size", "1", "--accumulate", "2", "--steps", "1",
                    "--out", str(tmp_path / "one")])
    capsys.readouterr()
    message = refused(capsys, tmp_path, "--layer-statistics", "channel")
    assert "--layer-statistics channel needs a --student and its --teacher" in message


@pytest.fixture
def teacher_file(tmp_path):
    net = randomize(ControlNet(TWO_LEVELS, paper_encoder=True), seed=3)
    save_controlnet(tmp_path / "teacher.safetensors", net)
    return tmp_path / "teacher.safetensors"


# --- Modulation after each layer, LoHa in place of convolutions ---


def test_modulation_stands_after_each_layer_and_reaches_the_next(sd, no_grad):
    ours, theirs = (build_student(name, sd.unet, generator())
                    for name in ("modulated", "modulated_layers"))
    assert [sum(isinstance(m, Modulation) for m in net.modules()) for net in (ours, theirs)] == [
        13, 9]
    assert all(isinstance(layer[-1], Modulation)
               for layer in [*theirs.input_blocks, theirs.middle_block])
    latents, _, *rest = inputs()
    skips = theirs.encode(latents, *rest).skips
    theirs.input_blocks[1][-1].net[-1].bias.add_(1)
    changed = theirs.encode(latents, *rest).skips
    assert torch.equal(skips[0], changed[0])
    assert all(relative_error(b, a) > 1e-2 for a, b in zip(skips[1:], changed[1:], strict=True))


def test_loha_of_convolutions_leaves_linear_layers_as_the_teacher_has_them(sd, no_grad):
    teacher = randomize(ControlNet(TINY, paper_encoder=True), seed=3)
    net = from_teacher(build_student("loha_convolutions", sd.unet, generator()), teacher,
                       generator())
    kinds = {type(layer) for layer in net.modules() if isinstance(layer, LoHaLinear)}
    assert kinds == {LoHaConv2d}
    assert isinstance(net.time_embed[0], nn.Linear)
    assert torch.equal(net.time_embed[0].weight, teacher.time_embed[0].weight)
    sizes = [sum(p.numel() for p in build_student(name, sd.unet).parameters())
             for name in ("loha", "loha_convolutions", "modulated")]
    assert sizes[0] < sizes[1] < sizes[2]


def test_loha_of_convolutions_is_merged_to_a_modulated_network_that_computes_the_same(
        sd, tmp_path, no_grad):
    net = randomize(build_student("loha_convolutions", sd.unet), seed=4)
    save_controlnet(tmp_path / "merged.safetensors", net.for_inference())
    merged = load_controlnet(tmp_path / "merged.safetensors", sd.unet)
    assert merged.architecture == "modulated"
    for a, b in zip(net.control(*inputs()), merged.control(*inputs()), strict=True):
        assert relative_error(b, a) < 1e-5


@pytest.mark.parametrize("name", ["modulated_layers", "loha_convolutions"])
def test_an_alternative_is_trained_resumed_and_sampled_as_a_student_is(
        go, two_levels, name, teacher_file, two_levels_file, tmp_path):
    more = ["--student", name, "--teacher", str(teacher_file), "--layer-only-steps", "1"]
    file = go("a", *more, "--steps", "2")
    go("b", *more, "--steps", "1")
    assert go("b", *more, "--steps", "2", "--resume").read_bytes() == file.read_bytes()
    assert load_controlnet(file, two_levels.unet).architecture == name
    sample.main(["--checkpoint", str(two_levels_file), "--controlnet", str(file), "--steps", "1",
                 "--out", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").exists()


# --- Fine-tuning the whole of Stable Diffusion ---


def test_finetune_in_the_large_mode_trains_encoder_and_decoder_from_the_first_step(
        go, two_levels, tmp_path):
    file = go("whole", "--ablation", "finetune", "--mode", "large", "--steps", "2")
    learned = load_stable_diffusion(file.with_name("sd.safetensors")).unet
    net = load_controlnet(file, learned)
    own = dict(learned.named_parameters()) | dict(net.named_parameters())
    for name, before in two_levels.unet.named_parameters():
        assert not torch.equal(own[name], before), name


def test_a_finetuned_encoder_predicts_in_sampling_what_it_did_in_training(sd, no_grad):
    net = randomize(ablations.FinetunedEncoder(TINY), seed=5)
    latents, condition, *rest = inputs()
    features = sd.unet.encode(latents, *rest)
    trained = ControlledUNet(sd.unet, net)(latents, condition, *rest, features).noise_pred
    sampled = controlled(sd.unet, [Control(net, condition)])(latents, *rest)
    assert relative_error(sampled, trained) < 1e-5


# --- The tables ---


def test_a_result_counts_for_the_choice_and_start_that_it_was_measured_with():
    ours, theirs = choices.CHOICES["LoHa"].sides
    results = {choices.key(options, init, seed): {"overlap": overlap}
               for options, init, seed, overlap in (
                   (ours, "random", 0, 0.8), (ours, "random", 1, 0.9), (theirs, "teacher", 0, 0.7))}
    _, _, random, teacher = choices.markdown(results).splitlines()
    assert random.startswith("| LoHa: ") and random.endswith("| 0.850 ± 0.071 | - |")
    assert "started from the teacher" in teacher and teacher.endswith("| - | 0.700, one seed |")


@pytest.mark.parametrize("options", [side for c in choices.CHOICES.values() for side in c.sides])
def test_train_takes_the_options_of_every_comparison(options):
    settings = parse(choices.training(options, "random", 1))
    assert settings.seed == 1 and (settings.steps, settings.batch_size) in ((500, 16), (400, 32))


def test_all_ablations_are_measured_and_the_whole_model_fine_tuned():
    assert set(ablation_rows.ROWS) == {"controlnet", *ABLATIONS, "finetune_whole"}
    settings = parse(ablation_rows.ROWS["finetune_whole"].split())
    assert (settings.ablation, settings.mode, settings.unlock_at) == ("finetune", "large", None)


def test_sampling_with_a_smaller_network_takes_less_memory():
    base, lite, controlnet = (resources.sampling_bytes("tiny", name, torch.float32)
                              for name in (resources.NONE, "lite", "controlnet"))
    weights = 4 * docs.stored("evaluation")["networks"]["lite"]["costs"]["parameters stored"]
    assert base + weights <= lite < controlnet


def test_the_table_of_resources_has_ratios_and_leaves_out_what_is_not_trained(monkeypatch):
    monkeypatch.setattr(resources, "sampling_bytes", lambda *_: 2**20)
    monkeypatch.setattr(resources, "peaks", lambda base, options, batch: (2 * 2**20, 0))
    monkeypatch.setattr(resources, "count", lambda *_: {"parameters stored": 3e6})
    monkeypatch.setattr(resources, "NETWORKS", ("controlnet", "lite"))
    networks = resources.measure("tiny")
    networks["controlnet"]["seconds of a guided step"] = 0.004
    networks["lite"]["seconds of a guided step"] = 0.003
    lines = resources.markdown({"machine": "CPU", "networks": {"tiny": networks}}).splitlines()
    none, controlnet, lite = ([cell.strip() for cell in line.split("|")[2:-1]]
                              for line in lines[-3:])
    assert none == ["-"] * 6 + ["1.0", "-"]
    assert controlnet == ["3.0", "-", "2.0", "-", "-", "-", "1.0", "4.0 (1.00)"]
    assert lite == ["3.0", "-", "2.0", "-", "2.0", "-", "1.0", "3.0 (0.75)"]


def test_networks_take_turns_for_their_times(monkeypatch):
    calls = []
    work = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert resources.medians(work, 2, torch.device("cpu")).keys() == {"a", "b"}
    assert calls == ["a", "b"] * 3  # the first to warm up
