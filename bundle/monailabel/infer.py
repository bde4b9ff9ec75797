"""A volume of MONAI Label through the model of configs/inference.json, and what each face makes of the result."""

import logging

import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import MapTransform
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from bundle.data.volumes import open_scan
from bundle.errors import UserError
from bundle.inference.inputs import ArrayScan
from bundle.inference.markups import lesion_axes
from bundle.inference.predict import Model
from bundle.inference.results import Result
from bundle.networks import MultiTaskNet

logger = logging.getLogger(__name__)


class LoadVolumed(MapTransform):
    """Read a volume by `bundle.data.volumes`.

    Makes a MetaTensor (1, X, Y, Z) of float32 with its affine to RAS in mm and, in `meta`, what MONAI Label looks for,
    "hounsfield", and "warnings" of the reader, which are logged too, as one text.
    """

    def __call__(self, data):
        data = dict(data)
        for key in self.keys:
            scan = open_scan(data[key])
            scan.check_values()
            warnings = scan.warnings + ["the file has no geometry: lengths count 1 mm for a pixel"] * (scan.affine is None)
            for warning in warnings:
                logger.warning(f"{scan.path}: {warning}")
            affine = torch.as_tensor(np.diag([-1.0, -1, 1, 1]) if scan.affine is None else scan.affine)  # as ITK reads it
            meta = {"filename_or_obj": scan.path, "original_affine": affine, "spatial_shape": scan.shape, "space": "RAS"}
            meta |= {"hounsfield": scan.hounsfield, "warnings": "\n".join(warnings)}
            data[key] = MetaTensor(torch.from_numpy(scan.read_volume())[None], affine=affine, meta=meta)
        return data


class VolumeInferer(Inferer):
    """Base of the faces: predicts a volume as the command does, by the network that MONAI Label hands over.

    With `monte_carlo` the network's dropout stays on. MONAI's DataLoader resets torch's random numbers whenever one is made,
    unless it has a generator of its own, as in faces.json.
    """

    def __init__(self, model: Model, monte_carlo: bool = False) -> None:
        super().__init__()
        self.model, self.monte_carlo = model, monte_carlo

    def predict(self, inputs: MetaTensor, network: MultiTaskNet) -> Result:
        """Predict a batch of one volume (1, 1, X, Y, Z), of `LoadVolumed`; Z may be absent."""
        if tuple(inputs.shape[:2]) != (1, 1):
            raise UserError(f"volume: found a batch of shape {tuple(inputs.shape)}, expected one volume of one channel")
        tasks = [task.name for task in self.model.tasks]
        self.model.evaluator.network = _AskedNetwork(network, tasks, self.monte_carlo)
        scan = ArrayScan(inputs[0, 0].numpy(force=True), affine_of(inputs))
        scan.hounsfield = bool(np.all(np.asarray(inputs.meta.get("hounsfield", True))))  # one of each in a batch
        scan.warnings += "".join(inputs.meta.get("warnings", "")).splitlines()
        return self.model.run(scan)


def affine_of(volume: MetaTensor) -> np.ndarray:
    """(4, 4) of a batch of one volume."""
    return np.asarray(volume.affine.cpu(), float).reshape(-1, 4, 4)[0]


class _AskedNetwork(nn.Module):
    """A network of which some tasks are asked; batch statistics stay as they are even where dropout is on."""

    def __init__(self, network: MultiTaskNet, tasks: list[str], dropout: bool) -> None:
        super().__init__()
        self.network, self.tasks, self.dropout = network, tasks, dropout

    def forward(self, image: torch.Tensor) -> dict:
        for module in self.network.modules():  # MONAI Label hands over a network in training mode for scoring
            module.training = self.dropout and isinstance(module, _DropoutNd)
        rows = torch.ones(len(image), dtype=torch.bool, device=image.device)
        return self.network(image, annotated={task: rows & (task in self.tasks) for task in self.network.heads})


class SegmentationInferer(VolumeInferer):
    """The mask of a volume, and beside it what the other heads say."""

    def __call__(self, inputs: MetaTensor, network: MultiTaskNet) -> list[dict]:
        """Give "pred" (1, X, Y, Z) uint8, 0 or the number of the lesion class, and "result", entries of predictions.json.

        Under Monte-Carlo dropout "pred" is float32 (channels, X, Y, Z), probabilities of lesion, and "result" is empty.
        """
        found = self.predict(inputs, network)
        result = {task.name: found.entries[task.name] for task in self.model.tasks} | {"warnings": found.warnings}
        volumes = [found.volumes["mask"].voxels()]
        if self.monte_carlo:
            kinds = [kind for kind in found.volumes if kind.startswith("probability")]
            volumes, result = [found.volumes[kind].voxels() / np.float32(255) for kind in kinds], {}
        # A MetaTensor, since the scoring of MONAI Label needs what both numpy and torch can sum up.
        pred = torch.from_numpy(np.stack(volumes).reshape(len(volumes), *inputs.shape[2:]))
        return [{"pred": MetaTensor(pred, affine=torch.as_tensor(affine_of(inputs))), "result": result}]


class ClassificationInferer(VolumeInferer):
    """The class of a volume."""

    def __call__(self, inputs: MetaTensor, network: MultiTaskNet) -> list[MetaTensor]:
        """One tensor, probabilities (number of classes,)."""
        return [MetaTensor(torch.tensor(list(self.predict(inputs, network).classes.values())))]


class LesionDetector(VolumeInferer):
    """The lesions of a volume as boxes in space; MONAI Label sets `network`."""

    network: MultiTaskNet | None = None

    def __call__(self, inputs: MetaTensor, use_inferer: bool = True) -> list[dict]:
        """Give "box" (N, 6), "label" (N,) zeros, and "description", a line for each lesion with its score.

        Boxes are centers and sizes in mm along the axes of LPS, highest score first; of an oblique scan, hulls in space.
        """
        found = self.predict(inputs, self.network)
        hull = np.abs(lesion_axes(found.scan.affine, found.scan.axis))
        boxes = [[*lesion["center_mm"], *(hull @ lesion["size_mm"])] for lesion in found.lesions]
        lines = [
            f"lesion {lesion['id']}: score {lesion['score']:.3f}, slices {lesion['slices'][0]} to {lesion['slices'][1]}, "
            f"{lesion['volume_ml']:g} mL"
            for lesion in found.lesions
        ]
        box, label = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 6), torch.zeros(len(boxes), dtype=torch.int64)
        return [{"box": box, "label": label, "description": "\n".join([*lines, "AI, research use only"])}]


class TakeAnswerd(MapTransform):
    """Take the dictionary that `SegmentationInferer` put under a key apart: the key holds the mask, "result" the rest."""

    def __call__(self, data):
        data = dict(data)
        for key in self.keys:
            data |= {key: data[key]["pred"], "result": data[key]["result"]}
        return data
