"""Bootstrap intervals of figures over cases, by groups (patients)."""

from collections.abc import Sequence

import numpy as np

from bundle.tasks import Task


def with_intervals(task: Task, cases: Sequence[dict], groups: Sequence[str], bootstrap: int, seed: int) -> dict:
    """Compute every figure of a task with its 95 % interval, from `bootstrap` draws of whole groups (patients) of the cases.

    Returns:
        name -> {"value", "ci95": [low, high], "n": number of cases the figure is defined for}. The interval is None without
        draws, and with fewer than two groups. Draws in which a figure is undefined are left out.
    """
    figures, rng = task.figures(cases), np.random.default_rng(seed)
    values = figures(np.ones(len(cases)))
    members = np.unique(groups, return_inverse=True)[1]
    draws = {name: [] for name in values}
    for _ in range(bootstrap if members.max() else 0):
        chosen = rng.integers(members.max() + 1, size=members.max() + 1)
        for name, value in figures(np.bincount(chosen, minlength=members.max() + 1)[members]).items():
            draws[name].append(value)
    report = {}
    for name, value in values.items():
        interval = np.percentile(draws[name], (2.5, 97.5)).tolist() if draws[name] else None
        report[name] = {"value": value, "ci95": interval, "n": sum(task.is_defined(case, name) for case in cases)}
    return report

