"""Which DICOM images are one scan: what their headers say, what is excluded, how they are grouped, ordered and decoded."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter

import numpy as np
import pydicom
from pydicom.datadict import keyword_for_tag
from pydicom.filereader import read_file_meta_info
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, EnhancedCTImageStorage, ExplicitVRBigEndian
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, MediaStorageDirectoryStorage
from scipy import ndimage

from bundle.errors import UserError

# Fields of a frame that are the text of a tag.
TEXTS = {"patient_id": "PatientID", "patient_name": "PatientName", "study": "StudyInstanceUID", "series": "SeriesInstanceUID"}
TEXTS |= {"instance": "SOPInstanceUID", "sop_class": "SOPClassUID", "frame_of_reference": "FrameOfReferenceUID"}
TEXTS |= {"kernel": "ConvolutionKernel", "image_type": "ImageType", "modality": "Modality"}
TEXTS |= {"photometric": "PhotometricInterpretation"}
# What may tell images of one place apart: phases of the heart or of contrast, energies, series that were merged.
MARKS = "AcquisitionNumber TemporalPositionIdentifier SeriesNumber SeriesDescription KVP TriggerTime TemporalPositionIndex "
MARKS = (MARKS + "FrameAcquisitionNumber NominalPercentageOfCardiacPhase StackID SliceThickness ImageType").split()
# What is read of a header, since a whole one takes 50 KB of memory.
TAGS = "AcquisitionTime ContentTime InstanceNumber SliceLocation Rows Columns NumberOfFrames SamplesPerPixel BitsAllocated "
TAGS += "BitsStored PixelRepresentation ImagePositionPatient ImageOrientationPatient PixelSpacing RescaleSlope "
TAGS += "RescaleIntercept RescaleType ModalityLUTSequence PixelPaddingValue PixelPaddingRangeLimit "
TAGS = (*TEXTS.values(), *MARKS, *(TAGS + "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence").split())

LOCALIZERS, DIRECTORY, NOT_AXIAL = "localizers", "a directory of files (DICOMDIR)", "images that are not axial"
NO_IMAGE = ("SEG", "RTDOSE")  # modalities whose pixels are no picture of the body
GREY = ("MONOCHROME1", "MONOCHROME2", "")
CT_STORAGE = (CTImageStorage, EnhancedCTImageStorage)
AIR = -1024  # HU
SAME_PLACE = 0.01  # mm: slices that are nearer show one place
MANY = 10  # slices: from here on a series is a scan even if its positions say nothing
BOLUS_TIME, BOLUS_THICKNESS = 0.9, 5  # s between images and mm: a monitored slice is repeated slowly, and is thick
PATIENT = ("patient_id", "patient_name")
# What the slices of a scan have in common. A blank text says nothing, see `_fill_blanks`.
IDENTITY = (*PATIENT, "study", "series", "frame_of_reference", "kernel")
COMMON = (*IDENTITY, "size", "unknown")


@dataclass(slots=True)
class Frame:
    """What a DICOM header says about one frame, in mm and LPS; texts are empty and numbers None if it says nothing of use."""

    path: str
    index: int  # in the file
    size: tuple[int, int]  # columns, rows
    patient_id: str
    patient_name: str
    study: str
    series: str
    instance: str
    sop_class: str
    frame_of_reference: str
    kernel: str
    image_type: str
    modality: str
    photometric: str
    marks: tuple[str, ...]  # of `MARKS`, the place of the corner along rows and columns in mm, dimension indices
    number: float | None
    time: float | None
    content_time: float | None
    padding: tuple[int, int] | None  # lowest and highest stored value outside of the field of view
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness: float | None
    slope: float | None
    intercept: float | None
    unknown: str = ""  # why the values are no HU; empty if they are

    @property
    def patient(self) -> str:
        return self.patient_id or self.patient_name

    @property
    def folder(self) -> str:
        return os.path.dirname(self.path)

    @property
    def placed(self) -> bool:
        """Whether it is known where the frame lies."""
        return None not in (self.position, self.orientation, self.spacing)

    @property
    def normal(self) -> tuple[float, ...]:
        """Unit vector across the slice, in LPS."""
        return _normal(self.orientation)

    @property
    def height(self) -> float:
        """Position along the normal, which runs to the head."""
        height = sum(a * b for a, b in zip(self.position, self.normal))
        return -height if self.normal[2] < 0 else height

    @property
    def axial(self) -> bool:
        return not self.orientation or abs(self.normal[2]) >= 0.7


def starts_as_dicom(start: bytes) -> bool:
    """Whether 132 bytes begin a DICOM file, with a preamble or, in old archives, without."""
    return start[128:132] == b"DICM" or (start[:1] in (b"\x02", b"\x08") and start[1:2] == start[3:4] == b"\0")


def read_header(file, tags: Sequence[str] | None = TAGS) -> pydicom.Dataset:
    """Header of a DICOM image, or only some of its tags, from a path or an open file, which is then at the pixels.

    pydicom raises anything if it is damaged.
    """
    if not hasattr(file, "read"):
        with open(file, "rb") as opened:
            return read_header(opened, tags)
    start = file.read(132)
    if not starts_as_dicom(start):
        raise UserError("found no DICOM header")
    force = start[128:] != b"DICM"
    if not force and read_file_meta_info(file.name).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise UserError("found a deflated file, expected another transfer syntax")  # its size in memory is not known
    file.seek(0)
    return pydicom.dcmread(file, stop_before_pixels=True, force=force, specific_tags=tags and list(tags))


def exclusion_reason(header: pydicom.Dataset) -> str:
    """What an object is called that is no image of a scan; empty for one that is."""
    if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return DIRECTORY
    if "Rows" not in header or "Columns" not in header or _text(header, "Modality") in NO_IMAGE:
        return "objects without images"
    return LOCALIZERS if "LOCALIZER" in _text(header, "ImageType").upper() else ""


def frames_of(path: str, header: pydicom.Dataset) -> list[Frame]:
    """The frames of a DICOM image."""
    count, samples = int(_number(header.get("NumberOfFrames")) or 1), _number(header.get("SamplesPerPixel", 1))
    if samples not in (1, 3) or not 1 <= count < 2**16:
        raise UserError(f"found {samples} values in a pixel and {count} frames, expected a grey or RGB image")
    shared = {field: _text(header, tag) for field, tag in TEXTS.items()} | {
        "path": str(path),
        "size": (int(header.Columns), int(header.Rows)),
        "number": _number(_look([header], "InstanceNumber", "SliceLocation")),
        "padding": _padding(header),
    }
    shared["patient_name"] = shared["patient_name"].rstrip("^ ")
    shared["modality"] = shared["modality"].upper() or "CT" * (shared["sop_class"] in CT_STORAGE)
    return [_frame(header, index, shared) for index in range(count)]


def _frame(header: pydicom.Dataset, index: int, shared: dict) -> Frame:
    layers = _layers(header, index)
    spacing = _numbers(_look(layers, "PixelSpacing"), 2)
    orientation = _numbers(_look(layers, "ImageOrientationPatient"), 6)
    position = _numbers(_look(layers, "ImagePositionPatient"), 3)
    corner = [round(np.dot(position, axis)) for axis in (orientation[:3], orientation[3:])] if position and orientation else ""
    marks = [*(_look(layers, name) for name in MARKS), corner, *np.atleast_1d(_look(layers, "DimensionIndexValues") or [])]
    frame = Frame(
        index=index,
        marks=_shared(tuple(map(str, marks))),
        time=_number(_look(layers, "FrameAcquisitionDateTime", "AcquisitionTime")),
        content_time=_number(_look(layers, "ContentTime")),
        position=position,
        orientation=_shared(orientation) if orientation and any(orientation) else None,
        spacing=_shared(spacing) if spacing and min(spacing) > 0 else None,
        thickness=_number(_look(layers, "SliceThickness")),
        slope=_number(_look(layers, "RescaleSlope")),
        intercept=_number(_look(layers, "RescaleIntercept")),
        **shared,
    )
    frame.unknown = _unknown_values(frame, header, str(_look(layers, "RescaleType") or "HU").upper())
    return frame


def _layers(header: pydicom.Dataset, index: int) -> list[pydicom.Dataset]:
    """Where a frame's attributes are, nearest first: the functional groups of the frame, those of all frames, the header."""
    layers = []
    for name, item in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = header.get(name)
        if groups and len(groups) > item:
            layers += [group.value[0] for group in groups[item] if group.VR == "SQ" and group.value]
    return [*layers, header]


