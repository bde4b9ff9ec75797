"""Read any file as a scan: axial slices on the grid of the file, one by one. Nothing else in the package reads images."""

from __future__ import annotations

import glob
import gzip
import itertools
import logging
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import torch
from monai.data import MetaTensor
from nibabel import orientations
from PIL import Image, ImageOps
from tqdm import tqdm

from bundle.data import series
from bundle.data.series import AIR, DIRECTORY, Frame, reaching_border
from bundle.errors import UserError, no_warnings
from bundle.files import text_hash
from bundle.lungs import TISSUE

logger = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
NIFTI = (".nii", ".nii.gz")
PAIRS = (".hdr", ".hdr.gz")  # of NIfTI; the pixels are in a file beside it
ITK = (".mhd", ".mha", ".nrrd", ".nhdr")
DICOM = (".dcm", ".ima")
EXTENSIONS = (*PICTURES, *NIFTI, *ITK, *DICOM)

# What a header may claim, so that a damaged one does not fill the memory.
MAX_SLICE_PIXELS, MAX_BYTES = 2**26, 2**32
MAX_SIDES = 100  # longer to shorter side of a slice: of a thinner one nothing is left at the size of the network
TOO_DENSE = 30000  # HU: from here on a value around the field of view is padding
WRAPPED = 2**15  # from here on up to 2**16 a value is a negative one that the file calls unsigned; 32767 may be metal
LPS = np.diag([-1.0, -1, 1, 1])  # to or from RAS
VOXEL_SIDES = 0.02, 100.0  # mm, of a CT

# First bytes of files.
GZIP, ARCHIVES = b"\x1f\x8b", (b"PK\3\4", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zX")
PICTURE_STARTS = (b"\x89PNG\r\n", b"\xff\xd8\xff")
NO_THICKNESS = "the file gives no thickness of the slice: volumes count 1 mm"
NO_GEOMETRY = "the file gives voxels of 1 mm at the origin, the default of programs: lengths and sides may be wrong"
NOT_ORIENTED = "the file gives no orientation (qform and sform codes 0): its axes are taken to run to left, posterior and head"
NO_HU = ": they are not known to be HU, the slices count as pictures"
EIGHT_BITS = f"values of 8 bits{NO_HU}"
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}  # of the units that NIfTI knows

logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # what matters is raised
logging.getLogger("nibabel").setLevel(logging.CRITICAL)


