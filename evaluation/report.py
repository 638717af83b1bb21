"""What `evaluate.py` writes: results.json as tables, and a figure."""

from collections.abc import Mapping, Sequence
from math import isinf
from statistics import mean, stdev

from PIL import Image
from torch import Tensor

from data.grids import grid
from evaluation.protocol import AUTOMATIC, SETTINGS, EvaluationSet

COSTS = {  # column -> key in a network's costs, unit
    "parameters, M": ("parameters stored", 1e6),
    "fp16, MB": ("bytes in fp16", 1e6),
    "control, 10^6 MACs": ("MACs of the control", 1e6),
    "guided step, ms": ("seconds of a guided step", 1e-3),
}
METRICS = {"FID": 1, "latent distance": 2, "SSIM": 3, "PSNR": 1, "LPIPS": 3}  # -> digits
FIDELITIES = {"overlap": 3, "line F1": 3, "edge F1": 3, "pose F1": 3, "depth RMSE": 3,
              "normal RMSE": 3, "color_error": 1, "named_color_error": 1}     # -> digits
TITLES = {"PSNR": "PSNR, dB", "color_error": "colour error",
          "named_color_error": "error of the named colours"}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1 and not isinf(mean(values)):
        text += f" ± {stdev(values):.{digits}f}"
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table: names on the left, numbers to the right."""
    alignment = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, alignment, *rows)]


def markdown(results: Mapping) -> str:
    """The tables of results.json: costs, control fidelity, distance to truth and to teacher."""
    networks, protocol = results["networks"], results["protocol"]
    measured = results["bounds"] | networks
    size, seeds = protocol["size"], ", ".join(map(str, protocol["seeds"]))
    width, height = protocol.get("width", size), protocol.get("height", size)
    costs = [[name, *(_cost(result["costs"].get(key), unit) for key, unit in COSTS.values())]
             for name, result in networks.items()]
    prompts = "".join(f", {name.replace('_', ' ')} {protocol[name]!r}"
                      for name in ("prompt_setting", "prompt_suffix") if name in protocol)
    lines = [
        f"{protocol['images']} pictures of {width} x {height} per setting and seed "
        f"({protocol['data']}), seeds {seeds}: mean ± standard deviation over the seeds; "
        f"{protocol['steps']} DDIM steps, guidance {protocol['guidance']:g}{prompts}."
        + f" Work and time are those of {size} x {size}." * (width != height),
        "", *table(["", *COSTS], costs)]
    for measure, digits in FIDELITIES.items():
        fidelities = {name: result["control fidelity"] for name, result in measured.items()}
        lines += spread_table(TITLES.get(measure, measure), {
            name: {setting: (values.get(measure), digits) for setting, values in by_setting.items()}
            for name, by_setting in fidelities.items()}, [*SETTINGS, AUTOMATIC])
    for reference in ("against the truth", "against the teacher"):
        lines += spread_table(reference, {
            name: {TITLES.get(metric, metric): (result[reference].get(metric), digits)
                   for metric, digits in METRICS.items()}
            for name, result in measured.items() if result.get(reference)},
            [TITLES.get(metric, metric) for metric in METRICS])
    lines += [f"\n{metric} is not available: {reason}."
              for metric, reason in protocol["missing"].items()]
    return "\n".join(lines) + "\n"


def spread_table(title: str, rows: Mapping[str, Mapping[str, tuple]],
                 columns: Sequence[str]) -> list[str]:
    """Of each cell's values over the seeds (None: there are none) and digits; without the columns
    that no row has values in, and nothing at all without any."""
    filled = [c for c in columns if any(row.get(c, (None,))[0] for row in rows.values())]
    cells = [[name, *(spread(*row[c]) if row.get(c, (None,))[0] else "-" for c in filled)]
             for name, row in rows.items()]
    return ["", *table([title, *filled], cells)] if filled else []


def _cost(value: float | None, unit: float) -> str:
    if value is None:
        return "-"
    return f"{value / unit:,.1f}" if value >= 10 * unit else f"{value / unit:.3g}"


def figure(samples: EvaluationSet, pictures: Mapping[str, Mapping[str, Tensor]]) -> Image.Image:
    """Four samples in the first setting, one in each other; a column for each network."""
    first, *others = samples.settings
    cells = [(first, i) for i in range(min(4, len(samples.truth)))]
    cells += [(setting, 0) for setting in others]
    rows = [[f"{setting}: {samples.prompts[setting][i]}", samples.conditions[setting][i],
             samples.truth[i], *(by_setting[setting][i] for by_setting in pictures.values())]
            for setting, i in cells]
    return grid(["Prompt", "Condition", "Ground truth", *pictures], rows)
