"""A page to draw on: networks side by side, on what you draw (pip install -e ".[demo]").

    python demo.py                              the shipped models; open the address that it prints
    python demo.py --checkpoint weights/tiny/sd.safetensors \\
        --controlnet runs/reduced_layer/controlnet.safetensors     your student beside the others
    python demo.py --checkpoint sd.safetensors --controlnet canny.safetensors
"""

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from common import cli
from weights import drawings, tiny

CANVAS, BRUSH = 512, 7                # pixels; half as wide as OpenMoji's lines: a radius
MAX_FILE, MAX_PIXELS = "20mb", 2**25  # of an upload; PIL refuses twice as many pixels


def parse(argv: list[str] | None = None) -> Namespace:
    p = cli.Parser(__doc__)
    p.add_argument("--checkpoint", type=Path,
                   help="Stable Diffusion in one file (default: shipped drawings and circles)")
    cli.add_sampling_options(p)
    p.add_argument("--controlnet", nargs="+", default=[], metavar="FILE",
                   help="ControlNet or student files for this --checkpoint")
    p.add_argument("--host", default="127.0.0.1",
                   help="0.0.0.0: to serve others too (default: 127.0.0.1, this machine alone)")
    p.add_argument("--port", type=cli.positive, default=7860, help="(default: 7860)")
    cli.add_device_option(p)
    args = p.parse_args(argv)
    if args.controlnet and not args.checkpoint:  # a file can fit both, and would draw nonsense
        p.error("--controlnet needs the --checkpoint that it was trained for")
    return args


if __name__ == "__main__":  # before PyTorch is imported
    cli.answer(parse)

try:
    import gradio as gr
except ImportError:
    gr = None
from PIL import Image

from common.devices import device, tune
from data.annotators import canny, from_canvas, to_canvas
from data.pictures import read_target, to_image, write_png
from evaluation.side_by_side import Made, Model, at_step, load_model, sample_each
from weights.shipped import examples_beside, networks_beside


@contextmanager
def bad_input_in_one_line() -> Iterator[None]:
    try:
        yield
    except (*cli.BAD_INPUT, *cli.FAILURES) as problem:
        raise gr.Error(" ".join(str(problem).split()), print_exception=False) from None


def captioned(model: Model, made: list[Made], step: int, folder: str) -> list[tuple[str, str]]:
    """Files of the pictures, because gradio would write the same picture again while it is read."""
    for i, m in enumerate(made):
        write_png(f"{folder}/{i}.png", to_image(at_step(model, m, step)))
    return [(f"{folder}/{i}.png", f"{m.name}: {m.milliseconds:.0f} ms") for i, m in enumerate(made)]


def tab(model: Model, examples) -> None:
    """The part of the page for one base model; `examples`: a Dataset, or None."""
    side, networks, steps = model.sd.resolution, list(model.networks), model.sd.sampling.steps

    def example(i: int) -> tuple[Image.Image, str]:
        return to_canvas(examples.condition(i) / 255, CANVAS), examples.prompt(i)

    def edges(photo: str) -> Image.Image:
        with bad_input_in_one_line():
            return to_canvas(canny(read_target(photo, (side, side)) / 255), CANVAS)

    def run(canvas, prompt, names, seed, steps, scale, start, end,
            progress=gr.Progress()):  # noqa: B008
        made, done = [], count(1)
        with bad_input_in_one_line(), TemporaryDirectory() as folder:  # gradio copies from it
            condition = from_canvas(canvas and canvas["composite"], side)
            for m in sample_each(model, names, condition, prompt, seed=seed, steps=steps,
                                 scale=scale, start=start, end=end,
                                 step_done=lambda: progress((next(done), steps * len(names)))):
                made.append(m)
                yield made, captioned(model, made, steps, folder), gr.Slider(1, steps, steps)

    def look_back(made: list[Made] | None, step: int) -> Iterator[list[tuple[str, str]]]:
        with TemporaryDirectory() as folder:
            yield captioned(model, made or [], step, folder)

    with gr.Row():
        with gr.Column(scale=2):
            brush = gr.Brush(BRUSH, colors=["#000000"], color_mode="fixed")
            canvas = gr.Sketchpad(label="Draw", type="pil", image_mode="RGB", format="png",
                                  height=480, layers=False, brush=brush, canvas_size=(CANVAS,) * 2)
            photo = gr.UploadButton("Draw the edges of a photo", file_types=["image"])
            prompts = [(examples.prompt(i), i) for i in range(len(examples or []))]
            chosen = gr.Dropdown(prompts, value=None, label="Draw a held-out example")
            prompt = gr.Textbox(label="Prompt")
        with gr.Column(scale=3):
            names = gr.CheckboxGroup(networks, value=networks[:3], label="Networks")
            with gr.Row():
                settings = [gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80)]
                for label, *numbers, by in (("Steps", 1, 50, steps, 1), ("Scale", 0, 2, 1, 0.05),
                                            ("Start", 0, 1, 0, 0.05), ("End", 0, 1, 1, 0.05)):
                    settings.append(gr.Slider(*numbers, step=by, label=label, min_width=120))
            button = gr.Button("Sample", variant="primary")
            pictures = gr.Gallery(label="Pictures", columns=3, height="auto")
            step = gr.Slider(1, max(2, steps), steps, step=1, label="As they stood after step")
    made = gr.State()
    chosen.input(example, chosen, [canvas, prompt], api_name="example")
    photo.upload(edges, photo, canvas, api_name="edges")
    button.click(run, [canvas, prompt, names, *settings], [made, pictures, step],
                 api_name="sample", concurrency_id="model")
    step.input(look_back, [made, step], pictures, api_name="step", concurrency_id="model",
               trigger_mode="always_last")


def serve(args: Namespace) -> "gr.Blocks":
    """Start to serve the page. Raises ValueError for a wrong file, or without gradio."""
    if gr is None:
        raise ValueError('expected gradio, which is not installed: pip install -e ".[demo]"')
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    shipped, models = {"drawings": drawings.SD, "circles": tiny.SD}, {}
    bases = {args.checkpoint.stem: args.checkpoint} if args.checkpoint else shipped
    for name, path in bases.items():
        networks = networks_beside(path) | {file: file for file in args.controlnet}
        models[name] = load_model(path, networks, device(args.device),
                                  cli.sampling_given(args))
    tune(max(model.sd.resolution for model in models.values()))
    with gr.Blocks(title="Light ControlNets", analytics_enabled=False,
                   delete_cache=(3600, 3600)) as page:  # uploads are deleted after an hour
        for name, model in models.items():
            with gr.Tab(name):
                tab(model, examples_beside(bases[name], model.sd.resolution))
    page.launch(server_name=args.host, server_port=args.port, share=False, max_file_size=MAX_FILE,
                show_error=True, quiet=True, ssr_mode=False, prevent_thread_lock=True)
    print(f"open {page.local_url}", flush=True)
    return page


if __name__ == "__main__":
    sys.exit(cli.run(lambda: serve(parse()).block_thread()))