class Scan:
    """A stack of axial slices in one or several files; opened when the first slice is read.

    Args:
        name: path of its results below the output folder.
        path: its file, or the folder of its series, as messages name it.
        shape: of the grid, along the file's own axes: three.
        affine: (4, 4) from voxel index to RAS in mm; None without geometry.
        files: whose change makes it another scan; none of one in memory.

    Attributes:
        axis: array axis of `shape` that the axial slices are stacked along, the one nearest to the patient's axis.
        positions, thickness: of each slice in mm along the normal, and half the way to both neighbours; None if unknown.
        spacing: mm between rows and between columns of a slice as it is read; None if unknown.
        turn: nibabel's orientation that turns the axes of the file to rows (to posterior), columns (to the left) and slices.
        sources: (path, frame) of each slice.
        warnings: one line each, without names or ids of patients.
        stamp: text that changes when a name, size or time of the files does.

    Raises:
        UserError: in one line, if the header claims what cannot be.
    """

    kind = "volume"  # or "picture" or "dicom"
    hounsfield = True  # whether values are Hounsfield units
    oriented = True  # whether the file says how it lies in space
    input_axes = (0, 1, 2)  # of `shape`, in the order in which a user counts them: a picture has its rows first
    mode = None  # Pillow's, of a picture
    positions = thickness = spacing = _voxels = None

    def __init__(self, name: str, path, shape: Sequence[int], affine: np.ndarray | None, files: Sequence | None = None):
        self.name, self.path, self.shape = str(name), str(path), (*map(int, shape), 1, 1)[:3]
        if min(self.shape) < 1:
            raise UserError(f"found a size of {tuple(shape)}")
        self.affine = None if affine is None else np.asarray(affine, float)
        grid = LPS if affine is None else self.affine
        if not maps_to_space(grid):
            raise UserError("found an affine that does not map to space, expected voxel sizes above 0; correct the header")
        self.turn = orientations.ornt_transform(nibabel.io_orientation(grid), orientations.axcodes2ornt("PLS")).astype(int)
        self.rows, self.columns, self.axis = np.argsort(self.turn[:, 0]).tolist()
        self.warnings: list[str] = []
        if affine is not None:
            self._measure()
        sides = np.delete(self.shape, self.axis)
        if np.prod(sides, dtype=float) > MAX_SLICE_PIXELS:
            raise UserError(f"found a size of {self.shape}, expected slices of at most {MAX_SLICE_PIXELS} pixels")
        if max(sides) > MAX_SIDES * min(sides):
            size = f"{sides[0]} x {sides[1]} pixels"
            raise UserError(f"found axial slices of {size}, expected no side {MAX_SIDES} times the other")
        self.sources = [(self.path, index) for index in range(len(self))]
        self.files = [os.fspath(file) for file in ([path] if files is None else files)]
        self._seen = self._look()
        self.stamp = text_hash(repr(self._seen[0]))

    def _measure(self) -> None:
        affine, sides = self.affine, nibabel.affines.voxel_sizes(self.affine).tolist()
        if not VOXEL_SIDES[0] <= min(sides) <= max(sides) <= VOXEL_SIDES[1]:
            return self._forget_lengths(sides)
        self.spacing = sides[self.rows], sides[self.columns]
        normal = np.cross(affine[:3, self.rows], affine[:3, self.columns])
        normal *= np.sign(normal[2]) / np.linalg.norm(normal)
        step = float(affine[:3, self.axis] @ normal)
        self.positions = [float(affine[:3, 3] @ normal) + step * index for index in range(len(self))]
        self.thickness = [abs(step)] * len(self)

    def _note(self, affine: np.ndarray, flat: bool) -> None:
        """Warn of what the header of a volume does not say."""
        self.warnings += [NO_THICKNESS] * flat + [NO_GEOMETRY] * np.array_equal(np.abs(affine), np.eye(4))
        self.warnings += [EIGHT_BITS] * (not self.hounsfield)

    def _forget_lengths(self, sides: Sequence[float]) -> None:
        self.affine = self.spacing = self.positions = self.thickness = None
        self.warnings.append(f"voxels of {' x '.join(f'{side:.3g}' for side in sides)} mm: lengths are not known")

    def __len__(self) -> int:
        return self.shape[self.axis]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_voxels": None}  # every process opens its own

    @property
    def stored_size(self) -> tuple[int, int]:
        """(columns, rows) of a slice on the grid of its file, as boxes are; `size` is that of the slice as it is read."""
        return tuple(np.delete(self.shape, self.axis).tolist())

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[self.columns], self.shape[self.rows]

    @property
    def ends(self) -> np.ndarray | None:
        """Where the first and the last voxel of the view lie, in mm of RAS, one a row; None without geometry."""
        last = [self.shape[axis] - 1 for axis in (self.rows, self.columns, self.axis)]
        to_stored = orientations.inv_ornt_aff(self.turn, self.shape)
        return None if self.affine is None else nibabel.affines.apply_affine(self.affine @ to_stored, [[0, 0, 0], last])

    def _look(self) -> tuple[list[tuple], list[int]]:
        """Name, size and time of each file, and the time of the folders of a series, which is new when a file comes."""
        states = [(os.path.basename(file), (s := os.stat(file)).st_size, s.st_mtime_ns) for file in self.files]
        folders = sorted({os.path.dirname(file) or "." for file in self.files}) if len(self.files) > 2 else []
        return states, [os.stat(folder).st_mtime_ns for folder in folders]

    def check_unchanged(self) -> None:
        """Raise a UserError if files are not those that were found or a series has got others: they are still copied, say."""
        with suppress(OSError):
            if self._look() == self._seen:
                return
        raise UserError(f"{self.path}: changed while it was read, expected whole files; predict it again later")

    def close(self) -> None:
        """Free what is held; the next slice opens the file again."""
        self._voxels = None

    def check_values(self) -> None:
        """Take the values for grey ones, with a warning, if they are said to be HU and five slices have none of a lung."""
        if not self.hounsfield:
            return
        planes = [self.read_stored(int(index)) for index in np.unique(np.linspace(0, len(self) - 1, 5).round())]
        values = np.concatenate([plane[plane > AIR] for plane in planes])
        if len(values) and values.min() > TISSUE:
            self.hounsfield = False
            self.warnings.append(f"values from {values.min():g} to {values.max():g}, none of a lung{NO_HU}")

    def read(self, index: int, labels: bool = False) -> MetaTensor:
        """Read a slice, turned to LPS: rows run to posterior, columns to the patient's left; for `labels` see `read_stored`.

        Returns:
            MetaTensor (1, rows, columns) of float32. The affine (3, 3) leads from (row, column) to (y, x) of the stored slice,
            where x, the column, runs along the first of its two axes.
        """
        stored = np.expand_dims(self.read_stored(index, labels), self.axis)
        pixels = orientations.apply_orientation(stored, self.turn)[..., 0]
        x, y = (axis for axis in range(3) if axis != self.axis)
        to_stored = orientations.inv_ornt_aff(self.turn, stored.shape)[np.ix_([y, x, 3], [0, 1, 3])]
        meta = {
            "filename_or_obj": self.sources[index][0],
            "hounsfield": self.hounsfield,
            "file_shape": pixels.shape if self.kind == "picture" else stored.shape,  # of the stored slice
            "spacing": self.spacing,  # (row, column) in mm
            "ends": self.ends,
            "picture": self.kind == "picture",
            "mode": self.mode,
        }
        return MetaTensor(torch.from_numpy(pixels.copy())[None], affine=torch.as_tensor(to_stored), meta=meta)

    def read_stored(self, index: int, labels: bool = False) -> np.ndarray:
        """Read a slice as it lies in the file: float32 (x, y), the shape of the grid without `axis`.

        NaN is air, as is in HU what is below air, and what no tissue reaches around the field of view. In `labels` NaN is 0.
        A UserError names a file whose pixels cannot be read or are not finite.
        """
        file = self.sources[index][0]
        try:
            with no_warnings():
                plane = np.asarray(self._plane(index), np.float32)
        except Exception as error:  # readers raise anything: one line instead of a library's traceback
            raise unreadable(file, error) from None
        outside = np.isnan(plane)
        outside &= len(self) > 1 or not outside.all()  # NaN alone is no slice
        if self.hounsfield and not labels:
            if (plane > TOO_DENSE).any():
                plane = np.where((plane >= WRAPPED) & (plane < 2**16), plane - 2**16, plane)
                outside |= reaching_border(plane > TOO_DENSE)
            outside |= plane < AIR
        if outside.any():
            plane = np.where(outside, 0 if labels else AIR if self.hounsfield else np.nanmin(plane), plane)
        if not np.isfinite(plane).all():
            raise UserError(f"{file}: found NaN or infinite pixels, expected finite values")
        return plane

    def read_volume(self, labels: bool = False) -> np.ndarray:
        """All slices as they lie in the file: float32 of `shape`."""
        return np.stack([self.read_stored(index, labels) for index in range(len(self))], self.axis)

    def _plane(self, index: int) -> np.ndarray:
        """Values of a stored slice, (x, y)."""
        raise NotImplementedError


