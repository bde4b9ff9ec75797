"""Results of a DICOM scan as DICOM objects of the same patient and study: a Segmentation and a Structured Report."""

from __future__ import annotations

import hashlib
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import highdicom
import numpy as np
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid
from pydicom.valuerep import DA, TM

from bundle.data.series import Frame, read_header
from bundle.errors import UserError, no_warnings
from bundle.inference.overlay import LESIONS
from bundle.inference.results import Result

logging.getLogger("highdicom").setLevel(logging.CRITICAL)  # it logs names of patients; what matters is raised

RESEARCH = "AI, research use only"
ML, PERCENT = Code("mL", "UCUM", "milliliter"), codes.UCUM.Percent
OWN_CODES = "99CHESTCT"  # private scheme for what no public one has; declared in the report

# Codes by the words of the whole name, in lower case: a part of "non-COVID" would say its opposite.
SEGMENTS = {
    r"ggo|(ggo )?ground glass( opacity)?": codes.DCM.GroundGlassOpacity,
    r"(lung )?consolidation": Code("95436008", "SCT", "Lung consolidation"),
    r".*": codes.SCT.Lesion,
}
CLASSES = {
    r"covid ?(19)?": Code("840539006", "SCT", "COVID-19"),
    r"lung cancer": Code("363358000", "SCT", "Malignant neoplasm of lung"),
}

ABNORMAL = codes.SCT.MorphologicallyAbnormalStructure

# What a DICOM object must have, if only an empty value.
TYPE_2 = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
TYPE_2 += ("AccessionNumber", "StudyID", "StudyDate", "StudyTime")
DATES = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
# Attribute of a header -> that of `Frame`.
IDENTITY = {"SOPClassUID": "sop_class", "SOPInstanceUID": "instance", "StudyInstanceUID": "study", "SeriesInstanceUID": "series"}
PLACE = {"FrameOfReferenceUID": "frame_of_reference", "ImagePositionPatient": "position"}
PLACE |= {"ImageOrientationPatient": "orientation", "PixelSpacing": "spacing"}


def write_dicom(folder, result: Result, warnings: list[str]) -> dict[str, str]:
    """Write segmentation.dcm and report.dcm of a DICOM scan and return kind -> name; why one is not written is warned of."""
    files, segmentation, frames = {}, None, result.scan.frames
    with no_warnings(), _noting(warnings, "DICOM object"):
        headers = read_headers(frames)
        if result.segments:
            with _noting(warnings, "DICOM Segmentation"):
                segmentation = write_segmentation(Path(folder, "segmentation.dcm"), frames, headers, result)
                files["dicom_segmentation"] = "segmentation.dcm"
        with _noting(warnings, "DICOM Structured Report"):
            write_structured_report(Path(folder, "report.dcm"), frames, headers, result, warnings, segmentation)
            files["dicom_report"] = "report.dcm"
    return files


