"""The results of a scan: collected slice by slice, summed up, and written in the forms that other programs read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pydicom
import torch
from ignite.engine import Events
from PIL import Image

from bundle import lungs
from bundle.data.volumes import Scan
from bundle.data.transforms import move_boxes, to_file_grid
from bundle.errors import UserError
from bundle.inference.lesions import check_link_iou, link_boxes
from bundle.inference.markups import write_markups
from bundle.inference.nifti import NiftiFile
from bundle.inference.novelty import assess
from bundle.inference.overlay import draw_overlay
from bundle.inference.report import Report
from bundle.inference.slices import FAILURE, INDEX, SCAN, SLICE
from bundle.inference.worklist import PREDICTIONS, Worklist
from bundle.names import CLASSIFICATION, DETECTION, EMBEDDING, IMAGE, RECONSTRUCTION, SEGMENTATION, check_tasks
from bundle.networks import Novelty

logger = logging.getLogger(__name__)

# What is said of the patient and the examination if the user asks for it; it is never part of any other result.
IDENTIFIERS = ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "StudyID", "StudyDate")
IDENTIFIERS += ("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription")


class ScanWriter:
    """Handler that collects the slices of each scan of a worklist and writes its folder of results at its last slice.

    A scan of which a slice could not be read, or whose results could not be made, fails as a whole, in one line.

    Args:
        worklist: gives the folders, and takes the failures.
        tasks: tasks to write.
        classes: names of the classes.
        segmentation_classes: names of the mask channels.
        model: {"name", "version", "checkpoint"} as the results state it.
        novelty: distance from the training data, or None where that is not known.
        link_iou: in-plane IoU from which boxes of neighbouring slices are one lesion.
        keep_identifiers: write names and ids from DICOM headers into predictions.json.

    Raises:
        UserError: for an unknown task, names of mask channels that would share a file, or if `link_iou` is out of range.
    """

    def __init__(
        self,
        worklist: Worklist,
        tasks: Iterable[str],
        classes: Sequence[str],
        segmentation_classes: Sequence[str],
        model: Mapping[str, str],
        novelty: Novelty | None = None,
        link_iou: float = 0.2,
        keep_identifiers: bool = False,
    ) -> None:
        check_link_iou(link_iou)
        if len(set(map(_file_name, segmentation_classes))) < len(segmentation_classes):
            raise UserError(
                f"segmentation_classes: found {', '.join(segmentation_classes)}, expected names that differ in letters or digits"
            )
        self.worklist, self.model, self.novelty = worklist, dict(model), novelty
        self.names = {"tasks": check_tasks(tasks), "classes": classes, "segmentation_classes": segmentation_classes}
        self.link_iou, self.keep_identifiers = link_iou, keep_identifiers
        self.results: ScanResults | None = None
        self.failed: str | None = None

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine) -> None:
        for sample, answer in zip(engine.state.batch, engine.state.output):
            scan = sample[SCAN]
            if scan.name == self.failed:  # by name: a worker of the data loader sends another object with each batch
                continue
            try:
                self._take(scan, sample, answer)
            except ValueError as error:
                self.failed = scan.name
                self.worklist.fail(scan.name, str(error))

    def _take(self, scan: Scan, sample: Mapping, answer: Mapping) -> None:
        if FAILURE in sample:
            raise UserError(sample[FAILURE])
        if self.results is None or self.results.scan.name != scan.name:
            self.results = ScanResults(scan, self.worklist.begin(scan.name), **self.names)
        self.results.add(sample, answer, self.novelty)
        if sample[INDEX] == len(scan) - 1:
            head = {"model": self.model, "stamp": self.worklist.stamp(scan)}
            if self.keep_identifiers and scan.kind == "dicom":
                head["identifiers"] = read_identifiers(scan)
            self.results.finish(head, self.novelty, self.link_iou)
            self.worklist.complete(scan.name)
            self.results = None


def classify_scan(probabilities: Sequence[Sequence[float]], bearing: Sequence[bool], classes: Sequence[str]) -> dict:
    """Class of a scan, by the mean over its slices with lung, over all where none has.

    Args:
        probabilities: of the classes, for each slice.
        bearing: whether a slice has lung.
        classes: their names.

    Returns:
        The entry "classification" of predictions.json: predicted, probabilities, and slices, how many were counted.
    """
    counted = [row for row, has_lung in zip(probabilities, bearing) if has_lung] or list(probabilities)
    mean = dict(zip(classes, np.mean(counted, axis=0, dtype=float).round(6).tolist()))
    return {"predicted": max(mean, key=mean.get), "probabilities": mean, "slices": len(counted)}


class ScanResults:
    """The results of one scan on their way into its folder. Nothing of a slice stays in memory but its numbers.

    Lesion probabilities are brought back to the grid of the file by linear interpolation and only then cut at 0.5, which
    keeps outlines smoother than enlarging a mask of the network's size. The mask holds 1, 2, … for the mask channels, the
    likeliest where several exceed 0.5. In a picture, a mask of one channel has 255 for lesion, probability and
    reconstruction error go from 0 to 255. The reconstruction is in HU (within the window), or 0 to 255.

    Args:
        scan: whose results these are.
        folder: to write to.
        tasks, classes, segmentation_classes: see `ScanWriter`.
    """

    def __init__(
        self, scan: Scan, folder: Path, tasks: Sequence[str], classes: Sequence[str], segmentation_classes: Sequence[str]
    ) -> None:
        self.scan, self.folder, self.tasks = scan, folder, tasks
        self.classes, self.segmentation_classes = list(classes), list(segmentation_classes)
        self.slices: list[dict] = []
        self.areas: list[list[float]] = []  # of the instance masks, in pixels, for every box of every slice
        self.lung_areas: list[float] = []  # mm2 of every slice, lesions included
        self.volumes: dict[str, NiftiFile] = {}
        self.report = Report(scan.spacing)
        (folder / "overlays").mkdir()

    def add(self, sample: Mapping, answer: Mapping, novelty: Novelty | None) -> None:
        """Take in a slice.

        Args:
            sample: "index"; "slice" (1, rows, columns), values as read; "image" with its "intensity_range".
            answer: classification, probabilities (K,); segmentation, probabilities (C, rows, columns); reconstruction
                (1, rows, columns); detection {"boxes" (N, 4) in pixels of the stored slice, "scores" (N,), "areas" (N,)};
                embedding (F,).
            novelty: see `ScanWriter`.
        """
        slice_, index = sample[SLICE], sample[INDEX]
        low, high = sample[IMAGE].meta["intensity_range"]
        pixels = slice_[0].numpy()
        shown = np.clip((pixels - low) / max(high - low, 1e-6), 0, 1)
        row = {"index": index, "position_mm": self.scan.positions and round(self.scan.positions[index], 3)}
        labels = rebuilt = None
        boxes, scores = torch.zeros(0, 4), torch.zeros(0)
        if CLASSIFICATION in self.tasks:
            row["probabilities"] = {name: round(p, 6) for name, p in zip(self.classes, answer[CLASSIFICATION].tolist())}
        if SEGMENTATION in self.tasks:
            labels = to_labels(answer[SEGMENTATION])
            row |= self._lesion_areas(labels)
            self._save_lesions(labels, answer[SEGMENTATION], slice_, index)
        if RECONSTRUCTION in self.tasks:
            rebuilt = answer[RECONSTRUCTION][0].clamp(0, 1).numpy()
            error = np.abs(rebuilt - shown)
            row["reconstruction_error"] = round(float(error.mean()), 6)
            stored = (low + rebuilt * (high - low), np.int16) if self.scan.hounsfield else (rebuilt * 255, np.uint8)
            self._save("reconstruction", np.round(stored[0]), stored[1], slice_, index)
            self._save("reconstruction_error", np.round(error * 255), np.uint8, slice_, index, slope=1 / 255)
        if DETECTION in self.tasks:
            found = answer[DETECTION]
            boxes, scores = move_boxes(found["boxes"], torch.linalg.inv(slice_.affine)), found["scores"]
            pairs = zip(found["boxes"].tolist(), scores.tolist())
            row["boxes"] = [{"box": [round(v, 2) for v in box], "score": round(score, 6)} for box, score in pairs]
            self.areas.append(found["areas"].tolist())
        row["lung_mm2"] = self._lung_area(pixels, labels)
        row["novelty"] = novelty and round(float(novelty.distance(answer[EMBEDDING][None])[0]), 4)
        self.slices.append(row)
        boxes, scores = boxes.numpy(), scores.numpy()
        self.report.add(index, pixels, self.scan.hounsfield, labels, rebuilt, boxes, scores, (low, high))
        file = self.folder / "overlays" / f"{index:04d}.png"
        draw_overlay(file, shown, self.scan.spacing, labels, boxes, scores, row.get("probabilities"), self._caption(row))

    def finish(self, head: Mapping, novelty: Novelty | None, link_iou: float) -> dict:
        """Sum the slices up and write what is left to write.

        Args:
            head: entries of predictions.json that are not measured: model, stamp, identifiers.
            novelty, link_iou: see `ScanWriter`.

        Returns:
            The content of predictions.json; docs/inference.md is its reference.
        """
        scan = self.scan
        prediction = {
            "scan": scan.name,
            "kind": scan.kind,
            "hounsfield": scan.hounsfield,
            "grid": {
                "shape": list(scan.shape),
                "axial_axis": scan.axis,
                "spacing_mm": None if scan.affine is None else np.linalg.norm(scan.affine[:3, :3], axis=0).round(6).tolist(),
                "affine": None if scan.affine is None else scan.affine.round(6).tolist(),
            },
            **head,
            "research_use_only": True,
            "warnings": list(scan.warnings),
            **self._sums(novelty, link_iou),
            "slices": self.slices,
        }
        prediction["warnings"] += prediction.pop("further_warnings")
        self._write_files(prediction)
        (self.folder / PREDICTIONS).write_text(json.dumps(prediction, indent=1) + "\n")
        return prediction

    def _sums(self, novelty: Novelty | None, link_iou: float) -> dict:
        """What is said of the scan as a whole: see docs/inference.md for each rule."""
        scan, rows = self.scan, self.slices
        lung = [row["lung_mm2"] for row in rows]
        bearing = [True] * len(rows) if None in lung else lungs.lung_bearing(lung)
        sums: dict = {"lung": None}
        if any(bearing) and None not in lung:
            with_lung = [row["index"] for row, has_lung in zip(rows, bearing) if has_lung]
            sums["lung"] = {"volume_ml": self._volume(self.lung_areas), "slices": [with_lung[0], with_lung[-1]]}
        if CLASSIFICATION in self.tasks:
            probabilities = [[row["probabilities"][name] for name in self.classes] for row in rows]
            sums[CLASSIFICATION] = classify_scan(probabilities, bearing, self.classes)
        if SEGMENTATION in self.tasks:
            sums[SEGMENTATION] = {name: self._lesion_sum(name, sums["lung"]) for name in self.segmentation_classes}
        if DETECTION in self.tasks:
            boxes = [[{**box, "area": area} for box, area in zip(row["boxes"], areas)] for row, areas in zip(rows, self.areas)]
            sums[DETECTION] = link_boxes(boxes, scan, link_iou)
        if RECONSTRUCTION in self.tasks:
            sums[RECONSTRUCTION] = {"mean_error": round(float(np.mean([row["reconstruction_error"] for row in rows])), 6)}
        distances = [row["novelty"] for row in rows]
        sums["novelty"], sums["further_warnings"] = assess(novelty, distances, None if None in lung else bearing)
        return sums

    def _lesion_sum(self, name: str, lung: Mapping | None) -> dict:
        found = {"volume_ml": None, "share_of_lung": None, "pixels": sum(row["lesion_pixels"][name] for row in self.slices)}
        if self.scan.thickness is not None:
            found["volume_ml"] = self._volume([row["lesion_mm2"][name] for row in self.slices])
            if lung:
                found["share_of_lung"] = round(found["volume_ml"] / lung["volume_ml"], 6)
        return found

    def _volume(self, areas: Sequence[float]) -> float:
        """mL of areas in mm2, one a slice."""
        return round(float(np.dot(areas, self.scan.thickness)) / 1000, 4)

    def _lesion_areas(self, labels: np.ndarray) -> dict:
        pixels = {name: int((labels == value).sum()) for value, name in enumerate(self.segmentation_classes, start=1)}
        spacing = self.scan.spacing
        mm2 = spacing and {name: round(count * spacing[0] * spacing[1], 2) for name, count in pixels.items()}
        return {"lesion_pixels": pixels, "lesion_mm2": mm2}

    def _save_lesions(self, labels: np.ndarray, probabilities: torch.Tensor, slice_, index: int) -> None:
        one = len(self.segmentation_classes) == 1
        self._save("mask", labels, np.uint8, slice_, index, picture_scale=255 if one else 1)
        for name, values in zip(self.segmentation_classes, torch.as_tensor(probabilities).numpy()):
            kind = "probability" if one else f"probability_{_file_name(name)}"
            self._save(kind, np.round(values * 255), np.uint8, slice_, index, slope=1 / 255)

    def _save(self, kind, pixels, dtype, slice_, index: int, slope: float = 1.0, picture_scale: int = 1) -> None:
        """Store pixels (rows, columns) of a slice on the grid of the file, in the file of this kind."""
        stored, scan = to_file_grid(pixels, slice_), self.scan
        if scan.kind == "picture":
            Image.fromarray((stored * picture_scale).astype(dtype)).save(self.folder / f"{kind}.png")
            return
        if kind not in self.volumes:
            path = self.folder / f"{kind}.nii.gz"
            self.volumes[kind] = NiftiFile(path, scan.shape, scan.affine, dtype, slope, scan.oriented)
        self.volumes[kind].put(stored.astype(dtype).reshape(np.delete(scan.shape, scan.axis)), scan.axis, index)

    def _lung_area(self, pixels: np.ndarray, labels: np.ndarray | None) -> float | None:
        """Area of the lung in mm2; beside it, of the lung and the lesions in it, for the volume of the lung."""
        if not self.scan.hounsfield or self.scan.spacing is None:
            return None
        lung = lungs.lung_mask(pixels, self.scan.spacing)
        united = lung if labels is None else lung | (labels > 0)
        pixel = self.scan.spacing[0] * self.scan.spacing[1]
        self.lung_areas.append(float(united.sum() * pixel))
        return round(float(lung.sum() * pixel), 2)

    def _caption(self, row: Mapping) -> str:
        """One line below the overlay: which slice, how much lesion, how many boxes."""
        parts = [f"slice {row['index']}" if len(self.scan) > 1 else Path(self.scan.name).name]
        for name, pixels in row.get("lesion_pixels", {}).items():
            size = f"{row['lesion_mm2'][name] / 100:.1f} cm²" if row["lesion_mm2"] else f"{pixels} px"
            parts.append(f"{name} {size}" if pixels else f"no {name}")
        if "boxes" in row:
            parts.append(f"{len(row['boxes'])} box" + ("" if len(row["boxes"]) == 1 else "es"))
        return "   ·   ".join(parts)

    def _write_files(self, prediction: dict) -> None:
        """Write everything but predictions.json, which gets what each file is called, by kind."""
        files, scan = {"overlays": "overlays", "report": "report.html"}, self.scan
        if scan.kind == "picture":
            files |= {path.stem: path.name for path in sorted(self.folder.glob("*.png"))}
        if scan.kind == "dicom":
            files |= self._write_dicom(prediction)
        for kind, volume in self.volumes.items():
            volume.finish()
            files[kind] = volume.path.name
        if DETECTION in self.tasks and scan.affine is not None:
            write_markups(self.folder / "markups.mrk.json", prediction)
            files["markups"] = "markups.mrk.json"
        prediction["files"] = files
        self.report.write(self.folder / files["report"], prediction)

    def _write_dicom(self, prediction: dict) -> dict:
        """Segmentation and structured report; a warning where the series lacks what they need."""
        from bundle.inference import dicom  # its highdicom needs pydicom 3, and MONAI Label pydicom 2: see bundle.monailabel

        files, sources, segmentation = {}, self.scan.sources, self.folder / "segmentation.dcm"
        if SEGMENTATION in self.tasks:
            labels = self.volumes["mask"].voxels()
            try:
                dicom.write_segmentation(segmentation, sources, labels, self.segmentation_classes, prediction["model"])
                files["dicom_segmentation"] = segmentation.name
            except ValueError as error:
                prediction["warnings"].append(str(error))
        try:
            report = self.folder / "report.dcm"
            dicom.write_structured_report(report, sources, prediction, segmentation if files else None)
            files["dicom_report"] = report.name
        except ValueError as error:
            prediction["warnings"].append(str(error))
        return files


def _file_name(name: str) -> str:
    """Name of a class as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name)


def to_labels(probabilities: torch.Tensor, threshold: float = 0.5) -> np.ndarray:
    """(C, rows, columns) to uint8 (rows, columns): 0, or 1 + the likeliest channel where it exceeds the threshold."""
    highest, channel = torch.as_tensor(probabilities).max(0)
    return torch.where(highest > threshold, channel + 1, 0).numpy().astype(np.uint8)


def read_identifiers(scan: Scan) -> dict[str, str]:
    """What the header of a DICOM scan says of patient and examination, those of `IDENTIFIERS` that it has."""
    header = pydicom.dcmread(scan.sources[0][0], stop_before_pixels=True)
    return {name: str(header[name].value) for name in IDENTIFIERS if name in header}
