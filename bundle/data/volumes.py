"""Files of any format as scans: stacks of axial slices on a grid of their own, read one by one."""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import os
import re
import stat
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from PIL import Image
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian
from tqdm import tqdm

from bundle.errors import UserError

logger = logging.getLogger(__name__)

# Extensions, in lower case. Everything else that may be an image is DICOM, which needs none.
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
NIFTI = (".nii", ".nii.gz")
ITK = (".mhd", ".mha", ".nrrd", ".nhdr")
DICOM = (".dcm", ".ima")
EXTENSIONS = (*PICTURES, *NIFTI, *ITK, *DICOM)
NO_IMAGE = ("SEG", "RTDOSE")  # modalities whose pixels are no picture of the body

# What a header may claim before any pixel is read: a damaged or malicious one must not fill the memory.
MAX_SLICE_PIXELS, MAX_BYTES = 2**26, 2**32
MAX_SIDES = 100  # longer to shorter side of a slice: of a thinner one nothing is left at the size of the network

NO_THICKNESS = "the thickness of the slice is not told: volumes count 1 mm"
NOT_ORIENTED = "the file does not tell how it lies (qform and sform codes 0): taken to run to left, posterior and head"

sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is raised
logging.getLogger("pydicom").setLevel(logging.CRITICAL)
logging.getLogger("nibabel").setLevel(logging.CRITICAL)


