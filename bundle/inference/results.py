"""The result of a scan: the answers for its slices are collected, summarised and written as a folder of files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor

from bundle.data.series import read_header
from bundle.data.transforms import to_file_grid
from bundle.data.volumes import Scan
from bundle.inference.folders import PREDICTIONS, check_place, disk_error, replacing_folder
from bundle.inference.markups import write_markups
from bundle.inference.nifti import Volume
from bundle.inference.novelty import assess
from bundle.inference.report import Report, SliceView
from bundle.inference.slices import INDEX
from bundle.lungs import lung_bearing, lung_mask
from bundle.names import EMBEDDING, IMAGE, SLICE
from bundle.networks import Novelty
from bundle.tasks import Task
from bundle.tasks.lesions import volume_ml

logger = logging.getLogger(__name__)

FIELD_OF_VIEW = 350  # mm, usual for a chest: taken where a file does not say it, to see whether there is lung at all
# Tags of patient and examination that predictions.json has with `keep_identifiers`; no other result ever has them.
IDENTIFIERS = ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "StudyID", "StudyDate")
IDENTIFIERS += ("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription")


class Result:
    """The answers of the network for one scan, of `Model.predict`; docs/outputs.md is the reference of the entries.

    Attributes:
        slices: the entry "slices" of predictions.json: a row for each slice.
        entries: the entries of predictions.json for the whole scan: "lung", "novelty", and one for each task.
        volumes: name -> voxels on the grid of the file: mask (0, or 1 + lesion class), probability of lesion, reconstruction
            and reconstruction_error.
        bearing: whether each slice shows lung; all True where that is not known.
        model, stamp, keep_identifiers: see `bundle.inference.Model`.
    """

    def __init__(
        self, scan: Scan, tasks: Sequence[Task], model: Mapping[str, str], stamp: str, keep_identifiers: bool = False
    ) -> None:
        self.scan, self.tasks, self.model, self.stamp, self.keep_identifiers = scan, tasks, model, stamp, keep_identifiers
        self.slices: list[dict] = []
        self.entries: dict = {}
        self.volumes: dict[str, Volume] = {}
        self.warnings: list[str] = []
        self.bearing: list[bool] = []
        self._report = Report(scan, tasks)
        self._lungs: list[tuple[float, float]] = []  # mm2 in each slice in HU: of the lung, of lung and lesions
        self._embeddings: list[torch.Tensor] = []

    def __str__(self) -> str:
        words = filter(None, (task.line(self.entries[task.name]) for task in self.tasks))
        return "; ".join([f"{self.scan.name}: {', '.join(words)}", *self.warnings])

    @property
    def classes(self) -> dict[str, float]:
        """Probability of each class for the scan; empty if it was not classified."""
        return {name: value for task in self.tasks for name, value in task.probabilities(self.entries[task.name]).items()}

    @property
    def segments(self) -> dict[str, dict]:
        """For each lesion class that is marked pixel by pixel "volume_ml" and "share_of_lung"."""
        return {name: value for task in self.tasks for name, value in task.segments(self.entries[task.name]).items()}

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
        """Write what `chestct predict` writes for the scan in place of an older result; a UserError if something else is there."""
        folder = Path(folder)
        check_place(folder)
        try:
            with replacing_folder(folder) as new:
                self.write(new)
        except OSError as error:
            raise disk_error(error, folder, folder) from error

    def write(self, folder: Path) -> None:
        """Write all files to an empty folder, predictions.json last; an OSError if one cannot be written."""
        scan, prediction = self.scan, self.prediction()
        if self.keep_identifiers and scan.kind == "dicom":
            header = read_header(scan.sources[0][0], IDENTIFIERS)
            prediction["identifiers"] = {name: str(header[name].value) for name in IDENTIFIERS if name in header}
        files = {"overlays": "overlays", "report": "report.html"}
        for kind, volume in self.volumes.items():
            files[kind] = f"{kind}.png" if scan.kind == "picture" else f"{kind}.nii.gz"
            volume.write(folder / files[kind])
        if scan.kind == "dicom":
            from bundle.inference.dicom import write_dicom  # highdicom needs pydicom 3, and MONAI Label pydicom 2

            files |= write_dicom(folder, self, prediction["warnings"])
        if "boxes" in self.slices[0] and scan.affine is not None:
            write_markups(folder / "markups.mrk.json", self.lesions, scan.affine, scan.axis)
            files["markups"] = "markups.mrk.json"
        prediction["files"] = files
        self._report.write(folder, prediction)
        (folder / PREDICTIONS).write_text(json.dumps(prediction, indent=1) + "\n")
        logger.info("; ".join([str(self), *prediction["warnings"][len(self.warnings) :]]))  # with those of what was written

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

    def add(self, sample: Mapping, answer: Mapping) -> None:
        """Add the answer for the next slice: for each task what its `row` takes, and "embedding" (F,)."""
        scan, slice_, (low, high) = self.scan, sample[SLICE], sample[IMAGE].meta["intensity_range"]
        pixels = slice_[0].numpy()
        view = SliceView(slice_, np.clip((pixels - low) / max(high - low, 1e-6), 0, 1), low, high)
        row = {"index": sample[INDEX], "position_mm": scan.positions and round(scan.positions[sample[INDEX]], 3)}
        for task in self.tasks:
            row |= task.row(answer[task.name], view, self)
        if scan.hounsfield:
            sides = scan.spacing or (FIELD_OF_VIEW / max(pixels.shape),) * 2
            lung = lung_mask(pixels, sides, max(sample[IMAGE].shape))
            both = lung if view.labels is None else lung | (view.labels > 0)
            self._lungs.append(tuple(float(mask.sum()) * sides[0] * sides[1] for mask in (lung, both)))
        row["lung_mm2"] = round(self._lungs[-1][0], 2) if scan.hounsfield and scan.spacing else None
        row["novelty"] = None  # of all slices at once, in `finish`
        self._embeddings.append(answer[EMBEDDING])
        self.slices.append(row)
        self._report.add(view, row)

    def finish(self, novelty: Novelty | None) -> Result:
        """Summarise the slices by the rules of docs/scans.md."""
        scan, count = self.scan, len(self.scan)
        if [row["index"] for row in self.slices] != list(range(count)):
            raise RuntimeError(f"{scan.path}: found answers for {len(self.slices)} slices, expected {count}")
        bearing = lung_bearing([lung for lung, _ in self._lungs])
        self.bearing, with_lung = bearing or [True] * count, np.flatnonzero(bearing).tolist()
        self.entries["lung"] = None
        if with_lung and scan.spacing:
            volume = volume_ml([both for _, both in self._lungs], scan)
            self.entries["lung"] = {"volume_ml": volume, "slices": [with_lung[0], with_lung[-1]]}
        for task in self.tasks:
            self.entries[task.name] = task.entry(self)
        distances = novelty and novelty.distance(torch.stack(self._embeddings)).numpy().round(4).tolist()
        for row, distance in zip(self.slices, distances or ()):
            row["novelty"] = distance
        self.entries["novelty"], warnings = assess(novelty, distances, bearing or None)
        self.warnings = [*scan.warnings, *warnings]
        return self
