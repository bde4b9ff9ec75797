import logging
import shutil
import subprocess
from types import SimpleNamespace

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from scipy.spatial.transform import Rotation

from bundle.data.series import read_header
from bundle.data.volumes import find_scans
from bundle.errors import UserError
from bundle.inference import dicom
from bundle.inference.dicom import read_headers, write_dicom

MODEL = {"name": "Chest CT multi-task", "version": "0.1.0", "checkpoint": "0123456789ab"}
# Frames of 143 bits are no whole number of bytes; all of a segment are one: ITK misreads the last bits where they are not.
ROWS, COLUMNS, SLICES = 13, 11, 8
TURN = Rotation.from_euler("xyz", [5, -8, 12], degrees=True).as_matrix()
OBLIQUE = np.round([*TURN[:, 0], *-TURN[:, 1]], 8).tolist()  # rows run to anterior
NO_PLACE, BOTH = {"slices": 1, "ImagePositionPatient": None, "ImageOrientationPatient": None}, ["Segmentation", "Structured Report"]
PLAIN = (1, 0, 0, 0, 1, 0)


@pytest.fixture
def write_series(write_dicom, tmp_path):
    """Function that writes a series of unequal slices in shuffled order, with what is given set in every file."""

    def write(orientation=PLAIN, slices=SLICES, heights=None, folder="scan", **values):
        (tmp_path / folder).mkdir()
        common = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
        common |= {"PatientName": "Doe^Jane", "PatientID": "4711", "SeriesNumber": 3, **values}
        normal = np.cross(orientation[:3], orientation[3:])
        for number in np.random.default_rng(0).permutation(slices):
            hu = np.full((ROWS, COLUMNS), number * 10)
            path = write_dicom(tmp_path / folder / f"{number}.dcm", hu, (0.75, 1.5), orientation)
            header = pydicom.dcmread(path)
            height = 2.5 * number if heights is None else heights[number]
            header.ImagePositionPatient = [round(float(x), 6) for x in [-50, -40, 30] + height * normal]
            header.InstanceNumber = int(number) + 1
            for keyword, value in common.items():
                if value is None:
                    header.pop(keyword, None)
                else:
                    setattr(header, keyword, value)
            header.save_as(path)
        return tmp_path / folder

    return write


LESIONS = [
    {
        "id": 1,
        "slices": [4, 5],
        "box": [1.0, 2.0, 6.5, 9.0],
        "center_mm": [1.0, 2.0, 3.0],
        "size_mm": [8.25, 5.25, 5.0],
        "volume_ml": 0.1234,
        "score": 0.912345,
        "boxes": [
            {"slice": 4, "box": [1.0, 2.0, 6.25, 8.0], "score": 0.9},
            {"slice": 5, "box": [1.5, 2.0, 6.5, 9.0], "score": 0.912345},
        ],
    },
    dict.fromkeys(("center_mm", "size_mm", "volume_ml"))
    | {"id": 2, "slices": [0, 0], "box": [0.0, 0.0, 11.0, 13.0], "score": 0.5}
    | {"boxes": [{"slice": 0, "box": [0.0, 0.0, 11.0, 13.0], "score": 0.5}]},
]
FOUND = {  # what the objects take from a `Result`
    "classes": {"other": 0.1, "COVID-19": 0.712345, "Änderung": 0.187655},
    "segments": {
        "lesion": {"volume_ml": 12.3456, "share_of_lung": 0.012345, "pixels": 99},
        "ground glass": {"volume_ml": 0.0, "share_of_lung": None, "pixels": 0},
    },
    "lesions": LESIONS,
    "entries": {"lung": {"volume_ml": 4000.123, "slices": [1, 5]}},
}
NOTHING = {"classes": {}, "segments": {}, "lesions": [], "entries": {"lung": None}}


def make_result(labels=None, scan=None, **entries):
    volumes = {"mask": SimpleNamespace(voxels=lambda: labels)}
    return SimpleNamespace(model=MODEL, scan=scan, volumes=volumes, **{**FOUND, **entries})


def read_scan(folder):
    (scan,), failures = find_scans(folder, folder.parent / "out")
    assert not failures
    return scan


