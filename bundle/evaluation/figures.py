"""Pictures of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import RocCurveDisplay

from bundle.files import write_figure
from bundle.evaluation.statistics import CONFIDENCE_BINS, froc_curve
from bundle.names import CLASSIFICATION, DETECTION, RECORD, SEGMENTATION, SOURCE

def draw_report(report: Mapping, rows: Sequence[Mapping], folder: Path) -> None:
    """Confusion matrix, ROC curves and reliability, Dice by source, and the FROC curve, for the tasks that were measured."""
    if CLASSIFICATION in report:
        _draw_classification(report[CLASSIFICATION], [row[CLASSIFICATION] for row in rows if CLASSIFICATION in row], folder)
    if SEGMENTATION in report:
        _draw_dice([row for row in rows if SEGMENTATION in row], folder)
    if "froc" in report.get(DETECTION, {}):
        _draw_froc([row[DETECTION] for row in rows if DETECTION in row], folder)


def _draw_classification(report: Mapping, cases: Sequence[Mapping], folder: Path) -> None:
    names, counts = report["confusion_matrix"]["classes"], np.array(report["confusion_matrix"]["counts"])
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, right, last = figure.subplots(1, 3)
    left.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        dark = count > 0.5 * counts[row].sum()
        left.text(column, row, count, ha="center", va="center", color="white" if dark else "black")
    left.set(title="confusion matrix", xlabel="predicted", ylabel="annotated")
    left.set_xticks(range(len(names)), names)
    left.set_yticks(range(len(names)), names)
    labels = np.array([case["label"] for case in cases])
    probabilities = np.stack([case["probabilities"] for case in cases])
    for index, name in enumerate(names):
        if 0 < (labels == index).sum() < len(labels):
            RocCurveDisplay.from_predictions(labels == index, probabilities[:, index], name=name, ax=right)
    right.plot([0, 1], [0, 1], ":", color="grey")
    right.set_title("one class against the rest")
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    CalibrationDisplay.from_predictions(correct, confidence, n_bins=CONFIDENCE_BINS, name="most probable class", ax=last)
    last.set(title=f"reliability, ECE {report['ece']['value']:.3f}", xlabel="confidence", ylabel="accuracy")
    counts, edges = np.histogram(confidence, CONFIDENCE_BINS, (0, 1))
    last.bar(edges[:-1], counts / len(confidence), 1 / CONFIDENCE_BINS, align="edge", color="0.85", label="share of cases")
    last.legend(loc="upper left")
    write_figure(figure, folder / "classification.png")


def _draw_dice(rows: Sequence[Mapping], folder: Path) -> None:
    sources = sorted({row[RECORD][SOURCE] for row in rows})
    dice = [[row[SEGMENTATION]["dice"] for row in rows if row[RECORD][SOURCE] == source] for source in sources]
    figure = Figure(figsize=(2 + 2 * len(sources), 4), layout="constrained")
    axis = figure.subplots()
    axis.boxplot(dice, tick_labels=[f"{source}\nn = {len(d)}" for source, d in zip(sources, dice)])
    axis.set(title="Dice of each case", ylim=(-0.02, 1.02))
    write_figure(figure, folder / "segmentation.png")


def _draw_froc(cases: Sequence[Mapping], folder: Path) -> None:
    rates, sensitivity = froc_curve(cases)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.subplots()
    axis.step([0, *rates], [0, *sensitivity], where="post")
    axis.set(title="FROC, IoU 0.1", xlabel="false positives per image", ylabel="sensitivity", ylim=(0, 1))
    axis.set_xscale("symlog", linthresh=0.125)
    axis.set_xlim(0, 8)
    write_figure(figure, folder / "detection.png")