class Scan:
    """A stack of axial slices in one or several files; opened when the first slice is read.

    Args:
        name: path of its results below the output folder.
        path: its file, or the folder of its series, as messages name it.
        shape: of the grid, along the file's own axes: three.
        affine: (4, 4) from voxel index to RAS in mm; None where the file has no geometry.
        files: whose change makes it another scan.

    Attributes:
        kind: "picture", "volume" or "dicom".
        hounsfield: whether values are Hounsfield units.
        axis: array axis of `shape` that the axial slices are stacked along, the one nearest to the patient's axis.
        positions: in mm along the normal of the slices, for each; None without geometry, as are thickness and spacing.
        thickness: mm that each slice stands for: half the way to both neighbours.
        spacing: mm between rows and between columns of a slice as it is read.
        oriented: whether the file tells how it lies in space.
        sources: (path, frame) of each slice.
        warnings: what was noticed, one line each, without names or ids of patients.
        stamp: text that changes when the files do.

    Raises:
        UserError: in one line, naming the file, if the header claims what cannot be.
    """

    kind = "volume"
    hounsfield = True

    def __init__(
        self, name: str, path, shape: Sequence[int], affine: np.ndarray | None, files: Sequence | None = None
    ) -> None:
        self.name, self.path, self.shape = str(name), str(path), (*map(int, shape), 1, 1)[:3]
        self.affine, self.axis, self.turned = affine, 2, [(1, False), (0, False)]
        self.positions = self.thickness = self.spacing = None
        self.oriented = True
        self.warnings: list[str] = []
        self._voxels = None
        if min(self.shape) < 1:
            raise UserError(f"found a size of {tuple(shape)}")
        if affine is not None:
            self._place(np.asarray(affine, float))
        if np.prod(np.delete(self.shape, self.axis), dtype=float) > MAX_SLICE_PIXELS:
            raise UserError(f"found a size of {self.shape}, expected slices of at most {MAX_SLICE_PIXELS} pixels")
        if max(sides := np.delete(self.shape, self.axis)) > MAX_SIDES * min(sides):
            raise UserError(
                f"found axial slices of {sides[0]} x {sides[1]} pixels, expected no side {MAX_SIDES} times the other"
            )
        self.sources = [(self.path, index) for index in range(len(self))]
        states = [(os.path.basename(file), (s := os.stat(file)).st_size, s.st_mtime_ns) for file in files or [path]]
        self.stamp = hashlib.sha256(repr(states).encode()).hexdigest()

    def _place(self, affine: np.ndarray) -> None:
        """Find the axial slices in the grid, how each is turned to LPS, and its place."""
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
            raise UserError("found an affine that is no map to space")
        orientation = nibabel.io_orientation(affine)  # for each array axis: axis of RAS, and direction
        along = orientation[:, 0].tolist()
        self.affine, self.axis = affine, along.index(2)
        # Array axis of rows and of columns, and whether it is turned round: both run against RAS in LPS.
        self.turned = [(along.index(world), orientation[along.index(world), 1] > 0) for world in (1, 0)]
        (rows, _), (columns, _) = self.turned
        sides = np.linalg.norm(affine[:3, :3], axis=0)
        self.spacing = float(sides[rows]), float(sides[columns])
        normal = np.cross(affine[:3, rows], affine[:3, columns])
        normal *= np.sign(normal[2]) / np.linalg.norm(normal)
        step = float(affine[:3, self.axis] @ normal)
        self.positions = [float(affine[:3, 3] @ normal) + step * index for index in range(len(self))]
        self.thickness = [abs(step)] * len(self)

    def __len__(self) -> int:
        return self.shape[self.axis]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_voxels": None}  # every process opens its own

    def close(self) -> None:
        """Let go of what is open; the next slice opens it again."""
        self._voxels = None

    def read(self, index: int) -> MetaTensor:
        """Read a slice, turned to LPS: rows run to posterior, columns to the patient's left.

        Args:
            index: of the slice along `axis`.

        Returns:
            MetaTensor (1, rows, columns) of float32. The affine (3, 3) leads from (row, column) to (y, x) of the stored
            slice, where x, the column, runs along the first of its two axes. `meta` holds "filename_or_obj", "hounsfield",
            "file_shape" of the stored slice, "file_affine" (4, 4) to RAS and "spacing" (row, column) in mm, both None
            without geometry.

        Raises:
            UserError: naming the file, if the pixels cannot be read or are not finite.
        """
        file = self.sources[index][0]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plane = np.asarray(self._plane(index), np.float32)
        except Exception as error:  # readers raise anything: one line instead of a library's traceback
            raise unreadable(file, error) from None
        if not np.isfinite(plane).all():
            raise UserError(f"{file}: found NaN or infinite pixels, expected finite values")
        return self._turn(plane, file)

    def _turn(self, plane: np.ndarray, file: str) -> MetaTensor:
        """(x, y) of the stored slice to rows and columns."""
        (rows, rows_back), (columns, columns_back) = self.turned
        swapped = rows < columns
        pixels = plane if swapped else plane.T
        pixels = pixels[:: -1 if rows_back else 1, :: -1 if columns_back else 1]
        to_stored = np.eye(3)
        for axis, back in enumerate((rows_back, columns_back)):
            if back:
                to_stored[axis, axis], to_stored[axis, 2] = -1, pixels.shape[axis] - 1
        if swapped:
            to_stored = to_stored[[1, 0, 2]]
        picture = self.kind == "picture"
        meta = {
            "filename_or_obj": file,
            "hounsfield": self.hounsfield,
            "file_shape": pixels.shape if picture else tuple(np.insert(plane.shape, self.axis, 1).tolist()),
            "file_affine": None if self.affine is None else torch.as_tensor(self.affine),
            "spacing": self.spacing,
            "picture": picture,
        }
        return MetaTensor(torch.from_numpy(pixels.copy())[None], affine=torch.as_tensor(to_stored), meta=meta)

    def _plane(self, index: int) -> np.ndarray:
        """Values of a stored slice, (x, y)."""
        raise NotImplementedError