def write_segmentation(path, frames, labels, names=("lesion", "ground glass")):
    result = make_result(labels, segments=dict.fromkeys(names))
    return dicom.write_segmentation(path, frames, read_headers(frames), result)


def write_structured_report(path, frames, segmentation=None, warnings=(), **entries):
    dicom.write_structured_report(path, frames, read_headers(frames), make_result(**entries), warnings, segmentation)


def make_labels(shape, values=(0, 1, 2)):
    labels = np.random.default_rng(1).choice(values, shape).astype(np.uint8)
    labels[..., 2] = 0  # a slice without lesion
    return labels


@pytest.fixture
def scan(write_series):
    return read_scan(write_series())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "object.dcm"


def voxels_on(affine, image: sitk.Image) -> np.ndarray:
    """Voxels of a grid (affine to RAS) that lie where an image read by SimpleITK is not zero, in sorted order."""
    found = np.argwhere(sitk.GetArrayViewFromImage(image))[:, ::-1]
    direction = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    points = (found @ direction.T + image.GetOrigin()) * [-1, -1, 1]
    voxels = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    np.testing.assert_allclose(voxels, voxels.round(), atol=1e-3)
    return np.array(sorted(voxels.round().astype(int).tolist()))


def assert_no_errors(path):
    """What dciodvfy of dicom3tools says, where it is installed."""
    if shutil.which("dciodvfy"):
        said = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, errors="replace")
        lines = (said.stdout + said.stderr).splitlines()
        assert lines and not [line for line in lines if line.startswith("Error")]


def by_source(path, scan) -> np.ndarray:
    """(columns, rows, slices) labels that highdicom reads for the slices of a series of single frames."""
    uids = [frame.instance for frame in scan.frames]
    return highdicom.seg.segread(path).get_pixels_by_source_instance(uids, combine_segments=True).transpose(2, 1, 0)


@pytest.mark.parametrize("values", [(0, 1, 2), (0, 1), (0,)])
@pytest.mark.parametrize("orientation", [PLAIN, OBLIQUE])
def test_masks_come_back_on_their_voxels(write_series, path, orientation, values):
    scan = read_scan(write_series(orientation))
    labels, names = make_labels(scan.shape, values), ["lesion", "ground glass"][: max(values[-1], 1)]
    assert scan.shape == (COLUMNS, ROWS, SLICES)
    write_segmentation(path, scan.frames, labels, names)
    segmentation = highdicom.seg.segread(path)
    assert (segmentation.NumberOfFrames, segmentation.number_of_segments) == (SLICES * len(names), len(names))
    np.testing.assert_array_equal(by_source(path, scan), labels)
    assert_no_errors(path)
    if not labels.any():
        return
    volume = segmentation.get_volume(combine_segments=True)
    to_voxel = np.linalg.inv(scan.affine) @ np.diag([-1, -1, 1, 1]) @ volume.affine  # of (slice, row, column)
    found = np.argwhere(volume.array)
    voxels = found @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    np.testing.assert_allclose(voxels, voxels.round(), atol=1e-3)
    np.testing.assert_array_equal(labels[tuple(voxels.round().astype(int).T)], volume.array[tuple(found.T)])
    assert len(found) == np.count_nonzero(labels)
    if len(names) == 1:
        np.testing.assert_array_equal(voxels_on(scan.affine, sitk.ReadImage(str(path))), np.argwhere(labels))


def test_unequal_gaps_keep_every_slice_in_its_place(write_series, path):
    heights = [0, 2, 4, 9, 11, 12.5, 30, 32]
    scan = read_scan(write_series(heights=heights, SpacingBetweenSlices=-2, SliceThickness=None))
    labels = make_labels(scan.shape)
    write_segmentation(path, scan.frames, labels)
    np.testing.assert_array_equal(by_source(path, scan), labels)
    frames = pydicom.dcmread(path).PerFrameFunctionalGroupsSequence
    assert pydicom.dcmread(path).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SliceThickness == 2
    found = sorted({frame.PlanePositionSequence[0].ImagePositionPatient[2] for frame in frames})
    assert found == [30 + height for height in heights]
    assert_no_errors(path)


