"""A picture of one slice and what the network says about it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bundle.data.transforms import move_boxes
from bundle.tasks import CLASSIFICATION, DETECTION, SEGMENTATION

DARK, LIGHT, FAINT, STRONG = "#15181c", "#e8eaed", "#3a4048", "#ffd166"
LESIONS = ("#ff8c42", "#e63977", "#b388ff", "#7bd389")  # outlines of the mask channels, in turn
BOX = "#4cc9f0"


def draw_overlay(slice_, answer: Mapping, entry: Mapping, path) -> None:
    """Draw the slice as radiologists look at it, with lesion outlines, boxes with scores and class probabilities, as a PNG.

    Args:
        slice_: (1, rows, columns) in [0, 1], as `bundle.data.transforms.LoadSlice` turns it.
        answer: see `bundle.inference.outputs.PredictionWriter.write`.
        entry: what predictions.json says about it.
        path: of the PNG.
    """
    rows, columns = slice_.shape[-2:]
    row_mm, column_mm = slice_.meta["spacing"] or (1.0, 1.0)
    height = 6 * min(max(rows * row_mm / (columns * column_mm), 0.4), 2.0)
    bars = 0.24 * len(entry[CLASSIFICATION]["probabilities"]) if CLASSIFICATION in entry else 0
    figure = Figure(figsize=(6, height + bars + 0.62), facecolor=DARK)
    total = figure.get_figheight()
    picture = figure.add_axes((0, 1 - height / total, 1, height / total))
    picture.imshow(slice_[0].numpy(), cmap="gray", vmin=0, vmax=1, aspect=row_mm / column_mm)
    picture.set_axis_off()
    if SEGMENTATION in entry:
        _draw_lesions(picture, torch.as_tensor(answer[SEGMENTATION]).numpy())
    if DETECTION in entry and entry[DETECTION]:
        _draw_boxes(picture, slice_, answer[DETECTION])
    if bars:
        left = min(0.06 + 0.0125 * max(map(len, entry[CLASSIFICATION]["probabilities"])), 0.5)
        axis = figure.add_axes((left, 0.48 / total, 0.88 - left, bars / total))
        _draw_classes(axis, entry[CLASSIFICATION])
    figure.text(0.5, 0.2 / total, _caption(entry), color=LIGHT, fontsize=9, ha="center", va="center", parse_math=False)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120)


def _draw_lesions(axis, probabilities) -> None:
    for channel, values in enumerate(probabilities):
        if values.max() > 0.5 and min(values.shape) > 1:
            color = LESIONS[channel % len(LESIONS)]
            axis.contourf(values, levels=[0.5, 1.01], colors=[color], alpha=0.2)
            if values.min() < 0.5:
                axis.contour(values, levels=[0.5], colors=[color], linewidths=1.4)


def _draw_boxes(axis, slice_, detections: Mapping) -> None:
    # Boxes are in pixels of the file; the picture shows the turned slice, whose pixel edges lie at k - 0.5.
    boxes = move_boxes(detections["boxes"], torch.linalg.inv(slice_.affine)) - 0.5
    for (x1, y1, x2, y2), score in zip(boxes.tolist(), detections["scores"].tolist()):
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=BOX, linewidth=1.4))
        label = {"color": DARK, "fontsize": 8, "bbox": {"facecolor": BOX, "edgecolor": "none", "pad": 1.2}}
        above = y1 > 0.06 * slice_.shape[-2]
        corner, offset = ((x1, y1), 3) if above else ((x1, y2), -3)
        va = "bottom" if above else "top"
        axis.annotate(f"{score:.2f}", corner, (1, offset), textcoords="offset points", va=va, annotation_clip=True, **label)


def _draw_classes(axis, classification: Mapping) -> None:
    probabilities = classification["probabilities"]
    for row, (name, value) in enumerate(probabilities.items()):
        strong = name == classification["predicted"]
        color = LIGHT if strong else "#9aa0a6"
        axis.barh(row, 1, height=0.55, color=FAINT)
        axis.barh(row, value, height=0.55, color=STRONG if strong else "#7a828c")
        axis.text(-0.02, row, name, color=color, fontsize=9, ha="right", va="center", weight="bold" if strong else "normal")
        axis.text(1.02, row, f"{value:.0%}", color=color, fontsize=9, va="center")
    axis.set(xlim=(0, 1), ylim=(len(probabilities) - 0.5, -0.5))
    axis.set_axis_off()


def _caption(entry: Mapping) -> str:
    parts = [entry["file"] if len(entry["file"]) <= 48 else "…" + entry["file"][-47:]]
    for name, area in entry.get(SEGMENTATION, {}).get("area", {}).items():
        size = f"{area['pixels']} px" if area["mm2"] is None else f"{area['mm2'] / 100:.1f} cm²"
        parts.append(f"{name} {size}" if area["pixels"] else f"no {name}")
    if DETECTION in entry:
        parts.append(f"{len(entry[DETECTION])} box" + ("" if len(entry[DETECTION]) == 1 else "es"))
    return "   ·   ".join(parts)
