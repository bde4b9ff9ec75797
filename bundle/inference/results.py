"""The result of a scan, in memory: the answers for its slices are collected and summarised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor

from bundle.data.transforms import to_file_grid
from bundle.data.volumes import Scan
from bundle.inference.nifti import Volume
from bundle.inference.novelty import assess
from bundle.inference.report import Report, SliceView
from bundle.inference.slices import INDEX
from bundle.lungs import lung_bearing, lung_mask
from bundle.names import EMBEDDING, IMAGE, SLICE
from bundle.networks import Novelty
from bundle.tasks import Task
from bundle.tasks.lesions import volume_ml

FIELD_OF_VIEW = 350  # mm, usual for a chest: taken where a file does not say it, to see whether there is lung at all


@dataclass
class Result:
    """The answers of the network for one scan, of `Model.predict`; docs/outputs.md is the reference of the entries.

    Attributes:
        slices: the entry "slices" of predictions.json: a row for each slice.
        entries: the entries of predictions.json for the whole scan: "lung", "novelty", and one for each task.
        volumes: name -> voxels on the grid of the file: mask (0, or 1 + lesion class), probability of lesion, reconstruction
            and reconstruction_error.
        bearing: whether each slice shows lung; all True where that is not known.
        report: pictures of the slices, for `save`.
        model, stamp, keep_identifiers: see `bundle.inference.Model`.
    """

    scan: Scan
    tasks: Sequence[Task]
    report: Report
    slices: list[dict] = field(default_factory=list)
    entries: dict = field(default_factory=dict)
    volumes: dict[str, Volume] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    bearing: list[bool] = field(default_factory=list)
    model: dict = field(default_factory=dict)
    stamp: str = ""
    keep_identifiers: bool = False

    def __str__(self) -> str:
        words = filter(None, (task.line(self.entries[task.name]) for task in self.tasks))
        return "; ".join([f"{self.scan.name}: {', '.join(words)}", *self.warnings])

    @property
    def classes(self) -> dict[str, float]:
        """Probability of each class for the scan; empty if it was not classified."""
        return {name: value for task in self.tasks for name, value in task.probabilities(self.entries[task.name]).items()}

    @property
    def lesions(self) -> list[dict]:
        """Lesions with boxes, by descending score: "score", "center_mm" and "size_mm" in LPS, and more: docs/outputs.md."""
        return [lesion for task in self.tasks for lesion in task.lesions(self.entries[task.name])]

    @property
    def mask(self) -> nibabel.Nifti1Image | None:
        """0, or 1 + lesion class, on the grid of the input; of a picture (rows, columns, 1). None if nothing was segmented."""
        if "mask" not in self.volumes:
            return None
        image, order = self.volumes["mask"].image(), self.scan.input_axes
        if order == (0, 1, 2):
            return image
        affine = None if self.scan.affine is None else image.affine[:, [*order, 3]]
        return nibabel.Nifti1Image(np.asarray(image.dataobj).transpose(order), affine)

    def save(self, folder) -> None:
        """Write what `chestct predict` writes for the scan, see docs/outputs.md, in place of an older result.

        Raises:
            UserError: if the folder holds something else, or cannot be written.
        """
        from bundle.inference.writer import save_result  # which imports this module

        save_result(self, folder)

    def store(self, kind: str, pixels: np.ndarray, slice_: MetaTensor, dtype=np.uint8, slope=1.0, picture_scale=1) -> None:
        """Append pixels (rows, columns) of a slice to a volume; see `Volume`."""
        scan, stored = self.scan, to_file_grid(pixels, slice_)
        if kind not in self.volumes:
            self.volumes[kind] = Volume(scan.shape, scan.affine, scan.axis, dtype, slope, scan.oriented, picture_scale)
        self.volumes[kind].append(stored.T if scan.kind == "picture" else stored.reshape(np.delete(scan.shape, scan.axis)))

    def prediction(self) -> dict:
        """Return the content of predictions.json without "files", which the writer adds."""
        scan, affine = self.scan, self.scan.affine
        grid = {
            "shape": list(scan.shape),
            "axial_axis": scan.axis,
            "spacing_mm": None if affine is None else np.linalg.norm(affine[:3, :3], axis=0).round(6).tolist(),
            "affine": None if affine is None else affine.round(6).tolist(),
        }
        head = {"scan": scan.name, "kind": scan.kind, "hounsfield": scan.hounsfield, "grid": grid, "research_use_only": True}
        tail = {"slices": self.slices, "model": self.model, "stamp": self.stamp}
        return {**head, "warnings": list(self.warnings), **self.entries, **tail}


class Collector:
    """Collect the answers for the slices of a scan, in order, and summarise them as a `Result`; arguments as of `Model`."""

    def __init__(self, scan: Scan, tasks: Sequence[Task], novelty: Novelty | None = None) -> None:
        self.result, self.tasks, self.novelty = Result(scan, tasks, Report(scan, tasks)), list(tasks), novelty
        self.lungs: list[tuple[float, float]] = []  # mm2 in each slice in HU: of the lung, of lung and lesions
        self.embeddings: list[torch.Tensor] = []

    def add(self, sample: Mapping, answer: Mapping) -> None:
        """Add the next slice.

        Args:
            sample: "index"; "slice" (1, rows, columns), values as read; "image" with its "intensity_range".
            answer: for each task what its `row` takes; "embedding" (F,).
        """
        scan, slice_, (low, high) = self.result.scan, sample[SLICE], sample[IMAGE].meta["intensity_range"]
        pixels = slice_[0].numpy()
        view = SliceView(slice_, np.clip((pixels - low) / max(high - low, 1e-6), 0, 1), low, high)
        row = {"index": sample[INDEX], "position_mm": scan.positions and round(scan.positions[sample[INDEX]], 3)}
        for task in self.tasks:
            row |= task.row(answer[task.name], view, self.result)
        if scan.hounsfield:
            self._measure_lung(pixels, view.labels, max(sample[IMAGE].shape))
        row["lung_mm2"] = round(self.lungs[-1][0], 2) if scan.hounsfield and scan.spacing else None
        row["novelty"] = None  # of all slices at once, in `finish`
        if self.novelty:
            self.embeddings.append(answer[EMBEDDING])
        self.result.slices.append(row)
        self.result.report.add(view, row)

    def _measure_lung(self, pixels: np.ndarray, labels: np.ndarray | None, longest: int) -> None:
        sides = self.result.scan.spacing or (FIELD_OF_VIEW / max(pixels.shape),) * 2
        lung = lung_mask(pixels, sides, longest)
        both = lung if labels is None else lung | (labels > 0)
        self.lungs.append(tuple(float(mask.sum()) * sides[0] * sides[1] for mask in (lung, both)))

    def finish(self) -> Result:
        """Summarise the slices by the rules of docs/scans.md."""
        result, count = self.result, len(self.result.scan)
        if [row["index"] for row in result.slices] != list(range(count)):
            raise RuntimeError(f"{result.scan.path}: found answers for {len(result.slices)} slices, expected {count}")
        bearing = lung_bearing([lung for lung, _ in self.lungs])
        result.bearing, with_lung = bearing or [True] * count, np.flatnonzero(bearing).tolist()
        result.entries["lung"] = None
        if with_lung and result.scan.spacing:
            volume = volume_ml([both for _, both in self.lungs], result.scan)
            result.entries["lung"] = {"volume_ml": volume, "slices": [with_lung[0], with_lung[-1]]}
        for task in self.tasks:
            result.entries[task.name] = task.entry(result)
        distances = self.novelty and self.novelty.distance(torch.stack(self.embeddings)).numpy().round(4).tolist()
        for row, distance in zip(result.slices, distances or ()):
            row["novelty"] = distance
        result.entries["novelty"], warnings = assess(self.novelty, distances, bearing or None)
        result.warnings = [*result.scan.warnings, *warnings]
        return result