def test_segments_say_what_they_are(scan, path):
    write_segmentation(path, scan.frames, make_labels(scan.shape), ["GGO: ground-glass", "Consolidation", "other"])
    segmentation = highdicom.seg.segread(path)
    first, second, third = (segmentation.get_segment_description(number) for number in (1, 2, 3))
    assert [segment.segment_label for segment in (first, second, third)] == ["GGO: ground-glass", "Consolidation", "other"]
    assert first.segmented_property_type == codes.DCM.GroundGlassOpacity
    assert second.segmented_property_type.meaning == "Lung consolidation"
    assert third.segmented_property_type == codes.SCT.Lesion
    assert first.segmented_property_category == codes.SCT.MorphologicallyAbnormalStructure
    assert first.algorithm_type.value == "AUTOMATIC"
    assert (first.algorithm_identification.name, first.algorithm_identification.version) == (MODEL["name"], MODEL["version"])
    source = pydicom.dcmread(scan.sources[0][0])
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert segmentation[keyword].value == source[keyword].value
    assert segmentation.SeriesInstanceUID != source.SeriesInstanceUID
    assert segmentation.SOPInstanceUID != source.SOPInstanceUID
    assert (segmentation.SeriesNumber, segmentation.InstanceNumber, segmentation.SoftwareVersions) == (301, 1, "0.1.0")
    assert segmentation.ContentDescription == "AI, research use only" in segmentation.SeriesDescription


@pytest.fixture
def multiframe(write_series, tmp_path):
    """A multi-frame image whose frames lie in no order, as (scan, header)."""
    singles = [pydicom.dcmread(path) for path in sorted(write_series(OBLIQUE, StudyID="1").iterdir())]
    names = ("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyDate", "StudyTime", "ReferringPhysicianName")
    for single in singles:
        single.ImageType, single.Manufacturer = ["ORIGINAL", "PRIMARY", "AXIAL"], "none"
        for name in (*names, "BodyPartExamined", "PatientPosition"):
            setattr(single, name, "")
    (tmp_path / "frames").mkdir()
    path = tmp_path / "frames" / "image.dcm"
    image = LegacyConvertedEnhancedCTImage(singles, generate_uid(), 3, generate_uid(), 1)  # frames from below to above
    groups = image.PerFrameFunctionalGroupsSequence
    image.PerFrameFunctionalGroupsSequence = [groups[index] for index in (3, 0, 7, 6, 1, 2, 5, 4)]
    image.save_as(path)
    scan = read_scan(path.parent)
    assert [frame for _, frame in scan.sources] == [1, 4, 5, 0, 7, 6, 3, 2]
    return scan, image


def test_a_multiframe_image_in_any_order(multiframe, tmp_path):
    scan, image = multiframe
    labels, path = make_labels(scan.shape), tmp_path / "segmentation.dcm"
    write_segmentation(path, scan.frames, labels)
    frames = [frame + 1 for _, frame in scan.sources]
    pixels = highdicom.seg.segread(path).get_pixels_by_source_frame(image.SOPInstanceUID, frames, combine_segments=True)
    np.testing.assert_array_equal(pixels.transpose(2, 1, 0), labels)
    assert_no_errors(path)
    single = tmp_path / "single.dcm"
    write_segmentation(single, scan.frames, (labels == 1).astype(np.uint8), ["lesion"])
    np.testing.assert_array_equal(voxels_on(scan.affine, sitk.ReadImage(str(single))), np.argwhere(labels == 1))


def test_frames_that_tell_spacing_each_and_some_left_out(multiframe, tmp_path):
    scan, image = multiframe
    shared = image.SharedFunctionalGroupsSequence[0]
    for frame in image.PerFrameFunctionalGroupsSequence:
        frame.PixelMeasuresSequence = shared.PixelMeasuresSequence
    del shared.PixelMeasuresSequence
    image.save_as(scan.sources[0][0])
    labels, path = make_labels((COLUMNS, ROWS, 3)), tmp_path / "segmentation.dcm"
    write_segmentation(path, scan.frames[2:5], labels)
    pixels = highdicom.seg.segread(path).get_pixels_by_source_frame(image.SOPInstanceUID, [6, 1, 8], combine_segments=True)
    np.testing.assert_array_equal(pixels.transpose(2, 1, 0), labels)


