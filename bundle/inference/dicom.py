"""Results of a DICOM scan as DICOM objects of the same patient and study: a Segmentation and a Structured Report."""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.color import CIELabColor
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid
from pydicom.valuerep import DA, TM

from bundle.errors import UserError
from bundle.inference.overlay import LESIONS

logging.getLogger("highdicom").setLevel(logging.CRITICAL)  # it logs names of patients; what matters is raised

RESEARCH = "AI, research use only"
ML = Code("mL", "UCUM", "milliliter")
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

ABNORMAL = {"finding_category": codes.SCT.MorphologicallyAbnormalStructure}

# What a DICOM object must have, if only an empty value.
TYPE_2 = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
TYPE_2 += ("AccessionNumber", "StudyID", "StudyDate", "StudyTime")
DATES = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
IDENTITY = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns")
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")


def write_segmentation(path, sources: Sequence[tuple[str, int]], labels, names: Sequence[str], model: Mapping) -> None:
    """Write a DICOM Segmentation (BINARY, a segment for each segmentation class) of a series or a multi-frame image.

    Patient and study are those of the source. Every segment has a frame for every slice, empty or not, so that its frames are
    the grid of the scan for readers that ignore frame positions. A frame of 512 x 512 pixels takes 32 KB.

    Args:
        path: of the file.
        sources: (path, frame from 0) of each slice, in slice order.
        labels: (columns, rows, slices) uint8, 0 or 1 + segmentation class.
        names: of the segmentation classes.
        model: {"name", "version", "checkpoint"}.

    Raises:
        UserError: in one line without patient data, if the source lacks what a Segmentation needs; nothing is written.
    """
    with _writing(path, "DICOM Segmentation"):
        headers = list(_read_headers(sources).values())
        _complete_geometry(headers)
        first = headers[0]
        if labels.shape != (first.Columns, first.Rows, len(sources)):
            raise UserError(f"found slices of {first.Columns} x {first.Rows} pixels, expected {labels.shape} as the mask has")
        Segmentation(
            source_images=headers,
            pixel_array=labels.transpose(2, 1, 0),
            segmentation_type="BINARY",
            segment_descriptions=[_segment(number, name, model) for number, name in enumerate(names, start=1)],
            plane_positions=_frame_positions(first, sources),
            omit_empty_frames=False,
            content_label="LESIONS",
            content_description=RESEARCH,
            series_description=f"Segmentation, {RESEARCH}",
            **_series(first, model, 1),
        ).save_as(path)


def write_structured_report(path, sources: Sequence[tuple[str, int]], prediction: Mapping, segmentation_path=None) -> None:
    """Write a DICOM Structured Report (Comprehensive SR, template TID 1500) of a scan's predictions.

    It has a group for each lesion (outlines of its boxes in pixels of the images, certainty in %, volume in mL; in mm the
    width along a row, height along a column, depth across the slices), one for each segmentation class (volume in mL, share of
    the lung in %, its segment) and one for the scan (probabilities in %, predicted class, volume of the lung in mL). Values
    that are null are omitted. Geometry is not needed. The report is unverified and preliminary; comments in it state that it
    is for research only, and the warnings.

    Args:
        path: of the file.
        sources: (path, frame from 0) of each slice, in slice order.
        prediction: content of predictions.json.
        segmentation_path: of the Segmentation of `write_segmentation`, if there is one.

    Raises:
        UserError: in one line without patient data, if the source lacks what a report needs; nothing is written.
    """
    model, segmentation = prediction["model"], None
    if segmentation_path is not None:
        segmentation = pydicom.dcmread(segmentation_path, stop_before_pixels=True)
    with _writing(path, "DICOM Structured Report"):
        headers = _read_headers(sources)
        first = next(iter(headers.values()))
        groups = [_scan_group(prediction)]
        for number, (name, found) in enumerate(prediction.get("segmentation", {}).items(), start=1):
            groups.append(_segment_group(number, name, found, model, first, segmentation))
        groups += [_lesion_group(lesion, model, sources, headers) for lesion in prediction.get("detection", [])]
        report = sr.MeasurementReport(_observer(model), codes.LN.CTUnspecifiedBodyRegion, groups)
        for text in ("Made by AI. Research use only, not for diagnosis.", *prediction["warnings"]):
            report[0].ContentSequence.append(sr.TextContentItem(codes.DCM.Comment, text, relationship_type="CONTAINS"))
        sr.ComprehensiveSR(
            evidence=[*headers.values(), *([segmentation] if segmentation else [])],
            content=report[0],
            is_complete=True,
            coding_schemes=[CodingSchemeIdentificationItem(OWN_CODES, name="Chest CT multi-task")],
            series_description=f"Measurements, {RESEARCH}",
            **_series(first, model, 2),
        ).save_as(path)