def maps_to_space(affine: np.ndarray) -> bool:
    return affine.shape == (4, 4) and bool(np.isfinite(affine).all()) and np.linalg.matrix_rank(affine[:3, :3]) == 3


class PictureScan(Scan):
    """A picture as a viewer shows it: one slice. 8-bit modes become luminance, deeper ones keep their depth."""

    kind, hounsfield, input_axes = "picture", False, (1, 0, 2)

    def __init__(self, name: str, path) -> None:
        with Image.open(path) as picture:
            if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # of a phone: the first one is the photograph
                raise UserError(f"found {picture.n_frames} pictures, expected one")
            self.mode = picture.mode + " compressed by JPEG" * (picture.format == "JPEG")
            turned = picture.format != "TIFF" and _orientation(picture) >= 5  # Pillow turns a TIFF itself
            super().__init__(name, path, picture.size[:: -1 if turned else 1], None)

    def _plane(self, index: int) -> np.ndarray:
        with open(self.path, "rb") as file, Image.open(file) as picture:  # by its path, Pillow maps a turned TIFF wrongly
            deep = picture.mode.startswith(("I", "F"))
            white_is_zero = deep and picture.format == "TIFF" and picture.tag_v2.get(262) == 0
            values = np.asarray(upright(picture) if deep else upright(picture).convert("L")).T
            return values.max() - values if white_is_zero else values


