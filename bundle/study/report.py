"""Tables and figures of an experiment from the figures of its runs."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from scipy.optimize import curve_fit

from bundle.errors import UserError
from bundle.study.experiment import Experiment
from bundle.files import write_text
from bundle.files import write_figure

OUT_OF_REACH = 1000  # times the largest amount of data: a fit that asks for more says that the curve is flat
END = "end"  # stage of the rows that hold what a run has led to


def write_report(experiment: Experiment, rows: Sequence[Mapping[str, str]], folder) -> Path:
    """Write NAME.md of an experiment, and NAME.png unless it has groups.

    Args:
        experiment: whose runs are reported.
        rows: of `bundle.study.Study.rows`.
        folder: where to write.

    Returns:
        Path of NAME.md.

    Raises:
        UserError: if there is no row.
    """
    if not rows:
        raise UserError(f"experiment {experiment.name}: found no result, expected at least one run; run it first")
    folder = Path(folder)
    end = [row for row in rows if row["stage"] == END]
    lines = [f"# {experiment.title}", "", experiment.question, "", *_facts(experiment, end), ""]
    if experiment.groups:
        lines += _groups(experiment, end)
    else:
        lines += _comparison(experiment, rows, end)
        _draw(experiment, end, folder / f"{experiment.name}.png")
    path = folder / f"{experiment.name}.md"
    write_text("\n".join(lines) + "\n", path)
    return path


def _comparison(experiment: Experiment, rows: Sequence[Mapping], end: Sequence[Mapping]) -> list[str]:
    """The tables of arms that are compared with the first, seed by seed, and the picture."""
    note = _interval_note(end)
    split = "Test split" if {row["split"] for row in end} == {"test"} else "Training and validation slices of the source left out"
    lines = [f"{split}, weights of the epoch with the highest validation score; mean over the seeds{note}:", ""]
    lines += [*_table(experiment, lambda arm, figure: _mean(_values(end, arm, figure))), ""]
    if len(experiment.arms) > 1 and not experiment.curve:
        first = next(iter(experiment.arms))
        lines += [f"Difference from “{first}”, seed by seed{note}:", ""]
        lines += [*_table(experiment, lambda arm, figure: _difference(end, arm, first, figure), skip=first), ""]
    lines += [*_stages(experiment, rows), *_curve(experiment, end)]
    return [*lines, f"![{experiment.title}]({experiment.name}.png)"]


def _groups(experiment: Experiment, rows: Sequence[Mapping]) -> list[str]:
    """One figure of each arm of a group, a column for each recipe, and its mean over the group."""
    lines = [
        "Training and validation slices of the source left out, weights of the epoch with the highest validation score; in "
        "brackets the 95 % bootstrap interval over groups (patients), where there is one seed:",
        "",
        f"| left out | figure | {' | '.join(experiment.recipes)} |",
        "|---|---|" + "---|" * len(experiment.recipes),
    ]
    for group in experiment.groups:
        figure = group["figure"]
        cells = {arm: [f"{arm}, {recipe}" for recipe in experiment.recipes] for arm in group["arms"]}
        for arm, names in cells.items():
            lines.append(f"| {arm} | {figure} | {' | '.join(_over_patients(rows, name, figure) for name in names)} |")
        recipes = [[list(_values(rows, name, figure).values()) for name in names] for names in zip(*cells.values())]
        means = [f"{np.mean([np.mean(values) for values in arms]):.3f}" if all(arms) else "-" for arms in recipes]
        lines.append(f"| **{group['title']}**, mean of {len(cells)} | {figure} | {' | '.join(means)} |")
    return lines


def _over_patients(rows: Sequence[Mapping], arm: str, figure: str) -> str:
    """Mean over the seeds; of one seed with its interval over patients."""
    values = _values(rows, arm, figure)
    found = [row for row in rows if row["arm"] == arm and row.get("intervals")]
    interval = json.loads(found[0]["intervals"]).get(figure) if len(values) == len(found) == 1 else None
    edges = " ({:.3f} to {:.3f})".format(*interval) if interval else ""
    return f"{np.mean(list(values.values())):.3f}{edges}" if values else "-"


def mean_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of values and its 95 % interval by Student's t; NaN for the edges with fewer than two values."""
    if len(values) < 2:
        return float(np.mean(values)), np.nan, np.nan
    if np.ptp(values) == 0:
        return (float(np.mean(values)),) * 3
    interval = stats.ttest_1samp(values, 0).confidence_interval()
    return float(np.mean(values)), float(interval.low), float(interval.high)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Fit 1 - y = b x^(-c), the usual form of learning curves (Hestness et al., arXiv 1712.00409) without a floor.

    Args:
        x: amounts of data, positive.
        y: scores below 1.

    Returns:
        (b, c), or None if the fit fails or does not fall (c <= 0).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the covariance cannot be estimated does not matter here
        try:
            (b, c), _ = curve_fit(lambda x, b, c: 1 - b * np.asarray(x) ** -c, x, y, p0=(1.0, 0.1))
        except (RuntimeError, TypeError):
            return None
    return (float(b), float(c)) if c > 0 and b > 0 else None