def _look(layers: Sequence[pydicom.Dataset], *names: str):
    """The first value that there is, or None."""
    return next((value for name in names for layer in layers if (value := _value(layer, name)) not in (None, "")), None)


def _unknown_values(frame: Frame, header: pydicom.Dataset, unit: str) -> str:
    rescaled = bool(header.get("ModalityLUTSequence"))
    reasons = {
        f"the modality is {frame.modality or 'not given'}, not CT": frame.modality != "CT",
        f"images in colours ({frame.photometric})": frame.photometric not in GREY,
        "the header has no rescale slope": not rescaled and not frame.slope,
        "the header has no rescale intercept": not rescaled and frame.intercept is None,
        f"the header says that the values are {unit}": not unit.startswith(("HU", "US")),  # unspecified, of old scanners
        "images of 8 bits": (_number(header.get("BitsStored")) or 16) <= 8,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), "")
    return reason and f"{reason}: the values are not known to be HU, the images count as pictures"


def _padding(header: pydicom.Dataset) -> tuple[int, int] | None:
    """Stored values of pixels outside the field of view, of the sign of the pixels, which the header often mistakes."""
    low = _number(_value(header, "PixelPaddingValue"))
    if low is None:
        return None
    high, values = _number(_value(header, "PixelPaddingRangeLimit")), 2 ** int(_number(header.get("BitsAllocated")) or 16)
    half = values // 2 if _number(header.get("PixelRepresentation")) else 0
    wrapped = sorted((int(value) + half) % values - half for value in (low, low if high is None else high))
    return wrapped[0], wrapped[1]