class PictureScan(Scan):
    """A PNG, JPEG, BMP or TIFF: one slice as it lies. 8-bit modes become luminance, deeper ones keep their depth."""

    kind = "picture"
    hounsfield = False

    def __init__(self, name: str, path) -> None:
        with Image.open(path) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise UserError(f"found {picture.n_frames} pictures, expected one")
            super().__init__(name, path, picture.size, None)

    def _plane(self, index: int) -> np.ndarray:
        with Image.open(self.path) as picture:
            deep = picture.mode.startswith(("I", "F"))
            return np.asarray(picture if deep else picture.convert("L")).T


class NiftiScan(Scan):
    """A NIfTI file in HU: mapped from disk if it is uncompressed, otherwise held in the type that it stores.

    One that does not tell how it lies in space is taken as ITK takes it: its axes run to the left, to posterior and to the
    head, from the origin.
    """

    def __init__(self, name: str, path) -> None:
        image = nibabel.load(path)
        check_shape(image.shape, image.get_data_dtype())
        oriented = image.header["qform_code"] > 0 or image.header["sform_code"] > 0
        sides = [*image.header.get_zooms(), 1.0][:3]
        super().__init__(name, path, image.shape, image.affine if oriented else np.diag([-sides[0], -sides[1], sides[2], 1]))
        self.oriented = bool(oriented)
        self.warnings += [] if oriented else [NOT_ORIENTED]
        self.warnings += [NO_THICKNESS] if len(image.shape) < 3 else []

    def _plane(self, index: int) -> np.ndarray:
        if self._voxels is None:
            image = nibabel.load(self.path)
            self._voxels = image.dataobj.get_unscaled().reshape(self.shape), image.dataobj.slope, image.dataobj.inter
        voxels, slope, intercept = self._voxels
        # Not take(), which copies the whole volume where its order is not C.
        return np.moveaxis(voxels, self.axis, 0)[index] * np.float32(slope) + np.float32(intercept)


class ItkScan(Scan):
    """A MetaImage or NRRD file in HU, held in the type that it stores."""

    def __init__(self, name: str, path) -> None:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() != 1 or reader.GetPixelID() == sitk.sitkUnknown:
            raise UserError(f"found {reader.GetNumberOfComponents()} values in a pixel, expected one")
        check_shape(reader.GetSize(), np.dtype(np.float64))
        dimensions, affine = reader.GetDimension(), np.eye(4)
        direction = np.reshape(reader.GetDirection(), (dimensions, dimensions))
        affine[:dimensions, :dimensions] = direction * reader.GetSpacing()
        affine[:dimensions, 3] = reader.GetOrigin()
        super().__init__(name, path, reader.GetSize(), np.diag([-1.0, -1, 1, 1]) @ affine, [path, *_pixel_file(Path(path))])
        self.warnings += [NO_THICKNESS] if dimensions < 3 else []

    def _plane(self, index: int) -> np.ndarray:
        if self._voxels is None:
            self._voxels = sitk.ReadImage(self.path)
        voxels = sitk.GetArrayViewFromImage(self._voxels).T.reshape(self.shape, order="F")
        return np.moveaxis(voxels, self.axis, 0)[index]


def _pixel_file(header: Path) -> list[Path]:
    """The file that the pixels lie in, where the header of a MetaImage or an NRRD names another one."""
    with header.open("rb") as file:
        named = re.search(rb"^(?:ElementDataFile *=|data ?file:) *(.*?)\s*$", file.read(2**16), re.MULTILINE)
    path = header.parent / os.fsdecode(named[1]) if named else header
    return [path] if path != header and path.is_file() else []