def _values(rows: Sequence[Mapping], arm: str, figure: str) -> dict[str, float]:
    """Seed -> value."""
    return {row["seed"]: float(row[figure]) for row in rows if row["arm"] == arm and row[figure] != ""}


def _mean(values: Mapping[str, float]) -> str:
    return _cell(list(values.values()), "{:.3f}") if values else "-"


def _difference(rows: Sequence[Mapping], arm: str, first: str, figure: str) -> str:
    ours, theirs = _values(rows, arm, figure), _values(rows, first, figure)
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return _cell(pairs, "{:+.3f}") if pairs else "-"


def _cell(values: Sequence[float], form: str) -> str:
    mean, low, high = mean_with_interval(values)
    return form.format(mean) + ("" if np.isnan(low) else f" ({form.format(low)} to {form.format(high)})")


def _table(experiment: Experiment, cell, skip: str | None = None) -> list[str]:
    names = [name for name in experiment.arms if name != skip]
    lines = ["| | " + " | ".join(experiment.figures) + " |", "|---|" + "---|" * len(experiment.figures)]
    return lines + [f"| {arm} | " + " | ".join(cell(arm, figure) for figure in experiment.figures) + " |" for arm in names]


def _interval_note(rows: Sequence[Mapping]) -> str:
    return " (95 % interval by Student's t)" if len({row["seed"] for row in rows}) > 1 else ", a single one"


def _facts(experiment: Experiment, rows: Sequence[Mapping]) -> list[str]:
    """Command, configs, budget, dates and machines of the runs."""
    (scale,), data = {row["scale"] for row in rows}, sorted({row["data"] for row in rows})
    configs = [f"[{name}.json](../../configs/{name}.json)" for name in (f"experiment_{experiment.name}", f"scale_{scale}")]
    dates, steps = sorted({row["date"] for row in rows}), sorted({int(row["steps"]) for row in rows})
    seconds = sum(int(row["seconds"]) for row in rows)
    times = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    number = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    return [
        f"    python scripts/run_experiments.py {experiment.name} --dataset_dir {' and '.join(data)} --scale {scale}",
        "",
        f"- {' with '.join(configs)}",
        f"- {len(rows)} runs of {number} optimiser steps, {_seeds(rows)}, {seconds / 3600:.1f} hours of wall time (other work "
        f"beside it included; of an interrupted run its last part), {times}",
        *(f"- {machine}" for machine in sorted({row["machine"] for row in rows})),
    ]


def _seeds(rows: Sequence[Mapping]) -> str:
    """Seeds of the runs, and of each arm that lacks some: a mean over others is not to be compared without a word."""

    def listed(seeds: set[int]) -> str:
        return ", ".join(map(str, sorted(seeds)))

    of_arms = defaultdict(set)
    for row in rows:
        of_arms[row["arm"]].add(int(row["seed"]))
    every = set().union(*of_arms.values())
    fewer = "; ".join(f"{arm}: {listed(seeds)}" for arm, seeds in of_arms.items() if seeds != every)
    return f"seeds {listed(every)}" + (f" ({fewer})" if fewer else "")


def _stages(experiment: Experiment, rows: Sequence[Mapping]) -> list[str]:
    """Forgetting: the figures after every stage, mean over the seeds; nothing for experiments without stages."""
    stages = [row for row in rows if row["stage"] != END]
    if not stages:
        return []
    lines = ["Validation split, after each stage, mean over the seeds:", ""]
    lines += ["| | after | " + " | ".join(experiment.figures) + " |", "|---|---|" + "---|" * len(experiment.figures)]
    for arm in experiment.arms:
        for stage in dict.fromkeys(row["stage"] for row in stages if row["arm"] == arm):
            part = [row for row in stages if row["stage"] == stage]
            means = [list(_values(part, arm, figure).values()) for figure in experiment.figures]
            cells = [f"{np.mean(values):.3f}" if values else "-" for values in means]
            lines.append(f"| {arm} | {stage.removeprefix('stage_')} | {' | '.join(cells)} |")
    return [*lines, ""]


