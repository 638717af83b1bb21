"""The benchmark beside diffusers compares what computes the same: results and gradients agree."""

import re

import pytest
import torch

from benchmarks import docs, speed, speed_diffusers, speed_measure

ROW = re.compile(r"^(\w[\w, ]+?) {2,}([\d.]+) +([\d.]+) +(\S+) +([\d,]+) +\S+ +\d+%", re.MULTILINE)


@pytest.mark.parametrize("section", ["guided", "picture", "training", "distillation"])
def test_both_sides_compute_the_same(monkeypatch, capsys, section):
    monkeypatch.setattr(speed, "STEPS", 2)
    speed.main([section, "--base", "tiny", "--device", "cpu", "--repeats", "1"])
    rows = ROW.findall(capsys.readouterr().out)
    names = [name for name, *_ in rows]
    if section in ("guided", "picture"):
        assert names == ["ours", "diffusers"]
    else:
        assert names == ["ours", "diffusers", "diffusers, cached"] * (len(names) // 3)
    assert all(float(difference) < 1e-4 for *_, difference, _ in rows)


def test_results_that_differ_are_seen():
    args = speed.parse(["guided", "--base", "tiny", "--device", "cpu"])
    x = speed_measure.random_inputs(args, batch=1)["noise"]
    assert speed_measure.difference([x, 2 * x], [x, x]) == pytest.approx(1)


def test_goals_are_those_of_the_stored_results(capsys):
    speed.main(["goals", "--base", "tiny", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    document = (docs.ROOT / "docs" / "speed.md").read_text()
    assert "\n".join(lines[2:]) in document
    started = next(line for line in lines if line.startswith("reduced_layer, started"))
    assert started.split()[2:4] == ["10", "(1,600)"]


def test_an_unknown_section_is_refused():
    with pytest.raises(SystemExit):
        speed.parse(["guided", "nonsense"])


def test_what_is_frozen_stays_frozen_in_diffusers():
    args = speed.parse(["guided", "--base", "tiny", "--device", "cpu"])
    sd, net = speed_measure.random_base(args), speed_measure.random_control("controlnet", args)
    net.requires_grad_(True)
    for network in (sd.unet, sd.vae, sd.text, net):
        theirs = speed_diffusers.converted(network, torch.float32)
        assert {p.requires_grad for p in [*network.parameters(), *theirs.parameters()]} == {
            network is net}
