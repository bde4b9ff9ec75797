"""The handler that collects cases during an evaluation and reports at its end."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

import ignite.distributed as idist
import numpy as np
from ignite.engine import Events
from monai.utils.enums import CommonKeys

from bundle.files import log_artifacts, write_json, write_table
from bundle.evaluation import figures
from bundle.evaluation.cases import cases_of
from bundle.evaluation.statistics import confusion, with_intervals
from bundle.names import (
    ANNOTATED,
    CLASSIFICATION,
    DETECTION,
    GROUP,
    IMAGE,
    RECONSTRUCTION,
    RECORD,
    SEGMENTATION,
    SOURCE,
    check_tasks,
)

logger = logging.getLogger(__name__)

# Figures whose mean is a task's part in the validation score. AP@0.5 alone is noisy while a detector still learns.
PRIMARY = {
    CLASSIFICATION: ("auroc", "balanced_accuracy"),
    SEGMENTATION: ("dice",),
    DETECTION: ("ap10", "ap50"),
    RECONSTRUCTION: ("ssim",),
}


class MultiTaskMetrics:
    """Handler of MONAI's SupervisedEvaluator for the metrics of all tasks.

    Only samples annotated for a task count for it, and a task without any has no figure at all. After the epoch
    `engine.state.metrics` holds the figures as floats named TASK_FIGURE, and "score", the mean over the tasks of their
    primary figures (`PRIMARY`; reconstruction counts only where it is alone); `report` holds them nested, with intervals.

    Args:
        tasks: tasks to measure.
        classes: names of the classes.
        segmentation_classes: names of the mask channels.
        bootstrap: draws for the 95 % intervals over groups; 0 for none.
        output_dir: where metrics.json (written last), per_case.csv and figures go; None writes nothing and skips the
            Hausdorff distance, which is slow.
        seed: of the bootstrap.
    """

    def __init__(
        self,
        tasks: Iterable[str],
        classes: Sequence[str],
        segmentation_classes: Sequence[str] = ("lesion",),
        bootstrap: int = 0,
        output_dir=None,
        seed: int = 0,
    ) -> None:
        self.tasks = check_tasks(tasks)
        self.classes = list(classes)
        self.segmentation_classes = list(segmentation_classes)
        self.bootstrap = bootstrap
        self.folder = None if output_dir is None else Path(output_dir)
        self.seed = seed
        self.rows: list[dict] = []
        self.report: dict = {}

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.compute)

    def reset(self, engine) -> None:
        self.rows = []

    def update(self, engine) -> None:
        label, pred = engine.state.output[CommonKeys.LABEL], engine.state.output[CommonKeys.PRED]
        rows = [{RECORD: record} for record in label[RECORD]]
        for task in filter(pred.__contains__, self.tasks):
            for row, case, annotated in zip(
                rows, cases_of(task, pred[task], label, self.folder is not None), label[ANNOTATED][task].tolist()
            ):
                if annotated and case:
                    row[task] = case
        self.rows += rows

    def compute(self, engine) -> None:
        if idist.get_world_size() > 1:
            # Process r has had every n-th record beginning with the r-th: see `bundle.training.distributed.shard`.
            turns = zip_longest(*idist.all_gather(self.rows))
            self.rows = [row for turn in turns for row in turn if row is not None]
        self.report = {}
        for task in self.tasks:
            rows = [row for row in self.rows if task in row]
            if rows:
                self.report[task] = self._task_report(task, rows)
        engine.state.metrics.update(self._flat())
        if self.folder is not None and idist.get_rank() == 0:
            self._write()
            log_artifacts(engine, [self.folder / "metrics.json", *sorted(self.folder.glob("*.png"))])

    def _task_report(self, task: str, rows: Sequence[dict]) -> dict:
        report = self._figures(task, rows)
        sources = sorted({row[RECORD][SOURCE] for row in rows})
        parts = [[row for row in rows if row[RECORD][SOURCE] == source] for source in sources]
        within = [self._figures(task, part) for part in parts] if len(parts) > 1 else [report]
        return {**report, "within_source": dict(zip(sources, within))}

    def _figures(self, task: str, rows: Sequence[dict]) -> dict:
        cases, groups = _cases(task, rows), [row[RECORD][GROUP] for row in rows]
        report = with_intervals(task, cases, groups, self.bootstrap, self.seed)
        if task == CLASSIFICATION:
            report["confusion_matrix"] = {"classes": self.classes, "counts": confusion(cases, len(self.classes))}
        if task == DETECTION:
            froc = {name.removeprefix("froc_"): report.pop(name) for name in list(report) if name.startswith("froc_")}
            report |= {"froc": froc} if froc else {}
        return report

    def _flat(self) -> dict[str, float]:
        flat = {
            f"{task}_{name}": figure["value"]
            for task, report in self.report.items()
            for name, figure in report.items()
            if "value" in figure
        }
        scored = [task for task in self.report if task != RECONSTRUCTION] or list(self.report)
        parts = [
            np.mean([self.report[task][name]["value"] for name in PRIMARY[task] if name in self.report[task]])
            for task in scored
            if any(name in self.report[task] for name in PRIMARY[task])
        ]
        return {**flat, "score": float(np.mean(parts))} if parts else flat

    def _write(self) -> None:
        write_table(map(self._csv_row, self.rows), self.folder / "per_case.csv")
        figures.draw_report(self.report, self.rows, self.folder)
        write_json(self.report, self.folder / "metrics.json")
        flat, names = self._flat(), [f"{task}_{PRIMARY[task][0]}" for task in self.report]
        chosen = ", ".join(f"{name} {flat[name]:.3f}" for name in names if name in flat)
        logger.info(f"{self.folder / 'metrics.json'}: {chosen}")

    def _csv_row(self, row: dict) -> dict:
        """One line of per_case.csv; a cell is empty where the case is not annotated or the figure not defined."""
        line = {key: row[RECORD][key] for key in (IMAGE, GROUP, SOURCE)}
        if case := row.get(CLASSIFICATION):
            line |= {"class": case["label"], "predicted_class": int(case["probabilities"].argmax())}
            line |= {f"probability_{name}": float(p) for name, p in zip(self.classes, case["probabilities"])}
        for task in (SEGMENTATION, RECONSTRUCTION):
            line |= {name: "" if np.isnan(value) else value for name, value in row.get(task, {}).items()}
        if case := row.get(DETECTION):
            line |= {name: case[name] for name in ("n_boxes", "n_detections", "true_positives", "false_positives")}
        return line


def _cases(task: str, rows: Sequence[dict]) -> list[dict]:
    """Cases of a task. Where a source has boxes but no instance masks, its images without lesions have no part in mask AP."""
    cases, sources = [row[task] for row in rows], [row[RECORD][SOURCE] for row in rows]
    if task != DETECTION:
        return cases
    masked = {source for source, case in zip(sources, cases) if "mask_match" in case and case["n_boxes"]}
    return [
        case if source in masked else {name: value for name, value in case.items() if name != "mask_match"}
        for source, case in zip(sources, cases)
    ]
