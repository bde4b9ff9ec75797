"""Training from MONAI Label: the slices of labelled volumes for the training of configs/train.json."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from monai.data import CacheDataset

from bundle.data.transforms import LoadSliced
from bundle.data.volumes import open_scan
from bundle.errors import UserError
from bundle.files import replacing
from bundle.monailabel.faces import MODEL
from bundle.names import EMPTY_MASK, GROUP, IMAGE, MASK, SOURCE


class VolumeSlice(NamedTuple):
    """A slice of a volume's file, in place of the path of an image."""

    path: str
    index: int

    def __str__(self) -> str:
        return f"{self.path}, slice {self.index}"


def slices_of(volume: Mapping[str, str], limit: int) -> list[dict]:
    """Records, as in a datalist with `VolumeSlice` for paths, of at most `limit` slices of a labelled volume to train on.

    At most half of them have a lesion, so that those without are learnt too; both are evenly spaced.
    """
    image, label = open_scan(volume["image"]), open_scan(volume["label"])
    if image.shape != label.shape:
        raise UserError(f"{label.path}: found a label of size {label.shape}, expected {image.shape} as in {image.path}")
    at, expected = label.positions, image.positions
    if at and expected and not np.allclose(at, expected, rtol=0, atol=image.thickness[0] / 2):
        raise UserError(
            f"{label.path}: found slices from {at[0]:.1f} to {at[-1]:.1f} mm, expected {expected[0]:.1f} to "
            f"{expected[-1]:.1f} mm as in {image.path}; write the label on the image's grid"
        )
    has_lesion, records = np.array([(label.read(index, labels=True) > 0).any() for index in range(len(label))]), []
    for wanted in (True, False):
        indices = np.flatnonzero(has_lesion == wanted)
        for place in np.linspace(0, len(indices) - 1, min(len(indices), limit // 2)).round().astype(int):
            index = int(indices[place])
            mask = VolumeSlice(label.path, index) if wanted else EMPTY_MASK
            records.append({IMAGE: VolumeSlice(image.path, index), MASK: mask, GROUP: image.path, SOURCE: "monailabel"})
    return records


class VolumeDataset(CacheDataset):
    """MONAI's CacheDataset of the slices of labelled volumes, {"image", "label"} of each, which MONAI Label sets as `data`.

    `otherwise` holds those to take if `data` has none: without any set aside, validation is on the training's.
    """

    def __init__(
        self, data: Sequence[Mapping], transform: Callable, otherwise: Sequence[Mapping] = (), slices_per_volume: int = 64
    ) -> None:
        volumes = data or otherwise
        if not volumes:
            raise UserError("training: found no labelled volume, expected at least one; submit a label first")
        records = [record for volume in volumes for record in slices_of(volume, slices_per_volume)]
        super().__init__(records, transform, num_workers=1, progress=False)


class LoadVolumeSliced(LoadSliced):
    """`LoadSliced` for records of `slices_of`; image and label of one volume are open at a time."""

    def __init__(self, segmentation_classes: int = 1) -> None:
        super().__init__(segmentation_classes)
        self.open = lru_cache(maxsize=2)(open_scan)
        self.load = lambda place, labels=False: self.open(place.path).read(place.index, labels)


def publish(weights, face) -> None:
    """Copy a file of weights over the model of a face, which is served."""
    with replacing(Path(face, MODEL)) as temporary:  # not *.pt, which MONAI Label would offer as a model
        shutil.copyfile(weights, temporary)
