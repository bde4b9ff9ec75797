"""A volume of MONAI Label, slice by slice through the network, and what each face makes of the answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch.nn.modules.dropout import _DropoutNd

from bundle.data.volumes import NIFTI, Scan, open_scan
from bundle.data.transforms import to_file_grid
from bundle.errors import UserError
from bundle.inference.lesions import link_boxes
from bundle.inference.markups import lesion_axes
from bundle.inference.results import classify_scan, to_labels
from bundle.inference.slices import INDEX, SCAN, SLICE, collate, to_cpu
from bundle.lungs import lung_bearing, lung_mask
from bundle.networks import MultiTaskNet
from bundle.names import CLASSIFICATION, DETECTION, IMAGE, SEGMENTATION


class PlaceAsScand(MapTransform):
    """Lay a volume whose NIfTI file does not tell how it lies where `bundle.data.volumes` lays it; nibabel has another place.

    So prediction, training and the viewers, which read with ITK, agree on which end is up.
    """

    def __call__(self, data):
        data = dict(data)
        for key in self.keys:
            path = str(data[key].meta["filename_or_obj"])
            if path.lower().endswith(NIFTI) and not (scan := open_scan(path)).oriented:
                data[key].affine = torch.as_tensor(scan.affine)
        return data


class VolumeScan(Scan):
    """A volume in memory, in HU.

    Args:
        volume: (1, 1, X, Y, Z) with its affine to RAS in mm, as MONAI's LoadImage reads it; Z may be absent.

    Raises:
        UserError: if it has several channels.
    """

    def __init__(self, volume: MetaTensor) -> None:
        path = volume.meta.get("filename_or_obj", "volume")
        path = str(path[0] if isinstance(path, (list, tuple)) else path)
        if tuple(volume.shape[:2]) != (1, 1):
            raise UserError(f"{path}: found a batch of shape {tuple(volume.shape)}, expected one volume of one channel")
        affine = np.asarray(volume.affine.cpu(), float).reshape(-1, *volume.affine.shape[-2:])[0]
        # os.devnull: its results are kept nowhere, so that no file's change makes it another scan.
        super().__init__(path, path, volume.shape[2:], affine, files=[os.devnull])
        self.voxels = volume.as_tensor().cpu().numpy().reshape(self.shape)

    def _plane(self, index: int) -> np.ndarray:
        return np.moveaxis(self.voxels, self.axis, 0)[index]


class VolumeInferer(Inferer):
    """Base of the faces: answers a volume slice by slice, as configs/inference.json does, and sums the answers up.

    Beside the volume and the mask, memory holds one batch of slices.

    Args:
        preprocessing: of a slice: `preprocessing` of configs/inference.json.
        postprocessing: of its answers: `postprocessing` of the same.
        classes: names of the classes.
        segmentation_classes: names of the mask channels.
        batch_size: slices in a pass of the network.
        lesion_threshold: probability above which a pixel is lesion.
        link_iou: overlap in the plane from which boxes of neighbouring slices are one lesion.
        monte_carlo: keep the network's dropout on, and answer with probabilities of lesion instead of a mask.

    Raises:
        UserError: if the threshold is out of range.
    """

    tasks: tuple[str, ...] = ()  # what the face asks the network for

    def __init__(
        self,
        preprocessing: Callable,
        postprocessing: Callable,
        classes: Sequence[str] = (),
        segmentation_classes: Sequence[str] = (),
        batch_size: int = 8,
        lesion_threshold: float = 0.5,
        link_iou: float = 0.2,
        monte_carlo: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= lesion_threshold < 1:
            raise UserError(f"lesion_threshold: found {lesion_threshold}, expected a number from 0 and below 1")
        self.preprocessing, self.postprocessing = preprocessing, postprocessing
        self.classes, self.segmentation_classes = list(classes), list(segmentation_classes)
        self.batch_size, self.lesion_threshold, self.link_iou = batch_size, lesion_threshold, link_iou
        self.monte_carlo = monte_carlo

    def answers(self, scan: Scan, network: MultiTaskNet, tasks: Iterable[str]) -> Iterator[dict]:
        """Every slice with its answers: probabilities of the classes, probabilities of lesion and boxes on its own grid."""
        for module in network.modules():  # MONAI Label hands over a network in training mode for scoring
            module.training = self.monte_carlo and isinstance(module, _DropoutNd)
        device = next(network.parameters()).device
        for first in range(0, len(scan), self.batch_size):
            indices = range(first, min(first + self.batch_size, len(scan)))
            samples = [self.preprocessing({SCAN: scan, INDEX: index}) for index in indices]
            image = collate(samples)[IMAGE].to(device)
            asked = {task: torch.full((len(image),), task in tasks, device=device) for task in network.heads}
            output = network(image, annotated=asked)
            for row, sample in enumerate(samples):
                answer = {task: to_cpu(output[task][row]) for task in tasks if task in output}
                yield self.postprocessing({**sample, **answer})

    def classify(self, slices: Sequence[Mapping]) -> dict:
        """Class of the scan, of `classify_scan`."""
        bearing = lung_bearing([row["lung_mm2"] for row in slices])
        return classify_scan([row[CLASSIFICATION] for row in slices], bearing, self.classes)

    def lesions(self, scan: Scan, slices: Sequence[Mapping]) -> list[dict]:
        """Lesions in space, of `link_boxes`."""
        return link_boxes([row[DETECTION] for row in slices], scan, self.link_iou)


def numbers_of(answer: Mapping, scan: Scan) -> dict:
    """What is kept of a slice: class probabilities, boxes, and the area of its lung in mm2."""
    row = {}
    if CLASSIFICATION in answer:
        row[CLASSIFICATION] = answer[CLASSIFICATION].numpy()
        row["lung_mm2"] = float(lung_mask(answer[SLICE][0].numpy(), scan.spacing).sum() * np.prod(scan.spacing))
    if DETECTION in answer:
        found = answer[DETECTION]
        values = zip(found["boxes"].tolist(), found["scores"].tolist(), found["areas"].tolist())
        row[DETECTION] = [
            {"box": [round(v, 2) for v in box], "score": round(score, 6), "area": area} for box, score, area in values
        ]
    return row


class SegmentationInferer(VolumeInferer):
    """The mask of a volume, and beside it what the other heads say."""

    tasks = (CLASSIFICATION, SEGMENTATION, DETECTION)

    def __call__(self, inputs: MetaTensor, network: MultiTaskNet) -> list[dict]:
        """Answer a volume.

        Args:
            inputs: of `VolumeScan`.
            network: with at least the head of the segmentation.

        Returns:
            One dictionary: "pred" (1, X, Y, Z) uint8, 0 or the number of the lesion class (1 + channel), on the grid of the
            volume; "result", the entries classification, segmentation and detection of predictions.json. Under Monte-Carlo
            dropout "pred" is float32 (channels, X, Y, Z), probabilities of lesion, and "result" is empty.

        Raises:
            UserError: for a volume that cannot be read, in one line.
        """
        scan, slices = VolumeScan(inputs), []
        channels, dtype = (len(self.segmentation_classes), np.float32) if self.monte_carlo else (1, np.uint8)
        pred = np.zeros((channels, *scan.shape), dtype)
        planes = np.moveaxis(pred, 1 + scan.axis, 1)
        for index, answer in enumerate(self.answers(scan, network, [SEGMENTATION] if self.monte_carlo else self.tasks)):
            probabilities = answer[SEGMENTATION].numpy()
            layers = probabilities if self.monte_carlo else to_labels(probabilities, self.lesion_threshold)[None]
            for channel, layer in enumerate(layers):
                stored = to_file_grid(layer, answer[SLICE])
                planes[channel, index] = stored.reshape(planes.shape[2:])
            slices.append(numbers_of(answer, scan))
        result = {} if self.monte_carlo else self._result(scan, slices, planes[0])
        # A MetaTensor, since the scoring of MONAI Label wants what both numpy and torch can sum up.
        mask = MetaTensor(torch.from_numpy(pred.reshape(channels, *inputs.shape[2:])), affine=torch.as_tensor(scan.affine))
        return [{"pred": mask, "result": result}]

    def _result(self, scan: Scan, slices: Sequence[Mapping], planes: np.ndarray) -> dict:
        result = {CLASSIFICATION: self.classify(slices)} if CLASSIFICATION in slices[0] else {}
        result[SEGMENTATION] = {}
        for value, name in enumerate(self.segmentation_classes, start=1):
            pixels = (planes == value).sum((1, 2))
            volume = float(np.dot(pixels, scan.thickness) * np.prod(scan.spacing) / 1000)
            result[SEGMENTATION][name] = {"volume_ml": round(volume, 4), "pixels": int(pixels.sum())}
        return result | ({DETECTION: self.lesions(scan, slices)} if DETECTION in slices[0] else {})


class ClassificationInferer(VolumeInferer):
    """The class of a volume."""

    tasks = (CLASSIFICATION,)

    def __call__(self, inputs: MetaTensor, network: MultiTaskNet) -> list[MetaTensor]:
        """Args: of `SegmentationInferer`. Returns: one tensor, probabilities (number of classes,)."""
        scan = VolumeScan(inputs)
        slices = [numbers_of(answer, scan) for answer in self.answers(scan, network, self.tasks)]
        return [MetaTensor(torch.tensor(list(self.classify(slices)["probabilities"].values())))]


class LesionDetector(VolumeInferer):
    """The lesions of a volume as boxes in space.

    Attributes:
        network: the network, set by MONAI Label.
    """

    tasks = (DETECTION,)
    network: MultiTaskNet | None = None

    def __call__(self, inputs: MetaTensor, use_inferer: bool = True) -> list[dict]:
        """Detect.

        Args:
            inputs: of `VolumeScan`.
            use_inferer: what MONAI Label always says.

        Returns:
            One dictionary: "box" (N, 6), centers and sizes in mm along the axes of LPS, highest score first (of an oblique
            scan, the hull of the box in space); "label" (N,) zeros; "description", a line for each lesion with its score.
        """
        scan = VolumeScan(inputs)
        slices = [numbers_of(answer, scan) for answer in self.answers(scan, self.network, self.tasks)]
        lesions = self.lesions(scan, slices)
        hull = np.abs(lesion_axes(scan.affine, scan.axis))
        boxes = [[*lesion["center_mm"], *(hull @ lesion["size_mm"])] for lesion in lesions]
        lines = [
            f"lesion {lesion['id']}: score {lesion['score']:.3f}, slices {lesion['slices'][0]} to {lesion['slices'][1]}, "
            f"{lesion['volume_ml']:g} mL"
            for lesion in lesions
        ]
        return [
            {
                "box": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6),
                "label": torch.zeros(len(boxes), dtype=torch.int64),
                "description": "\n".join([*lines, "AI, research use only"]),
            }
        ]


class TakeAnswerd(MapTransform):
    """Take the dictionary that `SegmentationInferer` put under a key apart: the key holds the mask, "result" the rest."""

    def __call__(self, data):
        data = dict(data)
        for key in self.keys:
            data |= {key: data[key]["pred"], "result": data[key]["result"]}
        return data