def values(group) -> dict:
    """{name: (value, unit)} of a measurement group."""
    return {m.name.meaning: (float(m.value), m.unit.value) for m in group.get_measurements()}


def identifier(group) -> str:
    return group.tracking_identifier


def comments(report) -> list[str]:
    items = highdicom.sr.utils.find_content_items(report, name=codes.DCM.Comment)
    return [item.TextValue for item in items]


def test_measurements_are_those_of_the_prediction(write_series, tmp_path):
    scan = read_scan(write_series(OBLIQUE))
    seg_path, path = tmp_path / "segmentation.dcm", tmp_path / "report.dcm"
    segmentation = write_segmentation(seg_path, scan.frames, make_labels(scan.shape))
    write_structured_report(path, scan.frames, segmentation)
    report = highdicom.sr.srread(path)
    assert report.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    (whole,) = report.content.get_image_measurement_groups()
    assert values(whole) == {
        "Probability of other": (10.0, "%"),
        "Probability of COVID-19": (71.2345, "%"),
        "Probability of Änderung": (18.7655, "%"),
        "Volume of lung": (4000.123, "mL"),
    }
    (evaluation,) = whole.get_qualitative_evaluations()
    assert (evaluation.name.meaning, evaluation.value.value) == ("Predicted class", "840539006")
    *segments, first, second = report.content.get_volumetric_roi_measurement_groups()
    assert [(identifier(group), values(group)) for group in segments] == [
        ("lesion", {"Volume": (12.3456, "mL"), "Share of lung": (1.2345, "%")}),
        ("ground glass", {"Volume": (0.0, "mL")}),
    ]
    for number, group in enumerate(segments, start=1):
        (reference,) = [item for item in group.referenced_segment if "ReferencedSOPSequence" in item]
        (item,) = reference.ReferencedSOPSequence
        assert (item.ReferencedSOPInstanceUID, item.ReferencedSegmentNumber) == (segmentation.SOPInstanceUID, number)
    assert (identifier(first), identifier(second)) == ("Lesion 1", "Lesion 2")
    assert first.finding_type == codes.SCT.Lesion
    assert [site.value for site in first.finding_sites] == [codes.SCT.Lung]
    assert values(first) == {
        "Certainty of Finding": (91.2345, "%"),
        "Volume": (0.1234, "mL"),
        "Width": (8.25, "mm"),
        "Height": (5.25, "mm"),
        "Depth": (5.0, "mm"),
    }
    assert values(second) == {"Certainty of Finding": (50.0, "%")}  # what is not known is not told
    for region, box in zip(first.roi, LESIONS[0]["boxes"], strict=True):
        assert [*region.value.min(0), *region.value.max(0)] == box["box"]
        (source,) = region.ContentSequence
        uid = source.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
        assert uid == pydicom.dcmread(scan.sources[box["slice"]][0]).SOPInstanceUID
    assert_no_errors(path)


def test_the_report_is_unverified_and_for_research(scan, path):
    write_structured_report(path, scan.frames, warnings=["about 2 slices are missing: größer"])
    report, source = highdicom.sr.srread(path), pydicom.dcmread(scan.sources[0][0])
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert report.SeriesDescription == "Measurements, AI, research use only" and report.ContentQualification == "RESEARCH"
    assert comments(report) == ["Made by AI. Research use only, not for diagnosis.", "about 2 slices are missing: größer"]
    (observer,) = report.content.get_observer_contexts()
    device = observer.observer_identifying_attributes
    assert (device.name, device.serial_number) == (MODEL["name"], MODEL["checkpoint"])
    assert (report.SoftwareVersions, report.SeriesNumber, report.InstanceNumber) == ("0.1.0", 302, 1)
    assert (report.PatientID, report.StudyInstanceUID) == ("4711", source.StudyInstanceUID)
    assert report.SeriesInstanceUID != source.SeriesInstanceUID
    assert {uid for _, uid, *_ in report.get_evidence()} == {source.SeriesInstanceUID}
    # Without a Segmentation the classes are still there, only without a segment.
    assert [identifier(g) for g in report.content.get_image_measurement_groups()] == ["Scan", "lesion", "ground glass"]
    assert_no_errors(path)