def upright(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation turns it."""
    return ImageOps.exif_transpose(picture) if _orientation(picture) > 1 else picture


def _orientation(picture: Image.Image) -> int:
    """EXIF's, 1 for upright; Pillow raises anything on damaged EXIF, which viewers ignore."""
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:
        return 1


class NiftiScan(Scan):
    """A NIfTI file in HU: mapped from disk if it is uncompressed, otherwise read plane by plane, or held as it is stored."""

    def __init__(self, name: str, path, image=None) -> None:
        self._image, image = image, image or _load_nifti(path)  # the first, if it is in memory
        check_shape(image.shape, image.get_data_dtype())
        header, affine = image.header, image.affine
        by_sform = header["sform_code"] > 0 and maps_to_space(affine)
        if not maps_to_space(affine) and header["qform_code"] > 0:
            affine = header.get_qform()
        if not (oriented := bool(header["qform_code"] > 0 or header["sform_code"] > 0)):
            sides = [*header.get_zooms(), 1.0][:3]
            affine = np.diag([-sides[0], -sides[1], sides[2], 1])
        affine = np.diag([MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)] * 3 + [1.0]) @ affine
        files = {file for entry in image.file_map.values() if (file := entry.filename) and os.path.isfile(file)}
        super().__init__(name, path, image.shape, affine, sorted({*files, path} if os.path.isfile(path) else files))
        scaled = nibabel.is_proxy(image.dataobj) and (image.dataobj.slope, image.dataobj.inter) != (1, 0)
        self.oriented, self.hounsfield = oriented, scaled or image.get_data_dtype().itemsize > 1
        sides = [] if by_sform or self._image else _stored_sides(path, type(header))
        if 0 in [side for side, size in zip(sides, self.shape) if size > 1]:
            self._forget_lengths(sides)
        self.warnings += [NOT_ORIENTED] * (not oriented)
        self._note(affine, flat=len(image.shape) < 3 or 0 in sides and self.affine is not None)

    def _plane(self, index: int) -> np.ndarray:
        if self._voxels is None:
            self._voxels = self._open()
        voxels, slope, intercept = self._voxels
        # Not take(), which copies the whole volume where its order is not C.
        plane = voxels[..., index] if self.axis == 2 else np.moveaxis(voxels, self.axis, 0)[index]
        return plane * np.float32(slope) + np.float32(intercept)

    def _open(self) -> tuple:
        """Stored values, slope and intercept. A compressed file of planes one after the other is read plane by plane."""
        data = (self._image or _load_nifti(self.path)).dataobj
        if not nibabel.is_proxy(data):
            return data.reshape(self.shape), 1, 0
        if self.axis == 2 and str(data.file_like).endswith(".gz"):
            # Its own reshape() would forget to keep the file open, and each slice would be unpacked from the first on.
            unscaled = (self.shape, data.dtype, data.offset, 1, 0)
            stored = nibabel.arrayproxy.ArrayProxy(data.file_like, unscaled, keep_file_open=True)
        else:
            stored = data.get_unscaled().reshape(self.shape)
        return stored, data.slope, data.inter


