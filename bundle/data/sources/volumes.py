"""Layouts of volumes: their axial slices are exported as NIfTI files of one slice, in HU, beside the datalist."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff

from bundle.data.labels import whole_labels
from bundle.data.sources.common import Records, lesions, read_rows, write_picture
from bundle.data.transforms import turned_elsewhere
from bundle.data.volumes import LPS, NO_HU, Scan, open_scan
from bundle.errors import UserError
from bundle.names import BOXES, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK

logger = logging.getLogger(__name__)


class Volume(NamedTuple):
    """A volume turned to LPS."""

    pixels: np.ndarray  # (slices, rows, columns)
    affine: np.ndarray  # (4, 4) from (row, column, slice) to LPS in mm
    scan: Scan

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm between columns, rows and slices."""
        return tuple(nibabel.affines.voxel_sizes(self.affine)[[1, 0, 2]].tolist())


def read_volume(path: Path, labels: bool = False) -> Volume:
    """Read a volume, or a mask of `labels`, whose axes are at right angles."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a volume")
    scan = open_scan(path)
    if scan.affine is None:
        raise UserError(f"{path}: found a {scan.kind} without geometry, expected a volume")
    axes = scan.affine[:3, :3] / nibabel.affines.voxel_sizes(scan.affine)
    if not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3):
        raise UserError(f"{path}: found a sheared grid, expected axes at right angles; resample it")
    if not labels:
        scan.check_values()
    if not (labels or scan.hounsfield):
        raise UserError(f"{path}: found {scan.warnings[-1].removesuffix(NO_HU)}, expected HU")
    pixels = apply_orientation(scan.read_volume(labels), scan.turn).transpose(2, 0, 1)
    return Volume(pixels, LPS @ scan.affine @ inv_ornt_aff(scan.turn, scan.shape), scan)


def read_annotated(path: Path, mask_path: Path) -> tuple[Volume, np.ndarray]:
    """A volume and the pixels of its mask, if they have one size and lie at one place."""
    volume, mask = read_volume(path), read_volume(mask_path, labels=True)
    if mask.pixels.shape != volume.pixels.shape:
        raise UserError(f"{mask_path}: found shape {mask.pixels.shape}, expected {volume.pixels.shape} as in {path}")
    turned = not np.array_equal(mask.scan.turn, volume.scan.turn)
    if turned and (np.abs(mask.scan.ends - volume.scan.ends) > volume.spacing).any():
        raise turned_elsewhere(mask_path, MASK, path)
    return volume, np.ceil(whole_labels(mask.pixels, mask_path))


def write_slice(pixels: np.ndarray, spacing: tuple[float, ...], path: Path) -> str:
    """Write (rows, columns) as a one-slice int16 NIfTI in LPS, spacing (x, y, z) in mm; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])  # NIfTI's world is RAS
    stored = np.clip(np.round(pixels), -32768, 32767).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(stored.T[..., None], affine), path)
    return str(path)


def _readable(paths: Iterable[Path], read: Callable[[Path], tuple]) -> Iterator[tuple[Path, tuple]]:
    """(path, what `read` returns for it) of the files that can be read; a warning names each of the others."""
    for path in paths:
        try:
            yield path, read(path)
        except UserError as error:
            logger.warning(f"{error}; this volume is left out")


def with_as_many_free(positive: list[int], free: list[int]) -> list[int]:
    """The slices with a lesion and as many without, evenly spaced over those there are."""
    count = min(len(free), len(positive))
    return sorted(positive + [free[round(i)] for i in np.linspace(0, len(free) - 1, count)] if count else positive)


def medseg_nifti(folder: Path, export: Path) -> Records:
    """The COVID-19 CT segmentation set as published. Patients are not named: every slice is a group."""
    volume, masks = read_annotated(folder / "tr_im.nii.gz", folder / "tr_mask.nii.gz")
    masks = np.where(masks == 3, 0, masks)  # pleural effusion is no infection
    for index, (slice_, mask) in enumerate(zip(volume.pixels, masks)):
        name = f"{index:03d}"
        record = {IMAGE: write_slice(slice_, volume.spacing, export / f"{name}.nii.gz"), MASK: EMPTY_MASK, GROUP: name}
        if mask.any():
            record[MASK] = write_picture(np.uint8(mask.clip(max=255)), export / f"{name}_mask.png")
        yield record


