"""What a run has reached, epoch by epoch and stage by stage, as a picture and a table."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from bundle.files import write_figure
from bundle.tasks import TASKS

STAGE_COLUMNS = {title: (name, figure) for name, task in TASKS.items() for title, figure in task.columns.items()}


def stage_table(reports: Mapping[str, Mapping]) -> str:
    """Markdown table "task metric after each stage" from the report of each stage; "-" where there is no figure."""
    lines = ["| after stage (validation split) | " + " | ".join(STAGE_COLUMNS) + " |", "|---|" + "---:|" * len(STAGE_COLUMNS)]
    for stage, report in reports.items():
        figures = [report.get(task, {}).get(name) for task, name in STAGE_COLUMNS.values()]
        cells = [f"{figure['value']:.3f}" if figure else "-" for figure in figures]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_curves(history: Sequence[Mapping[str, float]], path) -> None:
    """Draw losses (left) and validation metrics in [0, 1] (right) by epoch, as a PNG."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    losses, metrics = figure.subplots(1, 2)
    shown = {"score"} | {f"{task}_{name}" for task, name in STAGE_COLUMNS.values()}
    names = list(dict.fromkeys(name for entry in history for name in entry))
    for name in names:
        axis = losses if name.startswith("loss") else metrics if name in shown else None
        if axis is not None:
            points = [(entry["epoch"], entry[name]) for entry in history if name in entry]
            axis.plot(*zip(*points), label=name, marker="." if len(points) < 30 else None)
    # With `uncertainty_weights` a loss may be below 0.
    positive = all(entry[name] > 0 for entry in history for name in entry if name.startswith("loss"))
    losses.set(title="training loss", xlabel="epoch", yscale="log" if positive else "linear")
    metrics.set(title="validation", xlabel="epoch", ylim=(0, 1))
    for axis in (losses, metrics):
        if axis.lines:
            axis.legend(fontsize=7)
    write_figure(figure, path)
