"""The results of `benchmarks.distillation`: results.json as a table and two plots."""

from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.distillation_recipes import CIRCLES, DRAWINGS, VARIANTS, Experiment
from evaluation.report import spread, table
from kd import STUDENTS

BASE, TEACHER = "base", "teacher"
LOWEST = {CIRCLES.measure: 0.75, DRAWINGS.measure: 0.4}  # on the axis of the plot by size

# A row of results.json: one network's pictures, parameters, control fidelity and, of a training,
# its curve: lists of images seen, seconds and control fidelity.
Row = dict


def goal_reached(row: Row, goal: float) -> tuple[float, float] | None:
    """Images and seconds after which a training first has this control fidelity; None if never."""
    points = zip(*row["curve"].values(), strict=True)
    return next(((images, seconds) for images, seconds, value in points if value >= goal), None)


def grouped(rows: dict[str, Row]) -> dict[tuple[str, str], list[Row]]:
    """(student, variant) -> one row per seed, in the order of STUDENTS and VARIANTS."""
    groups = {}
    for student in STUDENTS:
        for variant in VARIANTS:
            group = [row for name, row in rows.items() if name.startswith(f"{variant}-{student}-")]
            if group:
                groups[student, variant] = group
    return groups


def markdown(results: dict, experiment: Experiment = CIRCLES) -> str:
    """Mean and standard deviation over the seeds, and where 90 % of the teacher's control fidelity
    was first reached."""
    measure = experiment.measure
    teacher = results["others"][TEACHER]
    goal = 0.9 * teacher["along a training"][measure]
    head = ["", "trained", "parameters, M", "seeds", measure, "of the teacher's", "colour error",
            "empty prompt", f"images to {goal:.2f}", f"seconds to {goal:.2f}"]
    groups = {(name, ""): [row] for name, row in results["others"].items()}
    cells = []
    for (student, variant), group in (groups | grouped(results["rows"])).items():
        values = [row["right prompt"][measure] for row in group]
        share = mean(values) / teacher["right prompt"][measure]
        color_error = mean(row["right prompt"]["color_error"] for row in group)
        without_prompt = spread([row["empty prompt"][measure] for row in group])
        parameters = group[0]["parameters"]
        cells.append([
            student, variant, f"{parameters / 1e6:.2f}" if parameters else "-",
            str(len(group)) if variant else "-", spread(values), f"{share:.1%}",
            f"{color_error:.1f}", without_prompt, *time_cells(group, goal)])
    caption = (
        f"{results['images']:,} pictures per training, drawn from {experiment.pool}, in batches of "
        f"{experiment.batch_size}; "
        f"{measure} and colour error on {results['pictures']} held-out "
        f"{'drawings' if experiment.data else 'circles'}, mean ± standard "
        "deviation over seeds. The last two columns: when a training first had 90 % of the "
        f"teacher's {measure}, both measured on {experiment.point_pictures} of them with "
        f"{experiment.point_steps} steps.")
    return "\n".join([caption, "", *table(head, cells)]) + "\n"


def time_cells(group: list[Row], goal: float) -> list[str]:
    """Mean images and seconds to the goal."""
    times = [goal_reached(row, goal) for row in group if "curve" in row]
    if not times:
        return ["-", "-"]
    if None in times:
        return ["never", "never"]
    return [f"{mean(column):,.0f}" for column in zip(*times, strict=True)]


def plot_curves(results: dict, experiment: Experiment) -> Figure:
    """Control fidelity against images seen: a panel for each student, a colour for each variant."""
    groups, measure = grouped(results["rows"]), experiment.measure
    students = [student for student in STUDENTS if any(student == key[0] for key in groups)]
    height = -(-len(students) // 4)
    figure = Figure(figsize=(12, 2.6 * height), layout="constrained")
    panels = figure.subplots(height, 4, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, student in zip(panels[: len(students)], students, strict=True):
        for i, variant in enumerate(VARIANTS):
            for row in groups.get((student, variant), []):
                curve = row["curve"]
                axes.plot(curve["images"], curve[measure], color=f"C{i}", linewidth=1)
        teacher = results["others"][TEACHER]["along a training"][measure]
        axes.axhline(teacher, color="black", linewidth=0.7, linestyle=":")
        axes.set_title(student, fontsize=9)
        axes.set_ylim(0.3, 1)
        axes.tick_params(labelsize=7, labelbottom=True, labelleft=True)
        axes.set_xlabel("images seen", fontsize=7)
        axes.set_ylabel(measure, fontsize=7)
    for axes in panels[len(students) :]:
        axes.remove()
    add_legend(figure, panels[0], groups)
    return figure


def plot_sizes(results: dict, experiment: Experiment) -> Figure:
    """Control fidelity at the end against size: a point per student, a colour per variant, with the
    standard deviation over the seeds."""
    groups, measure = grouped(results["rows"]), experiment.measure
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (_, variant), group in groups.items():
        values = [row["right prompt"][measure] for row in group]
        deviation = stdev(values) if len(values) > 1 else 0
        axes.errorbar(group[0]["parameters"] / 1e6, mean(values), deviation, fmt="o",
                      markersize=4, color=f"C{VARIANTS.index(variant)}")
    label_students(axes, groups, measure)
    teacher = results["others"][TEACHER]["right prompt"][measure]
    axes.axhline(teacher, color="black", linewidth=0.7, linestyle=":")
    axes.set_xlabel("million parameters (dotted: the teacher)", fontsize=8)
    axes.set_xscale("log")
    ticks = [0.25, 0.5, 1, 2, 4]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(0.1, 0.15)
    axes.set_ylim(bottom=LOWEST[measure] - 0.03)
    axes.set_ylabel(f"{measure} with the right prompt", fontsize=8)
    axes.tick_params(labelsize=7)
    add_legend(figure, axes, groups)
    return figure


def label_students(axes: Axes, groups: dict[tuple[str, str], list[Row]], measure: str) -> None:
    """Names above and, every other one, below the points, so that those of equal size do not
    collide."""
    parameters = {student: group[0]["parameters"] / 1e6 for (student, _), group in groups.items()}
    for i, student in enumerate(sorted(parameters, key=parameters.get)):
        values = [row["right prompt"][measure] for key, group in groups.items()
                    if key[0] == student for row in group]
        y, offset, alignment = max(values), 6, "bottom"
        if i % 2:
            y, offset, alignment = max(LOWEST[measure], min(values)), -6, "top"
        axes.annotate(student, (parameters[student], y), (0, offset), textcoords="offset points",
                      ha="center", va=alignment, fontsize=7)


def add_legend(figure: Figure, axes: Axes, groups: dict[tuple[str, str], list[Row]]) -> None:
    variants = [variant for variant in VARIANTS if any(variant == key[1] for key in groups)]
    lines = [axes.plot([], [], color=f"C{VARIANTS.index(variant)}")[0] for variant in variants]
    figure.legend(lines, variants, loc="outside upper center", ncols=len(variants), fontsize=8)