def _load_nifti(path):
    """nibabel's image, compressed or not, whatever its name says."""
    stream = _unpacked(path)
    if str(path).lower().endswith((".nii.gz", ".hdr.gz") if isinstance(stream, gzip.GzipFile) else (".nii", ".hdr")):
        stream.close()
        return nibabel.load(path)
    second = stream.read(4) in (b"\x1c\2\0\0", b"\0\0\2\x1c")  # the size of its header, 540
    stream.seek(0)
    return (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_stream(stream)


def _unpacked(path):
    """A file, opened as what is in it where it is compressed."""
    with open(path, "rb") as file:
        compressed = file.read(2) == GZIP
    return (gzip.open if compressed else open)(path, "rb")


def _stored_sides(path, header: type) -> list[float]:
    """Voxel sizes as the header holds them; nibabel turns 0 into 1."""
    with _unpacked(path) as file:
        return np.abs(header.from_fileobj(file, check=False)["pixdim"][1:4]).tolist()


class ItkScan(Scan):
    """A MetaImage or NRRD file in HU, held in the type that it stores."""

    def __init__(self, name: str, path) -> None:
        reader = _simpleitk().ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1 or reader.GetPixelID() == _simpleitk().sitkUnknown:
            raise UserError(f"found {reader.GetNumberOfComponents()} values in a pixel, expected one")
        check_shape(reader.GetSize(), np.dtype(np.float64))
        affine = itk_affine(reader)
        super().__init__(name, path, reader.GetSize(), affine, [path, *_pixel_file(Path(path))])
        self.hounsfield = reader.GetPixelID() != _simpleitk().sitkUInt8
        self._note(affine, flat=reader.GetDimension() < 3)

    def _plane(self, index: int) -> np.ndarray:
        if self._voxels is None:
            self._voxels = _simpleitk().ReadImage(self.path)
        voxels = _simpleitk().GetArrayViewFromImage(self._voxels).T.reshape(self.shape, order="F")
        return np.moveaxis(voxels, self.axis, 0)[index]


def itk_affine(image) -> np.ndarray:
    """(4, 4) from voxel index to RAS in mm of an image or a reader of SimpleITK."""
    dimensions, affine = image.GetDimension(), np.eye(4)
    axes, space = np.reshape(image.GetDirection(), (dimensions, dimensions)) * image.GetSpacing(), min(dimensions, 3)
    affine[:space, :space], affine[:space, 3] = axes[:space, :space], image.GetOrigin()[:space]
    return LPS @ affine


def _simpleitk():
    import SimpleITK  # no other format needs it

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is raised
    return SimpleITK


def _pixel_file(header: Path) -> list[Path]:
    """The file of the pixels, if the header of a MetaImage or an NRRD names one."""
    with header.open("rb") as file:
        named = re.search(rb"^(?:ElementDataFile *=|data ?file:) *(.*?)\s*$", file.read(2**16), re.MULTILINE)
    name = os.fsdecode(named[1]) if named else "LOCAL"
    if name.upper().startswith(("LOCAL", "LIST")) or "%" in name:  # here, or in many files
        return []
    if not (header.parent / name).is_file():
        raise UserError(f"found no file {name} beside it, expected the pixels there, as the header says")
    return [header.parent / name]


class DicomScan(Scan):
    """The images of a DICOM series on one grid, (columns, rows, slices), of `series.group_frames`; decoded one at a time."""

    kind = "dicom"

    def __init__(self, name: str, path, frames: Sequence[Frame]) -> None:
        self.frames, notes = series.order_frames(frames)
        first, size = self.frames[0], (*self.frames[0].size, len(self.frames))
        check_shape(size, np.dtype(np.int16))
        affine = series.affine_of(self.frames) if first.placed else None
        super().__init__(name, path, size, affine, sorted({frame.path for frame in frames}))
        self.hounsfield, self.sources = not first.unknown, [(frame.path, frame.index) for frame in self.frames]
        self.warnings += notes + [first.unknown] * bool(first.unknown)
        if self.affine is not None and len(self) > 1:
            self.positions = [frame.height for frame in self.frames]
            self.thickness, gaps = series.measure_gaps(np.array(self.positions))
            self.warnings += gaps
        elif self.affine is not None and not first.thickness:
            self.warnings.append(NO_THICKNESS)

    def _plane(self, index: int) -> np.ndarray:
        frame = self.frames[index]
        if self._voxels is None or self._voxels.path != frame.path:
            self._voxels = series.Pixels(frame.path)
        return self._voxels.read(frame)


def check_shape(shape: Sequence[int], dtype: np.dtype) -> None:
    """Refuse a header that does not describe one volume of numbers of a readable size."""
    if dtype.kind not in "iuf":
        raise UserError(f"found values of type {dtype}, expected numbers")
    if not 2 <= len(shape) or any(size != 1 for size in shape[3:]):
        raise UserError(f"found shape {tuple(shape)}, expected 2 or 3 axes")
    if np.prod(shape, dtype=float) * dtype.itemsize > MAX_BYTES:
        raise UserError(f"found a size of {tuple(shape)}, expected at most {MAX_BYTES >> 30} GiB")


def unreadable(path, error: Exception) -> UserError:
    """One line for whatever a reader raised."""
    if isinstance(error, UserError):
        return error if str(error).startswith(str(path)) else UserError(f"{path}: {error}")
    text = str(error).strip().replace("\n - ", ": ") or type(error).__name__  # of nibabel
    reason = text.splitlines()[-1].replace(str(path), Path(path).name)
    return UserError(f"{path}: cannot be read ({reason[:300]}), expected an intact picture, NIfTI or DICOM file")


def open_scan(path, name: str | None = None) -> Scan:
    """The scan in a single file; a UserError names the file in one line if its header cannot be read."""
    path = Path(path)
    try:
        with no_warnings():
            return _reader(path)(name or path.name, str(path))
    except Exception as error:  # readers raise anything: one line instead of a library's traceback
        raise unreadable(path, error) from None


def _reader(path: Path) -> Callable[[str, str], Scan]:
    """What reads a file, by its content where that is certain, otherwise by its extension."""
    with open(path, "rb") as file:
        start = file.read(352)
    name = path.name.lower()
    if start[128:132] == b"DICM":
        return _open_dicom
    if reader := next((reader for names, reader in READERS.items() if name.endswith(names)), None):
        return reader
    if start.startswith(PICTURE_STARTS):
        return PictureScan
    if start.startswith(GZIP):
        with _unpacked(path) as file:
            start = file.read(352)
        if start[128:132] == b"DICM":
            return partial(_refuse, "found DICOM compressed by gzip, expected DICOM; unpack it")
    if start[344:347] == b"n+1" or start[4:7] == b"n+2" or name.endswith(PAIRS) and start[344:347] == b"ni1":
        return NiftiScan
    if name.endswith(PAIRS) and start[:4] in (b"\\\1\0\0", b"\0\0\1\\"):  # 348
        return partial(_refuse, "found Analyze 7.5, which does not say where left is, expected NIfTI; convert it")
    if series.starts_as_dicom(start):
        return _open_dicom
    if start.startswith(ARCHIVES):
        return partial(_refuse, "found an archive, expected the files in it; unpack it")
    raise UserError(f"found no DICOM header, expected DICOM or one of {', '.join(EXTENSIONS)}")


def _refuse(reason: str, name: str, path: str) -> Scan:
    raise UserError(reason)


def _open_dicom(name: str, path: str) -> Scan:
    scans = _open_dicoms(name, path)
    if len(scans) > 1:
        raise UserError(f"found {len(scans)} scans (phases, say), expected one; `chestct predict` reads each of them")
    return scans[0]


def _open_dicoms(name: str, path: str) -> list[Scan]:
    """The scans in one file: several phases or fields of view."""
    header = series.read_header(path)
    reason = series.exclusion_reason(header)
    groups = series.group_frames(series.frames_of(path, header)) if reason in ("", series.LOCALIZERS) else []
    if groups:
        reason = "" if all(group[0].axial for group in groups) else series.NOT_AXIAL
    if reason:
        raise UserError(f"found {reason}, expected an axial image{'; give its folder' if reason == DIRECTORY else ''}")
    return [DicomScan(f"{name}_{n}" if len(groups) > 1 else name, path, group) for n, group in enumerate(groups, 1)]


READERS: dict[tuple[str, ...], Callable[[str, str], Scan]] = {PICTURES: PictureScan, NIFTI: NiftiScan, ITK: ItkScan}


def open_slice(path) -> Scan:
    """The scan in a file of a single axial slice."""
    scan = open_scan(path)
    if len(scan) != 1:
        raise UserError(f"{path}: found {len(scan)} slices, expected a single one")
    return scan


def find_scans(source, output_dir=None) -> tuple[list[Scan], list[dict]]:
    """The scans in a file, a folder and those in it, or what a glob pattern matches, and {"file", "reason"} of the unreadable.

    Only headers are read, of files with an extension of `EXTENSIONS` and of others whose content is known; hidden files and
    links to folders are skipped. A UserError if there is no image, or the source holds `output_dir`, the folder of the
    results, which the next run would take as images.
    """
    root, files, failures = _list_files(str(source))
    output = output_dir and Path(output_dir).resolve()
    holds_output = output and Path(source).is_dir() and Path(source).resolve() in (output, *output.parents)
    real = [Path(os.path.realpath(path)) for path in (files if output else ())]  # resolve() fails on links in a circle
    if holds_output or any(output in path.parents for path in real):
        raise UserError(f"output_dir: found {output_dir} inside the input {source}, expected a folder outside of it")
    images = [path for path in files if len(files) == 1 or _is_image(path)]
    logger.info(f"{source}: {len(images)} images, {len(files) - len(images)} other files")
    scans, frames, excluded = [], [], defaultdict(Counter)
    for path in tqdm(images, "headers", disable=None if len(images) > 200 else True):
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise UserError("found no regular file, expected an image")
            if _reader(path) is not _open_dicom:
                scans.append(open_scan(path, _name(path, root)))
            elif path == Path(source):
                scans += _open_dicoms(path.name, str(path))
            else:
                frames += _read_frames(path, excluded)
        except Exception as error:  # readers raise anything on damaged files
            failures.append({"file": _name(path, root), "reason": " ".join(str(unreadable(path, error)).split())})
    found, failed = _dicom_scans(frames, excluded, root)
    scans, failures = scans + found, failures + failed
    if not scans and (not failures or not images):
        unlisted = f"; {failures[0]['reason']}" if failures else ""
        expected = f"some of {', '.join(EXTENSIONS)}; unpack archives"
        raise UserError(f"input: {source}: found no image among {len(files)} files, expected {expected}{unlisted}")
    return sorted(scans, key=lambda scan: scan.name), sorted(failures, key=lambda failure: failure["file"])


def _name(path, root: Path) -> str:
    return Path(path).relative_to(root).as_posix()


def _list_files(source: str) -> tuple[Path, list[Path], list[dict]]:
    """The folder that names start from, the sorted files, and the folders that cannot be listed."""
    path, errors = Path(source), []
    found, root = [path], path if path.is_dir() else path.parent
    if not path.exists():
        found = [Path(match) for match in glob.glob(source, recursive=True) if glob.has_magic(source)]
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    if not found:
        raise UserError(f"input: {source}: no such file or folder")
    files = {file for match in found for file in (_walk(match, errors.append) if match.is_dir() else [match])}
    unlisted = {_name(error.filename, root): f"{error.filename}: cannot be listed ({error.strerror})" for error in errors}
    return root, sorted(files), [{"file": name, "reason": reason} for name, reason in unlisted.items()]


def _walk(folder: Path, onerror: Callable[[OSError], None]) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder, onerror=onerror):
        folders[:] = [name for name in folders if name[0] != "."]
        yield from (Path(parent, name) for name in names if name[0] != "." and name.upper() != "DICOMDIR")