def msd_lung(folder: Path, export: Path) -> Records:
    """MSD Task06_Lung: slices whose tumour has a part of at least `MIN_LESION_PIXELS`, and as many free of tumour."""
    labels = sorted(path for path in (folder / "labelsTr").glob("*.nii.gz") if not path.name.startswith("."))
    for label, (volume, masks) in _readable(labels, lambda label: read_annotated(folder / "imagesTr" / label.name, label)):
        found = {index: lesions(mask) for index, mask in enumerate(masks) if mask.any()}
        free = [index for index in range(len(masks)) if index not in found]
        tumours = {index: one for index, one in found.items() if one[1]}
        yield from _exported(volume, export / label.name.removesuffix(".nii.gz"), tumours, free)


def _exported(volume: Volume, folder: Path, found: dict[int, tuple], free: list[int]) -> Records:
    """The slices with objects, index -> (instances or None, boxes), and as many free ones, written into a group's folder."""
    for index in with_as_many_free(sorted(found), free):
        image, (instances, boxes) = folder / f"{index:03d}.nii.gz", found.get(index, (None, []))
        record = {IMAGE: write_slice(volume.pixels[index], volume.spacing, image), BOXES: boxes, GROUP: folder.name}
        if instances is not None:
            record[INSTANCES] = write_picture(instances, image.with_name(f"{index:03d}_instances.png"))
        yield record


def luna16(folder: Path, export: Path) -> Records:
    """LUNA16, whose annotations.csv has centres in mm LPS and diameters.

    A nodule is taken as a ball: the slices that cut it at half of its diameter or more get its box there; as many slices
    that touch no nodule get none; those between are left out, and scans without nodules.
    """
    nodules: dict[str, list[tuple[float, ...]]] = {}
    columns = ("coordx", "coordy", "coordz", "diameter_mm")
    for place, row in read_rows(folder / "annotations.csv", ("seriesuid", *columns)):
        try:
            nodules.setdefault(row["seriesuid"], []).append(tuple(float(row[name]) for name in columns))
        except ValueError as error:
            raise UserError(f"{place}: {error}, expected numbers in {', '.join(columns)}") from None
    scans = [path for path in sorted(folder.rglob("*.mhd")) if path.stem in nodules]
    scans = [path for path in scans if not any(parent.name.startswith("seg-lungs") for parent in path.parents)]
    for path, volume in _readable(scans, read_volume):
        boxes, touched = _ball_boxes(nodules[path.stem], volume)
        free = [index for index in range(len(volume.pixels)) if index not in touched]
        yield from _exported(volume, export / path.stem, {index: (None, found) for index, found in boxes.items()}, free)


def _ball_boxes(nodules: list[tuple[float, ...]], volume: Volume) -> tuple[dict[int, list], set[int]]:
    """Slice -> boxes of the balls (x, y, z, diameter in mm) cut there, and the slices that any ball touches."""
    (dx, dy, dz), (slices, rows, columns) = volume.spacing, volume.pixels.shape
    to_voxel = np.linalg.inv(volume.affine)
    boxes: dict[int, list] = {}
    touched, cut_thin = set(), set()
    for x, y, z, diameter in nodules:
        row, column, centre = nibabel.affines.apply_affine(to_voxel, (x, y, z))
        radii = np.sqrt(np.maximum((diameter / 2) ** 2 - ((np.arange(slices) - centre) * dz) ** 2, 0))
        for index in np.flatnonzero(radii).tolist():
            touched.add(index)
            radius = radii[index]
            box = [column + 0.5 - radius / dx, row + 0.5 - radius / dy, column + 0.5 + radius / dx, row + 0.5 + radius / dy]
            box = [round(float(np.clip(value, 0, limit)), 2) for value, limit in zip(box, (columns, rows) * 2)]
            if radius >= diameter / 4 and box[0] < box[2] and box[1] < box[3]:
                boxes.setdefault(index, []).append(box)
            else:
                cut_thin.add(index)
    return {index: found for index, found in boxes.items() if index not in cut_thin}, touched