class DicomScan(Scan):
    """The images of a DICOM series on one grid, (columns, rows, slices); decoded one at a time.

    Values of CT become HU by slope and intercept, whatever the photometric interpretation. Other modalities have no HU: they
    count as pictures do, and MONOCHROME1 (low values bright) is inverted.

    Args:
        name, path: see `Scan`.
        frames: of the series, of the same size, spacing and orientation, in any order.
    """

    kind = "dicom"

    def __init__(self, name: str, path, frames: Sequence[Frame]) -> None:
        first = frames[0]
        self.hounsfield = first.modality == "CT"
        notes: list[str] = []
        with_position = [frame for frame in frames if frame.position is not None]
        placed = bool(with_position) and first.spacing is not None and first.orientation is not None
        if placed and len(with_position) < len(frames):
            notes.append(f"left out {len(frames) - len(with_position)} images without a position")
            frames = with_position
        order = sorted(frames, key=lambda frame: (frame.height if placed else 0.0, frame.number, frame.path, frame.index))
        if placed:
            kept = [
                frame for before, frame in zip([None, *order], order) if not before or frame.height - before.height > 1e-3
            ]
            if len(kept) < len(order):
                notes.append(f"left out {len(order) - len(kept)} images at the place of another one")
            order = kept
        elif len(order) > 1:
            notes.append(f"{len(order)} images without a position, in the order of their numbers; lengths are not known")
        if placed and len(order) == 1 and not order[0].thickness:
            notes.append(NO_THICKNESS)
        files = sorted({frame.path for frame in frames})
        affine = _dicom_affine(order) if placed else None
        super().__init__(name, path, (*first.size, len(order)), affine, files)
        self.frames, self.sources = order, [(frame.path, frame.index) for frame in order]
        self.warnings = notes
        if placed and len(order) > 1:
            self._measure_gaps(np.array([frame.height for frame in order]))

    def _measure_gaps(self, heights: np.ndarray) -> None:
        gaps = np.diff(heights)
        usual = float(np.median(gaps))
        self.positions = heights.tolist()
        self.thickness = ((np.r_[gaps[0], gaps] + np.r_[gaps, gaps[-1]]) / 2).tolist()
        missing = int(np.maximum(np.round(gaps / usual) - 1, 0).sum())
        uneven = gaps.max() - gaps.min() > 0.02 * usual + 0.01
        if missing:
            self.warnings.append(
                f"about {missing} slices are missing: gaps up to {gaps.max():.2f} mm, usually {usual:.2f} mm"
            )
        elif uneven:
            self.warnings.append(f"unequal spacing of the slices: {gaps.min():.2f} to {gaps.max():.2f} mm")
        if missing or uneven:
            self.warnings.append(f"NIfTI has one spacing only and claims {gaps.mean():.2f} mm; volumes count the true ones")

    def _plane(self, index: int) -> np.ndarray:
        frame = self.frames[index]
        try:
            pixels = pydicom.pixels.pixel_array(frame.path, index=frame.index)
        except RuntimeError as error:
            if "missing dependencies" not in str(error):
                raise
            syntax = read_file_meta_info(frame.path).TransferSyntaxUID.name
            raise UserError(f"found {syntax}, expected a decoder for it: pip install 'chest-ct-multitask[jpeg]'") from None
        if pixels.shape != frame.size[::-1]:
            raise UserError(f"found pixels of shape {pixels.shape}")
        values = pixels.T * np.float32(frame.slope) + np.float32(frame.intercept)
        return values.max() - values if frame.inverted and not self.hounsfield else values


