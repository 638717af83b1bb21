"""The students and the ablations: their sizes, their files, that each learns, and what LoHa and the
start from a teacher promise.

That each starts at the base model and that every weight of it learns is in test_claims.py.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, TWO_LEVELS, randomize, relative_error, same
from torch import nn
from torch.utils.data import default_collate

import evaluate
import sample
import train
from benchmarks import costs
from common.cli import run
from controlnet import ControlledUNet, ControlNet, ControlNetwork, ablations
from controlnet.injection import injection_points
from controlnet.sampling import Control, generate, initial_latents
from data.circles import Circles
from diffusion import Sampling, q_sample
from kd import ALTERNATIVES, STUDENTS, build_student, layerwise_loss
from kd.from_teacher import every_second_channel, from_teacher
from kd.loha import LoHaConv2d, LoHaLinear
from kd.losses import distillation_losses
from kd.students import BUILDERS
from text import CLIP_VIT_L, OPENCLIP_VIT_H, CLIPText
from unet import SD15, SD21, TINY, UNetConfig
from unet.blocks import timestep_embedding
from vae import sample_latents
from weights import load_controlnet, save_controlnet
from weights.controlnet import ARCHITECTURES

# at least so many times
SMALLER = {
    "original": 1, "reduced_channel": 3.5, "reduced_layer": 2, "modulated": 2, "loha": 6, "mlp": 30,
    "lite": 10
}
B = 2


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def teacher(sd):
    return randomize(ControlNet(TINY, paper_encoder=True), seed=3).requires_grad_(False)


@pytest.fixture(scope="module")
def inputs(sd):
    g = generator(1)
    latents = torch.randn(B, 4, 8, 8, generator=g)
    context = torch.randn(B, 77, TINY.context_dim, generator=g)
    condition = torch.rand(B, 3, 64, 64, generator=g)
    timesteps = torch.tensor([10, 700])
    with torch.no_grad():
        features = sd.unet.encode(latents, timesteps, context)
    return latents, condition, timesteps, context, sd.unet, features


@pytest.fixture(scope="module")
def features(inputs):
    return inputs[-1]


def networks(sd) -> dict[str, nn.Module]:
    """Every network that can be trained, fresh."""
    return (
        {"controlnet": ControlNet.from_unet(sd.unet, generator=generator())}
        | {name: build_student(name, sd.unet, generator()) for name in (*STUDENTS, *ALTERNATIVES)}
        | {name: ablation(sd.unet, generator()) for name, ablation in ablations.BUILDERS.items()}
    )


@pytest.mark.parametrize(("config", "original"), [(SD15, 361_279_120), (SD21, 364_228_240)])
@pytest.mark.parametrize("name", STUDENTS)
def test_sizes_at_stable_diffusions_shape(name, config, original):
    with torch.device("meta"):
        student = build_student(name, SimpleNamespace(config=config))
    assert original / size(student) >= SMALLER.get(name, 1)


@pytest.mark.parametrize("config", [SD15, SD21])
def test_heads_and_groups_stay_when_channels_go(config):
    with torch.device("meta"):
        narrow = build_student("reduced_channel", SimpleNamespace(config=config)).config
    assert [narrow.heads(mult * narrow.model_channels) for mult in (1, 2, 4)] == [
        config.heads(mult * config.model_channels) for mult in (1, 2, 4)
    ]
    assert narrow.groups == config.groups


def test_the_encoder_is_entered_before_blocks_1_4_7_10_and_the_middle():
    assert injection_points(SD15) == {0: 320, 3: 320, 6: 640, 9: 1280, 11: 1280}


def test_a_file_gives_back_the_same_network(sd, inputs, tmp_path, no_grad):
    for name, net in networks(sd).items():
        randomize(net, seed=5)
        save_controlnet(tmp_path / "s.safetensors", net)
        loaded = load_controlnet(tmp_path / "s.safetensors", sd.unet)
        for attribute in ("architecture", "config", "target"):
            assert getattr(loaded, attribute) == getattr(net, attribute), name
        assert not any(p.requires_grad for p in loaded.parameters())
        first, second = net.control(*inputs), loaded.control(*inputs)
        assert same(net, loaded), name
        # Not to the last bit: some CPUs compute otherwise with weights that lie in a file, whose
        # place in memory is not a multiple of 64.
        pairs = list(zip(first, second, strict=True))
        assert len(pairs) == 13 and all(relative_error(b, a) < 1e-5 for a, b in pairs), name


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_that_is_built_directly_has_its_name_and_loads(sd, tmp_path, name):
    net = randomize(BUILDERS[name](TINY))
    save_controlnet(tmp_path / "s.safetensors", net)
    assert net.architecture == name
    assert same(load_controlnet(tmp_path / "s.safetensors", sd.unet), net)


@pytest.mark.parametrize("name", ["reduced_channel", "loha"])
def test_a_file_stores_what_shapes_do_not_show(name, tmp_path):
    """Heads of a fixed width, as in SD 2.x, are half as wide in a network of half the width; the
    rank may be unusual."""
    config = replace(TINY, num_heads=None, head_dim=16, linear_projections=True)
    base = SimpleNamespace(config=config)
    net = BUILDERS[name](replace(config, rank=3 if name == "loha" else None))
    save_controlnet(tmp_path / "s.safetensors", net)
    loaded = load_controlnet(tmp_path / "s.safetensors", base)
    assert loaded.config == net.config and loaded.target == base.config
    expected = (8, None) if name == "reduced_channel" else (16, 3)
    assert (loaded.config.head_dim, loaded.config.rank) == expected


def test_only_a_controlnet_has_diffusers_names(sd, tmp_path):
    for name, net in networks(sd).items():
        if name not in ("controlnet", "original", "gaussian"):
            with pytest.raises(ValueError, match="this is a student"):
                save_controlnet(tmp_path / "s.safetensors", net, naming="diffusers")


def test_a_student_needs_no_tensor_of_a_certain_name_to_be_loaded_again(sd, tmp_path, monkeypatch):
    class Plain(ControlNetwork):
        architecture = "plain"

        def __init__(self, config):
            super().__init__()
            self.config = self.target = config
            self.scale = nn.Parameter(torch.zeros(13))

        def control(self, latents, condition, timesteps, context, unet=None, features=None):
            return list(self.scale)

    monkeypatch.setitem(ARCHITECTURES, "plain", Plain)
    save_controlnet(tmp_path / "plain.safetensors", Plain(TINY))
    net = load_controlnet(tmp_path / "plain.safetensors", sd.unet)
    assert isinstance(net, Plain) and net.for_inference() is net
    with pytest.raises(ValueError, match="needs zero_convs, which plain does not have"):
        net.connect_only_middle()


def test_a_file_of_an_unknown_architecture_or_another_base_is_refused(sd, tmp_path):
    student = build_student("lite", sd.unet)
    student.architecture = "nobody"
    save_controlnet(tmp_path / "a.safetensors", student)
    with pytest.raises(ValueError, match="unknown architecture, 'nobody'; known are controlnet"):
        load_controlnet(tmp_path / "a.safetensors", sd.unet)
    config = UNetConfig(model_channels=64, context_dim=64, num_heads=2, groups=8)
    wider = build_student("loha", SimpleNamespace(config=config))
    save_controlnet(tmp_path / "b.safetensors", wider)
    with pytest.raises(ValueError, match="for another base model"):
        load_controlnet(tmp_path / "b.safetensors", sd.unet)


def test_twenty_steps_of_training_lower_the_loss(sd, teacher):
    """Students with L_layer, which all have in common; a ControlNet with L_d. The same two circles,
    noises and timesteps each time."""
    batch = default_collate([Circles(32, 2)[i] for i in range(2)])
    g, timesteps, context = generator(), torch.tensor([100, 600]), sd.text.encode(batch["prompt"])
    with torch.no_grad():
        mean, logvar = sd.vae.encode(batch["target"])
        latents = sample_latents(mean, logvar, torch.randn(mean.shape, generator=g))
        noise = torch.randn(mean.shape, generator=g)
        inputs = q_sample(latents, timesteps, noise), batch["condition"], timesteps, context
        features = sd.unet.encode(inputs[0], timesteps, context)
        taught = ControlledUNet(sd.unet, teacher)(*inputs, decodes=False)
    for name in ("controlnet", *STUDENTS):
        distilled = name in STUDENTS
        net = build_student(name, sd.unet, generator()) if distilled else ControlNet.from_unet(
            sd.unet, generator=generator())
        student, values = ControlledUNet(sd.unet, net), []
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
        for _ in range(20):
            optimizer.zero_grad()
            prediction = student(*inputs, features, decodes=not distilled)
            losses = distillation_losses(prediction, taught if distilled else None, noise)
            (loss,) = losses.values()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        assert values[-1] < 0.95 * values[0], (name, values)


@pytest.mark.parametrize(("layer", "shape"), [
    (nn.Linear(40, 48), (3, 40)),
    (nn.Linear(40, 48, bias=False), (3, 7, 40)),
    (nn.Conv2d(20, 48, 3, stride=2, padding=1), (3, 20, 9, 9)),
    (nn.Conv2d(40, 48, 1), (3, 40, 9, 9)),
])
def test_a_merged_loha_layer_equals_the_factored_one(layer, shape):
    loha = (LoHaConv2d if isinstance(layer, nn.Conv2d) else LoHaLinear)(layer, rank=4)
    loha.init_weights(generator())
    x = torch.randn(shape, generator=generator(1))
    layer.load_state_dict({name: tensor for name, tensor in (
        ("weight", loha.weight()), ("bias", loha.bias)) if tensor is not None})
    assert (layer(x) - loha(x)).abs().max() < 1e-6 and loha(x).std() > 0.1


def test_a_fresh_loha_weight_has_hes_scale_and_rank_to_the_square():
    loha = LoHaConv2d(nn.Conv2d(64, 128, 3), rank=8)
    loha.init_weights(generator())
    weight = loha.weight().flatten(1)
    assert weight.std().item() == pytest.approx((2 / weight.shape[1]) ** 0.5, rel=0.15)
    assert torch.linalg.matrix_rank(weight) == 64
    assert 2 * 8 * (128 + 64 * 9) + 128 == size(loha)


def test_a_loha_layer_starts_at_its_best_approximation_of_a_weight():
    weight = torch.randn(48, 40, generator=generator())
    loha = LoHaLinear(nn.Linear(40, 48), rank=6)
    loha.approximate(weight, noise=0.0, generator=generator())
    u, s, v = torch.linalg.svd(weight)
    assert torch.allclose(loha.weight(), u[:, :6] * s[:6] @ v[:6], atol=1e-5)
    loha.approximate(weight, noise=0.1, generator=generator())
    loha.weight().square().sum().backward()
    assert all(factor.grad.abs().amin() > 0 for factor in (loha.b1, loha.a1, loha.b2, loha.a2))


def test_a_merged_loha_student_is_the_modulated_one_that_computes_the_same(
        sd, inputs, tmp_path, no_grad):
    net = randomize(build_student("loha", sd.unet), seed=4)
    before, stored = net.control(*inputs), size(net)
    save_controlnet(tmp_path / "m.safetensors", net.for_inference())
    merged = load_controlnet(tmp_path / "m.safetensors", sd.unet)
    assert merged.architecture == "modulated" and size(merged) > 3 * stored
    for a, b in zip(before, merged.control(*inputs), strict=True):
        assert (a - b).abs().max() < 1e-6 * a.abs().max()


def test_a_start_from_the_teacher_is_still_the_base_model(
        sd, teacher, inputs, features, no_grad):
    plain = sd.unet.decode(features)
    for name in sorted(BUILDERS.keys() - {"mlp", "lite"}):
        net = from_teacher(build_student(name, sd.unet, generator()), teacher, generator())
        assert torch.equal(sd.unet.decode(features, net.control(*inputs)), plain), name


def test_what_fits_is_copied_from_the_teacher(sd, teacher, inputs, no_grad):
    def start(name: str) -> nn.Module:
        return from_teacher(
            build_student(name, sd.unet, generator()), teacher, generator(), copy_zero_convs=True)

    theirs = teacher.control(*inputs)
    pairs = zip(start("original").control(*inputs), theirs, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for name in ("reduced_layer", "modulated"):
        ours = start(name).control(*inputs)
        # before the first block that the student does not have
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        zeros = [torch.zeros_like(c) for c in ours]
        assert layerwise_loss(ours, theirs) < layerwise_loss(zeros, theirs)
    narrow = start("reduced_channel")
    assert torch.equal(narrow.input_blocks[1][0].in_layers[0].weight,
                       teacher.input_blocks[1][0].in_layers[0].weight[::2])


def test_loha_starts_at_the_best_approximation_of_the_right_block(sd, teacher, no_grad):
    student = from_teacher(build_student("loha", sd.unet, generator()), teacher, generator())
    # the first residual block of the second level: block 4 of the teacher
    layer = student.input_blocks[3][0].in_layers[2]
    u, s, v = torch.linalg.svd(
        teacher.input_blocks[4][0].in_layers[2].weight.flatten(1), full_matrices=False)
    best = (u[:, : layer.rank] * s[: layer.rank]) @ v[: layer.rank]
    # the noise on the spare ranks
    assert (layer.weight().flatten(1) - best).norm() < 0.3 * best.norm()


def test_every_second_channel_of_outputs_and_inputs_is_taken_and_its_variance_kept(
        sd, teacher, no_grad):
    assert torch.allclose(
        every_second_channel(torch.ones(8, 6), torch.Size((4, 3))), torch.full((4, 3), 2**0.5))
    student = from_teacher(
        build_student("reduced_channel", sd.unet, generator()), teacher, generator())
    ours, theirs = (net.input_blocks[1][0].in_layers[2].weight for net in (student, teacher))
    assert torch.allclose(ours[3, 5], 2**0.5 * theirs[6, 10]) and ours.shape[:2] == (16, 16)


@pytest.mark.parametrize("name", [name for name in BUILDERS if " M, " in BUILDERS[name].__doc__])
def test_the_size_in_a_docstring_is_the_size(name):
    with torch.device("meta"):
        millions = size(build_student(name, SimpleNamespace(config=SD15))) / 1e6
    assert f" {millions:.1f} M, " in BUILDERS[name].__doc__


def test_every_second_channel_keeps_the_time_embeddings_frequencies():
    t = torch.tensor([3, 500])
    assert torch.allclose(timestep_embedding(t, 32)[:, ::2], timestep_embedding(t, 16), atol=1e-5)
    assert every_second_channel(torch.ones(8, 6, 3, 3), (4, 3, 3, 3)).shape == (4, 3, 3, 3)
    assert every_second_channel(torch.ones(8, 5), (4, 5)).unique().tolist() == [1]


def test_a_student_that_nothing_of_the_teacher_fits_is_refused(sd, teacher):
    for name in ("mlp", "lite"):
        with pytest.raises(ValueError, match=f"no layer of a ControlNet fits {name}"):
            from_teacher(build_student(name, sd.unet), teacher, generator())
    with pytest.raises(ValueError, match="expected a ControlNet as the teacher"):
        from_teacher(
            build_student("original", sd.unet), build_student("lite", sd.unet), generator())


def test_ablations_without_zero_convolutions_disturb_the_base_and_the_others_do_not(
        sd, inputs, features, no_grad):
    plain = sd.unet.decode(features)
    unchanged = {}
    for name, make in ablations.BUILDERS.items():
        control = make(sd.unet, generator()).control(*inputs)
        unchanged[name] = torch.equal(sd.unet.decode(features, control), plain)
    assert unchanged == {
        "gaussian": False, "lite_encoder": False, "lite_decoder": False, "lite_decoder_zero": True,
        "finetune": True
    }


@pytest.mark.parametrize(
    "arguments", [["--ablation", "finetune"], ["--student", "mlp", "--layer-only-steps", "1",
                                               "--loss-layer", "1"],
                  ["--student", "loha", "--layer-only-steps", "1"]])
def test_the_command_line_trains_saves_resumes_samples_and_evaluates_them(
        two_levels, two_levels_file, tmp_path, arguments):
    teacher = randomize(ControlNet(TWO_LEVELS, paper_encoder=True), seed=3)
    save_controlnet(tmp_path / "teacher.safetensors", teacher)
    more = ["--teacher", str(tmp_path / "teacher.safetensors")] if "--student" in arguments else []

    def go(folder: str, *steps: str) -> bytes:
        train.main([*SHORT, *arguments, *more, "--checkpoint", str(two_levels_file),
                    "--batch-size", "2", "--out", str(tmp_path / folder), "--steps", *steps])
        return (tmp_path / folder / "controlnet.safetensors").read_bytes()

    whole = go("a", "2")
    go("b", "1")
    assert go("b", "2", "--resume") == whole
    weights = tmp_path / "a/controlnet.safetensors"
    assert load_controlnet(weights, two_levels.unet).architecture == arguments[1]
    files = ["--checkpoint", str(two_levels_file), "--controlnet", str(weights)]
    sample.main([*files, "--steps", "1", "--out", str(tmp_path / "picture.png")])
    few = ["--steps", "1", "--images", "2", "--seeds", "0", "--resolution", "32"]
    evaluate.main([*files, "--teacher", "none", *few, "--out", str(tmp_path / "evaluation")])
    assert (tmp_path / "picture.png").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--ablation", "gaussian", "--student", "lite"], "--student and --init do not go with it"),
    (["--ablation", "gaussian", "--init", "random"], "--student and --init do not go with it"),
    (["--student", "lite", "--copy-zero-convs"], "--copy-zero-convs needs --init teacher"),
    (["--init", "teacher"], "--init teacher needs a --student"),
    (["--student", "mlp", "--init", "teacher"], "no layer of a ControlNet fits mlp"),
])
def test_conflicting_options_are_one_line_and_exit_code_2(tmp_path, capsys, arguments,
                                                               message):
    try:
        code = run(lambda: train.main([*arguments, "--out", str(tmp_path / "run")]))
    except SystemExit as leaving:  # argparse
        code = leaving.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error:") and message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_cost_sheet_counts_what_is_known():
    with torch.device("meta"), torch.no_grad():
        unet, vae, net = costs.build("sd15", "controlnet")
        x, condition, t, context = costs.dummy_inputs(unet, 512, batch=1)
        work = [
            costs.count_macs(lambda: unet(x, t, context)),
            costs.count_macs(lambda: net(x, condition, t, context)),
            costs.count_macs(lambda: vae.decode(x))
        ]
        text = [
            costs.count_macs(lambda config=config: CLIPText(config)
                       (torch.zeros(1, 77, dtype=torch.int64)))
            for config in (CLIP_VIT_L, OPENCLIP_VIT_H)
        ]
    assert [round(w / 1e9, 1) for w in work] == [401.6, 141.6, 1257.3]
    assert text == [costs.text_macs(768, 12), costs.text_macs(1024, 23)]


def test_fused_attention_counts_its_matrix_products_whatever_pytorchs_counter_knows():
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    product = 2 * 16 * 16 * 8  # heads * pixels * pixels * width
    forward = costs.count_macs(lambda: F.scaled_dot_product_attention(q, k, v))
    both = costs.count_macs(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert forward == 2 * product
    assert both == (2 + 5) * product  # backward: four gradients, and the scores once more


def test_a_network_that_enters_the_encoder_pays_for_running_it_again():
    with torch.device("meta"), torch.no_grad():
        unet, _, net = costs.build("tiny", "mlp")
        x, condition, t, context = costs.dummy_inputs(unet, 64, batch=1)
        features = unet.encode(x, t, context)
        own = costs.count_macs(lambda: net(x, condition, t))
        encoder = costs.count_macs(lambda: unet.encode(x, t, context))
        both = costs.count_macs(lambda: net.control(x, condition, t, context, unet, features))
        assert both == own + encoder


def test_the_cost_sheet_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(costs, "NETWORKS", ("loha",))
    monkeypatch.setattr(
        costs, "measure", lambda *_: dict.fromkeys(
            (key for key, _ in costs.COLUMNS.values() if key.startswith("seconds")), 1.0))
    monkeypatch.setattr(costs, "training_costs",
                        lambda *_: {"MACs of training": 1, "activation bytes of training": 1})
    costs.main(["--out", str(tmp_path / "costs.json"), "--resolution", "32"])
    row = json.loads((tmp_path / "costs.json").read_text())["networks"]["loha"]
    assert 3 * row["parameters stored"] < row["parameters merged"] and row[
        "MACs to form the weights, if not merged"] > 0
    assert all(value > 0 for value in row.values()) and "control ms" in capsys.readouterr().out


def test_times_are_measured():
    times = costs.measure("tiny", "lite", 32, repeats=1, device=torch.device("cpu"))
    assert all(value > 0 for value in times.values())
    assert times["seconds of the control"] < times["seconds of a picture, 20 guided steps"]


# --- Nothing twice in sampling ---


def sampled(sd, net: ControlNetwork, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    condition = torch.rand(1, 3, 32, 32, generator=generator)
    noise = initial_latents(1, 32, 32, generator)
    context = sd.text.encode(["a circle"])
    return generate(sd.unet, sd.vae, [Control(net, condition, scale)], noise, context,
                    sd.text.encode([""]), Sampling(3, 2.0))


@pytest.mark.parametrize("name", STUDENTS)
def test_the_condition_is_encoded_once_for_a_picture(sd, name):
    net = randomize(build_student(name, sd.unet)).for_inference()
    calls = []
    net.input_hint_block.register_forward_hook(lambda *_: calls.append(1))
    sampled(sd, net)
    assert len(calls) == 1


def test_a_network_in_the_encoder_makes_it_run_once_and_to_the_same_picture(sd, monkeypatch):
    net = randomize(build_student("mlp", sd.unet))
    encodings = []
    encode = sd.unet.encode
    monkeypatch.setattr(sd.unet, "encode", lambda *args: encodings.append(1) or encode(*args))
    once = sampled(sd, net)
    assert len(encodings) == 3
    monkeypatch.setattr("controlnet.sampling.replaces_features", lambda *_: False)
    twice = sampled(sd, net)
    assert len(encodings) == 3 + 2 * 3
    assert relative_error(once, twice) < 1e-5
    assert relative_error(sampled(sd, net, scale=0.5), twice) > 1e-3  # which needs the differences
