"""Transforms that MONAI does not have: reading one slice of any format, and boxes that follow the image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform, RandomizableTransform, Transform
from torchvision.ops import clip_boxes_to_image

from bundle.data.batch import plain
from bundle.data.labels import labels_of
from bundle.data.volumes import open_slice
from bundle.errors import UserError
from bundle.lungs import lung_region
from bundle.names import BOXES, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK, RECORD, SOURCE


class LoadSlice(Transform):
    """Read the one axial slice in a file of any format as a MetaTensor (1, rows, columns): see `Scan.read`."""

    def __call__(self, path, labels: bool = False) -> MetaTensor:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; check dataset_dir and the datalist")
        scan = open_slice(path)
        if not labels:
            scan.check_values()
        return scan.read(0, labels)


def to_file_grid(pixels: np.ndarray, slice_: MetaTensor) -> np.ndarray:
    """Pixels (rows, columns) on the grid of a slice as its file stores them: rows first in a picture, x first in a volume."""
    to_plane = to_affine_nd(2, slice_.affine).numpy()
    plane = pixels.T if to_plane[0, 1] else pixels
    flipped = [axis for axis in (0, 1) if to_plane[axis, :2].sum() < 0]
    plane = np.ascontiguousarray(np.flip(plane, flipped))
    return plane if slice_.meta["picture"] else plane.T.reshape(slice_.meta["file_shape"])


class LoadSliced(MapTransform):
    """Read a record of the datalist: `image`, and the annotations it has, which must fit the image and each other.

    Adds {image, group, source} under "record". A mask becomes one {0, 1} channel for each of `segmentation_classes` (any
    non-zero value where there is one class, otherwise channel k is value k + 1), `instances` (number of boxes, rows, columns).
    """

    def __init__(self, segmentation_classes: int = 1) -> None:
        super().__init__(IMAGE)
        self.segmentation_classes = segmentation_classes
        self.load = LoadSlice()

    def __call__(self, record):
        sample = dict(record)
        image_path = str(record[IMAGE])
        sample[RECORD] = {IMAGE: image_path, GROUP: record.get(GROUP, image_path), SOURCE: record.get(SOURCE, "unknown")}
        sample[IMAGE] = image = self.load(record[IMAGE])
        if MASK in record:
            empty = record[MASK] == EMPTY_MASK
            mask = torch.zeros_like(image.as_tensor()) if empty else self._labels(record, MASK, image)
            values = range(1, self.segmentation_classes + 1)
            if len(values) > 1 and not set(found := mask.unique().tolist()) <= {0, *values}:
                raise UserError(f"{record[MASK]}: found the values {found}, expected 0 and {', '.join(map(str, values))}")
            channels = [mask > 0] if len(values) == 1 else [mask == value for value in values]
            sample[MASK] = MetaTensor(torch.cat(channels).float(), affine=image.affine)
        if BOXES in record:
            sample[BOXES] = torch.as_tensor(record[BOXES], dtype=torch.float32).reshape(-1, 4)
            sample.pop(INSTANCES, None)
            if INSTANCES in record and len(sample[BOXES]):
                labels = self._labels(record, INSTANCES, image)
                masks = torch.stack([labels[0] == n + 1 for n in range(len(sample[BOXES]))])
                _check_instances(record[INSTANCES], labels, masks, boxes_on_grid(sample[BOXES], image))
                sample[INSTANCES] = MetaTensor(masks.float(), affine=image.affine)
        return sample

    def _labels(self, record, key: str, image: MetaTensor) -> torch.Tensor:
        labels, path = self.load(record[key], labels=True), record[IMAGE]
        if labels.shape != image.shape:
            found, expected = tuple(labels.shape[1:]), tuple(image.shape[1:])
            raise UserError(f"{record[key]}: found {key} of {found} rows and columns, expected {expected} as in {path}")
        turned = not torch.equal(labels.affine, image.affine)
        if turned and image.meta["picture"]:
            found = f"found a header that turns the {key}, while {path} has none"
            raise UserError(f"{record[key]}: {found}, expected a picture as {key}")
        turned &= all(item.meta["spacing"] for item in (labels, image))
        if turned and (np.abs(labels.meta["ends"] - image.meta["ends"])[:, :2] > max(image.meta["spacing"])).any():
            raise turned_elsewhere(record[key], key, path)
        return torch.tensor(labels_of(labels), dtype=torch.float32)[None]


def turned_elsewhere(path, kind: str, image_path) -> UserError:
    found = f"found a header that turns the {kind} otherwise than {image_path} and lays it elsewhere"
    expected = "expected the same place in space; if their arrays agree as stored, give it the affine of the image"
    return UserError(f"{path}: {found}, {expected}")


def _check_instances(path, labels: torch.Tensor, masks: torch.Tensor, boxes: torch.Tensor) -> None:
    expected = "expected n + 1 on the object of boxes[n], and 0 elsewhere"
    if missing := [n + 1 for n, mask in enumerate(masks) if not mask.any()]:
        raise UserError(f"{path}: found no pixel of value {missing}, {expected}")
    if labels.max() > len(boxes):
        raise UserError(f"{path}: found the value {int(labels.max())} beside {len(boxes)} boxes, {expected}")
    extents = torch.stack([_extent(mask) for mask in masks])
    apart = (torch.minimum(extents, boxes)[:, 2:] <= torch.maximum(extents, boxes)[:, :2]).any(1)
    if apart.any():
        n = int(apart.nonzero()[0, 0])
        raise UserError(f"{path}: found the value {n + 1} outside of boxes[{n}], {expected}")


class ScaleIntensityd(MapTransform):
    """Bring a slice to [0, 1]: HU through a window (low, high), pictures by their own 0.5th and 99.5th percentile.

    The values that became 0 and 1 are kept in `meta` as "intensity_range".
    """

    def __init__(self, keys: KeysCollection, window: tuple[float, float]) -> None:
        super().__init__(keys)
        if len(window) != 2 or window[0] >= window[1]:
            raise UserError(f"window: found {list(window)}, expected [low, high] in HU with low < high")
        self.window = window

    def __call__(self, data):
        data = dict(data)
        for key in self.keys:
            image = data[key]
            low, high = self.window
            if not image.meta.get("hounsfield"):
                low, high = np.percentile(image.numpy(), (0.5, 99.5))
            data[key] = ((image - low) / max(high - low, 1e-6)).clamp(0, 1)
            data[key].meta["intensity_range"] = (float(low), float(high))
        return data


class KeepLungd(MapTransform):
    """Blacken what is outside of the lungs (`keep` "lung") or the lungs ("rest") of an image in [0, 1]."""

    def __init__(self, keys: KeysCollection, keep: str) -> None:
        super().__init__(keys)
        if keep not in ("lung", "rest"):
            raise UserError(f"keep: found {keep!r}, expected lung or rest")
        self.keep = keep

    def __call__(self, data):
        data = dict(data)
        for key in self.keys:
            lung = _lung(data[key])
            data[key] = data[key] * (lung if self.keep == "lung" else ~lung)
        return data


class RandKeepLungd(RandomizableTransform, KeepLungd):
    """Blacken everything outside lungs, lesions and boxes at random, so that a classifier cannot use table, arms or captions.

    A slice stays as it is if it has no lung, or if more than 5 % of its lesions and boxes lie outside the lungs.
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.5) -> None:
        KeepLungd.__init__(self, keys, "lung")
        RandomizableTransform.__init__(self, prob)

    def __call__(self, data):
        self.randomize(None)
        data = dict(data)
        for key in self.keys if self._do_transform else ():
            lung, marked = _lung(data[key]), _marked(data, data[key])
            if lung.any() and (marked & ~lung).sum() <= 0.05 * marked.sum():
                data[key] = data[key] * (lung | marked)
        return data