def test_regions_in_a_multiframe_image_name_their_frame(multiframe, path):
    scan, image = multiframe
    write_structured_report(path, scan.frames)
    group = highdicom.sr.srread(path).content.get_volumetric_roi_measurement_groups()[0]
    found = [region.ContentSequence[0].ReferencedSOPSequence[0] for region in group.roi]
    assert [item.ReferencedFrameNumber for item in found] == [scan.sources[4][1] + 1, scan.sources[5][1] + 1]
    assert {item.ReferencedSOPInstanceUID for item in found} == {image.SOPInstanceUID}
    assert_no_errors(path)


def test_a_code_never_says_more_than_the_name(write_series, tmp_path):
    scan, path = read_scan(write_series()), tmp_path / "report.dcm"
    for name, code in (("COVID_19", "840539006"), ("non-COVID", "non-covid"), ("no lung cancer", "no-lung-cancer")):
        write_structured_report(path, scan.frames, **{**NOTHING, "classes": {name: 0.6, "A+": 0.3, "A-": 0.1}})
        (whole,) = highdicom.sr.srread(path).content.get_image_measurement_groups()
        (evaluation,) = whole.get_qualitative_evaluations()
        assert evaluation.value.value == code
        assert len({measurement.name.value for measurement in whole.get_measurements()}) == 3, "A+ is not A-"
        assert_no_errors(path)
    names = ["background nodule", "non-consolidation"]
    write_segmentation(tmp_path / "seg.dcm", scan.frames, make_labels(scan.shape), names)
    segmentation = highdicom.seg.segread(tmp_path / "seg.dcm")
    for number in (1, 2):
        assert segmentation.get_segment_description(number).segmented_property_type == codes.SCT.Lesion


def test_a_report_of_one_task_without_geometry(write_series, path):
    scan = read_scan(write_series(FrameOfReferenceUID=None, **NO_PLACE))
    write_structured_report(path, scan.frames, **{**NOTHING, "lesions": LESIONS[1:]})
    report = highdicom.sr.srread(path)
    (lesion,) = report.content.get_volumetric_roi_measurement_groups()
    assert values(lesion) == {"Certainty of Finding": (50.0, "%")}
    assert_no_errors(path)


EMPTY = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
EMPTY += ("AccessionNumber", "StudyID", "StudyDate", "StudyTime")


@pytest.mark.parametrize("value", [None, "", "?"])
def test_patient_data_that_lack_or_are_not_valid(write_series, tmp_path, value):
    missing = dict.fromkeys(EMPTY, value) | {"SeriesNumber": None, "SliceThickness": None}
    if value == "?":  # of these alone any text is valid
        missing |= {"PatientName": "../../x", "PatientID": "../../x", "AccessionNumber": "?", "StudyID": "?"}
    with pydicom.config.disable_value_validation():
        scan = read_scan(write_series(**missing))
    path, seg_path = tmp_path / "report.dcm", tmp_path / "segmentation.dcm"
    before = set(tmp_path.rglob("*"))
    segmentation = write_segmentation(seg_path, scan.frames, make_labels(scan.shape))
    write_structured_report(path, scan.frames, segmentation)
    assert set(tmp_path.rglob("*")) - before == {path, seg_path}
    for written in map(pydicom.dcmread, (path, seg_path)):
        for keyword in EMPTY:
            expected = {"PatientName": "../../x", "PatientID": "../../x", "AccessionNumber": "?", "StudyID": "?"}
            assert (written[keyword].value or "") == (expected.get(keyword, "") if value == "?" else "")
        assert written.SeriesNumber in (1, 2)
    assert_no_errors(path)
    assert_no_errors(seg_path)


def test_names_of_any_script(write_series, path):
    name = "Люкceмбypг"
    scan = read_scan(write_series(SpecificCharacterSet="ISO_IR 144", PatientName=name, StudyDescription=name))
    write_structured_report(path, scan.frames)
    report = pydicom.dcmread(path)
    assert (str(report.PatientName), report.StudyDescription) == (name, name)


