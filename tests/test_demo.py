"""The page to draw on: what it samples is what sample.py does, and it serves nobody else."""

import socket

import pytest
import torch
from PIL import Image

import demo
from data.annotators import from_canvas, to_canvas
from data.circles import HELD_OUT, Circles
from data.pictures import read_picture, to_image, write_png
from evaluation.side_by_side import NO_CONTROL, at_step, load_model, sample_each
from weights import drawings, tiny
from weights.shipped import examples_beside, networks_beside

CONTROLNET = "ControlNet, 3.78 M"


@pytest.fixture(scope="module")
def model():
    return load_model(tiny.SD, {"ControlNet": tiny.CONTROLNET}, torch.device("cpu"))


@pytest.fixture(scope="module")
def circle():
    return Circles(64, 1, first=HELD_OUT)[0]


def as_on_paper(condition: torch.Tensor) -> Image.Image:
    return to_canvas(condition, demo.CANVAS)


def test_a_canvas_gives_back_the_condition_that_was_put_on_it(circle):
    canvas = as_on_paper(circle["condition"])
    assert canvas.size == (512, 512) and canvas.getpixel((0, 0)) == (255, 255, 255)
    assert torch.allclose(from_canvas(canvas, 64), circle["condition"], atol=0.5 / 255)


@pytest.mark.parametrize("canvas", [None, Image.new("RGB", (512, 512), "white")])
def test_an_empty_canvas_is_refused(canvas):
    with pytest.raises(ValueError, match="expected a drawing, the canvas is empty"):
        from_canvas(canvas, 64)


def test_a_shipped_base_has_its_own_networks_and_another_file_has_none(tmp_path):
    assert networks_beside(drawings.SD)["ControlNet"] == drawings.CONTROLNET
    assert networks_beside(tiny.SD)["lite"] == tiny.STUDENTS / "lite.safetensors"
    assert networks_beside(tmp_path / "sd.safetensors") == {}
    assert examples_beside(tmp_path / "sd.safetensors", 64) is None
    assert examples_beside(tiny.SD, 64).prompt(0) == Circles(64, 1, first=HELD_OUT).prompt(0)
    assert len(examples_beside(drawings.SD, 128)) == 222


def test_each_network_makes_the_picture_that_the_command_line_makes(model, circle, tmp_path):
    import sample

    write_png(tmp_path / "condition.png", to_image(circle["condition"]))
    arguments = ["--condition", str(tmp_path / "condition.png"), "--prompt", circle["prompt"],
                 "--seed", "5", "--steps", "3", "--scale", "0.5", "--device", "cpu"]
    condition, done = read_picture(tmp_path / "condition.png"), []
    made = list(sample_each(model, [NO_CONTROL, CONTROLNET], condition, circle["prompt"], seed=5,
                            steps=3, scale=0.5, step_done=lambda: done.append(1)))
    assert len(done) == 6 and all(m.milliseconds > 0 for m in made)
    for m, controlnet in zip(made, ["none", str(tiny.CONTROLNET)], strict=True):
        out = tmp_path / "out.png"
        sample.main([*arguments, "--controlnet", controlnet, "--out", str(out)])
        assert to_image(m.picture).tobytes() == to_image(read_picture(out)).tobytes()


def test_the_steps_of_a_picture_approach_it(model, circle):
    made, = sample_each(model, [CONTROLNET], circle["condition"], circle["prompt"], seed=0, steps=4)
    distances = [(at_step(model, made, step) - made.picture).abs().mean() for step in range(1, 5)]
    assert distances[0] > 0.05 and distances[0] > distances[2] > distances[3] == 0


@pytest.mark.parametrize("names, start, message", [
    ([], 0.0, "expected a network"), ([CONTROLNET], 1.0, "expected the control to start before"),
])
def test_nothing_to_do_is_refused(model, circle, names, start, message):
    with pytest.raises(ValueError, match=message):
        next(sample_each(model, names, circle["condition"], "", seed=0, steps=1, start=start))


def test_a_network_without_the_base_it_was_trained_for_is_refused(capsys):
    with pytest.raises(SystemExit):  # a circles' student fits the drawings too
        demo.parse(["--controlnet", "runs/lite/controlnet.safetensors"])
    assert "needs the --checkpoint that it was trained for" in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo, "gr", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[demo\]"'):
        demo.serve(demo.parse([]))


# --- Served ---


@pytest.fixture(scope="module")
def client():
    """A client of the page for circles, served as a user's is."""
    pytest.importorskip("gradio", reason='the page needs gradio: pip install -e ".[demo]"')
    from gradio_client import Client

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = demo.serve(demo.parse(["--checkpoint", str(tiny.SD), "--port", str(port), "--device",
                                  "cpu"]))
    yield Client(page.local_url, verbose=False)
    page.close()


def drawn(path) -> dict:
    from gradio_client import handle_file

    return {"background": None, "layers": [], "composite": handle_file(str(path))}



def test_the_page_samples_and_goes_back_through_the_steps(client, circle, tmp_path):
    as_on_paper(circle["condition"]).save(tmp_path / "canvas.png")
    pictures, step = client.predict(drawn(tmp_path / "canvas.png"), circle["prompt"],
                                    [NO_CONTROL, CONTROLNET], 5, 2, 1, 0, 1, api_name="/sample")
    assert [p["caption"].split(":")[0] for p in pictures] == [NO_CONTROL, CONTROLNET]
    assert step["maximum"] == step["value"] == 2
    earlier = client.predict(1, api_name="/step")
    last, first = (read_picture(made[1]["image"]) for made in (pictures, earlier))
    assert last.shape == first.shape == (3, 64, 64) and (last - first).abs().mean() > 0.002


def test_the_page_draws_a_held_out_example(client):
    canvas, prompt = client.predict(0, api_name="/example")
    assert prompt == Circles(64, 1, first=HELD_OUT).prompt(0)
    assert (read_picture(canvas["composite"]) < 0.5).any()


def test_the_page_says_in_one_line_what_is_wrong(client, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    text, blank = tmp_path / "photo.png", tmp_path / "blank.png"
    text.write_text("no picture")
    Image.new("RGB", (8, 8), "white").save(blank)
    with pytest.raises(AppError, match="^expected a picture, .*photo.png is not one"):
        client.predict(handle_file(str(text)), api_name="/edges")
    for names, start, message in (([CONTROLNET], 0, "^expected a drawing"),
                                  ([], 0, "^expected a drawing"), (["nonsense"], 0, "^Value: ")):
        with pytest.raises(AppError, match=message):
            client.predict(drawn(blank), "", names, 0, 2, 1, start, 1, api_name="/sample")


def test_the_page_is_for_this_machine_alone_and_takes_no_large_file(client, tmp_path):
    assert client.src.startswith("http://127.0.0.1:")
    from gradio_client import handle_file

    large = tmp_path / "large.png"
    large.write_bytes(bytes(21_000_000))
    with pytest.raises(Exception, match="[Mm]ax"):
        client.predict(handle_file(str(large)), api_name="/edges")
