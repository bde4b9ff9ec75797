"""The size of a slice from its file's header, without its pixels."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from PIL import Image, UnidentifiedImageError


def slice_size(path) -> tuple[int, int]:
    """(columns, rows) of the one axial slice in a file of any format that `LoadSlice` reads, turned to LPS as it does.

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
                    return picture.size
            except UnidentifiedImageError:
                shape, affine = _itk_header(str(path))
        # Size of the array axis that runs most along the patient's x, y and z; a file of two axes is one slice.
        axes = nibabel.io_orientation(affine)[:, 0].tolist()
        columns, rows, slices = ((*shape, 1, 1)[axes.index(world)] for world in range(3))
    except Exception as error:  # readers raise anything: one line instead of a library's traceback
        reason = str(error).strip().splitlines()
        raise ValueError(f"cannot read {path} ({reason[-1] if reason else type(error).__name__})") from None
    if slices != 1:
        raise ValueError(f"found {slices} slices in {path}, expected a single one")
    return columns, rows


def _itk_header(path: str) -> tuple[tuple[int, ...], np.ndarray]:
    """Size along the array axes and their directions (4, 4), from the header of a DICOM, MetaImage or NRRD file."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    dimensions, affine = reader.GetDimension(), np.eye(4)
    affine[:dimensions, :dimensions] = np.reshape(reader.GetDirection(), (dimensions, dimensions))
    return reader.GetSize(), affine
