"""Tables and figures of an experiment from the figures of its runs."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from bundle.errors import UserError
from bundle.files import write_figure, write_text
from bundle.study.experiment import Experiment

OUT_OF_REACH = 1000  # times the largest amount of data: a fit that asks for more says that the curve is flat
END = "end"  # stage of the rows that hold what a run has led to
BEST = "weights of the epoch with the highest validation score"


def write_report(experiment: Experiment, rows: Sequence[Mapping[str, str]], folder) -> Path:
    """Write NAME.md of an experiment with `rows` of `bundle.study.Study.rows`, and NAME.png unless it has groups."""
    if not rows:
        raise UserError(f"experiment {experiment.name}: found no result, expected at least one run; run it first")
    path, end = Path(folder) / f"{experiment.name}.md", [row for row in rows if row["stage"] == END]
    lines = [f"# {experiment.title}", "", experiment.question, "", *_facts(experiment, end), ""]
    if experiment.groups:
        lines += _groups(experiment, end)
    else:
        lines += _comparison(experiment, rows, end)
        write_figure(_picture(experiment, end), path.with_suffix(".png"))
    write_text("\n".join(lines) + "\n", path)
    return path


def mean_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of values and its 95 % interval by Student's t; NaN for the edges with fewer than two values."""
    if len(values) < 2:
        return float(np.mean(values)), np.nan, np.nan
    if np.ptp(values) == 0:
        return (float(np.mean(values)),) * 3
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    return float(np.mean(values)), float(interval.low), float(interval.high)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Fit 1 - y = b x^(-c), the usual form of learning curves (Hestness et al., arXiv 1712.00409), as a line in logarithms.

    Gives (b, c), or None if the curve does not fall (c <= 0) or there are no two amounts x; scores y are below 1.
    """
    if len(set(x)) < 2:
        return None
    slope, intercept = np.polyfit(np.log(x), np.log(1 - np.asarray(y)), 1)
    return (float(np.exp(intercept)), float(-slope)) if slope < 0 else None


def _values(rows: Iterable[Mapping], arm: str, figure: str) -> dict[str, float]:
    """Seed -> value."""
    return {row["seed"]: float(row[figure]) for row in rows if row["arm"] == arm and row[figure] != ""}


def _mean(values: Iterable[float]) -> str:
    return f"{np.mean(values):.3f}" if (values := list(values)) else "-"


def _cell(values: Iterable[float], form: str = "{:.3f}") -> str:
    """Mean and interval over the seeds."""
    if not (values := list(values)):
        return "-"
    mean, low, high = mean_with_interval(values)
    return form.format(mean) + ("" if np.isnan(low) else f" ({form.format(low)} to {form.format(high)})")


def _table(rows: Mapping[str, Iterable[str]], *columns: str) -> list[str]:
    lines = [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|"]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()), ""]


def _facts(experiment: Experiment, rows: Sequence[Mapping]) -> list[str]:
    """Command, configs, budget, dates and machines of the runs."""
    (scale,), data = {row["scale"] for row in rows}, sorted({row["data"] for row in rows})
    configs = [f"[{name}.json](../../configs/{name}.json)" for name in (f"experiment_{experiment.name}", "scales")]
    dates, steps = sorted({row["date"] for row in rows}), sorted({int(row["steps"]) for row in rows})
    seconds = sum(int(row["seconds"]) for row in rows)
    return [
        f"    python scripts/run_experiments.py {experiment.name} --dataset_dir {' and '.join(data)} --scale {scale}",
        "",
        f"- {' with '.join(configs)}",
        f"- {len(rows)} runs of {_range(steps)} optimiser steps, {_seeds(rows)}, {seconds / 3600:.1f} hours of wall time (other "
        f"work beside it included; of an interrupted run its last part), {_range(dates)}",
        *(f"- {machine}" for machine in sorted({row["machine"] for row in rows})),
    ]


def _range(values: Sequence) -> str:
    return f"{values[0]} to {values[-1]}" if len(values) > 1 else str(values[0])


def _seeds(rows: Sequence[Mapping]) -> str:
    """Seeds of the runs, and of each arm that lacks some, whose mean cannot be compared as it is."""
    of_arms = defaultdict(set)
    for row in rows:
        of_arms[row["arm"]].add(int(row["seed"]))
    listed = {arm: ", ".join(map(str, sorted(seeds))) for arm, seeds in of_arms.items()}
    every = ", ".join(map(str, sorted(set().union(*of_arms.values()))))
    fewer = "; ".join(f"{arm}: {seeds}" for arm, seeds in listed.items() if seeds != every)
    return f"seeds {every}" + (f" ({fewer})" if fewer else "")


def _comparison(experiment: Experiment, rows: Sequence[Mapping], end: Sequence[Mapping]) -> list[str]:
    """The tables of arms that are compared with the first, seed by seed, and after each stage."""
    first, *others = experiment.arms
    note = " (95 % interval by Student's t)" if len({row["seed"] for row in end}) > 1 else ", a single one"
    split = "Test split" if {row["split"] for row in end} == {"test"} else "Training and validation slices of the source left out"

    def cells(arm: str, cell: Callable[[str, str], str]) -> list[str]:
        return [cell(arm, figure) for figure in experiment.figures]

    def difference(arm: str, figure: str) -> str:
        ours, theirs = _values(end, arm, figure), _values(end, first, figure)
        return _cell([ours[seed] - theirs[seed] for seed in ours if seed in theirs], "{:+.3f}")

    means = {arm: cells(arm, lambda arm, figure: _cell(_values(end, arm, figure).values())) for arm in experiment.arms}
    lines = [f"{split}, {BEST}; mean over the seeds{note}:", "", *_table(means, "", *experiment.figures)]
    if others and not experiment.curve:
        lines += [f"Difference from “{first}”, seed by seed{note}:", ""]
        lines += _table({arm: cells(arm, difference) for arm in others}, "", *experiment.figures)
    if stages := _stages(experiment, rows):
        lines += ["Validation split, after each stage, mean over the seeds:", ""]
        lines += _table(stages, "", "after", *experiment.figures)
    lines += _curve(experiment, end) if experiment.curve else []
    return [*lines, f"![{experiment.title}]({experiment.name}.png)"]


def _stages(experiment: Experiment, rows: Iterable[Mapping]) -> dict[str, list[str]]:
    """Mean figures of every arm after each of its stages; what a stage forgets is seen here."""
    stages = {}
    for row in sorted((row for row in rows if row["stage"] != END), key=lambda row: list(experiment.arms).index(row["arm"])):
        stages.setdefault((row["arm"], row["stage"]), []).append(row)
    return {
        f"{arm} | {stage.removeprefix('stage_')}": [_mean(_values(part, arm, figure).values()) for figure in experiment.figures]
        for (arm, stage), part in stages.items()
    }


def _groups(experiment: Experiment, rows: Sequence[Mapping]) -> list[str]:
    """One figure of each arm of a group, a column for each recipe, and its mean over the group."""
    table = {}
    for group in experiment.groups:
        figure, found = group["figure"], []
        for arm in group["arms"]:
            names = [f"{arm}, {recipe}" for recipe in experiment.recipes]
            table[f"{arm} | {figure}"] = [_over_patients(rows, name, figure) for name in names]
            found.append([np.mean([*_values(rows, name, figure).values()] or np.nan) for name in names])
        means = [_mean(column) if np.isfinite(column).all() else "-" for column in np.transpose(found)]
        table[f"**{group['title']}**, mean of {len(found)} | {figure}"] = means
    where = "Training and validation slices of the source left out"
    return [
        f"{where}, {BEST}; in brackets the 95 % bootstrap interval over groups (patients), where there is one seed:",
        "",
        *_table(table, "left out", "figure", *experiment.recipes)[:-1],
    ]


def _over_patients(rows: Sequence[Mapping], arm: str, figure: str) -> str:
    """Mean over the seeds; of one seed with its interval over patients."""
    values = _values(rows, arm, figure)
    found = [row for row in rows if row["arm"] == arm and row.get("intervals")]
    interval = json.loads(found[0]["intervals"]).get(figure) if len(values) == len(found) == 1 else None
    return _mean(values.values()) + (" ({:.3f} to {:.3f})".format(*interval) if interval else "")


def _points(experiment: Experiment, rows: Iterable[Mapping]) -> tuple[list[float], list[float]]:
    figure = experiment.curve["figure"]
    points = [(experiment.curve["x"][row["arm"]], float(row[figure])) for row in rows if row[figure] != ""]
    return [x for x, _ in points], [y for _, y in points]


def _curve(experiment: Experiment, rows: Sequence[Mapping]) -> list[str]:
    """What a power law says of the amount of data that the target needs; by seed for those that have all arms."""
    figure, label, target = (experiment.curve[name] for name in ("figure", "label", "target"))
    x, y = _points(experiment, rows)
    limit = OUT_OF_REACH * max(x)
    if (fit := fit_power_law(x, y)) is None:
        return [f"No falling power law fits 1 - {figure} over the {label}.", ""]
    line = f"Fitted: 1 - {figure} = {fit[0]:.3g} n^(-{fit[1]:.3g}), n the {label}."
    if (needed := _needed(fit, target)) > limit:
        return [f"{line} More than {OUT_OF_REACH} times the largest n would be needed for {target}: flat at this budget.", ""]
    seeds = [_points(experiment, [row for row in rows if row["seed"] == seed]) for seed in {row["seed"] for row in rows}]
    needs = sorted(_needed(fit_power_law(*points), target) for points in seeds if len(points[0]) == len(experiment.arms))
    line += f" It reaches {target} at n = {needed:,.0f}"
    if len(needs) > 1:
        edges = [f"{n:,.0f}" if n <= limit else f"more than {OUT_OF_REACH} times the largest n" for n in (needs[0], needs[-1])]
        line += f" (fitted seed by seed: {' to '.join(edges)})"
    return [f"{line}, {needed / max(x):,.1f} times the largest n that was tried: an extrapolation.", ""]


def _needed(fit: tuple[float, float] | None, target: float) -> float:
    """n at which a fitted power law reaches a target; infinite where there is none, or it is beyond all numbers."""
    with np.errstate(over="ignore"):
        return float(np.power(fit[0] / (1 - target), 1 / np.float64(fit[1]))) if fit else np.inf


def _picture(experiment: Experiment, rows: Sequence[Mapping]) -> Figure:
    if experiment.curve:
        return _draw_curve(experiment, rows)
    size = 3 + 2.6 * len(experiment.figures), 1.2 + 0.4 * len(experiment.arms)
    figure = Figure(figsize=size, layout="constrained")
    for axis, column in zip(figure.subplots(1, len(experiment.figures), sharey=True, squeeze=False)[0], experiment.figures):
        for place, arm in enumerate(experiment.arms):
            if values := list(_values(rows, arm, column).values()):
                mean, low, high = mean_with_interval(values)
                axis.plot(values, [place] * len(values), ".", color="0.6")
                axis.plot([low, high], [place, place], color="C0")
                axis.plot(mean, place, "o", color="C0")
        axis.set(title=column, ylim=(len(experiment.arms) - 0.5, -0.5))
        axis.set_yticks(range(len(experiment.arms)), list(experiment.arms))
        axis.grid(axis="x", alpha=0.3)
    return figure


def _draw_curve(experiment: Experiment, rows: Sequence[Mapping]) -> Figure:
    figure, (x, y) = Figure(figsize=(6.5, 4.0), layout="constrained"), _points(experiment, rows)
    axis = figure.subplots()
    axis.plot(x, y, "o", color="C0", label="a run")
    if fit := fit_power_law(x, y):
        line = np.geomspace(min(x), 4 * max(x))
        axis.plot(line, 1 - fit[0] * line ** -fit[1], color="C1", label=f"1 - {fit[0]:.2g} n^(-{fit[1]:.2g})")
    axis.axhline(experiment.curve["target"], linestyle=":", color="0.5", label="target")
    axis.set(xscale="log", xlabel=experiment.curve["label"], ylabel=experiment.curve["figure"], ylim=(0, 1))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