class Frame:
    """What the header of a DICOM image says about one of its frames.

    Args:
        path: of the file.
        header: of the file.
        index: of the frame.
    """

    def __init__(self, path: str, header: pydicom.Dataset, index: int) -> None:
        self.path, self.index, self.number = path, index, int(header.get("InstanceNumber") or 0)
        self.size = int(header.Columns), int(header.Rows)
        self.modality, self.inverted = str(header.get("Modality")), header.get("PhotometricInterpretation") == "MONOCHROME1"
        groups = [group for name in ("PerFrame", "Shared") if (group := _functional_groups(header, name, index)) is not None]

        def look(sequence: str, attribute: str):
            for group in groups:
                if sequence in group and attribute in group[sequence][0]:
                    return group[sequence][0].get(attribute)
            return header.get(attribute)

        position = look("PlanePositionSequence", "ImagePositionPatient")
        orientation = look("PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = look("PixelMeasuresSequence", "PixelSpacing")
        self.position, self.orientation, self.spacing = (_numbers(value) for value in (position, orientation, spacing))
        self.thickness = look("PixelMeasuresSequence", "SliceThickness")
        slope = look("PixelValueTransformationSequence", "RescaleSlope")
        intercept = look("PixelValueTransformationSequence", "RescaleIntercept")
        self.slope, self.intercept = float(1 if slope is None else slope), float(intercept or 0)

    @property
    def normal(self) -> np.ndarray:
        """Unit vector across the slice, in LPS."""
        return np.cross(self.orientation[:3], self.orientation[3:])

    @property
    def height(self) -> float:
        """Position along the normal, in mm, which runs to the head."""
        normal = self.normal
        return float(self.position @ normal) * (-1.0 if normal[2] < 0 else 1.0)


def _functional_groups(header: pydicom.Dataset, name: str, index: int) -> pydicom.Dataset | None:
    sequence = header.get(f"{name}FunctionalGroupsSequence")
    return sequence[index if name == "PerFrame" else 0] if sequence else None


def _numbers(values) -> np.ndarray | None:
    if values is None or values == "":
        return None
    return np.array([float(value) for value in values])


def _dicom_affine(frames: Sequence[Frame]) -> np.ndarray:
    """(4, 4) from (column, row, slice) to RAS; the step between slices is their mean, a gantry's tilt included (DICOM
    PS3.3, C.7.6.2.1.1)."""
    first, last, affine = frames[0], frames[-1], np.eye(4)
    affine[:3, 0] = first.orientation[:3] * first.spacing[1]
    affine[:3, 1] = first.orientation[3:] * first.spacing[0]
    if len(frames) > 1:
        affine[:3, 2] = (last.position - first.position) / (len(frames) - 1)
    else:
        affine[:3, 2] = first.normal * np.sign(first.normal[2] or 1) * float(first.thickness or 1)
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1, 1, 1]) @ affine


def check_shape(shape: Sequence[int], dtype: np.dtype) -> None:
    """Refuse what is no single volume of numbers, or claims to be too large.

    Raises:
        UserError: naming what was found.
    """
    if dtype.kind not in "iuf":
        raise UserError(f"found values of type {dtype}, expected numbers")
    if not 2 <= len(shape) or any(size != 1 for size in shape[3:]):
        raise UserError(f"found shape {tuple(shape)}, expected 2 or 3 axes")
    if np.prod(shape, dtype=float) * dtype.itemsize > MAX_BYTES:
        raise UserError(f"found a size of {tuple(shape)}, expected at most {MAX_BYTES >> 30} GiB")


