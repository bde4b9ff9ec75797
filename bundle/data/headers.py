"""The size of a slice from its file's header, without its pixels."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import SimpleITK as sitk
from PIL import Image, UnidentifiedImageError


class SliceSize(NamedTuple):
    """(columns, rows) of a slice: `stored` on the grid of its file, as boxes are; `turned` to LPS, as it is read."""

    stored: tuple[int, int]
    turned: tuple[int, int]


def slice_size(path) -> SliceSize:
    """Size of the one axial slice in a file of any format that `bundle.data.transforms.LoadSlice` reads.

    Raises:
        ValueError: if the header cannot be read, or tells of more than one slice.
    """
    try:
        if Path(path).name.lower().endswith((".nii", ".nii.gz")):
            image = nibabel.load(path)
            shape, affine = image.shape, image.affine
        else:
            try:
                with Image.open(path) as picture:
                    return SliceSize(picture.size, picture.size)
            except UnidentifiedImageError:
                shape, affine = _itk_header(str(path))
        shape = (*shape, 1)[:3]  # a file of two axes is one slice
        # For each axis of the array, the axis of the patient (x, y, z) that it runs along.
        along = nibabel.io_orientation(affine)[:, 0].tolist()
        slices = shape[along.index(2)]
    except Exception as error:  # readers raise anything: one line instead of a library's traceback
        reason = str(error).strip().splitlines()
        raise ValueError(f"cannot read {path} ({reason[-1] if reason else type(error).__name__})") from None
    if slices != 1:
        raise ValueError(f"found {slices} slices in {path}, expected a single one")
    first, second = (axis for axis in range(3) if along[axis] != 2)
    stored = shape[first], shape[second]
    return SliceSize(stored, stored if along[first] == 0 else stored[::-1])


def _itk_header(path: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Size along the array axes and their directions (4, 4), from the header of a DICOM, MetaImage or NRRD file."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    dimensions, affine = reader.GetDimension(), np.eye(4)
    affine[:dimensions, :dimensions] = np.reshape(reader.GetDirection(), (dimensions, dimensions))
    return reader.GetSize(), affine
