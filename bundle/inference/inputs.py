"""What `Model.predict` takes, as a scan: paths, images of nibabel and SimpleITK, arrays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import nibabel
import numpy as np

from bundle.data.volumes import NO_THICKNESS, NiftiScan, Scan, find_scans, itk_affine
from bundle.errors import UserError


class ArrayScan(Scan):
    """A volume (x, y, z) in HU, z may be absent, or without an affine a picture (columns, rows), in memory.

    `affine` (4, 4) leads from voxel index to RAS in mm. `window`: the HU that 0 and 1 (in 8 bits 255) stand for, if not HU.
    """

    def __init__(self, voxels: np.ndarray, affine: np.ndarray | None, window: Sequence[float] | None = None) -> None:
        super().__init__("array", "array", voxels.shape, affine, files=[])
        self.voxels, self.window = voxels.reshape(self.shape), window
        self.stamp = _hash(repr((self.shape, None if affine is None else affine.tolist(), window)).encode(), voxels)
        if affine is None:
            self.kind, self.hounsfield, self.input_axes = "picture", False, (1, 0, 2)
        elif voxels.ndim < 3:
            self.warnings.append(NO_THICKNESS)

    def _plane(self, index: int) -> np.ndarray:
        plane = np.moveaxis(self.voxels, self.axis, 0)[index]
        if self.window is None:
            return plane
        low, high = self.window
        return low + plane.astype(np.float32) * ((high - low) / (255 if plane.dtype == np.uint8 else 1))


def as_scan(source, spacing: Sequence[float] | None = None, window: Sequence[float] | None = None) -> Scan:
    """The one scan in what a user passes to `Model.predict`, whose docstring describes it."""
    kind = type(source).__module__.split(".")[0]
    is_array = hasattr(source, "__array__") and not isinstance(source, Scan) and kind != "nibabel"
    if not is_array and (spacing is not None or window is not None):
        raise UserError("spacing, window: found one with something else than an array, expected it with an array only")
    if isinstance(source, Scan):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _only_scan(source)
    if isinstance(source, nibabel.spatialimages.SpatialImage):
        return _from_nibabel(source)
    if kind == "SimpleITK":
        return _from_simpleitk(source)
    if not is_array:
        raise UserError(f"found a {type(source).__name__}, expected a path, an image of nibabel or SimpleITK, or an array")
    return _from_array(np.asarray(source), spacing, window)


def _only_scan(path) -> Scan:
    scans, failures = find_scans(path)
    if not scans:
        raise UserError(failures[0]["reason"])
    scans[0].warnings += [f"left out {len(failures)} files that cannot be read"] if failures else []
    if len(scans) > 1:
        names = ", ".join(scan.name for scan in scans[:5]) + ", …" * (len(scans) > 5)
        raise UserError(f"{path}: found {len(scans)} scans ({names}), expected one; `chestct predict` takes a folder of scans")
    return scans[0]


def _from_nibabel(source: nibabel.spatialimages.SpatialImage) -> Scan:
    if source.affine is None:
        raise UserError("found an image of nibabel without an affine, expected one with it")
    image, file = nibabel.Nifti1Image.from_image(source), source.get_filename() or "image"
    scan = NiftiScan(os.path.basename(file), file, image)
    data = [] if nibabel.is_proxy(image.dataobj) else [np.asarray(image.dataobj)]
    scan.stamp = _hash(scan.stamp.encode() + image.header.binaryblock, *data)
    return scan


def _from_simpleitk(image) -> Scan:
    import SimpleITK

    if image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(f"found {image.GetNumberOfComponentsPerPixel()} values in a pixel, expected one")
    if image.GetDimension() not in (2, 3):
        raise UserError(f"found an image of {image.GetDimension()} dimensions, expected 2 or 3")
    scan = ArrayScan(SimpleITK.GetArrayViewFromImage(image).T, itk_affine(image))
    scan.image = image  # a view does not keep the voxels in memory
    return scan


def _from_array(array: np.ndarray, spacing: Sequence[float] | None, window: Sequence[float] | None) -> Scan:
    if array.dtype.kind not in "iuf" or array.ndim not in (2, 3) or 0 in array.shape:
        axes = "(slices, rows, columns) or (rows, columns)"
        raise UserError(f"array: found {array.dtype} of shape {array.shape}, expected numbers, {axes}")
    if spacing is None:
        if array.ndim == 3 or array.dtype != np.uint8 or window is not None:
            raise UserError("spacing: found none, expected mm between slices, rows and columns; an 8-bit picture needs none")
        return ArrayScan(array.T, None)
    sides = np.asarray(spacing, float)
    if sides.shape != (array.ndim,) or not (np.isfinite(sides).all() and (sides > 0).all()):
        raise UserError(f"spacing: found {spacing}, expected {array.ndim} numbers in mm above 0, in the order of the axes")
    if window is not None:
        if len(window) != 2 or not window[0] < window[1]:
            raise UserError(f"window: found {window}, expected two numbers in HU, the lower one first")
        if array.dtype != np.uint8 and (array.dtype.kind != "f" or array.min() < 0 or array.max() > 1):
            found = f"{array.dtype} values from {array.min()} to {array.max()}"
            raise UserError(f"window: found {found}, expected 8-bit values or 0 to 1; leave window out if the values are HU")
    affine = np.diag([-sides[-1], -sides[-2], *sides[:-2], 1, 1][:4])  # columns run to the left, rows to posterior
    scan = ArrayScan(array.T, affine, window)  # x = column in boxes
    scan.input_axes = (1, 0, 2) if array.ndim == 2 else (2, 1, 0)
    return scan


def _hash(description: bytes, *arrays: np.ndarray) -> str:
    found = hashlib.sha256(description)
    for array in arrays:
        found.update(array.ravel("K"))  # no copy of a volume
    return found.hexdigest()