@contextmanager
def _noting(warnings: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        warnings.append(f"no {what} is written: {error}")


def read_headers(frames: Sequence[Frame]) -> dict[str, Dataset]:
    """Headers by path: the first as it is read, without invalid values; the others with what references and geometry need."""
    _require(frames, IDENTITY)
    first, headers = read_header(frames[0].path, None), {}
    for keyword in TYPE_2:
        if not _is_valid(keyword, first.get(keyword)):
            setattr(first, keyword, None)
    if any("ReferencedSOPClassUID" not in study for study in first.get("ReferencedStudySequence") or ()):
        del first.ReferencedStudySequence  # optional, and half of it is an error in any object that it is copied to
    for frame in frames:
        if frame.path not in headers:
            header = headers[frame.path] = Dataset() if headers else first
            for keyword, name in {**IDENTITY, **PLACE}.items():
                # Digits of the orientation may differ from slice to slice.
                if value := getattr(frames[0] if name == "orientation" else frame, name):
                    setattr(header, keyword, list(value) if isinstance(value, tuple) else value)
            header.Columns, header.Rows = frame.size
    return headers


def _require(frames: Sequence[Frame], keywords: Mapping[str, str]) -> None:
    if missing := [keyword for keyword, name in keywords.items() if not all(getattr(frame, name) for frame in frames)]:
        raise UserError(f"found no {', '.join(missing)} in a file of the series")


def write_segmentation(path, frames: Sequence[Frame], headers: Mapping[str, Dataset], result: Result) -> Segmentation:
    """Write a DICOM Segmentation (BINARY, a segment for each segmentation class); what highdicom needs is added to `headers`.

    Every segment has a frame for every slice, empty or not (32 KB of 512 x 512), so that its frames are the grid of the scan
    for readers that ignore frame positions.
    """
    model = result.model
    return _save(
        path,
        Segmentation,
        source_images=list(headers.values()),
        pixel_array=result.volumes["mask"].voxels().transpose(2, 1, 0),
        segmentation_type="BINARY",
        segment_descriptions=[_segment(number, name, model) for number, name in enumerate(result.segments, start=1)],
        plane_positions=_place(frames, headers),
        omit_empty_frames=False,
        content_label="LESIONS",
        content_description=RESEARCH,
        series_description=f"Segmentation, {RESEARCH}",
        **_series(headers[frames[0].path], model, 1),
    )


def write_structured_report(
    path,
    frames: Sequence[Frame],
    headers: Mapping[str, Dataset],
    result: Result,
    warnings: Sequence[str],
    segmentation: Dataset | None = None,
) -> None:
    """Write a DICOM Structured Report (Comprehensive SR, template TID 1500), unverified and preliminary; it needs no geometry.

    It has a group for the scan, for each segmentation class (with its segment) and for each lesion (with the outlines of its
    boxes), without values that are null, and comments: research use, and the warnings.
    """
    model, first = result.model, headers[frames[0].path]
    groups = [_scan_group(result)]
    for number, (name, found) in enumerate(result.segments.items(), start=1):
        groups.append(_segment_group(number, name, found, model, first, segmentation))
    groups += [_lesion_group(lesion, model, frames, headers) for lesion in result.lesions]
    uid = generate_uid(entropy_srcs=list(model.values()))  # the same in all reports of the same weights
    about = {"name": model["name"], "model_name": model["name"], "serial_number": model["checkpoint"]}
    device = sr.DeviceObserverIdentifyingAttributes(uid=uid, **about)
    observer = sr.ObserverContext(codes.DCM.Device, observer_identifying_attributes=device)
    context = sr.ObservationContext(observer_device_context=observer)
    report = sr.MeasurementReport(context, codes.LN.CTUnspecifiedBodyRegion, groups)
    for text in ("Made by AI. Research use only, not for diagnosis.", *warnings):
        report[0].ContentSequence.append(sr.TextContentItem(codes.DCM.Comment, text, relationship_type="CONTAINS"))
    _save(
        path,
        sr.ComprehensiveSR,
        evidence=[*headers.values(), *([segmentation] if segmentation else [])],
        content=report[0],
        is_complete=True,
        coding_schemes=[CodingSchemeIdentificationItem(OWN_CODES, name="Chest CT multi-task")],
        series_description=f"Measurements, {RESEARCH}",
        **_series(first, model, 2),
    )


def _save(path, kind: type[Dataset], **arguments) -> Dataset:
    """Make a highdicom object and write it; messages of the libraries are not shown, since they quote the patient."""
    try:
        made = kind(**arguments)
        made.save_as(path)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        Path(path).unlink(missing_ok=True)
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
        raise UserError(f"the headers of the series cannot be carried over ({where})") from error
    return made


def _segment(number: int, name: str, model: Mapping) -> SegmentDescription:
    algorithm = highdicom.AlgorithmIdentificationSequence(
        model["name"], codes.DCM.ArtificialIntelligence, model["version"], parameters={"checkpoint": model["checkpoint"]}
    )
    return SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=ABNORMAL,
        segmented_property_type=_public_code(name, SEGMENTS),
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        tracking_id=name[:64],
        tracking_uid=highdicom.UID(),
        anatomic_regions=[codes.SCT.Lung],
        display_color=CIELabColor.from_string(LESIONS[(number - 1) % len(LESIONS)]),
    )


def _common(identifier: str, model: Mapping, values: Sequence[tuple]) -> dict:
    """What all measurement groups have. `values` are (name, value, unit): without unknown ones, shares in %."""
    known = [(name, value * (100 if unit == PERCENT else 1), unit) for name, value, unit in values if value is not None]
    return {
        "tracking_identifier": sr.TrackingIdentifier(uid=highdicom.UID(), identifier=identifier),
        "algorithm_id": sr.AlgorithmIdentification(model["name"], model["version"], [f"checkpoint {model['checkpoint']}"]),
        "finding_sites": [sr.FindingSite(codes.SCT.Lung)],
        "measurements": [sr.Measurement(name, round(value, 6), unit) for name, value, unit in known],
    }


def _scan_group(result: Result) -> sr.MeasurementsAndQualitativeEvaluations:
    values, evaluations = [(_own_code(f"Probability of {name}"), p, PERCENT) for name, p in result.classes.items()], []
    if result.classes:
        predicted = max(result.classes, key=result.classes.get)
        code = _public_code(predicted, CLASSES) or _own_code(predicted)
        evaluations = [sr.QualitativeEvaluation(_own_code("Predicted class"), code)]
    if lung := result.entries["lung"]:
        values.append((_own_code("Volume of lung"), lung["volume_ml"], ML))
    common = _common("Scan", result.model, values)
    return sr.MeasurementsAndQualitativeEvaluations(qualitative_evaluations=evaluations, **common)