def _segment(number: int, name: str, model: Mapping) -> SegmentDescription:
    parameters = {"checkpoint": model["checkpoint"]}
    return SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
        segmented_property_type=_public_code(name, SEGMENTS),
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            model["name"], codes.DCM.ArtificialIntelligence, model["version"], parameters=parameters
        ),
        tracking_id=name[:64],
        tracking_uid=highdicom.UID(),
        anatomic_regions=[codes.SCT.Lung],
        display_color=CIELabColor.from_string(LESIONS[(number - 1) % len(LESIONS)]),
    )


def _observer(model: Mapping) -> sr.ObservationContext:
    """The software, which has the same UID in all reports of the same weights."""
    attributes = sr.DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=[model["name"], model["version"], model["checkpoint"]]),
        name=model["name"],
        model_name=model["name"],
        serial_number=model["checkpoint"],
    )
    return sr.ObservationContext(
        observer_device_context=sr.ObserverContext(codes.DCM.Device, observer_identifying_attributes=attributes)
    )


def _group_of(identifier: str, model: Mapping, measurements: Sequence[sr.Measurement]) -> dict:
    """What all measurement groups have."""
    return {
        "tracking_identifier": sr.TrackingIdentifier(uid=highdicom.UID(), identifier=identifier),
        "algorithm_id": sr.AlgorithmIdentification(model["name"], model["version"], [f"checkpoint {model['checkpoint']}"]),
        "finding_sites": [sr.FindingSite(codes.SCT.Lung)],
        "measurements": measurements,
    }


def _scan_group(prediction: Mapping) -> sr.MeasurementsAndQualitativeEvaluations:
    measurements, evaluations = [], []
    if classification := prediction.get("classification"):
        for name, probability in classification["probabilities"].items():
            measurements += _measure(_own_code(f"Probability of {name}"), probability, codes.UCUM.Percent, 100)
        predicted = classification["predicted"]
        evaluations.append(
            sr.QualitativeEvaluation(_own_code("Predicted class"), _public_code(predicted, CLASSES) or _own_code(predicted))
        )
    if lung := prediction.get("lung"):
        measurements += _measure(_own_code("Volume of lung"), lung["volume_ml"], ML)
    return sr.MeasurementsAndQualitativeEvaluations(
        qualitative_evaluations=evaluations, **_group_of("Scan", prediction["model"], measurements)
    )


def _segment_group(number: int, name: str, found: Mapping, model: Mapping, header: Dataset, segmentation: Dataset | None):
    measurements = _measure(codes.SCT.Volume, found["volume_ml"], ML)
    measurements += _measure(_own_code("Share of lung"), found["share_of_lung"], codes.UCUM.Percent, 100)
    common = {"finding_type": _public_code(name, SEGMENTS), **ABNORMAL, **_group_of(name, model, measurements)}
    if segmentation is None:
        return sr.MeasurementsAndQualitativeEvaluations(**common)
    segment = sr.ReferencedSegment(
        segmentation.SOPClassUID,
        segmentation.SOPInstanceUID,
        number,
        source_series=sr.SourceSeriesForSegmentation(header.SeriesInstanceUID),
    )
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **common)


def _lesion_group(lesion: Mapping, model: Mapping, sources: Sequence[tuple[str, int]], headers: Mapping[str, Dataset]):
    """Regions are polygons in pixels of the image, whose upper left corner is (0, 0): the convention of boxes here too."""
    measurements = _measure(codes.DCM.CertaintyOfFinding, lesion["score"], codes.UCUM.Percent, 100)
    measurements += _measure(codes.SCT.Volume, lesion["volume_ml"], ML)
    sides = zip((codes.SCT.Width, codes.DCM.Height, codes.SCT.Depth), lesion["size_mm"] or [None] * 3)
    for name, size in sides:
        measurements += _measure(name, size, codes.UCUM.Millimeter)
    regions = []
    for box in lesion["boxes"]:
        x1, y1, x2, y2 = box["box"]
        path, frame = sources[box["slice"]]
        header = headers[path]
        frames = [frame + 1] if _is_multiframe(header) else None
        outline = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2], [x1, y1]])
        regions.append(sr.ImageRegion("POLYLINE", outline, sr.SourceImageForRegion.from_source_image(header, frames)))
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_regions=regions,
        finding_type=codes.SCT.Lesion,
        **ABNORMAL,
        **_group_of(f"Lesion {lesion['id']}", model, measurements),
    )


def _measure(name, value: float | None, unit: Code, factor: float = 1) -> list[sr.Measurement]:
    """The measurement, or nothing where the value is not known. Products have the digits of predictions.json."""
    return [] if value is None else [sr.Measurement(name, round(value * factor, 6), unit)]


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


