"""The handler that collects cases during an evaluation and reports at its end."""

import logging
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import ignite.distributed as idist
import numpy as np
from ignite.engine import Events
from monai.utils.enums import CommonKeys

from bundle.files import log_artifacts, write_figure, write_json, write_table
from bundle.names import ANNOTATED, GROUP, IMAGE, RECORD, SOURCE
from bundle.tasks import Task

logger = logging.getLogger(__name__)


class MultiTaskMetrics:
    """Handler of MONAI's SupervisedEvaluator for the metrics of all tasks.

    After the epoch `engine.state.metrics` holds the figures as floats named TASK_FIGURE, and "score", the mean over the tasks
    of their `headline` figures (a task that needs no annotation counts only where it is alone); `report` holds them nested,
    with intervals. A task without annotated sample has no figure.

    Args:
        bootstrap: draws for the 95 % intervals over groups; 0 for none.
        output_dir: where metrics.json (written last), per_case.csv and figures go; None writes nothing and skips slow figures.
    """

    def __init__(self, tasks: Sequence[Task], bootstrap: int = 0, output_dir=None, seed: int = 0) -> None:
        self.tasks, self.bootstrap, self.seed = list(tasks), bootstrap, seed
        self.folder = None if output_dir is None else Path(output_dir)
        self.rows, self.report = [], {}

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.compute)

    def reset(self, engine) -> None:
        self.rows = []

    def update(self, engine) -> None:
        label, pred = engine.state.output[CommonKeys.LABEL], engine.state.output[CommonKeys.PRED]
        rows = [{RECORD: record} for record in label[RECORD]]
        for task in (task for task in self.tasks if task.name in pred):
            cases = task.cases(pred[task.name], label, thorough=self.folder is not None)
            for row, case, annotated in zip(rows, cases, label[ANNOTATED][task.name].tolist()):
                if annotated and case:
                    row[task.name] = case
        self.rows += rows

    def compute(self, engine) -> None:
        if idist.get_world_size() > 1:
            # Process r has had every n-th record beginning with the r-th: see `bundle.training.distributed.shard`.
            turns = zip_longest(*idist.all_gather(self.rows))
            self.rows = [row for turn in turns for row in turn if row is not None]
        self.report = {}
        for task in self.tasks:
            if rows := [row for row in self.rows if task.name in row]:
                sources = sorted({row[RECORD][SOURCE] for row in rows})
                parts = [[row for row in rows if row[RECORD][SOURCE] == source] for source in sources]
                report = self._figures(task, rows)
                within = [self._figures(task, part) for part in parts] if len(parts) > 1 else [report]
                self.report[task.name] = {**report, "within_source": dict(zip(sources, within))}
        engine.state.metrics.update(self._flat())
        if self.folder is not None and idist.get_rank() == 0:
            self._write()
            log_artifacts(engine, [self.folder / "metrics.json", *sorted(self.folder.glob("*.png"))])

    def _figures(self, task: Task, rows: Sequence[dict]) -> dict:
        cases = task.comparable([row[task.name] for row in rows], [row[RECORD][SOURCE] for row in rows])
        groups = [row[RECORD][GROUP] for row in rows]
        return task.finish(with_intervals(task, cases, groups, self.bootstrap, self.seed), cases)

    def _flat(self) -> dict[str, float]:
        figures = [(f"{task}_{name}", figure) for task, report in self.report.items() for name, figure in report.items()]
        flat = {name: figure["value"] for name, figure in figures if "value" in figure}
        measured = [task for task in self.tasks if task.name in self.report]
        scored = [task for task in measured if task.field is not None] or measured
        parts = [[flat[key] for name in task.headline if (key := f"{task.name}_{name}") in flat] for task in scored]
        means = [np.mean(part) for part in parts if part]
        return {**flat, "score": float(np.mean(means))} if means else flat

    def _write(self) -> None:
        lines = [{key: row[RECORD][key] for key in (IMAGE, GROUP, SOURCE)} for row in self.rows]
        for task in (task for task in self.tasks if task.name in self.report):
            rows = [(row, line) for row, line in zip(self.rows, lines) if task.name in row]
            for row, line in rows:  # other cells stay empty
                line |= task.table_row(row[task.name])
            cases, sources = [row[task.name] for row, _ in rows], [line[SOURCE] for _, line in rows]
            if picture := task.draw(self.report[task.name], cases, sources):
                write_figure(picture, self.folder / f"{task.name}.png")
        write_table(lines, self.folder / "per_case.csv")
        write_json(self.report, self.folder / "metrics.json")
        flat, names = self._flat(), [f"{task.name}_{name}" for task in self.tasks for name in task.headline[:1]]
        chosen = ", ".join(f"{name} {flat[name]:.3f}" for name in names if name in flat)
        logger.info(f"{self.folder / 'metrics.json'}: {chosen}")


def with_intervals(task: Task, cases: Sequence[dict], groups: Sequence[str], bootstrap: int, seed: int) -> dict:
    """Compute the figures of a task with their 95 % intervals, from `bootstrap` draws of whole groups (patients).

    Returns:
        name -> {"value", "ci95": [low, high], "n": number of cases the figure is defined for}. The interval is None without
        draws, and with fewer than two groups. Draws in which a figure is undefined are left out.
    """
    figures, rng = task.figures(cases), np.random.default_rng(seed)
    members = np.unique(groups, return_inverse=True)[1]
    draws, count = [], members.max() + 1
    for _ in range(bootstrap if count > 1 else 0):
        draws.append(figures(np.bincount(rng.integers(count, size=count), minlength=count)[members]))
    report = {}
    for name, value in figures(np.ones(len(cases))).items():
        drawn = [draw[name] for draw in draws if name in draw]
        interval = np.percentile(drawn, (2.5, 97.5)).tolist() if drawn else None
        report[name] = {"value": value, "ci95": interval, "n": sum(task.is_defined(case, name) for case in cases)}
    return report
