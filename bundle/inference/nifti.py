"""Volumes of NIfTI that grow plane by plane, compressed in memory; a disk that fills up cannot harm them."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image


class Volume:
    """Voxels on the grid of a scan, stored as the stream of a .nii.gz file, so that they take as much memory as that file.

    Args:
        affine: (4, 4) from voxel index to RAS in mm, or None where the geometry is not known.
        axis: array axis along which the planes are appended, from first to last.
        slope: what a stored 1 means.
        oriented: False if the header states spacing alone, not how the volume lies in space.
        picture_scale: factor of the values in a .png.
    """

    def __init__(
        self, shape: Sequence[int], affine, axis: int = 2, dtype=np.uint8, slope=1.0, oriented=True, picture_scale=1
    ) -> None:
        self.shape, self.axis, self.dtype, self.picture_scale = tuple(shape), axis, np.dtype(dtype), picture_scale
        header = nibabel.Nifti1Image(np.broadcast_to(self.dtype.type(0), self.shape), affine).header
        header.set_xyzt_units("mm" if affine is not None else "unknown")
        header.set_slope_inter(slope, 0)
        if not oriented:
            header.set_sform(None, code=0)
            header.set_qform(None, code=0)
        header["magic"], header["vox_offset"] = b"n+1", header.single_vox_offset
        self.header = header.binaryblock.ljust(header.single_vox_offset, b"\0")
        self._compressor = zlib.compressobj(level=1, wbits=31)  # 31: gzip
        self._parts = [self._compressor.compress(self.header)]

    def append(self, plane: np.ndarray) -> None:
        """Store the next plane, of the shape of the volume without `axis`."""
        self._parts.append(self._compressor.compress(plane.astype(self.dtype).tobytes("F")))

    def voxels(self) -> np.ndarray:
        """The stored values as one array."""
        size = len(self.header) + int(np.prod(self.shape)) * self.dtype.itemsize
        stored = np.frombuffer(zlib.decompress(self._stream(), 31, size), self.dtype, offset=len(self.header))
        planes = stored.reshape([*np.delete(self.shape, self.axis), self.shape[self.axis]], order="F")
        return np.moveaxis(planes, -1, self.axis)

    def image(self) -> nibabel.Nifti1Image:
        """The stored values as an image in memory."""
        header = nibabel.Nifti1Header(self.header[:348])
        return nibabel.Nifti1Image(self.voxels().copy("K"), header.get_best_affine(), header)

    def write(self, path) -> None:
        """Write a file that ends in .nii.gz, or the one slice of a picture as a .png."""
        if Path(path).suffix == ".png":
            Image.fromarray((self.voxels()[..., 0].T * self.picture_scale).astype(self.dtype)).save(path)
        elif self.axis == 2:  # the order in which the planes were appended is that of the file
            Path(path).write_bytes(self._stream())
        else:
            Path(path).write_bytes(gzip.compress(self.header + self.voxels().tobytes("F"), 1, mtime=0))

    def _stream(self) -> bytes:
        return b"".join([*self._parts, self._compressor.copy().flush()])