@contextmanager
def _writing(path, what: str):
    """Turn an error into one line. Messages of libraries quote the patient, so only the kind of an error is given."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
        return
    except UserError as error:
        reason = str(error)
    except OSError:  # of the disk: no fault of the series
        raise
    except Exception as error:
        reason = f"the headers of the series cannot be carried over ({type(error).__name__})"
    Path(path).unlink(missing_ok=True)
    raise UserError(f"no {what} is written: {reason}")


def _read_headers(sources: Sequence[tuple[str, int]]) -> dict[str, Dataset]:
    """Headers by path, in slice order; in the first, which patient and study are taken from, invalid values are emptied."""
    headers = {path: pydicom.dcmread(path, stop_before_pixels=True) for path in dict.fromkeys(path for path, _ in sources)}
    for header in headers.values():
        _require(header, IDENTITY)
    first = next(iter(headers.values()))
    for keyword in TYPE_2:
        if not _is_valid(keyword, first.get(keyword)):
            setattr(first, keyword, None)
    if any("ReferencedSOPClassUID" not in study for study in first.get("ReferencedStudySequence") or ()):
        del first.ReferencedStudySequence  # optional, and half of it is an error in any object that it is copied to
    return headers


def _is_valid(keyword: str, value) -> bool:
    if keyword == "PatientSex":
        return value in ("M", "F", "O")
    try:
        return value is not None and DATES.get(keyword, str)(value) is not None
    except (TypeError, ValueError):
        return False


def _require(dataset: Dataset, keywords: Sequence[str]) -> None:
    if missing := [keyword for keyword in keywords if dataset.get(keyword) in (None, "")]:
        raise UserError(f"found no {', '.join(missing)} in a file of the series")


def _complete_geometry(headers: Sequence[Dataset]) -> None:
    """Add to the headers what highdicom needs, where it follows from them.

    Raises:
        UserError: if it does not.
    """
    first = headers[0]
    if _is_multiframe(first):
        if len(headers) > 1:
            raise UserError(f"found {len(headers)} multi-frame files, expected one, or single frames")
        _require(first, ("FrameOfReferenceUID", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"))
        _share_groups(first)
        return
    for header in headers:
        _require(header, ("FrameOfReferenceUID", *GEOMETRY))
        if not np.allclose(header.ImageOrientationPatient, first.ImageOrientationPatient, atol=0.01):
            raise UserError("found slices that are not parallel")
        header.ImageOrientationPatient = first.ImageOrientationPatient  # its digits may differ from slice to slice
    if len({header.SOPInstanceUID for header in headers}) < len(headers):
        raise UserError("found slices that share a SOPInstanceUID, which no reference can tell apart")
    first.SliceThickness = first.get("SliceThickness") or _usual_gap(headers)
    if "SpacingBetweenSlices" in first:  # often wrong or negative: highdicom finds it from the positions
        del first.SpacingBetweenSlices
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        if len({header[keyword].value for header in headers}) > 1:
            raise UserError(f"found slices of unequal {keyword}")


def _usual_gap(headers: Sequence[Dataset]) -> float | None:
    """Usual distance of neighbouring slices in mm; None for a single one."""
    rows, columns = np.reshape(headers[0].ImageOrientationPatient, (2, 3)).astype(float)
    heights = [np.array(header.ImagePositionPatient, float) @ np.cross(rows, columns) for header in headers]
    return round(float(np.median(np.diff(np.sort(heights)))), 4) if len(heights) > 1 else None


def _share_groups(header: Dataset) -> None:
    """Move orientation and spacing, which may be given frame by frame, to the shared groups, where highdicom reads them."""
    shared, frames = header.SharedFunctionalGroupsSequence[0], header.PerFrameFunctionalGroupsSequence
    for name in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        if name not in shared:
            if any(name not in frame or frame[name] != frames[0][name] for frame in frames):
                raise UserError(f"found frames with unequal or without {name}")
            setattr(shared, name, frames[0][name].value)
    if any("PlanePositionSequence" not in frame for frame in frames):
        raise UserError("found frames without PlanePositionSequence")
    if "SpacingBetweenSlices" in shared.PixelMeasuresSequence[0]:
        del shared.PixelMeasuresSequence[0].SpacingBetweenSlices


def _is_multiframe(header: Dataset) -> bool:
    return int(header.get("NumberOfFrames") or 1) > 1 or "PerFrameFunctionalGroupsSequence" in header


def _frame_positions(header: Dataset, sources: Sequence[tuple[str, int]]):
    """Positions of the slices of a multi-frame image, which may be stored in another order; None for single frames."""
    if not _is_multiframe(header):
        return None
    frames = header.PerFrameFunctionalGroupsSequence
    positions = [frames[frame].PlanePositionSequence[0].ImagePositionPatient for _, frame in sources]
    return [highdicom.PlanePositionSequence("PATIENT", position) for position in positions]
