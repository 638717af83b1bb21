"""The table can be trusted: every metric at values that are known, every setting as described, the
same numbers for the same networks."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TWO_LEVELS, randomize, two_levels, two_levels_file
from safetensors.torch import save_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.models import alexnet

import evaluate
from common.cli import run
from controlnet import ControlNet
from data import fill50k
from data.annotators import canny
from data.circles import HELD_OUT, Circles, random_circle
from data.fidelity import depth_rmse, edge_f1, measure_of, normal_rmse, pose_f1
from data.folder import Folder
from data.pictures import to_image, write_png
from evaluation import metrics
from evaluation.costs import sizes_and_work
from evaluation.metrics import MetricNetworks, Reference, frechet_distance
from evaluation.protocol import (
    CEILING,
    CHANCE,
    CONFLICTING,
    DEFAULT,
    EMPTY,
    RIGHT,
    SETTINGS,
    SWAPPED,
    EvaluationSet,
    bounds,
    columns,
)
from evaluation.report import markdown, spread
from text.prompts import DEFAULT_PROMPT
from vae import LATENT_SCALE, VAE
from weights import save_controlnet

CPU = torch.device("cpu")
sd, base_file = two_levels, two_levels_file  # fixtures in place of conftest's


@pytest.fixture
def offline(monkeypatch):
    """As on a machine without a network."""

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(metrics, "load_state_dict_from_url", refuse)


@pytest.fixture
def photos() -> torch.Tensor:
    circles = Circles(32, 8, first=HELD_OUT)
    return torch.stack([circles[i]["target"] / 2 + 0.5 for i in range(8)])


# --- The metrics ---


def gaussian(mean: np.ndarray, root: np.ndarray, count: int = 400) -> np.ndarray:
    """Samples whose mean and covariance are exactly `mean` and `root` times its transpose."""
    samples = np.random.default_rng(0).normal(size=(count, len(mean)))
    samples -= samples.mean(0)
    white = samples @ np.linalg.inv(np.linalg.cholesky(np.cov(samples, rowvar=False))).T
    return white @ root.T + mean


def test_the_frechet_distance_is_the_closed_form_of_two_gaussians():
    a = gaussian(np.zeros(3), np.diag([1.0, 2.0, 0.5]))
    b = gaussian(np.array([1.0, 2.0, -2.0]), np.diag([3.0, 1.0, 0.5]))
    # commuting covariances: the roots' difference, squared
    assert frechet_distance(a, b) == pytest.approx(9 + 2**2 + 1**2, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_equals_torchmetrics_own():
    generator = np.random.default_rng(1)
    a, b = (gaussian(generator.normal(size=6), generator.normal(size=(6, 6))) for _ in range(2))
    features = nn.Identity()
    features.num_features = 6
    fid = FrechetInceptionDistance(feature=features).set_dtype(torch.float64)
    fid.update(torch.from_numpy(a), real=True)
    fid.update(torch.from_numpy(b), real=False)
    assert frechet_distance(a, b) == pytest.approx(fid.compute().item(), rel=1e-8)


def test_the_frechet_distance_of_fewer_samples_than_dimensions_is_finite():
    a, b = np.random.default_rng(2).normal(size=(2, 5, 40))
    assert 0 < frechet_distance(a, b) < 200 and frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_equal_inverted_and_noisy_pictures_have_their_known_values(sd, photos, offline):
    reference = Reference(photos, sd.vae, MetricNetworks(None, None, CPU))
    equal = reference.compare(photos)
    assert equal["SSIM"] == pytest.approx(1, abs=1e-9) and equal["PSNR"] == math.inf
    assert equal["latent distance"] == pytest.approx(0, abs=1e-4)
    inverted = reference.compare(1 - photos)
    psnr = -10 * torch.log10((1 - 2 * photos).square().mean(dim=(1, 2, 3))).mean().item()
    assert inverted["PSNR"] == pytest.approx(psnr, rel=1e-5)
    assert inverted["SSIM"] < 0.5 and inverted["latent distance"] > 0.1
    signs = torch.randint(2, photos.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = reference.compare(photos + 0.1 * signs)
    assert noisy["PSNR"] == pytest.approx(20, rel=1e-4)  # a mean squared error of 0.01
    assert inverted["SSIM"] < noisy["SSIM"] < 0.999


def test_the_latent_distance_is_that_of_the_base_models_latents(sd, photos, offline):
    reference = Reference(photos, sd.vae, MetricNetworks(None, None, CPU))
    means, _ = sd.vae.encode(2 * photos - 1)
    # 4 x 4 latents, each becomes 2 x 2 equal ones of 8 x 8
    expected = LATENT_SCALE * means.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert np.allclose(reference.latents, expected.flatten(1).numpy(), atol=1e-5)


def test_without_their_networks_fid_and_lpips_are_left_out_with_the_reason(sd, photos, offline):
    networks = MetricNetworks(None, None, CPU)
    values = Reference(photos, sd.vae, networks).compare(photos)
    assert set(values) == {"SSIM", "PSNR", "latent distance"}
    assert set(networks.missing) == {"FID", "LPIPS"}
    assert "no route to host" in networks.missing["FID"]


def test_fid_takes_inceptions_weights_from_a_file(sd, photos, offline, monkeypatch, tmp_path):
    # of an early layer, which is quicker
    monkeypatch.setattr(metrics, "FEATURES", 64)
    with monkeypatch.context() as patch:  # the network insists on weights when it is made
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
                      lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["64"])
    randomize(network)
    for name, buffer in network.named_buffers():
        buffer.fill_(1.0 if name.endswith("var") else 0.0)
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    networks = MetricNetworks(tmp_path / "inception.pth", None, CPU)
    reference, inverted = Reference(photos, sd.vae, networks), 1 - photos
    features = [network((255 * pictures).round().byte())[0].numpy()
                for pictures in (photos, inverted)]
    expected = frechet_distance(*features)
    for _ in range(2):  # the reference's side is kept
        assert reference.compare(inverted)["FID"] == pytest.approx(expected, rel=1e-3)
    assert reference.compare(photos)["FID"] == pytest.approx(0, abs=1e-3)


def test_lpips_takes_alexnets_weights_from_a_file(sd, photos, offline, tmp_path):
    backbone = randomize(alexnet(weights=None).features)
    tensors = {f"features.{name}": tensor for name, tensor in backbone.state_dict().items()}
    torch.save(tensors, tmp_path / "alexnet.pth")
    networks = MetricNetworks(None, tmp_path / "alexnet.pth", CPU)
    photos = nn.functional.interpolate(photos, scale_factor=2)
    reference = Reference(photos, sd.vae, networks)
    assert reference.compare(photos)["LPIPS"] == pytest.approx(0, abs=1e-6)
    slight, strong = (reference.compare(photos.lerp(1 - photos, share))["LPIPS"]
                      for share in (0.05, 0.5))
    assert 0 < slight < strong
    # AlexNet's second convolution is LPIPS's second slice
    assert torch.equal(networks.lpips.net.slice2[1].weight, backbone[3].weight)


@pytest.mark.parametrize("name", ["inception", "lpips"])
def test_another_file_for_a_metrics_network_is_refused(name, offline, tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK broken")
    for file in ("other.pth", "broken.pth", "missing.pth"):
        with pytest.raises(ValueError, match=file):
            MetricNetworks(
                inception_file=tmp_path / file if name == "inception" else None,
                lpips_file=tmp_path / file if name == "lpips" else None, device=CPU)


def test_edges_agree_within_a_pixel():
    lines = torch.zeros(3, 16, 16)
    lines[:, 8] = 1
    moved = [lines.roll(pixels, dims=1) for pixels in (0, 1, 2)]
    assert [edge_f1(edges, lines) for edges in moved] == [1, 1, 0]
    half = lines.clone()
    half[:, :, 8:] = 0
    # all of its lines are right (one pixel more of the other is near), half of them are missing
    assert edge_f1(half, lines) == pytest.approx(2 * (9 / 16) / (1 + 9 / 16))
    assert edge_f1(torch.zeros_like(lines), lines) == 0 == edge_f1(lines, torch.zeros_like(lines))
    assert edge_f1(torch.zeros_like(lines), torch.zeros_like(lines)) == 1


def test_depth_is_compared_up_to_scale_and_shift_and_not_inside_out():
    depth = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    deviation = depth[0].std(correction=0).item()
    assert depth_rmse(0.5 * depth + 0.2, depth) == pytest.approx(0, abs=1e-6)
    for wrong in (1 - depth, torch.full_like(depth, 0.3)):  # no more than its mean is right
        assert depth_rmse(wrong, depth) == pytest.approx(deviation, rel=1e-6)


def test_normals_are_compared_as_unit_vectors():
    up = torch.tensor([0.5, 0.5, 1.0])[:, None, None].expand(3, 8, 8)
    short, right, down = up * 0.5 + 0.25, up.roll(1, 0), 1 - up
    expected = [0, 0, 2**0.5, 2]
    assert [normal_rmse(n, up) for n in (up, short, right, down)] == pytest.approx(expected)


def test_every_limb_of_a_pose_counts_the_same():
    pose = torch.zeros(3, 16, 16)
    pose[2, 8] = 1  # a blue limb, whose mean over the channels is below a half
    assert pose_f1(pose, pose.roll(1, 0)) == 1 and pose_f1(pose, torch.zeros(3, 16, 16)) == 0


@pytest.mark.parametrize(("annotator", "measure"), [
    ("canny", "edge F1"), ("softedge_hed", "edge F1"), ("lineart_coarse", "edge F1"),
    ("lines", "line F1"), ("depth_midas", "depth RMSE"), ("normal_bae", "normal RMSE"),
    ("openpose_full", "pose F1"), ("dwpose", "pose F1"), ("shuffle", None)])
def test_what_a_condition_shows_decides_how_obedience_is_measured(annotator, measure):
    found = measure_of(annotator)
    assert (found and found[0]) == measure


# --- The five settings ---


@pytest.fixture
def samples() -> EvaluationSet:
    return EvaluationSet(Circles(32, 3, first=HELD_OUT))


def test_a_true_picture_passes_and_one_of_another_setting_does_not(samples):
    circles = [random_circle(HELD_OUT + i) for i in range(3)]
    for setting in SETTINGS:
        shapes = circles[1:] + circles[:1] if setting == SWAPPED else circles
        colors = circles[1:] + circles[:1] if setting == CONFLICTING else circles
        shown = [replace(shape, color=color.color, background=color.background)
                 for shape, color in zip(shapes, colors, strict=True)]
        pictures = torch.stack([torch.from_numpy(circle.target(32)).permute(2, 0, 1).float() / 255
                                for circle in shown])
        right = samples.fidelity(pictures, setting)
        assert right["overlap"] > 0.95 and right["color_error"] < 1, setting
        for other in (CONFLICTING, SWAPPED):
            if other != setting:
                wrong = samples.fidelity(pictures, other)
                assert wrong["color_error"] > 20 or wrong["overlap"] < 0.8, (setting, other)


def test_every_setting_changes_one_thing(samples):
    circles = Circles(32, 3, first=HELD_OUT)
    prompts = [circles[i]["prompt"] for i in range(3)]
    assert samples.prompts == {
        RIGHT: prompts, EMPTY: [""] * 3, DEFAULT: [DEFAULT_PROMPT] * 3,
        CONFLICTING: [prompts[1], prompts[2], prompts[0]], SWAPPED: prompts}
    for setting in SETTINGS:
        moved = 1 if setting == SWAPPED else 0
        for i in range(3):
            expected = circles[(i + moved) % 3]["condition"]
            assert torch.equal(samples.conditions[setting][i], expected)


def test_photos_are_measured_by_the_edges_of_their_annotator(photos, tmp_path):
    for i, photo in enumerate(photos):
        write_png(tmp_path / f"{i}.png", to_image(photo))
        write_png(tmp_path / f"edges{i}.png", to_image(canny(photo)))
    (tmp_path / "metadata.jsonl").write_text("".join(
        json.dumps({"file_name": f"{i}.png", "conditioning_image": f"edges{i}.png"}) + "\n"
        for i in range(len(photos))))
    size = photos.shape[-1]
    samples = EvaluationSet(Folder(tmp_path, size, annotator="canny"))
    assert samples.fidelity(photos, RIGHT) == {"edge F1": 1}
    assert samples.fidelity(photos, SWAPPED)["edge F1"] < 0.7
    assert EvaluationSet(Folder(tmp_path, size)).fidelity(photos, RIGHT) == {}
    computed = EvaluationSet(Folder(tmp_path, size, edges=True))
    assert computed.fidelity(photos, RIGHT) == {"edge F1": 1}


# --- The program ---


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    for seed, name in enumerate(("teacher", "student")):
        net = randomize(ControlNet(TWO_LEVELS, paper_encoder=True), seed=seed)
        save_controlnet(folder / f"{name}.safetensors", net)
    return folder


@pytest.fixture(scope="module")
def counts() -> dict:
    """What has been counted: it takes a second, and is the same for networks of the same shapes."""
    return {}


@pytest.fixture
def go(base_file, files, tmp_path, offline, monkeypatch, counts):
    def counted_once(unet, net, size: int) -> dict[str, int]:
        key = net.architecture, net.config, size
        counts[key] = counts.get(key) or sizes_and_work(unet, net, size)
        return counts[key]

    monkeypatch.setattr(evaluate, "sizes_and_work", counted_once)

    def go(*more: str) -> dict:
        evaluate.main([
            "--checkpoint", str(base_file), "--teacher", str(files / "teacher.safetensors"),
            "--controlnet", str(files / "student.safetensors"), "--steps", "1",
            "--resolution", "32", "--images", "3", "--out", str(tmp_path / "out"), *more])
        return json.loads((tmp_path / "out" / "results.json").read_text())

    return go


def test_one_process_and_two_write_the_same_numbers_with_their_protocol(go, tmp_path, capsys):
    first, second = go(), go("--processes", "2")
    networks, protocol = first["networks"], first["protocol"]
    assert list(networks) == ["base", "teacher", "student"]
    assert list(first["bounds"]) == [CEILING, CHANCE] and first["bounds"] == second["bounds"]
    for name, row in networks.items():
        for part in ("control fidelity", "against the truth", "against the teacher"):
            assert row[part] == second["networks"][name][part]
        # two seeds
        assert all(len(row["control fidelity"][setting]["overlap"]) == 2 for setting in SETTINGS)
    expected = {"images": 3, "size": 32, "seeds": [0, 1], "steps": 1, "guidance": 3.0}
    assert {key: protocol[key] for key in expected} == expected
    assert set(protocol["missing"]) == {"FID", "LPIPS"}
    assert len(networks["student"]["sha256"]) == 64
    parameters = sum(p.numel() for p in ControlNet(TWO_LEVELS, paper_encoder=True).parameters())
    assert networks["teacher"]["costs"]["parameters stored"] == parameters
    assert (tmp_path / "out" / "results.md").read_text() == markdown(second)
    assert markdown(second) in capsys.readouterr().out
    assert (tmp_path / "out" / "figure.png").exists()


def test_the_bounds_are_the_autoencoders_restorations_in_and_out_of_place(sd, samples, offline):
    truth = Reference(samples.truth, sd.vae, MetricNetworks(None, None, CPU))
    mean, _ = sd.vae.encode(2 * samples.truth - 1)
    right = (sd.vae.decode(mean) / 2 + 0.5).clamp(0, 1).mul(255).round() / 255
    found = bounds(sd.vae, samples, truth)
    for name, pictures in ((CEILING, right), (CHANCE, right[[1, 2, 0]])):
        row = found[name]
        assert row["control fidelity"] == {RIGHT: columns([samples.fidelity(pictures, RIGHT)])}
        assert row["against the truth"] == columns([truth.compare(pictures)])


def test_the_teacher_measured_as_a_student_equals_itself(go, files):
    teacher = str(files / "teacher.safetensors")
    row = go("--controlnet", teacher, "--seeds", "5")["networks"][teacher]
    assert row["against the teacher"]["PSNR"] == [math.inf]
    assert row["against the teacher"]["SSIM"] == [pytest.approx(1)]


def test_another_autoencoder_is_measured_with(go, sd, tmp_path):
    other = randomize(VAE(sd.vae.config), seed=21)
    save_file(other.state_dict(), tmp_path / "vae.safetensors")
    results = go("--vae", str(tmp_path / "vae.safetensors"), "--teacher", "none", "--seeds", "0",
                 "--images", "2")
    samples = EvaluationSet(Circles(32, 2).preview(2))
    truth = Reference(samples.truth, other, MetricNetworks(None, None, CPU))
    assert results["protocol"]["vae"]["file"] == "vae.safetensors"
    assert results["bounds"][CEILING] == bounds(other, samples, truth)[CEILING]


def test_a_folder_of_photos_is_measured_by_its_edges(go, tmp_path):
    fill50k.main(["--out", str(tmp_path / "data"), "--count", "4", "--size", "32"])
    results = go("--data", str(tmp_path / "data"), "--canny", "--teacher", "none", "--seeds", "0")
    rows = results["networks"]
    assert list(rows) == ["base", "student"] and rows["base"]["against the teacher"] == {}
    for setting in SETTINGS:
        assert 0 <= rows["student"]["control fidelity"][setting]["edge F1"][0] <= 1


def test_a_folder_is_read_as_for_training(tmp_path, capsys):
    fill50k.main(["--out", str(tmp_path), "--count", "3", "--size", "32"])
    index = tmp_path / "prompt.json"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows = [{**row, "words": f"circle {i}", "prompt": "x"} for i, row in enumerate(rows)]
    rows[1]["source"] = "missing.png"
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(tmp_path), "--caption-column", "words", "--teacher", "none"]
    samples = evaluate.evaluation_set(evaluate.parse([*options, "--skip-broken"]), 32)
    assert "1 of 3 rows are left out" in capsys.readouterr().out
    assert samples.prompts[RIGHT] == ["circle 0", "circle 2"]
    with pytest.raises(ValueError, match="missing.png"):
        evaluate.evaluation_set(evaluate.parse(options), 32)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--images", "1"], "expected at least 2 pictures"),
    (["--canny"], "--canny and --annotator need --data"),
    (["--skip-broken"],
     "--caption-column, --condition-resize, --skip-broken and --buckets need --data"),
    (["--data", "nowhere"], "nowhere does not exist"),
    (["--controlnet", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--resolution", "20"], "divisible by 8"),
    (["--inception", "nowhere.pth"], "nowhere.pth"),
])
def test_wrong_input_is_one_line_and_writes_nothing(go, capsys, tmp_path, arguments, message):
    try:
        code = run(lambda: go(*arguments))
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "missing"), [
    ([], "--controlnet and --teacher"), (["--controlnet", "a"], "--teacher"),
    (["--teacher", "none"], "--controlnet")])
def test_another_base_says_which_files_it_needs(capsys, given, missing):
    with pytest.raises(SystemExit, match="2"):
        evaluate.parse(["--checkpoint", "other.safetensors", *given])
    error, = capsys.readouterr().err.splitlines()
    assert f"this --checkpoint needs its own {missing};" in error


def test_networks_are_called_by_their_files_or_folders(tmp_path):
    files = [tmp_path / name for name in
             ("loha.safetensors", "run/controlnet.safetensors", "base.safetensors")]
    expected = {"loha": files[0], "run": files[1], str(files[2]): files[2]}
    assert evaluate.network_names(files) == expected
    twice = [tmp_path / "a" / "loha.safetensors", tmp_path / "b" / "loha.safetensors"]
    assert list(evaluate.network_names(twice)) == [str(path) for path in twice]


def test_a_spread_is_the_standard_deviation_over_the_seeds():
    assert spread([0.5, 0.7]) == "0.600 ± 0.141" and spread([0.5]) == "0.500"
    assert spread([math.inf, math.inf], 1) == "inf"
