"""Transforms that MONAI does not have: reading one slice of any format, and boxes that follow the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ITKReader, MetaTensor, NibabelReader, PILReader
from monai.data.utils import to_affine_nd
from monai.transforms import LoadImage, MapTransform, Orientation, Transform

from bundle.tasks import BOXES, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK, RECORD, SOURCE

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# Formats whose values are Hounsfield units and whose header tells the orientation.
VOLUMES = {(".nii", ".nii.gz"): NibabelReader, (".dcm", ".mhd", ".mha", ".nrrd"): ITKReader}


def _to_grey(image):
    """8-bit modes become luminance; 16-bit and floating-point pictures keep their depth."""
    return image if image.mode.startswith(("I", "F")) else image.convert("L")


class LoadSlice(Transform):
    """Read one axial slice as a MetaTensor (1, rows, columns), rows to posterior, columns to the patient's left.

    Pictures (PNG, JPEG, BMP, TIFF of any mode) are read as they lie. NIfTI, DICOM, MetaImage and NRRD slices are turned
    to LPS by their header. `meta` holds "filename_or_obj" and "hounsfield" (True where the values are HU).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it cannot be read, is not a single slice, or holds NaN or infinite pixels.
    """

    def __call__(self, path) -> MetaTensor:
        path = str(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file; check dataset_dir and the datalist")
        suffix = "".join(Path(path).suffixes[-2:]).lower()
        reader = next((r for names, r in VOLUMES.items() if suffix.endswith(names)), None)
        if reader is None and not suffix.endswith(PICTURES):
            reader = ITKReader  # DICOM files often have no extension
        try:
            image = self._read(path, reader)
        except Exception as error:  # readers raise anything: one line instead of a library's traceback
            reason = str(error).strip().splitlines()
            raise ValueError(f"{path}: cannot be read ({reason[-1] if reason else type(error).__name__})") from None
        image = image.squeeze(-1) if image.ndim == 4 and image.shape[-1] == 1 else image
        if image.ndim != 3 or image.shape[0] != 1:
            raise ValueError(f"{path}: found shape {tuple(image.shape[1:])}, expected a single grey slice")
        if not torch.isfinite(image).all():
            raise ValueError(f"{path}: found NaN or infinite pixels, expected finite values")
        # MONAI's readers put x (the column) first; rows first is what networks and torchvision's boxes use.
        pixels = image.as_tensor().transpose(1, 2).contiguous()
        return MetaTensor(pixels, affine=torch.eye(3), meta={"filename_or_obj": path, "hounsfield": reader is not None})

    @staticmethod
    def _read(path: str, reader) -> MetaTensor:
        if reader is None:
            image = LoadImage(PILReader(converter=_to_grey), image_only=True, ensure_channel_first=True)(path)
            return image[:1]
        image = LoadImage(reader(), image_only=True, ensure_channel_first=True)(path)
        if image.ndim == 3:  # a slice without its third axis, as nibabel gives 2D files
            image = MetaTensor(image.as_tensor()[..., None], affine=image.affine)
        return Orientation(axcodes="LPS", labels=None)(image)


class LoadSliced(MapTransform):
    """Read a record of the datalist: `image`, and the annotations it has.

    Adds {image, group, source} under "record". A mask of "empty" becomes zeros; a mask becomes one {0, 1} channel for each
    of `segmentation_classes` (any non-zero value where there is one class, otherwise channel k is value k + 1);
    `instances` becomes uint8 (number of boxes, rows, columns).

    Args:
        segmentation_classes: number of lesion channels.

    Raises:
        ValueError: naming the files, if the mask or the instances have another size than the image.
    """

    def __init__(self, segmentation_classes: int = 1) -> None:
        super().__init__(IMAGE)
        self.segmentation_classes = segmentation_classes
        self.load = LoadSlice()

    def __call__(self, record):
        sample = dict(record)
        image_path = str(record[IMAGE])
        sample[RECORD] = {
            IMAGE: image_path,
            GROUP: record.get(GROUP, image_path),
            SOURCE: record.get(SOURCE, "unknown"),
        }
        sample[IMAGE] = image = self.load(record[IMAGE])
        if MASK in record:
            empty = record[MASK] == EMPTY_MASK
            mask = torch.zeros_like(image.as_tensor()) if empty else self._labels(record, MASK, image)
            values = range(1, self.segmentation_classes + 1)
            channels = [mask > 0] if self.segmentation_classes == 1 else [mask == value for value in values]
            sample[MASK] = MetaTensor(torch.cat(channels).float(), affine=image.affine)
        if BOXES in record:
            sample[BOXES] = torch.as_tensor(record[BOXES], dtype=torch.float32).reshape(-1, 4)
            sample.pop(INSTANCES, None)
            if INSTANCES in record and len(sample[BOXES]):
                labels = self._labels(record, INSTANCES, image)
                masks = [labels[0] == n + 1 for n in range(len(sample[BOXES]))]
                sample[INSTANCES] = MetaTensor(torch.stack(masks).float(), affine=image.affine)
        return sample

    def _labels(self, record, key: str, image: MetaTensor) -> torch.Tensor:
        labels = self.load(record[key]).as_tensor()
        if labels.shape != image.shape:
            found, expected = tuple(labels.shape[1:]), tuple(image.shape[1:])
            raise ValueError(
                f"{record[key]}: found {key} of {found} rows and columns, expected {expected} as in {record[IMAGE]}"
            )
        return labels


class ScaleIntensityd(MapTransform):
    """Bring a slice to [0, 1]: Hounsfield units through a window, pictures by their own 0.5th and 99.5th percentile.

    Args:
        window: lowest and highest value shown, in HU.
    """

    def __init__(self, keys: KeysCollection, window: tuple[float, float] = (-1350.0, 150.0)) -> None:
        super().__init__(keys)
        if window[0] >= window[1]:
            raise ValueError(f"window: found {list(window)}, expected [low, high] in HU with low < high")
        self.window = window

    def __call__(self, data):
        data = dict(data)
        for key in self.keys:
            image = data[key]
            low, high = self.window
            if not image.meta.get("hounsfield"):
                low, high = np.percentile(image.numpy(), (0.5, 99.5))
            data[key] = ((image - low) / max(high - low, 1e-6)).clamp(0, 1)
        return data


class FollowImaged(MapTransform):
    """Bring boxes to the pixel grid of the image after any affine transforms of MONAI (resize, pad, flip, rotate, zoom).

    The image's affine tells where every pixel came from; corners of the stored boxes are sent through it. Where instance
    masks exist, their extent is taken instead, which stays tight under rotation. Boxes are clipped to the image; those
    thinner than `min_size` pixels are dropped, with their instance.

    Args:
        min_size: smallest width and height in pixels of the image.
    """

    def __init__(self, min_size: float = 1.0) -> None:
        super().__init__(BOXES, allow_missing_keys=True)
        self.min_size = min_size

    def __call__(self, sample):
        if BOXES not in sample:
            return sample
        sample = dict(sample)
        image, boxes = sample[IMAGE], sample[BOXES]
        rows, columns = image.shape[-2:]
        masks = None
        if INSTANCES in sample:
            masks = sample[INSTANCES].as_tensor() > 0.5
            boxes = torch.stack([_extent(mask) for mask in masks])
        elif len(boxes) == 0:  # nothing there: no instance either
            masks = torch.zeros(0, rows, columns, dtype=torch.bool)
        else:
            boxes = self._through_affine(boxes, image)
        limit = boxes.new_tensor([columns, rows, columns, rows])
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= self.min_size).all(1)
        sample[BOXES] = boxes[kept]
        if masks is not None:
            sample[INSTANCES] = masks[kept].to(torch.uint8)
        return sample

    @staticmethod
    def _through_affine(boxes: torch.Tensor, image: MetaTensor) -> torch.Tensor:
        x, y = boxes[:, [0, 2]], boxes[:, [1, 3]]
        # Edges of pixel k lie at k - 0.5 and k + 0.5 of the affine's coordinates, whose integers are pixel centres.
        corners = torch.stack([y[:, [0, 0, 1, 1]], x[:, [0, 1, 0, 1]]], -1) - 0.5
        to_pixels = torch.linalg.inv(to_affine_nd(2, image.affine)).to(corners)
        points = corners @ to_pixels[:2, :2].T + to_pixels[:2, 2] + 0.5
        low, high = points.amin(1), points.amax(1)
        return torch.stack([low[:, 1], low[:, 0], high[:, 1], high[:, 0]], 1)


def _extent(mask: torch.Tensor) -> torch.Tensor:
    """Box [x1, y1, x2, y2] of a boolean mask (rows, columns); zeros if it is empty."""
    if not mask.any():
        return torch.zeros(4)
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]).float()