def unreadable(path, error: Exception) -> UserError:
    """One line for whatever a reader raised."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1].replace(str(path), Path(path).name)
    return UserError(f"{path}: cannot be read ({reason[:300]}), expected an intact picture, NIfTI or DICOM file")


def open_scan(path, name: str | None = None) -> Scan:
    """The scan in a single file.

    Raises:
        UserError: in one line, naming the file, if its header cannot be read.
    """
    path = Path(path)
    reader = next((r for names, r in READERS.items() if path.name.lower().endswith(names)), _open_dicom)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reader(name or path.name, str(path))
    except Exception as error:  # readers raise anything: one line instead of a library's traceback
        raise unreadable(path, error) from None


def _open_dicom(name: str, path: str) -> Scan:
    return DicomScan(name, path, frames_of(path, read_header(path)))


READERS: dict[tuple[str, ...], Callable[[str, str], Scan]] = {PICTURES: PictureScan, NIFTI: NiftiScan, ITK: ItkScan}


def read_header(path: str) -> pydicom.Dataset:
    """Header of a DICOM image.

    Raises:
        UserError: if it is compressed as a whole, which would be unpacked in memory whatever its size.
        Exception: of pydicom, if it is no DICOM file.
    """
    if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise UserError("found a deflated file, expected another transfer syntax")
    return pydicom.dcmread(path, stop_before_pixels=True)


def frames_of(path: str, header: pydicom.Dataset) -> list[Frame]:
    """The frames of a DICOM image.

    Raises:
        UserError: if it is no grey image, or not an axial one.
    """
    if "Rows" not in header or "Columns" not in header or _text(header, "Modality") in NO_IMAGE:
        raise UserError("found no image in it")
    if header.get("SamplesPerPixel", 1) != 1:
        raise UserError(f"found {header.SamplesPerPixel} values in a pixel, expected a grey image")
    count = int(header.get("NumberOfFrames") or 1)
    check_shape((header.Columns, header.Rows, count), np.dtype(np.float32))
    frames = [Frame(path, header, index) for index in range(count)]
    for frame in frames:
        if frame.orientation is not None and abs(frame.normal[2]) < 0.7:
            raise UserError("found a slice that is not axial")
    return frames


def find_scans(source, output_dir) -> tuple[list[Scan], list[dict]]:
    """List the scans in a file, in a folder and all folders in it, or in what a glob pattern matches.

    Images are files with an extension of `EXTENSIONS`, and DICOM files of any name (DICM after 128 bytes). DICOM files
    become a scan for each series, or several where a series mixes sizes, spacings or orientations. Localizers, derived
    images other than axial ones (beside original images of the same study) and objects without pixels are left out, which
    the warnings of the other scans of the study tell. Hidden files, DICOMDIR and links to folders are not looked at. Only
    headers are read.

    Args:
        source: file, folder or pattern with * ? or [.
        output_dir: folder of the results, which must not lie in the source, where the next run would take them as images.

    Returns:
        The scans, in the order of their names, and {"file", "reason"} of what cannot be read.

    Raises:
        UserError: if nothing is there.
        UserError: if there is no image among the files, or the source holds output_dir.
    """
    root, files, failures = _list_files(str(source))
    output = Path(output_dir).resolve()
    holds_output = Path(source).is_dir() and Path(source).resolve() in (output, *output.parents)
    if holds_output or any(output in path.resolve().parents for path in files):
        raise UserError(f"output_dir: found {output_dir} inside the input {source}, expected a folder outside of it")
    images = [path for path in files if len(files) == 1 or _is_image(path)]
    if not images:
        unlisted = f"; {failures[0]['reason']}" if failures else ""
        raise UserError(
            f"input: {source}: found no image among {len(files)} files, expected some of {', '.join(EXTENSIONS)}{unlisted}"
        )
    logger.info(f"{source}: {len(images)} images, {len(files) - len(images)} other files")
    scans, headers = [], []
    for path in tqdm(images, "headers", disable=None if len(images) > 200 else True):
        name = path.relative_to(root).as_posix()
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"{path}: found no regular file, expected an image")
            if path == Path(source) or path.name.lower().endswith((*PICTURES, *NIFTI, *ITK)):
                scans.append(open_scan(path, name))
            else:
                headers.append((path, name, _read_dicom(path)))
        except (OSError, ValueError) as error:
            failures.append({"file": name, "reason": " ".join(str(error).split())})
    series, left_out = _series(headers, root)
    return sorted(scans + series, key=lambda scan: scan.name), sorted(
        failures + left_out, key=lambda failure: failure["file"]
    )


def _list_files(source: str) -> tuple[Path, list[Path], list[dict]]:
    """The folder that names start from, the files in sorted order, and the folders that cannot be listed."""
    path = Path(source)
    if path.is_dir():
        found, root = [path], path
    elif path.exists():
        return path.parent, [path], []
    elif glob.has_magic(source):
        found = [Path(match) for match in sorted(glob.glob(source, recursive=True))]
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    else:
        found = []
    if not found:
        raise UserError(f"input: {source}: no such file or folder")
    errors: list[OSError] = []
    files = {file for match in found for file in (_walk(match, errors.append) if match.is_dir() else [match])}
    unlisted = {Path(error.filename).relative_to(root).as_posix(): error for error in errors}
    failures = [
        {"file": name, "reason": f"{error.filename}: cannot be listed ({error.strerror})"} for name, error in unlisted.items()
    ]
    return root, sorted(files), failures


def _walk(folder: Path, onerror: Callable[[OSError], None]) -> Iterable[Path]:
    for parent, folders, names in os.walk(folder, onerror=onerror):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith(".") and name != "DICOMDIR")


def _is_image(path: Path) -> bool:
    if path.name.lower().endswith(EXTENSIONS):
        return True
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _read_dicom(path: Path) -> pydicom.Dataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = read_header(str(path))
            for name in ("StudyInstanceUID", "SeriesInstanceUID", "ImageType", "Modality"):  # converted here, damaged or not
                header.get(name)
            return header
    except Exception as error:  # pydicom raises anything on damaged files
        raise unreadable(path, error) from None


def _series(headers: Sequence[tuple[Path, str, pydicom.Dataset]], root: Path) -> tuple[list[Scan], list[dict]]:
    """Scans of DICOM files, and what is left out of a study of which nothing is left."""
    groups, failures, left_out = defaultdict(list), [], defaultdict(lambda: defaultdict(int))
    images = [header for _, _, header in headers if _not_for_us(header, False) is None]
    original = {_text(header, "StudyInstanceUID") for header in images if "DERIVED" not in _image_type(header)}
    for path, name, header in headers:
        study = _text(header, "StudyInstanceUID")
        kind = _not_for_us(header, study in original)
        if kind:
            left_out[study][kind] += 1
            continue
        try:
            for frame in frames_of(str(path), header):
                turn = None if frame.orientation is None else tuple(np.round(frame.orientation, 2).tolist())
                spacing = None if frame.spacing is None else tuple(np.round(frame.spacing, 3).tolist())
                key = (_text(header, "SeriesInstanceUID"), frame.size, turn, spacing)
                groups[(path.parent, key)].append((frame, study))
        except Exception as error:  # of tags that are not what they should be
            failures.append({"file": name, "reason": str(unreadable(path, error))})
    scans, told, alike = [], set(), Counter((folder, key[:-1]) for folder, key in groups)
    for (folder, key), members in groups.items():
        told_apart_by = key if alike[folder, key[:-1]] > 1 else key[:-1]
        name = (folder.relative_to(root) / f"series_{hashlib.sha256(str(told_apart_by).encode()).hexdigest()[:8]}").as_posix()
        try:
            scan = DicomScan(name, folder, [frame for frame, _ in members])
        except Exception as error:
            failures.append({"file": name, "reason": str(unreadable(folder, error))})
            continue
        scan.warnings += [f"left out {count} {kind}" for kind, count in left_out.get(members[0][1], {}).items()]
        told.add(members[0][1])
        scans.append(scan)
    for counts in (counts for study, counts in left_out.items() if study not in told):
        reason = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        failures.append({"file": ".", "reason": f"{root}: left out {reason} of a study without other images"})
    return scans, failures


def _text(header: pydicom.Dataset, name: str) -> str:
    return str(header.get(name, ""))


def _image_type(header: pydicom.Dataset) -> str:
    return _text(header, "ImageType").upper()


def _not_for_us(header: pydicom.Dataset, beside_originals: bool) -> str | None:
    """What an object is called that is left out; None for an axial image."""
    kind = _image_type(header)
    if "Rows" not in header or _text(header, "Modality") in NO_IMAGE:
        return "objects without images"
    if "LOCALIZER" in kind:
        return "localizers"
    if "DERIVED" in kind and "AXIAL" not in kind and beside_originals:
        return "derived images"
    return None