def _lung(image: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.stack([lung_region(channel) for channel in image.numpy()]))


def _marked(data: Mapping, image: MetaTensor) -> torch.Tensor:
    """Pixels of lesions and boxes, bool (1, rows, columns); boxes are those of the stored slice."""
    marked = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
    if MASK in data:
        marked[0] = plain(data[MASK]).bool().any(0)
    if len(data.get(BOXES, ())):
        for x1, y1, x2, y2 in boxes_on_grid(data[BOXES], image).round().int().clamp(min=0).tolist():
            marked[:, y1:y2, x1:x2] = True
    return marked


class FollowImaged(MapTransform):
    """Bring boxes to the pixel grid of the image after any affine transforms of MONAI, through the inverse of its affine.

    Where instance masks exist, their extent is taken instead, which stays tight under rotation. Boxes are clipped to the
    image; those thinner than `min_size` pixels are dropped, with their instance.
    """

    def __init__(self, min_size: float = 1.0) -> None:
        super().__init__(BOXES, allow_missing_keys=True)
        self.min_size = min_size

    def __call__(self, sample):
        if BOXES not in sample:
            return sample
        sample = dict(sample)
        image, boxes = sample[IMAGE], sample[BOXES]
        masks = None if len(boxes) else torch.zeros(0, *image.shape[-2:], dtype=torch.bool)  # no box, no instance
        if INSTANCES in sample:
            masks = sample[INSTANCES].as_tensor() > 0.5
        boxes = boxes_on_grid(boxes, image) if INSTANCES not in sample else torch.stack([_extent(mask) for mask in masks])
        boxes = clip_boxes_to_image(boxes, image.shape[-2:])
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= self.min_size).all(1)
        sample[BOXES] = boxes[kept]
        if masks is not None:
            sample[INSTANCES] = masks[kept].to(torch.uint8)
        return sample


def boxes_on_grid(boxes: torch.Tensor, image: MetaTensor) -> torch.Tensor:
    """Boxes (N, 4) of the stored slice on the pixel grid of an image that transforms have made of it."""
    return move_boxes(boxes, torch.linalg.inv(to_affine_nd(2, image.affine)))


def move_boxes(boxes: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Hulls (N, 4) of boxes (N, 4) x1 y1 x2 y2, x = column, after an affine map (3, 3) of (row, column), as MetaTensor's."""
    x, y = boxes[:, [0, 2]], boxes[:, [1, 3]]
    # Edges of pixel k lie at k - 0.5 and k + 0.5 of the affine's coordinates, whose integers are pixel centres.
    corners = torch.stack([y[:, [0, 0, 1, 1]], x[:, [0, 1, 0, 1]]], -1) - 0.5
    matrix = torch.as_tensor(matrix).to(corners)
    points = corners @ matrix[:2, :2].T + matrix[:2, 2] + 0.5
    low, high = points.amin(1), points.amax(1)
    return torch.stack([low[:, 1], low[:, 0], high[:, 1], high[:, 0]], 1)


def _extent(mask: torch.Tensor) -> torch.Tensor:
    """Box [x1, y1, x2, y2] of a boolean mask (rows, columns); zeros if it is empty."""
    if not mask.any():
        return torch.zeros(4)
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]).float()
