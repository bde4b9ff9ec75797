"""NIfTI files written plane by plane, so that no volume is ever held in memory."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np


class NiftiFile:
    """A volume that grows on disk: uncompressed while planes are put in, compressed at the end.

    The planes may lie along any array axis. Memory is that of one plane.

    Args:
        path: of the finished file, ending in .nii.gz.
        shape: of the volume, along the file's own axes.
        affine: (4, 4) from voxel index to RAS in mm, or None where the geometry is not known.
        dtype: of the stored values.
        slope: what a stored 1 means: a reader gets stored * slope.
        oriented: say how the volume lies in space; otherwise of the affine its spacing alone.
    """

    def __init__(
        self, path, shape: Sequence[int], affine: np.ndarray | None, dtype=np.uint8, slope: float = 1.0, oriented: bool = True
    ) -> None:
        self.path, self.shape, self.dtype = Path(path), tuple(shape), np.dtype(dtype)
        self.raw = self.path.with_suffix("")
        header = nibabel.Nifti1Image(np.broadcast_to(self.dtype.type(0), self.shape), affine).header
        header.set_xyzt_units("mm" if affine is not None else "unknown")
        header.set_slope_inter(slope, 0)
        if not oriented:
            header.set_sform(None, code=0)
            header.set_qform(None, code=0)
        header["magic"], self.offset = b"n+1", header.single_vox_offset
        header["vox_offset"] = self.offset
        with self.raw.open("wb") as file:
            header.write_to(file)
            file.truncate(self.offset + self.dtype.itemsize * int(np.prod(self.shape)))

    def voxels(self, mode: str = "r") -> np.memmap:
        """The stored values, mapped from disk; until `finish`."""
        return np.memmap(self.raw, self.dtype, mode, self.offset, self.shape, order="F")

    def put(self, plane: np.ndarray, axis: int, index: int) -> None:
        """Store a plane, of the shape of the volume without `axis`, at `index` along it."""
        np.moveaxis(self.voxels("r+"), axis, 0)[index] = plane

    def finish(self) -> None:
        """Compress, and leave the finished file alone."""
        with self.raw.open("rb") as raw, gzip.open(self.path, "wb", compresslevel=1) as file:
            shutil.copyfileobj(raw, file, 1 << 20)
        self.raw.unlink()
