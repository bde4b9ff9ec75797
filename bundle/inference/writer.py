"""A result of a scan as a folder of files, in the forms that other programs read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from bundle.data.transforms import move_boxes
from bundle.data.series import read_header
from bundle.data.volumes import Scan
from bundle.inference.markups import write_markups
from bundle.inference.overlay import draw_overlay
from bundle.inference.report import Report
from bundle.inference.results import Result
from bundle.names import DETECTION

PREDICTIONS = "predictions.json"

# Tags of patient and examination that predictions.json has with `keep_identifiers`; no other result ever has them.
IDENTIFIERS = ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "StudyID", "StudyDate")
IDENTIFIERS += ("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription")


def write_result(result: Result, folder, model: Mapping[str, str], stamp: str = "", keep_identifiers: bool = False) -> dict:
    """Write a result: volumes or pictures, overlays, report.html, markups, DICOM objects, and predictions.json last.

    Args:
        result: of a scan, whose slices are read again for their pictures.
        folder: that exists and is empty.
        model: {"name", "version", "checkpoint"}.
        stamp: what the result depends on, see `Worklist.stamp`.
        keep_identifiers: write names and ids from DICOM headers into predictions.json.

    Returns:
        The content of predictions.json; docs/outputs.md is its reference.

    Raises:
        OSError: if a file cannot be written.
    """
    folder, scan, prediction = Path(folder), result.scan, result.prediction()
    prediction |= {"model": dict(model), "stamp": stamp}
    if keep_identifiers and scan.kind == "dicom":
        prediction["identifiers"] = read_identifiers(scan)
    files = {"overlays": "overlays", "report": "report.html"}
    for kind, volume in result.volumes.items():
        files[kind] = f"{kind}.png" if scan.kind == "picture" else f"{kind}.nii.gz"
        volume.write(folder / files[kind])
    if scan.kind == "dicom":
        from bundle.inference.dicom import write_dicom  # highdicom needs pydicom 3, and MONAI Label pydicom 2

        labels = result.volumes["mask"].voxels() if "mask" in result.volumes else None
        files |= write_dicom(folder, scan.frames, prediction, labels)
    if DETECTION in prediction and scan.affine is not None:
        write_markups(folder / "markups.mrk.json", prediction)
        files["markups"] = "markups.mrk.json"
    prediction["files"] = files
    report = _draw_slices(result, folder / files["overlays"])
    lines = {title: text for task in result.tasks for title, text in task.report(result.entries[task.name]).items()}
    report.write(folder / files["report"], prediction, lines)
    (folder / PREDICTIONS).write_text(json.dumps(prediction, indent=1) + "\n")
    return prediction


def _draw_slices(result: Result, folder: Path) -> Report:
    """Draw the overlay of every slice and collect the pictures of the report."""
    scan, report = result.scan, Report(result.scan.spacing)
    folder.mkdir()
    masks, rebuilt = (
        result.volumes[kind].planes() if kind in result.volumes else repeat(None) for kind in ("mask", "reconstruction")
    )
    for row, (low, high), mask, hu in zip(result.slices, result.ranges, masks, rebuilt):
        index, slice_ = row["index"], scan.read(row["index"])
        pixels = slice_[0].numpy()
        labels = None if mask is None else _as_read(mask, slice_)
        if hu is not None:
            hu = _as_read(hu, slice_).astype(np.float32)
            hu = (hu - low) / max(high - low, 1e-6) if scan.hounsfield else hu / 255
        found = row.get("boxes", [])
        boxes = torch.tensor([box["box"] for box in found], dtype=torch.float32).reshape(-1, 4)
        boxes = move_boxes(boxes, torch.linalg.inv(slice_.affine)).numpy()
        scores = np.array([box["score"] for box in found], dtype=np.float32)
        report.add(index, pixels, scan.hounsfield, labels, hu, boxes, scores, (low, high))
        shown = np.clip((pixels - low) / max(high - low, 1e-6), 0, 1)
        file, probabilities = folder / f"{index:04d}.jpg", row.get("probabilities")
        draw_overlay(file, shown, scan.spacing, labels, boxes, scores, probabilities, _caption(row, result))
    return report


def _as_read(plane: np.ndarray, slice_) -> np.ndarray:
    """(x, y) as stored to (rows, columns) as `Scan.read` turns a slice: the way back of `to_file_grid`."""
    matrix = slice_.affine[:2, :2].numpy()
    turned = np.flip(plane.T, [axis for axis in (0, 1) if matrix[axis].sum() < 0])
    return turned.T if matrix[0, 1] else turned


def _caption(row: Mapping, result: Result) -> str:
    """One line below the overlay: which slice, and what each task says of it."""
    scan = result.scan
    parts = [f"slice {row['index']}" if len(scan) > 1 else Path(scan.name).name]
    for task in result.tasks:
        parts += task.caption(row)
    return "   ·   ".join(parts)


def read_identifiers(scan: Scan) -> dict[str, str]:
    """Read those of `IDENTIFIERS` that the header of a DICOM scan has."""
    header = read_header(scan.sources[0][0], IDENTIFIERS)
    return {name: str(header[name].value) for name in IDENTIFIERS if name in header}
