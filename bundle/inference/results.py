"""What the network says about a scan: collected slice by slice, then summed up. Nothing here is written to a disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from monai.data import MetaTensor

from bundle.data.transforms import to_file_grid
from bundle.data.volumes import Scan
from bundle.errors import UserError
from bundle.inference.lesions import link_boxes
from bundle.inference.nifti import Volume
from bundle.inference.novelty import assess
from bundle.inference.slices import INDEX, SLICE
from bundle.lungs import lung_bearing, lung_mask
from bundle.names import CLASSIFICATION, DETECTION, EMBEDDING, IMAGE, RECONSTRUCTION, SEGMENTATION, check_tasks
from bundle.networks import Novelty


@dataclass
class Result:
    """What the network says about one scan; docs/inference.md is the reference of the entries.

    Attributes:
        scan: that was predicted.
        slices: the entry "slices" of predictions.json: a row for each slice.
        entries: the entries of predictions.json for the whole scan: "lung", "novelty", and one for each task.
        volumes: name -> voxels on the grid of the file: mask (0, or 1 + lesion class), probability of lesion, reconstruction
            and reconstruction_error.
        warnings: one line each.
        ranges: for each slice, the values that the network sees as 0 and as 1.
        bearing: whether each slice shows lung; all True where that is not known.
    """

    scan: Scan
    slices: list[dict] = field(default_factory=list)
    entries: dict = field(default_factory=dict)
    volumes: dict[str, Volume] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    ranges: list[tuple[float, float]] = field(default_factory=list)
    bearing: list[bool] = field(default_factory=list)

    def store(self, kind: str, pixels: np.ndarray, slice_: MetaTensor, dtype=np.uint8, slope=1.0, picture_scale=1) -> None:
        """Append pixels (rows, columns) of the slice at hand to a volume; see `Volume`."""
        scan, stored = self.scan, to_file_grid(pixels, slice_)
        if kind not in self.volumes:
            self.volumes[kind] = Volume(scan.shape, scan.affine, scan.axis, dtype, slope, scan.oriented, picture_scale)
        self.volumes[kind].append(stored.T if scan.kind == "picture" else stored.reshape(np.delete(scan.shape, scan.axis)))

    def prediction(self) -> dict:
        """The content of predictions.json, without what the writer adds: model, stamp, files."""
        scan, affine = self.scan, self.scan.affine
        grid = {
            "shape": list(scan.shape),
            "axial_axis": scan.axis,
            "spacing_mm": None if affine is None else np.linalg.norm(affine[:3, :3], axis=0).round(6).tolist(),
            "affine": None if affine is None else affine.round(6).tolist(),
        }
        head = {"scan": scan.name, "kind": scan.kind, "hounsfield": scan.hounsfield, "grid": grid, "research_use_only": True}
        return {**head, "warnings": list(self.warnings), **self.entries, "slices": self.slices}


@dataclass
class SliceView:
    """A slice as it is collected: `pixels` (rows, columns) as read, `shown` in [0, 1], and `lesions`, what counts as lung too."""

    slice: MetaTensor
    shown: np.ndarray
    low: float
    high: float
    lesions: np.ndarray | None = None


class Collector:
    """Take in the answers for the slices of a scan, in order, and sum them up to a `Result`.

    Args:
        scan: whose slices these are.
        tasks: task -> how its answers are collected, of `task_results`.
        novelty: distance from the training data, or None where that is not known.
    """

    def __init__(self, scan: Scan, tasks: Mapping[str, TaskResults], novelty: Novelty | None = None) -> None:
        self.result, self.tasks, self.novelty = Result(scan), tasks, novelty
        self.lung_areas: list[float] = []  # mm2 of every slice, lesions included

    def add(self, sample: Mapping, answer: Mapping) -> None:
        """Take in a slice.

        Args:
            sample: "index"; "slice" (1, rows, columns), values as read; "image" with its "intensity_range".
            answer: for each task what its `TaskResults` takes; "embedding" (F,).
        """
        scan, slice_, (low, high) = self.result.scan, sample[SLICE], sample[IMAGE].meta["intensity_range"]
        pixels = slice_[0].numpy()
        view = SliceView(slice_, np.clip((pixels - low) / max(high - low, 1e-6), 0, 1), low, high)
        row = {"index": sample[INDEX], "position_mm": scan.positions and round(scan.positions[sample[INDEX]], 3)}
        for task, results in self.tasks.items():
            row |= results.row(answer[task], view, self.result)
        row["lung_mm2"] = self._lung_area(pixels, view.lesions)
        row["novelty"] = self.novelty and round(float(self.novelty.distance(answer[EMBEDDING][None])[0]), 4)
        self.result.slices.append(row)
        self.result.ranges.append((float(low), float(high)))

    def _lung_area(self, pixels: np.ndarray, lesions: np.ndarray | None) -> float | None:
        """Area of the lung in mm2; beside it, of the lung and the lesions in it, for the volume of the lung."""
        scan = self.result.scan
        if not scan.hounsfield or scan.spacing is None:
            return None
        lung = lung_mask(pixels, scan.spacing)
        pixel = scan.spacing[0] * scan.spacing[1]
        self.lung_areas.append(float((lung if lesions is None else lung | lesions).sum() * pixel))
        return round(float(lung.sum() * pixel), 2)

    def finish(self) -> Result:
        """Sum the slices up: see docs/inference.md for each rule.

        Raises:
            RuntimeError: if a slice is missing.
        """
        result, areas = self.result, [row["lung_mm2"] for row in self.result.slices]
        if [row["index"] for row in result.slices] != list(range(len(result.scan))):
            raise RuntimeError(f"{result.scan.path}: found answers for {len(areas)} slices, expected {len(result.scan)}")
        known = None not in areas
        result.bearing = lung_bearing(areas) if known else [True] * len(areas)
        with_lung = [index for index, has_lung in enumerate(result.bearing) if has_lung]
        result.entries["lung"] = None
        if known and with_lung:
            volume = volume_ml(self.lung_areas, result.scan)
            result.entries["lung"] = {"volume_ml": volume, "slices": [with_lung[0], with_lung[-1]]}
        for task, results in self.tasks.items():
            result.entries[task] = results.entry(result)
        distances = [row["novelty"] for row in result.slices]
        result.entries["novelty"], warnings = assess(self.novelty, distances, result.bearing if known else None)
        result.warnings = [*result.scan.warnings, *warnings]
        return result


def volume_ml(areas: Sequence[float], scan: Scan) -> float:
    """mL of areas in mm2, one a slice."""
    return round(float(np.dot(areas, scan.thickness)) / 1000, 4)


class TaskResults:
    """How the answers of one task are collected, summed up and tabled. One subclass a task: see `TASK_RESULTS`.

    Args:
        **options: see `task_results`; each task takes what it names.
    """

    def __init__(self, **options) -> None:
        pass

    def row(self, answer, view: SliceView, result: Result) -> dict:
        """Entries of a slice in predictions.json; voxels go to `result.store`."""
        raise NotImplementedError

    def entry(self, result: Result) -> object:
        """The entry of the task in predictions.json, for the whole scan."""
        raise NotImplementedError

    @staticmethod
    def caption(row: Mapping) -> list[str]:
        """What the line below the picture of a slice says."""
        return []

    @staticmethod
    def scan_columns(entry) -> dict:
        """Columns of scans.csv, of an entry of predictions.json."""
        raise NotImplementedError

    @staticmethod
    def slice_columns(row: Mapping) -> dict:
        """Columns of slices.csv, of a row of "slices" in predictions.json."""
        raise NotImplementedError


class ClassificationResults(TaskResults):
    """Probabilities (K,) of each slice; of the scan their mean over the slices with lung."""

    def __init__(self, classes: Sequence[str], **_) -> None:
        self.classes = list(classes)

    def row(self, answer, view, result):
        return {"probabilities": {name: round(p, 6) for name, p in zip(self.classes, answer.tolist())}}

    def entry(self, result):
        probabilities = [[row["probabilities"][name] for name in self.classes] for row in result.slices]
        return classify_scan(probabilities, result.bearing, self.classes)

    @staticmethod
    def scan_columns(entry):
        probabilities = {f"probability {name}": value for name, value in entry["probabilities"].items()}
        return {"predicted": entry["predicted"], **probabilities}

    @staticmethod
    def slice_columns(row):
        return {f"probability {name}": value for name, value in row["probabilities"].items()}


class SegmentationResults(TaskResults):
    """Probabilities (C, rows, columns) of lesion on the grid of the slice; areas and volumes of lesion.

    They were brought to this grid by linear interpolation and are only now cut at the threshold, which keeps outlines smoother than
    enlarging a mask of the network's size. In a picture, a mask of one channel has 255 for lesion.
    """

    def __init__(self, segmentation_classes: Sequence[str], lesion_threshold: float = 0.5, **_) -> None:
        self.names, self.threshold = list(segmentation_classes), lesion_threshold
        if len(set(map(file_part, self.names))) < len(self.names):
            found = ", ".join(self.names)
            raise UserError(f"segmentation_classes: found {found}, expected names that differ in letters or digits")

    def row(self, answer, view, result):
        labels, one, spacing = to_labels(answer, self.threshold), len(self.names) == 1, result.scan.spacing
        view.lesions = labels > 0
        result.store("mask", labels, view.slice, picture_scale=255 if one else 1)
        for name, values in zip(self.names, torch.as_tensor(answer).numpy()):
            kind = "probability" if one else f"probability_{file_part(name)}"
            result.store(kind, np.round(values * 255), view.slice, slope=1 / 255)
        pixels = {name: int((labels == value).sum()) for value, name in enumerate(self.names, start=1)}
        mm2 = spacing and {name: round(count * spacing[0] * spacing[1], 2) for name, count in pixels.items()}
        return {"lesion_pixels": pixels, "lesion_mm2": mm2}

    def entry(self, result):
        return {name: self._lesion(name, result) for name in self.names}

    def _lesion(self, name: str, result: Result) -> dict:
        found = {"volume_ml": None, "share_of_lung": None, "pixels": sum(row["lesion_pixels"][name] for row in result.slices)}
        if result.scan.thickness is not None:
            found["volume_ml"] = volume_ml([row["lesion_mm2"][name] for row in result.slices], result.scan)
            if lung := result.entries["lung"]:
                found["share_of_lung"] = round(found["volume_ml"] / lung["volume_ml"], 6)
        return found

    @staticmethod
    def caption(row):
        sizes = {name: f"{pixels} px" for name, pixels in row["lesion_pixels"].items()}
        sizes |= {name: f"{area / 100:.1f} cm²" for name, area in (row["lesion_mm2"] or {}).items()}
        return [f"{name} {sizes[name]}" if pixels else f"no {name}" for name, pixels in row["lesion_pixels"].items()]

    @staticmethod
    def scan_columns(entry):
        keys = ("volume_ml", "share_of_lung", "pixels")
        return {f"{name} {key}": found[key] for name, found in entry.items() for key in keys}

    @staticmethod
    def slice_columns(row):
        columns = {}
        for name, pixels in row["lesion_pixels"].items():
            columns |= {f"{name} pixels": pixels, f"{name} mm2": row["lesion_mm2"] and row["lesion_mm2"][name]}
        return columns


class ReconstructionResults(TaskResults):
    """The rebuilt slice (1, rows, columns) in HU (within the window), or 0 to 255; |input - rebuilt| as a share of the window."""

    def row(self, answer, view, result):
        rebuilt = answer[0].clamp(0, 1).numpy()
        error = np.abs(rebuilt - view.shown)
        hu = view.low + rebuilt * (view.high - view.low)
        values, dtype = (hu, np.int16) if result.scan.hounsfield else (rebuilt * 255, np.uint8)
        result.store("reconstruction", np.round(values), view.slice, dtype)
        result.store("reconstruction_error", np.round(error * 255), view.slice, slope=1 / 255)
        return {"reconstruction_error": round(float(error.mean()), 6)}

    def entry(self, result):
        return {"mean_error": round(float(np.mean([row["reconstruction_error"] for row in result.slices])), 6)}

    @staticmethod
    def scan_columns(entry):
        return {"reconstruction_error": entry["mean_error"]}

    @staticmethod
    def slice_columns(row):
        return {"reconstruction_error": row["reconstruction_error"]}


class DetectionResults(TaskResults):
    """{"boxes" (N, 4) in pixels of the stored slice, "scores" (N,), "areas" (N,)} of each slice, linked to lesions."""

    def __init__(self, link_iou: float = 0.2, **_) -> None:
        self.link_iou = link_iou

    def row(self, answer, view, result):
        found = zip(answer["boxes"].tolist(), answer["scores"].tolist(), answer["areas"].tolist())
        boxes = [([round(v, 2) for v in box], round(score, 6), round(area, 4)) for box, score, area in found]
        return {"boxes": [dict(zip(("box", "score", "area"), box)) for box in boxes]}

    def entry(self, result):
        return link_boxes([row["boxes"] for row in result.slices], result.scan, self.link_iou)

    @staticmethod
    def caption(row):
        return [f"{len(row['boxes'])} box" + ("" if len(row["boxes"]) == 1 else "es")]

    @staticmethod
    def scan_columns(entry):
        return {"lesions": len(entry), "highest score": max((lesion["score"] for lesion in entry), default=None)}

    @staticmethod
    def slice_columns(row):
        return {"boxes": len(row["boxes"]), "highest score": max((box["score"] for box in row["boxes"]), default=None)}


TASK_RESULTS: dict[str, type[TaskResults]] = {
    CLASSIFICATION: ClassificationResults,
    SEGMENTATION: SegmentationResults,
    RECONSTRUCTION: ReconstructionResults,
    DETECTION: DetectionResults,
}


def task_results(tasks: Iterable[str], **options) -> dict[str, TaskResults]:
    """How the answers of each task are collected.

    Args:
        tasks: their names.
        **options: classes, names of the classes; segmentation_classes, names of the mask channels; lesion_threshold,
            probability above which a pixel is lesion; link_iou, in-plane IoU from which boxes of neighbouring slices are one
            lesion.

    Raises:
        UserError: for an unknown task, or for names of mask channels that would share a file.
    """
    return {task: TASK_RESULTS[task](**options) for task in check_tasks(tasks)}


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


def to_labels(probabilities: torch.Tensor, threshold: float = 0.5) -> np.ndarray:
    """(C, rows, columns) to uint8 (rows, columns): 0, or 1 + the likeliest channel where it exceeds the threshold."""
    highest, channel = torch.as_tensor(probabilities).max(0)
    return torch.where(highest > threshold, channel + 1, 0).numpy().astype(np.uint8)


def file_part(name: str) -> str:
    """Name of a class as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name)