def _segment_group(number: int, name: str, found: Mapping, model: Mapping, header: Dataset, segmentation: Dataset | None):
    values = [(codes.SCT.Volume, found["volume_ml"], ML), (_own_code("Share of lung"), found["share_of_lung"], PERCENT)]
    common = {"finding_category": ABNORMAL, "finding_type": _public_code(name, SEGMENTS), **_common(name, model, values)}
    if segmentation is None:
        return sr.MeasurementsAndQualitativeEvaluations(**common)
    source = sr.SourceSeriesForSegmentation(header.SeriesInstanceUID)
    segment = sr.ReferencedSegment(segmentation.SOPClassUID, segmentation.SOPInstanceUID, number, source_series=source)
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **common)


def _lesion_group(lesion: Mapping, model: Mapping, frames: Sequence[Frame], headers: Mapping[str, Dataset]):
    """Regions are polygons in pixels of the image, whose upper left corner is (0, 0), as of boxes."""
    values = [(codes.DCM.CertaintyOfFinding, lesion["score"], PERCENT), (codes.SCT.Volume, lesion["volume_ml"], ML)]
    for name, size in zip((codes.SCT.Width, codes.DCM.Height, codes.SCT.Depth), lesion["size_mm"] or ()):
        values.append((name, size, codes.UCUM.Millimeter))
    regions = []
    for box in lesion["boxes"]:
        x1, y1, x2, y2 = box["box"]
        frame = frames[box["slice"]]
        number = [frame.index + 1] if _is_multiframe(headers[frame.path]) else None
        source = sr.SourceImageForRegion(frame.sop_class, frame.instance, number)
        outline = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]])
        regions.append(sr.ImageRegion("POLYLINE", outline, source))
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_regions=regions,
        finding_category=ABNORMAL,
        finding_type=codes.SCT.Lesion,
        **_common(f"Lesion {lesion['id']}", model, values),
    )


def _own_code(meaning: str) -> sr.CodedConcept:
    code = re.sub(r"\W+", "-", meaning.lower())
    if re.search(r"[^\w -]", meaning):  # two meanings never share a code
        code += f"-{hashlib.sha256(meaning.encode()).hexdigest()[:6]}"
    return sr.CodedConcept(code, OWN_CODES, meaning[:64])


def _public_code(name: str, known: Mapping[str, Code]) -> Code | None:
    words = " ".join(re.findall(r"[^\W_]+", name.lower()))
    return next((code for pattern, code in known.items() if re.fullmatch(pattern, words)), None)


def _series(header: Dataset, model: Mapping, number: int) -> dict:
    """Arguments of highdicom for a new series, whose number is 100 times that of the source, plus `number`."""
    return {
        "series_instance_uid": highdicom.UID(),
        "series_number": 100 * max(0, min(int(header.get("SeriesNumber") or 0), 10**6)) + number,
        "sop_instance_uid": highdicom.UID(),
        "instance_number": 1,
        "manufacturer": model["name"],
        "manufacturer_model_name": model["name"],
        "software_versions": model["version"],
        "device_serial_number": model["checkpoint"],
        "content_qualification": "RESEARCH",
        "specific_character_set": "ISO_IR 192",  # UTF-8: names of any script
    }


def _is_valid(keyword: str, value) -> bool:
    if keyword == "PatientSex":
        return value in ("M", "F", "O")
    try:
        return value is not None and DATES.get(keyword, str)(value) is not None
    except (TypeError, ValueError):
        return False


def _is_multiframe(header: Dataset) -> bool:
    return "PerFrameFunctionalGroupsSequence" in header or int(header.get("NumberOfFrames") or 1) > 1


def _place(frames: Sequence[Frame], headers: Mapping[str, Dataset]) -> list[highdicom.PlanePositionSequence] | None:
    """Add to the headers what highdicom needs of the geometry; positions of the frames of one file, else None."""
    _require(frames, PLACE)
    if len({frame.instance for frame in frames}) < len(headers):
        raise UserError("found slices that share a SOPInstanceUID, which no reference can tell apart")
    first, gaps = headers[frames[0].path], np.diff(np.sort([frame.height for frame in frames]))
    thickness = frames[0].thickness or (round(float(np.median(gaps)), 4) if len(gaps) else None)
    if not _is_multiframe(first):
        first.SliceThickness = thickness
        first.pop("SpacingBetweenSlices", None)  # often wrong or negative: highdicom finds it from the positions
        return None
    if len(headers) > 1 or "PerFrameFunctionalGroupsSequence" not in first:
        raise UserError(f"found {len(headers)} multi-frame files, expected one, of an enhanced image, or single frames")
    shared = Dataset()  # each frame may have its own instead
    shared.PixelMeasuresSequence = highdicom.PixelMeasuresSequence(frames[0].spacing, thickness)
    shared.PlaneOrientationSequence = highdicom.PlaneOrientationSequence("PATIENT", frames[0].orientation)
    first.SharedFunctionalGroupsSequence = [shared]
    return [highdicom.PlanePositionSequence("PATIENT", frame.position) for frame in frames]
