"""What `evaluate.py` writes: results.json as tables, and a figure."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from PIL import Image
from torch import Tensor

from data.pictures import grid
from evaluation.protocol import RIGHT, SETTINGS, EvaluationSet

COSTS = {  # column -> entry of a row's costs, unit
    "parameters, M": ("parameters stored", 1e6),
    "fp16, MB": ("bytes in fp16", 1e6),
    "control, 10^6 MACs": ("MACs of the control", 1e6),
    "guided step, ms": ("seconds of a guided step", 1e-3),
}
METRICS = {"FID": 1, "latent distance": 2, "SSIM": 3, "PSNR": 1, "LPIPS": 3}     # each with its digits
FIDELITIES = {"overlap": 3, "color_error": 1, "edge F1": 3}
TITLES = {"PSNR": "PSNR, dB", "color_error": "colour error"}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 and mean(values) != float("inf") else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table: names on the left, numbers to the right."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def markdown(results: Mapping) -> str:
    """The tables of results.json: costs and control, and the pictures against the truth and against the teacher's."""
    networks, protocol = results["networks"], results["protocol"]
    said = [name for name in FIDELITIES if any(row["control fidelity"][RIGHT].get(name) for row in networks.values())]
    lines = [
        f"{protocol['images']} pictures of {protocol['size']} x {protocol['size']} a setting and seed ({protocol['data']}), seeds "
        f"{', '.join(map(str, protocol['seeds']))}: mean ± standard deviation over the seeds; {protocol['steps']} DDIM steps, guidance "
        f"{protocol['guidance']:g}.", "",
        *table(["", *COSTS], [[name, *(_cost(row["costs"].get(key), unit) for key, unit in COSTS.values())] for name, row in networks.items()]),
    ]  # fmt: skip
    for fidelity in said:
        rows = [[name, *(spread(row["control fidelity"][s][fidelity], FIDELITIES[fidelity]) for s in SETTINGS)] for name, row in networks.items()]
        lines += ["", *table([TITLES.get(fidelity, fidelity), *SETTINGS], rows)]
    for reference in ("against the truth", "against the teacher"):
        rows = {name: row[reference] for name, row in networks.items() if row[reference]}
        if rows:
            cells = [[name, *(spread(found[m], digits) if m in found else "n/a" for m, digits in METRICS.items())] for name, found in rows.items()]
            lines += ["", *table([reference, *(TITLES.get(m, m) for m in METRICS)], cells)]
    lines += [f"\n{name} is not available: {reason}." for name, reason in protocol["missing"].items()]
    return "\n".join(lines) + "\n"


def _cost(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.1f}" if value >= 10 * unit else f"{value / unit:.3g}"


def figure(exam: EvaluationSet, pictures: Mapping[str, Mapping[str, Tensor]]) -> Image.Image:
    """Prompt | condition | ground truth | the networks' pictures, by name and setting: four samples with the right prompt, then one in each other setting."""
    rows = []
    for setting, i in [*((RIGHT, i) for i in range(min(4, len(exam.truth)))), *((setting, 0) for setting in SETTINGS if setting != RIGHT)]:
        cells = [f"{setting}: {exam.prompts[setting][i]}", exam.conditions[setting][i], exam.truth[i]]
        rows.append([*cells, *(by_setting[setting][i] for by_setting in pictures.values())])
    return grid(["Prompt", "Condition", "Ground truth", *pictures], rows)
