"""A volume of MONAI Label, slice by slice through the network, and what each face makes of the answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch.nn.modules.dropout import _DropoutNd

from bundle.data.volumes import Scan, open_scan
from bundle.data.transforms import to_file_grid
from bundle.errors import UserError
from bundle.inference.markups import lesion_axes
from bundle.inference.results import Collector, Result
from bundle.inference.slices import INDEX, SCAN, collate, to_cpu
from bundle.networks import MultiTaskNet
from bundle.names import CLASSIFICATION, DETECTION, IMAGE, SEGMENTATION, SLICE
from bundle.tasks import make_tasks


class LoadVolumed(MapTransform):
    """Read a volume by `bundle.data.volumes`, so that prediction, training and MONAI Label see the same values and geometry.

    Returns a MetaTensor (1, X, Y, Z) of float32 with its affine to RAS in mm, and the metadata that MONAI Label looks for.
    """

    def __call__(self, data):
        data = dict(data)
        for key in self.keys:
            scan = open_scan(data[key])
            affine = torch.as_tensor(np.eye(4) if scan.affine is None else scan.affine)
            meta = {"filename_or_obj": scan.path, "original_affine": affine, "spatial_shape": scan.shape, "space": "RAS"}
            data[key] = MetaTensor(torch.from_numpy(scan.read_volume())[None], affine=affine, meta=meta)
        return data


class VolumeScan(Scan):
    """A volume in memory, in HU.

    Args:
        volume: (1, 1, X, Y, Z) with its affine to RAS in mm, of `LoadVolumed`; Z may be absent.

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
        self.batch_size, self.monte_carlo = batch_size, monte_carlo
        self.options = {"classes": classes, "segmentation_classes": segmentation_classes}
        self.options |= {"lesion_threshold": lesion_threshold, "link_iou": link_iou}

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

    def predict(self, inputs: MetaTensor, network: MultiTaskNet) -> Result:
        """What the network says about a volume, of the tasks of the face.

        Args:
            inputs: of `VolumeScan`.
            network: with the heads of some of them.

        Raises:
            UserError: for a volume that cannot be read, in one line.
        """
        scan = VolumeScan(inputs)
        tasks = [task for task in self.tasks if task in network.heads]
        collector = Collector(scan, make_tasks(tasks, **self.options))
        for found in self.answers(scan, network, tasks):
            collector.add(found, found)
        return collector.finish()


class SegmentationInferer(VolumeInferer):
    """The mask of a volume, and beside it what the other heads say."""

    tasks = (CLASSIFICATION, SEGMENTATION, DETECTION)

    def __call__(self, inputs: MetaTensor, network: MultiTaskNet) -> list[dict]:
        """Answer a volume.

        Args: of `predict`.

        Returns:
            One dictionary: "pred" (1, X, Y, Z) uint8, 0 or the number of the lesion class (1 + channel), on the grid of the
            volume; "result", the entries classification, segmentation and detection of predictions.json. Under Monte-Carlo
            dropout "pred" is float32 (channels, X, Y, Z), probabilities of lesion, and "result" is empty.
        """
        if self.monte_carlo:
            pred, result = self._probabilities(VolumeScan(inputs), network), {}
        else:
            found = self.predict(inputs, network)
            pred = found.volumes["mask"].voxels()[None]
            result = {task: found.entries[task] for task in self.tasks if task in found.entries}
        # A MetaTensor, since the scoring of MONAI Label wants what both numpy and torch can sum up.
        mask = torch.from_numpy(pred.reshape(len(pred), *inputs.shape[2:]))
        return [{"pred": MetaTensor(mask, affine=torch.as_tensor(VolumeScan(inputs).affine)), "result": result}]

    def _probabilities(self, scan: Scan, network: MultiTaskNet) -> np.ndarray:
        pred = np.zeros((len(self.options["segmentation_classes"]), *scan.shape), np.float32)
        planes = np.moveaxis(pred, 1 + scan.axis, 1)
        for index, answer in enumerate(self.answers(scan, network, [SEGMENTATION])):
            for channel, layer in enumerate(answer[SEGMENTATION].numpy()):
                planes[channel, index] = to_file_grid(layer, answer[SLICE]).reshape(planes.shape[2:])
        return pred


class ClassificationInferer(VolumeInferer):
    """The class of a volume."""

    tasks = (CLASSIFICATION,)

    def __call__(self, inputs: MetaTensor, network: MultiTaskNet) -> list[MetaTensor]:
        """Args: of `predict`. Returns: one tensor, probabilities (number of classes,)."""
        found = self.predict(inputs, network).entries[CLASSIFICATION]
        return [MetaTensor(torch.tensor(list(found["probabilities"].values())))]


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
        found = self.predict(inputs, self.network)
        lesions, hull = found.entries[DETECTION], np.abs(lesion_axes(found.scan.affine, found.scan.axis))
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