def _points(experiment: Experiment, rows: Sequence[Mapping]) -> tuple[list[float], list[float]]:
    figure = experiment.curve["figure"]
    points = [(experiment.curve["x"][row["arm"]], float(row[figure])) for row in rows if row[figure] != ""]
    return [x for x, _ in points], [y for _, y in points]


def _curve(experiment: Experiment, rows: Sequence[Mapping]) -> list[str]:
    if not experiment.curve:
        return []
    figure, label, target = (experiment.curve[name] for name in ("figure", "label", "target"))
    x, y = _points(experiment, rows)
    fit = fit_power_law(x, y)
    if fit is None:
        return [f"No falling power law fits 1 - {figure} over the {label}.", ""]
    b, c = fit
    line = f"Fitted: 1 - {figure} = {b:.3g} n^(-{c:.3g}), n the {label}."
    needed = _needed(fit, target)
    if needed > OUT_OF_REACH * max(x):
        return [f"{line} More than {OUT_OF_REACH} times the largest n would be needed for {target}: flat at this budget.", ""]
    line += f" It reaches {target} at n = {needed:,.0f}"
    needs = _needs_of_seeds(experiment, rows)
    if len(needs) > 1:
        far = f"more than {OUT_OF_REACH} times the largest n"
        least, most = (f"{need:,.0f}" if need <= OUT_OF_REACH * max(x) else far for need in (needs[0], needs[-1]))
        line += f" (fitted seed by seed: {least} to {most})"
    return [f"{line}, {needed / max(x):,.1f} times the largest n that was tried: an extrapolation.", ""]


def _needs_of_seeds(experiment: Experiment, rows: Sequence[Mapping]) -> list[float]:
    """n at which the fit of each seed with all arms reaches the target, sorted; infinite where no falling curve fits."""
    needs = []
    for seed in {row["seed"] for row in rows}:
        x, y = _points(experiment, [row for row in rows if row["seed"] == seed])
        if len(x) == len(experiment.arms):
            fit = fit_power_law(x, y)
            needs.append(_needed(fit, experiment.curve["target"]) if fit else np.inf)
    return sorted(needs)


def _needed(fit: tuple[float, float], target: float) -> float:
    """n at which a fitted power law reaches a target; infinite where that is beyond all numbers."""
    with np.errstate(over="ignore"):
        return float(np.power(fit[0] / (1 - target), 1 / np.float64(fit[1])))


def _draw(experiment: Experiment, rows: Sequence[Mapping], path: Path) -> None:
    columns = [experiment.curve["figure"]] if experiment.curve else list(experiment.figures)
    height = 4.0 if experiment.curve else 1.2 + 0.4 * len(experiment.arms)
    figure = Figure(figsize=(6.5 if experiment.curve else 3 + 2.6 * len(columns), height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(columns), sharey=not experiment.curve))
    if experiment.curve:
        _draw_curve(experiment, rows, axes[0])
    else:
        for axis, column in zip(axes, columns):
            _draw_arms(experiment, rows, axis, column)
    write_figure(figure, path)


def _draw_arms(experiment: Experiment, rows: Sequence[Mapping], axis, column: str) -> None:
    for place, arm in enumerate(experiment.arms):
        values = list(_values(rows, arm, column).values())
        if values:
            mean, low, high = mean_with_interval(values)
            axis.plot(values, [place] * len(values), ".", color="0.6")
            axis.plot([low, high], [place, place], color="C0")
            axis.plot(mean, place, "o", color="C0")
    axis.set(title=column)
    axis.set_yticks(range(len(experiment.arms)), list(experiment.arms))
    axis.set_ylim(len(experiment.arms) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def _draw_curve(experiment: Experiment, rows: Sequence[Mapping], axis) -> None:
    x, y = _points(experiment, rows)
    axis.plot(x, y, "o", color="C0", label="a run")
    if fit := fit_power_law(x, y):
        line = np.geomspace(min(x), 4 * max(x))
        axis.plot(line, 1 - fit[0] * line ** -fit[1], color="C1", label=f"1 - {fit[0]:.2g} n^(-{fit[1]:.2g})")
    axis.axhline(experiment.curve["target"], linestyle=":", color="0.5", label="target")
    axis.set(xscale="log", xlabel=experiment.curve["label"], ylabel=experiment.curve["figure"], ylim=(0, 1))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
