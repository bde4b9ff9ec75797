"""A small report for the tests of the page: what is in it, and what a browser makes of it."""

import shutil

import numpy as np
import torch
from monai.data import MetaTensor

from bundle.data.volumes import Scan
from bundle.inference.report import Report, SliceView
from bundle.tasks import make_tasks

TASKS = ("classification", "segmentation", "detection", "reconstruction")
EVIL = "<script>alert(1)</script>"


TURNED = np.eye(4)[[1, 0, 2, 3]]  # the file stores rows and columns exchanged


def make_scan(shape, count, spacing=(2.0, 1.0), hounsfield=True):
    scan = Scan("scan", "scan", (*shape, count), np.eye(4), files=[])
    scan.spacing, scan.hounsfield = spacing, hounsfield
    return scan


def make_view(pixels, ends=(-1350.0, 150.0), **answers):
    shown = ((pixels - ends[0]) / (ends[1] - ends[0])).clip(0, 1)
    return SliceView(MetaTensor(torch.as_tensor(pixels)[None], affine=torch.as_tensor(TURNED)), shown, *ends, **answers)


def make_page(path, count=3, hounsfield=True, shape=(40, 60), tasks=TASKS, spacing=(2.0, 1.0), **changes):
    """A page of slices whose air is darker from slice to slice, with a lesion and a box on the middle one."""
    report, rows, middle = Report(make_scan(shape, count, spacing, hounsfield), make_tasks(tasks)), [], count // 2
    for k in range(count):
        pixels = np.linspace(-1350, 1650, shape[0] * shape[1]).reshape(shape).astype(np.float32) - 20 * k
        labels = np.zeros(shape, np.uint8)
        labels[12:18, 8:22] = k == middle
        view = make_view(pixels, (-1350.0, 150.0) if hounsfield else (-1000.0, 1000.0))
        row = {"index": k, "position_mm": 5.0 * k, "probabilities": {"z": 0.25, "a": 0.75}, "novelty": None}
        row["reconstruction_error"] = 0.05
        if "segmentation" in tasks:
            view.labels = labels
            row |= {"lesion_pixels": {"lesion": int(labels.sum())}, "lesion_mm2": {"lesion": 2.0 * labels.sum()}}
        if "reconstruction" in tasks:
            view.rebuilt = view.shown * 0.9
        if "detection" in tasks:
            row["boxes"] = [{"box": [10.0, 5.0, 20.0, 25.0], "score": 0.75}] * (k == middle)
        report.add(view, row)
        rows.append(row)
    lesion = {"id": 7, "slices": [middle, middle], "box": [10, 5, 20, 25], "size_mm": [20.0, 20.0, 5.0], "volume_ml": 2.0}
    lesion |= {"center_mm": [0.0, 0.0, 0.0], "score": 0.75, "boxes": [{"slice": middle, "box": [10.0, 5.0, 20.0, 25.0], "score": 0.75}]}
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
    folder = path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    report.write(folder, prediction)
    (folder / "report.html").rename(path)