def _text(header: pydicom.Dataset, name: str) -> str:
    """A value as a text that many headers share in memory."""
    return sys.intern("" if (value := header.get(name)) is None else str(value).strip())


_shared = lru_cache(maxsize=256)(lambda values: values)  # of values that many headers share in memory
_normal = lru_cache(maxsize=256)(lambda orientation: tuple(np.cross(orientation[:3], orientation[3:]).tolist()))


def _value(header: pydicom.Dataset, name: str):
    """A value, or None where it is no number although it should be one."""
    try:
        return header.get(name)
    except (ValueError, TypeError, OverflowError):
        return None


def _number(value) -> float | None:
    try:
        return float(value) if np.isfinite(float(value)) else None
    except (ValueError, TypeError, OverflowError):
        return None


def _numbers(values, count: int) -> tuple[float, ...] | None:
    try:
        numbers = tuple(map(_number, values))
    except TypeError:
        return None
    return numbers if len(numbers) == count and None not in numbers else None


class Pixels:
    """The pixels of a DICOM file, whose header is parsed once for all its frames."""

    def __init__(self, path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.header = read_header(file, None)
            start, element = file.tell(), file.read(12)
        little = self.header.original_encoding[1]
        explicit = element[4:6] in (b"OW", b"OB", b"OF", b"OD", b"UN")  # whatever the transfer syntax says
        plain = (ExplicitVRLittleEndian if explicit else ImplicitVRLittleEndian) if little else ExplicitVRBigEndian
        self.syntax = self.header.file_meta.get("TransferSyntaxUID", plain)
        if not self.syntax.is_transfer_syntax:
            raise UserError(f"found the private transfer syntax {self.syntax}, expected a standard one")
        if len(element) < 12:
            raise UserError("found no pixels after the header")
        self.start = start + (12 if explicit else 8)
        tag = np.frombuffer(element[:4], "<u2" if little else ">u2").tolist()
        usual = {"samples_per_pixel": 1, "photometric_interpretation": "MONOCHROME2", "pixel_representation": 0}
        self.options = usual | pydicom.pixels.as_pixel_options(self.header, pixel_keyword=keyword_for_tag(tag))
        # Bits below the value, in old files whose value is at the upper end of its 16 bits.
        self.spare = max(0, self.header.get("HighBit", 0) + 1 - self.header.get("BitsStored", 1))
        self.options["bits_stored"] = self.options.get("bits_stored", 16) + self.spare

    def read(self, frame: Frame) -> np.ndarray:
        """float32 (columns, rows): HU of CT, padding as air; otherwise grey values, luminance of colours, low values dark."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                pixels, _ = pydicom.pixels.get_decoder(self.syntax).as_array(file, index=frame.index, **self.options)
        except RuntimeError as error:
            if "missing dependencies" not in str(error):
                raise
            packages = "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
            raise UserError(f"found {self.syntax.name}, for which no decoder is installed: pip install {packages}") from None
        if self.spare and not (pixels & (1 << self.spare) - 1).any():
            pixels = pixels >> self.spare
        if frame.photometric == "PALETTE COLOR":
            pixels = pydicom.pixels.apply_color_lut(pixels, self.header)
        if pixels.ndim == 3:
            pixels = pixels[..., :3] @ np.float32([0.299, 0.587, 0.114])
        if pixels.shape != frame.size[::-1]:
            raise UserError(f"found pixels of shape {pixels.shape}")
        if self.header.get("ModalityLUTSequence"):
            values = pydicom.pixels.apply_modality_lut(pixels, self.header).astype(np.float32)
        else:
            values = pixels * np.float32(frame.slope or 1) + np.float32(frame.intercept or 0)
        if frame.unknown:
            return (values.max() - values if frame.photometric == "MONOCHROME1" else values).T
        if frame.padding:
            low, high = frame.padding
            values[reaching_border((pixels >= low) & (pixels <= high))] = AIR
        return values.T


def reaching_border(mask: np.ndarray) -> np.ndarray:
    """The parts of a mask that reach its border."""
    labels, _ = ndimage.label(mask)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.isin(labels, border[border > 0])


def group_frames(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Divide frames into scans by what they have in `COMMON`, grid, folder and phase."""
    _drop_scrambled(frames)
    _fill_blanks(frames)
    groups = _divide(frames, attrgetter(*COMMON))
    for divide in (_by_grid, _by_folder, _by_phase):
        groups = [part for group in groups for part in divide(group)]
    return groups


def _drop_scrambled(frames: Sequence[Frame]) -> None:
    """Blank the identifiers that an anonymiser made anew for every slice of a series."""
    for group in _divide(frames, attrgetter("series")):
        named = bool(group[0].series)
        fields = _scrambled(group, ("study", "frame_of_reference") + PATIENT * named)
        if fields and (named and not {*PATIENT} & {*fields} or _are_stacks(group)):
            _set(group, dict.fromkeys(fields, ""))
    seen = Counter(frame.series for frame in frames)
    alone = [frame for frame in frames if seen[frame.series] == 1]
    for alike in _divide(alone, attrgetter("patient", "size", "kernel", "modality", "thickness")):
        for group in _by_grid(alike):
            if _are_stacks(group) or _is_numbered(group):
                _set(group, dict.fromkeys(_scrambled(group, ("series", "study", "frame_of_reference")), ""))


def _scrambled(frames: Sequence[Frame], fields: Iterable[str]) -> list[str]:
    return [field for field in fields if 2 < len(frames) == len({getattr(frame, field) for frame in frames})]


def _set(frames: Sequence[Frame], values: Mapping[str, str]) -> None:
    for frame, (field, value) in itertools.product(frames, values.items()):
        setattr(frame, field, value)


def _fill_blanks(frames: Sequence[Frame]) -> None:
    """Give slices without an identifier that of the others of their stacks, which agree in every other one, or in one."""
    others = [[name for name in IDENTITY if name != field] for field in IDENTITY]
    for known in [*others, *([name] for name in IDENTITY[:-1])]:
        for group in _divide(frames, attrgetter(*known, "size", "unknown")):
            if any(getattr(group[0], name) for name in known if name != "kernel"):
                _fill(group)


def _fill(group: Sequence[Frame]) -> None:
    values = {field: {getattr(frame, field) for frame in group} for field in IDENTITY}
    several = [field for field in IDENTITY if len(values[field] - {""}) > 1]
    for part in _divide(group, lambda frame: tuple(getattr(frame, field) for field in several)):
        found = {field: {getattr(frame, field) for frame in part} for field in IDENTITY}
        blank = {field: max(texts) for field, texts in found.items() if len(texts) > 1}
        if blank and len({(frame.number, frame.marks) for frame in part}) in (1, len(part)) and _are_stacks(part):
            _set(part, blank)


def _divide(items: Iterable, key: Callable) -> list[list]:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


def _by_grid(frames: Sequence[Frame]) -> list[list[Frame]]:
    groups: list[list[Frame]] = []
    for frame in frames:
        if alike := next((group for group in groups if _on_one_grid(group[0], frame)), None):
            alike.append(frame)
        else:
            groups.append([frame])
    return groups


def _on_one_grid(one: Frame, other: Frame) -> bool:
    """Whether directions differ by at most 0.01 and sides of a pixel by 0.001 mm, if they are known."""
    pairs = ((one.orientation, other.orientation, 0.01), (one.spacing, other.spacing, 0.001))
    differ = [pair for pair in pairs if pair[0] and pair[1] and pair[0] != pair[1]]
    return all(np.abs(np.subtract(first, second)).max() <= most for first, second, most in differ)


def _by_folder(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Folders are parts of one scan unless they hold the same places, or unless nothing but the places joins them."""
    place, folders = dict(zip(map(id, frames), _places(frames))), _divide(frames, attrgetter("folder"))
    places = [{place[id(frame)] for frame in folder} for folder in folders]
    repeated = sum(map(len, places)) - len(set().union(*places))
    one_each = MANY <= len(frames) == len(folders)  # as in archives: then the places of all of them count
    fewest = len(frames) if one_each else min(map(len, places))
    joined = 2 * repeated <= fewest and (frames[0].series or _is_stack(frames))
    return [list(frames)] if joined else folders


def _places(frames: Sequence[Frame]) -> list:
    """What two slices of a scan never have in common: the number of the place, from the feet, or else of the image."""
    heights = np.array([frame.height if frame.placed else np.nan for frame in frames])
    order = np.argsort(heights)  # unknown ones last
    numbers = np.empty(len(frames), int)
    numbers[order] = np.cumsum(np.r_[0, np.diff(heights[order]) > SAME_PLACE])
    return [int(at) if frame.placed else (frame.number, frame.index) for at, frame in zip(numbers, frames)]


def _by_phase(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Divide slices at the same places, and stacks that overlap, by what tells most of them apart, or else by their order."""
    repeated = len(frames) - len(set(_places(frames)))
    for index in range(len(frames[0].marks)):
        parts = _divide(frames, lambda frame: frame.marks[index : index + 1])
        if len(parts) > 1 and min(map(len, parts)) > 1:
            overlap = not repeated and index < len(MARKS) and _overlap(parts)
            if sum(len(part) - len(set(_places(part))) for part in parts) < repeated / 2 or overlap:
                return [finer for part in parts for finer in _by_phase(part)]
    return _by_order(frames) if repeated or not _is_stack(frames) else [list(frames)]


def _by_order(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Divide slices by time or number: into sweeps along the body, or, of places that come again, turn by turn."""
    place = dict(zip(map(id, frames), _places(frames)))
    times = Counter(place.values())
    most, again = max(times.values()), sum(count > 1 for count in times.values())
    if len(times) < 3 or 0 < 2 * again < len(times) or not all(frame.placed for frame in frames):
        return [list(frames)]  # one place over time, or copies of a few slices
    for field in ("time", "content_time", "number", "index"):
        value = attrgetter(field)
        if None in map(value, frames) or len({(place[id(frame)], value(frame)) for frame in frames}) < len(frames):
            continue
        order = sorted(frames, key=value)
        sweeps, turns, turn, way = [[order[0]]], defaultdict(list), Counter(), 0
        for last, frame in zip(order, order[1:]):
            step = place[id(frame)] - place[id(last)]
            if step == 0 or step * way < 0:
                sweeps.append([])
            way = step if sweeps[-1] else 0
            sweeps[-1].append(frame)
        for frame in order:
            turns[turn[place[id(frame)]]].append(frame)
            turn[place[id(frame)]] += 1
        if again:
            return sweeps if len(sweeps) == most else list(turns.values())
        if _overlap(sweeps):
            return sweeps
    return [list(frames)]


def _overlap(parts: Sequence[Sequence[Frame]]) -> bool:
    """Whether these are stacks that make none together, and half of one is inside of another: slabs overlap by less."""
    if not all(map(_is_stack, parts)) or _is_stack([frame for part in parts for frame in part]):
        return False
    ends = sorted((min(heights), max(heights)) for heights in ([frame.height for frame in part] for part in parts))
    pairs = zip(ends, ends[1:])
    return any(2 * (min(top, high) - low) > min(top - bottom, high - low) for (bottom, top), (low, high) in pairs)


def _are_stacks(frames: Sequence[Frame]) -> bool:
    return all(map(_is_stack, _by_phase(frames)))


def _is_stack(frames: Sequence[Frame]) -> bool:
    """Whether slices are one above the other at a regular distance, some of them missing perhaps."""
    if len(frames) < 3 or not all(frame.placed for frame in frames):
        return False
    points = np.array([frame.position for frame in sorted(frames, key=lambda frame: frame.height)])
    steps = np.diff(points, axis=0)
    usual = np.median(steps, axis=0)
    if not (length := np.linalg.norm(usual)) > 0.01:
        return False
    counts = np.round(steps @ usual / length**2)
    few_missing = counts.min() >= 1 and 3 * (counts > 1).sum() <= len(counts)
    return bool(few_missing and np.abs(steps - counts[:, None] * usual).max() < 0.1 * length)


def _is_numbered(frames: Sequence[Frame]) -> bool:
    """Whether images of no place or of the same have the numbers of one series of one study."""
    numbers, heights = {frame.number for frame in frames} - {None}, {frame.height for frame in frames if frame.placed}
    if len(frames) < MANY or len(heights) > 1 or len({frame.study for frame in frames}) > 1:
        return False
    return len(numbers) == len(frames) > max(numbers) - min(numbers)


def drop_extras(groups: Sequence[list[Frame]]) -> tuple[list[list[Frame]], dict[tuple[str, str], Counter]]:
    """Drop images that are not axial, and `_extra` images of a study that has a scan; return scans and drops by study."""
    kept, left_out = [], defaultdict(Counter)
    for study in _divide(groups, lambda group: study_of(group[0])):
        scans = [group for group in study if not _extra(group, 0)]
        largest = max((len(group) for group in scans if not _one_place(group)), default=0)
        for group in study:
            kind = _extra(group, largest) if scans else NOT_AXIAL * (not group[0].axial)
            if kind:
                left_out[study_of(group[0])][kind] += len(group)
            else:
                kept.append(group)
    return kept, left_out


def study_of(frame: Frame) -> tuple[str, str]:
    """Patient and study, which is the folder where it has no UID."""
    return frame.patient, frame.study or frame.folder


def study_of_header(path, header: pydicom.Dataset) -> tuple[str, str]:
    """The same for a file that has no frame."""
    texts = [_text(header, name) for name in ("PatientID", "PatientName", "StudyInstanceUID")]
    return texts[0] or texts[1].rstrip("^ "), texts[2] or os.path.dirname(path)


def _extra(group: Sequence[Frame], largest: int) -> str:
    """What images are called that are no scan beside a scan of `largest` slices; empty for a scan."""
    first = group[0]
    if not first.axial:
        return NOT_AXIAL
    if first.photometric not in GREY:
        return "images in colour"
    if "DERIVED" in first.image_type.upper() and not any(frame.placed for frame in group):
        return "derived images without a position"
    if re.search(r"\bM(IN)?IP\b|PROJECTION", first.image_type.upper()):
        return "projections of several slices"
    times = sorted(frame.time for frame in group if frame.time is not None)
    slow = len(times) == len(group) > 1 and float(np.median(np.diff(times))) >= BOLUS_TIME
    bolus = slow and (first.thickness or 0) >= BOLUS_THICKNESS
    if _one_place(group) and (len(group) < max(MANY, 2 * largest) or bolus):
        return "images of one place over time"
    if len(group) <= 2 and largest >= MANY and (first.thickness or 0) >= BOLUS_THICKNESS:
        return "single test images"
    return ""


def _one_place(group: Sequence[Frame]) -> bool:
    """Whether several files show one place."""
    return len({frame.path for frame in group}) > 1 and group[0].placed and len(set(_places(group))) == 1


def order_frames(frames: Sequence[Frame]) -> tuple[list[Frame], list[str]]:
    """The slices of a scan from the feet to the head, without positions if lengths are not known, and warnings."""
    notes, placed = [], [frame for frame in frames if frame.placed]
    if not placed or _say_nothing(placed):
        by_height = not placed and all(frame.position and frame.orientation for frame in frames)
        lack = "equal positions" if placed else "no pixel spacing" if by_height else "no position"
        if len(frames) > 1:
            order = f"they are in the order of their {'positions' if by_height else 'numbers'}"
            notes.append(f"{len(frames)} images with {lack}: {order}, lengths are not known")
        order = sorted(frames, key=lambda frame: (frame.height if by_height else 0.0, *_order(frame)))
        return [replace(frame, position=None) for frame in order], notes
    if len(placed) < len(frames):
        notes.append(f"left out {len(frames) - len(placed)} images without a position")
    order = sorted(placed, key=lambda frame: (frame.height, *_order(frame)))
    heights = [frame.height for frame in order]
    kept = [frame for frame, low, high in zip(order, [-np.inf, *heights], heights) if high - low > SAME_PLACE]
    if len(kept) < len(order):
        notes.append(f"left out {len(order) - len(kept)} images at the place of another one")
    shared = len({frame.path for frame in kept}) - len({frame.instance or frame.path for frame in kept})
    if shared:
        notes.append(f"{shared} images have the SOPInstanceUID of another one")
    return kept, notes


def _order(frame: Frame) -> tuple:
    natural = tuple((int(digits or 0), text) for text, digits in re.findall(r"(\D*)(\d{1,18})?", frame.path))
    return frame.number is None, frame.number or 0, natural, frame.index


def _say_nothing(frames: Sequence[Frame]) -> bool:
    """Whether one position of many different images is an anonymiser's work, or that of a file of many frames."""
    if len(frames) < 2 or len(set(_places(frames))) > 1:
        return False
    if len({frame.path for frame in frames}) == 1:
        return True
    numbers = {frame.number for frame in frames}
    if len(frames) < MANY or numbers != {None} and len(numbers) < len(frames):
        return False
    first, other = frames[0], frames[len(frames) // 2]
    return not np.array_equal(Pixels(first.path).read(first), Pixels(other.path).read(other))


def measure_gaps(heights: np.ndarray) -> tuple[list[float], list[str]]:
    """mm that each slice stands for, half the way to both neighbours, and warnings."""
    gaps, notes = np.diff(heights), []
    usual = float(np.median(gaps))
    missing = int(np.maximum(np.round(gaps / usual) - 1, 0).sum())
    if missing:
        notes.append(f"about {missing} slices are missing: gaps up to {gaps.max():.2f} mm, usually {usual:.2f} mm")
    elif gaps.max() - gaps.min() > 0.02 * usual + 0.01:
        notes.append(f"unequal spacing of the slices: {gaps.min():.2f} to {gaps.max():.2f} mm")
    if notes:
        notes.append(f"NIfTI has one spacing only and claims {gaps.mean():.2f} mm; volumes count the true ones")
    return ((np.r_[gaps[0], gaps] + np.r_[gaps, gaps[-1]]) / 2).tolist(), notes


def affine_of(frames: Sequence[Frame]) -> np.ndarray:
    """(4, 4) from (column, row, slice) to RAS (DICOM PS3.3, C.7.6.2.1.1); the step between slices is their mean."""
    first, last, across, down = frames[0], frames[-1], *np.reshape(frames[0].orientation, (2, 3))
    step = np.array(first.normal) * np.sign(first.normal[2] or 1) * float(first.thickness or 1)
    if len(frames) > 1:
        step = np.subtract(last.position, first.position) / (len(frames) - 1)
    columns = np.stack([across * first.spacing[1], down * first.spacing[0], step, first.position], 1)
    return np.diag([-1.0, -1, 1, 1]) @ np.vstack([columns, [0, 0, 0, 1]])