LACKING = {  # what a header lacks, what is not written, and why
    "FrameOfReferenceUID": ({"FrameOfReferenceUID": None}, ["Segmentation"], "found no FrameOfReferenceUID in a file of the series"),
    "position": (NO_PLACE, ["Segmentation"], "found no ImagePositionPatient, ImageOrientationPatient in a file of the series"),
    "StudyInstanceUID": ({"StudyInstanceUID": None}, ["object"], "found no StudyInstanceUID in a file of the series"),
    "own UIDs": ({"SOPInstanceUID": "1.2.3"}, ["Segmentation"], "found slices that share a SOPInstanceUID, which no reference can tell apart"),
    "kind of object": ({"SOPClassUID": "1.2.3.4"}, BOTH, "the headers of the series cannot be carried over"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_the_objects_need_is_a_warning_and_the_other_one_is_written(write_series, tmp_path, name):
    values, lacking, reason = LACKING[name]
    scan, warnings = read_scan(write_series(**values)), []
    files = write_dicom(tmp_path, make_result(np.zeros(scan.shape, np.uint8), scan, lesions=[]), warnings)
    expected = [f"no DICOM {what} is written: {reason}" for what in lacking]
    assert [warning.split(" (")[0] for warning in warnings] == expected
    assert sorted(path.name for path in tmp_path.glob("*.dcm")) == sorted(files.values())
    assert len(files) == {"Segmentation": 1, "object": 0}[lacking[0]] - len(lacking[1:])


def test_slices_of_several_studies_are_not_one_object(write_series, path):
    first, second = (read_scan(write_series(folder=folder)) for folder in ("a", "b"))
    with pytest.raises(UserError, match=r"cannot be carried over \(ValueError in image.py, line \d+\)"):
        write_segmentation(path, [*first.frames, *second.frames], make_labels((COLUMNS, ROWS, 2 * SLICES)))
    assert not path.exists()


def test_a_bug_of_ours_is_no_fault_of_the_series(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "_public_code", lambda *_: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        write_dicom(tmp_path, make_result(make_labels(scan.shape), scan), [])


def test_files_without_preamble_are_referenced_as_others(write_series, tmp_path, monkeypatch):
    folder = write_series()
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[132:])
    scan, warnings, read = read_scan(folder), [], []
    monkeypatch.setattr(dicom, "read_header", lambda path, tags: read.append(path) or read_header(path, tags))
    labels = make_labels(scan.shape)
    assert len(write_dicom(tmp_path, make_result(labels, scan), warnings)) == 2 and warnings == []
    assert read == [scan.frames[0].path]  # one header, once
    uids = [frame.instance for frame in scan.frames]
    segmentation = highdicom.seg.segread(tmp_path / "segmentation.dcm")
    pixels = segmentation.get_pixels_by_source_instance(uids, combine_segments=True)
    np.testing.assert_array_equal(pixels.transpose(2, 1, 0), labels)
    assert {uid for _, _, uid, _ in highdicom.sr.srread(tmp_path / "report.dcm").get_evidence()} > set(uids)


def test_nothing_is_said_of_the_patient(write_series, tmp_path, caplog, recwarn, capfd):
    scan = read_scan(write_series(PatientName="SecretName", PatientID="x" * 80, PatientSex="SecretSex"))
    recwarn.clear()
    caplog.set_level(logging.DEBUG)
    warnings = []
    write_dicom(tmp_path, make_result(make_labels(scan.shape), scan), warnings)
    said = [caplog.text, *warnings, *(str(warning.message) for warning in recwarn), *capfd.readouterr()]
    assert not [text for text in said if "Secret" in text or "xxx" in text]


def test_real_series(real_data, tmp_path):
    scan = read_scan(real_data / "lung_pet_ct_dx" / "Lung_Dx-A0001_s2_L")
    labels = np.zeros(scan.shape, np.uint8)
    labels[100:140, 200:230, 20:30] = 1
    labels[300:301, 511, 63] = 1
    path, report = tmp_path / "segmentation.dcm", tmp_path / "report.dcm"
    segmentation = write_segmentation(path, scan.frames, labels, ["lesion"])
    np.testing.assert_array_equal(by_source(path, scan), labels)
    np.testing.assert_array_equal(voxels_on(scan.affine, sitk.ReadImage(str(path))), np.argwhere(labels))
    write_structured_report(report, scan.frames, segmentation)
    assert len(highdicom.sr.srread(report).get_evidence()) == 65
    assert_no_errors(path)
    assert_no_errors(report)