def _is_image(path: Path) -> bool:
    try:
        return path.name.lower().endswith(EXTENSIONS) or stat.S_ISREG(path.stat().st_mode) and bool(_reader(path))
    except Exception:  # of the file system, or of gzip
        return False


def _read_frames(path: Path, excluded: dict[tuple[str, str], Counter]) -> list[Frame]:
    """Frames of a DICOM file; none if it is no image of a scan: such files are counted by study."""
    with no_warnings():
        header = series.read_header(path)
        reason = series.exclusion_reason(header)
        if reason and reason != DIRECTORY:
            excluded[series.study_of_header(path, header)][reason] += 1
        return [] if reason else series.frames_of(path, header)


def _dicom_scans(frames: Sequence[Frame], excluded: dict, root: Path) -> tuple[list[Scan], list[dict]]:
    """The scans of DICOM files and the failures. The warnings of a scan list what its study excluded."""
    groups, extras = series.drop_extras(series.group_frames(frames))
    for study, counts in extras.items():
        excluded[study].update(counts)
    scans, failures, studies, seen = [], [], set(), Counter()
    for group in groups:
        study, folder = series.study_of(group[0]), os.path.commonpath([frame.folder for frame in group])
        name = _name(Path(folder, _series_name(group)), root)
        seen[name] += 1
        name += f"_{seen[name]}" * (seen[name] > 1)
        try:
            scan = DicomScan(name, folder, group)
        except Exception as error:
            failures.append({"file": name, "reason": str(unreadable(group[0].path, error))})
            continue
        scan.warnings += [f"left out {count} {kind}" for kind, count in excluded.get(study, {}).items()]
        studies.add(study)
        scans.append(scan)
    for counts in (counts for study, counts in excluded.items() if study not in studies):
        reason = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        failures.append({"file": ".", "reason": f"{root}: left out {reason} of a study without other images"})
    return scans, failures


def _series_name(group: Sequence[Frame]) -> str:
    """Hash of what a scan has in common: a name stays when other scans come."""
    first = group[0]
    grid = [part and np.round(part, digits).tolist() for part, digits in ((first.orientation, 2), (first.spacing, 3))]
    marks = [values[0] for values in zip(*(frame.marks for frame in group)) if len(set(values)) == 1]
    return f"series_{text_hash(str((*(getattr(first, field) for field in series.COMMON), grid, marks)))[:8]}"
