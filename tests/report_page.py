"""A small report for the tests of the page: what is in it, and what a browser makes of it."""

import numpy as np

from bundle.inference.report import Report
from bundle.tasks import make_tasks

TASKS = ("classification", "segmentation", "detection", "reconstruction")
EVIL = "<script>alert(1)</script>"


def make_page(path, count=3, hounsfield=True, shape=(40, 60), tasks=TASKS, spacing=(2.0, 1.0), **changes):
    """A page of slices whose air is darker from slice to slice, with a lesion and a box on the middle one."""
    report, rows, middle = Report(spacing, count), [], count // 2
    for k in range(count):
        pixels = np.linspace(-1350, 1650, shape[0] * shape[1]).reshape(shape).astype(np.float32) - 20 * k
        labels = np.zeros(shape, np.uint8)
        boxes = np.zeros((0, 4))
        if k == middle:
            labels[12:18, 8:22] = 1
            boxes = np.array([[5.0, 10.0, 25.0, 20.0]])
        scores = np.full(len(boxes), 0.8)
        segmented, rebuilt = "segmentation" in tasks, "reconstruction" in tasks
        boxes, scores = (boxes, scores) if "detection" in tasks else (boxes[:0], scores[:0])
        ends = (-1350.0, 150.0) if hounsfield else (-1000.0, 1000.0)
        shown = ((pixels - ends[0]) / (ends[1] - ends[0])).clip(0, 1) * 0.9
        report.add(k, pixels, hounsfield, labels if segmented else None, shown if rebuilt else None, boxes, scores, ends)
        stored = [{"box": [10.0, 5.0, 20.0, 25.0], "score": 0.8} for _ in boxes]  # the file stores it transposed
        row = {"index": k, "position_mm": 5.0 * k, "probabilities": {"z": 0.25, "a": 0.75}, "novelty": None}
        if segmented:
            row |= {"lesion_pixels": {"lesion": int(labels.sum())}, "lesion_mm2": {"lesion": 2.0 * labels.sum()}}
        if "detection" in tasks:
            row["boxes"] = stored
        rows.append({**row, "reconstruction_error": 0.05})
    lesion = {"id": 7, "slices": [middle, middle], "box": [10, 5, 20, 25], "size_mm": [20.0, 20.0, 5.0], "volume_ml": 2.0}
    lesion |= {"center_mm": [0.0, 0.0, 0.0], "score": 0.8, "boxes": [{"slice": middle, "box": [10.0, 5.0, 20.0, 25.0], "score": 0.8}]}
    answers = {
        "classification": {"predicted": "a", "probabilities": {"z": 0.25, "a": 0.75}, "slices": count, "agreeing": 2},
        "segmentation": {"lesion": {"volume_ml": 3.25, "share_of_lung": 0.125, "pixels": 200}},
        "detection": [lesion] if "detection" in tasks else [],
        "reconstruction": {"mean_error": 0.0512},
    }
    prediction = {
        "scan": "study/scan.nii.gz",
        "kind": "volume",
        "hounsfield": hounsfield,
        "model": {"name": "a model", "version": "1.2.3", "checkpoint": "0123456789ab"},
        "research_use_only": True,
        "warnings": [],
        **{task: answers[task] for task in tasks},
        "lung": {"volume_ml": 4000.0, "slices": [0, count - 1]},
        "novelty": None,
        "slices": rows,
        **changes,
    }
    report.write(path, prediction, make_tasks(tasks))
    return prediction
