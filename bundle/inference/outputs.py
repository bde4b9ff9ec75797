"""Predictions on their way back to the grid of the file, and into files."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import torch
from ignite.engine import Events
from monai.config import KeysCollection
from monai.engines.utils import IterationEvents
from monai.transforms import MapTransform
from monai.utils.enums import CommonKeys
from PIL import Image

from bundle.data.transforms import move_boxes, to_file_grid
from bundle.inference.images import FAILURE, NAME, SAMPLES, SLICE
from bundle.inference.overlay import draw_overlay
from bundle.tasks import CLASSIFICATION, DETECTION, IMAGE, RECONSTRUCTION, SEGMENTATION, check_tasks

logger = logging.getLogger(__name__)


class SplitBatch:
    """Handler that splits batch and predictions into single samples, so that the engine's postprocessing gets each alone.

    MONAI's own decollation would mix up detections, which are a list with an entry for each image. The prediction for a
    file that could not be read is dropped.
    """

    def attach(self, engine) -> None:
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)

    def __call__(self, engine) -> None:
        samples, pred = engine.state.batch[SAMPLES], engine.state.output[CommonKeys.PRED]
        engine.state.batch = samples
        engine.state.output = [
            {} if FAILURE in sample else {task: _to_cpu(answer[index]) for task, answer in pred.items()}
            for index, sample in enumerate(samples)
        ]


def _to_cpu(answer):
    if isinstance(answer, dict):
        return {key: _to_cpu(value) for key, value in answer.items()}
    return torch.as_tensor(answer).detach().float().cpu()


class BoxesToFiled(MapTransform):
    """Bring detections to pixels of the file, x = column as stored, clipped to its edges; weak and vanished ones go.

    Replaces {"boxes", "scores", …} of the network by {"boxes" (N, 4) x1 y1 x2 y2, "scores" (N,)}.

    Args:
        score_threshold: lowest score that is kept, from 0 to 1.

    Raises:
        ValueError: if the threshold is out of range.
    """

    def __init__(self, keys: KeysCollection, score_threshold: float = 0.5, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold: found {score_threshold}, expected a number from 0 to 1")
        self.score_threshold = score_threshold

    def __call__(self, data):
        data = dict(data)
        for key in self.key_iterator(data):
            boxes, scores = data[key]["boxes"], data[key]["scores"]
            boxes = move_boxes(boxes, data[IMAGE].affine)
            rows, columns = data[SLICE].shape[-2:]
            if data[SLICE].affine[0, 1]:  # stored with rows and columns exchanged
                rows, columns = columns, rows
            boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([columns, rows, columns, rows]))
            kept = (scores >= self.score_threshold) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            data[key] = {"boxes": boxes[kept], "scores": scores[kept]}
        return data


class PredictionWriter:
    """Handler that writes the answers of every image, and at the end predictions.json.

    For image NAME (its path below the input folder) there are, as far as the tasks are active,
    NAME.mask, NAME.reconstruction (.png for a picture, .nii.gz with the file's affine for a volume) and NAME.overlay.png.

    The lesion probability is brought back to the grid of the file by linear interpolation and only then cut at 0.5, which
    keeps outlines smoother than enlarging a mask of the network's size. The mask holds 1, 2, … for the mask channels, the
    likeliest where several exceed 0.5; in a PNG of one channel 255. The reconstruction is in HU (within the window) for a
    volume; in a PNG, 0 and 255 are the darkest and brightest values that the network is shown.

    Files are written under a temporary name, then renamed. A file that could not be read is logged in one line and listed
    under "failures" of predictions.json.

    Args:
        output_dir: folder of the results.
        tasks: tasks to write.
        classes: names of the classes.
        segmentation_classes: names of the mask channels.

    Raises:
        ValueError: after all is written, if no image could be read.
    """

    def __init__(
        self, output_dir, tasks: Iterable[str], classes: Sequence[str], segmentation_classes: Sequence[str] = ("lesion",)
    ) -> None:
        self.folder = Path(output_dir)
        self.tasks = check_tasks(tasks)
        self.classes = list(classes)
        self.segmentation_classes = list(segmentation_classes)
        self.images: list[dict] = []
        self.failures: list[dict] = []

    def attach(self, engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine) -> None:
        self.images, self.failures = [], []

    def update(self, engine) -> None:
        for sample, answer in zip(engine.state.batch, engine.state.output):
            if FAILURE in sample:
                logger.warning(f"skipped {sample[FAILURE]}")
                self.failures.append({"file": sample[NAME], "reason": sample[FAILURE]})
            else:
                self.images.append(self.write(sample, answer))

    def finish(self, engine) -> None:
        with _written(self.folder / "predictions.json") as file:
            file.write_text(json.dumps({"images": self.images, "failures": self.failures}, indent=1) + "\n")
        logger.info(f"{self.folder / 'predictions.json'}: {len(self.images)} images, {len(self.failures)} skipped")
        if not self.images:
            raise ValueError(f"input: none of {len(self.failures)} files could be read; {self.failures[0]['reason']}")

    def write(self, sample: dict, answer: dict) -> dict:
        """Write the files of one image.

        Args:
            sample: "name", and "slice" (1, rows, columns) in [0, 1] as a MetaTensor.
            answer: classification, probabilities (K,); segmentation, probabilities (C, rows, columns); reconstruction
                (1, rows, columns); detection {"boxes" (N, 4) in pixels of the file, "scores" (N,)}.

        Returns:
            Its entry in predictions.json: "file", and under each task what is known.
        """
        slice_, entry = sample[SLICE], {"file": sample[NAME]}
        if CLASSIFICATION in self.tasks:
            probabilities = {name: round(p, 6) for name, p in zip(self.classes, answer[CLASSIFICATION].tolist())}
            entry[CLASSIFICATION] = {"predicted": max(probabilities, key=probabilities.get), "probabilities": probabilities}
        if SEGMENTATION in self.tasks:
            labels = _labels(answer[SEGMENTATION])
            entry[SEGMENTATION] = {"mask": self._save(labels, sample, "mask"), "area": self._areas(labels, slice_)}
        if RECONSTRUCTION in self.tasks:
            pixels = _to_intensity(answer[RECONSTRUCTION][0], slice_)
            entry[RECONSTRUCTION] = {"image": self._save(pixels, sample, "reconstruction")}
        if DETECTION in self.tasks:
            found = zip(answer[DETECTION]["boxes"].tolist(), answer[DETECTION]["scores"].tolist())
            entry[DETECTION] = [{"box": [round(v, 2) for v in box], "score": round(score, 6)} for box, score in found]
        entry["overlay"] = f"{sample[NAME]}.overlay.png"
        with _written(self.folder / entry["overlay"]) as file:
            draw_overlay(slice_, answer, entry, file)
        return entry

    def _areas(self, labels: np.ndarray, slice_) -> dict:
        """Size of each lesion class in pixels, and in mm2 where the file knows its spacing (otherwise None)."""
        spacing, areas = slice_.meta["spacing"], {}
        for value, name in enumerate(self.segmentation_classes, start=1):
            pixels = int((labels == value).sum())
            areas[name] = {"pixels": pixels, "mm2": spacing and round(pixels * spacing[0] * spacing[1], 2)}
        return areas

    def _save(self, pixels: np.ndarray, sample: dict, kind: str) -> str:
        """Write pixels (rows, columns) of the slice in the geometry of its file; returns the path below the folder."""
        slice_ = sample[SLICE]
        stored, affine = to_file_grid(pixels, slice_), slice_.meta["file_affine"]
        name = f"{sample[NAME]}.{kind}" + (".png" if affine is None else ".nii.gz")
        with _written(self.folder / name) as file:
            if affine is None:
                scale = 255 if kind == "mask" and len(self.segmentation_classes) == 1 else 1
                Image.fromarray((stored * scale).astype(np.uint8)).save(file)
            else:
                nifti = nibabel.Nifti1Image(stored, affine.numpy())
                nifti.header.set_xyzt_units("mm")
                nibabel.save(nifti, file)
        return name


def _labels(probabilities: torch.Tensor) -> np.ndarray:
    """(C, rows, columns) to uint8 (rows, columns): 0, or 1 + the likeliest channel where it exceeds 0.5."""
    highest, channel = torch.as_tensor(probabilities).max(0)
    return torch.where(highest > 0.5, channel + 1, 0).numpy().astype(np.uint8)


def _to_intensity(pixels: torch.Tensor, slice_) -> np.ndarray:
    """[0, 1] to HU (int16), or to 0 … 255 (uint8) for a picture."""
    (low, high), kind = (slice_.meta["intensity_range"], np.int16) if slice_.meta["hounsfield"] else ((0, 255), np.uint8)
    pixels = torch.as_tensor(pixels).clamp(0, 1).numpy()
    return np.round(low + pixels * (high - low)).astype(kind)


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, with its extension, that takes its place if nothing is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
