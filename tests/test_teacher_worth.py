"""What `benchmarks.teacher_worth` trains with: pictures of line art alone, other L_layers."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import teacher_pictures
from benchmarks.teacher_worth import cosine_errors, deep_errors, markdown
from data.own import training_data
from kd.losses import layer_errors


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 8, 4, 4, generator=generator) for _ in range(13)]


def test_the_cosine_counts_directions_alone_and_has_a_gradient_at_zero(outputs):
    # 1 % is added to the student's square: it lets a start at zero have a gradient.
    assert cosine_errors([3 * a for a in outputs], outputs, []).abs().max() < 1e-3
    assert torch.allclose(cosine_errors([-a for a in outputs], outputs, []),
                          torch.full((13,), 1 + 1.01**-0.5), atol=1e-4)
    zeros = [torch.zeros_like(a).requires_grad_() for a in outputs]
    errors = cosine_errors(zeros, outputs, [])
    assert torch.equal(errors, torch.ones(13))
    errors.sum().backward()
    assert all(0 < a.grad.abs().max() < 100 for a in zeros)


def test_the_weights_by_depth_are_one_on_average_and_seven_times_that_of_the_finest(outputs):
    students, variance = [torch.zeros_like(a) for a in outputs], [torch.ones(())] * 13
    weights = (deep_errors(students, outputs, variance)
               / layer_errors(students, outputs, variance))
    assert weights.mean() == pytest.approx(1) and weights[-1] == pytest.approx(13 / 7)
    assert weights[0] == pytest.approx(1 / 7)


def test_pictures_of_line_art_alone_know_no_true_colour_and_are_made_once(tmp_path, monkeypatch):
    made = []

    def sample(sd, net, conditions, prompts, **_):
        made.append(prompts)
        return conditions.clone()

    monkeypatch.setattr(teacher_pictures, "sample_pictures", sample)
    monkeypatch.setattr(teacher_pictures, "BATCH", 2)
    teacher_pictures.make_pictures(tmp_path, 3)
    train = tmp_path / "train"
    (train / "metadata.jsonl").unlink()
    (train / "00002.png").unlink()
    teacher_pictures.make_pictures(tmp_path, 3)
    assert [len(prompts) for prompts in made] == [2, 1, 1] and made[1] == made[2]

    data = training_data(tmp_path, 128)
    assert [data.prompt(i) for i in range(3)] == [*made[0], *made[1]] and len(data) == 3
    assert torch.equal(data.target(0), data.condition(0)) and len(data.preview(500)) == 222
    # All that a prompt needs of a drawing is its kind.
    line_art = SimpleNamespace(entries=[{"kind": "food"}], pairs=[0], seed=0)
    kind, *colors, ground = teacher_pictures.invented_prompt(line_art, 0).split(", ")
    assert kind == "food" and ground == made[0][0].split(", ")[-1]
    assert 1 <= len(colors) <= 3 and set(colors) <= set(teacher_pictures.COLORS)


def test_the_table_has_a_line_for_each_training_with_its_seeds_together():
    row = {"right prompt": {"line F1": 0.5, "color_error": 20.0}, "empty prompt": {"line F1": 0.4}}
    better = {"right prompt": {"line F1": 0.7, "color_error": 10.0},
              "empty prompt": {"line F1": 0.6}}
    lines = markdown({"few-50-alone-0": row, "few-50-alone-1": better,
                      "small-mlp-long-0": row}).splitlines()
    assert lines[2:] == [
        "| reduced_layer | alone | 50 drawings | 9,600 | 2 | 0.600 ± 0.141 | 15.0 ± 7.1 | "
        "0.500 ± 0.141 |",
        "| mlp | alone | three times as long | 28,800 | 1 | 0.500 | 20.0 | 0.400 |"]
