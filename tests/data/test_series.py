"""Which DICOM images are one scan, and what their pixels mean: kinds of faults seen in archives."""

import shutil

import numpy as np
import pydicom
import pytest
from pydicom.uid import SecondaryCaptureImageStorage, generate_uid

from bundle.data.volumes import find_scans, open_scan


def change(path, **tags):
    """Give a file other tags: values, functions of the data set, (VR, value), or None to remove one."""
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        value = value(dataset) if callable(value) else value
        if value is None:
            delattr(dataset, name)
        elif isinstance(value, tuple):
            dataset.add_new(name, *value)
        else:
            with pydicom.config.disable_value_validation():
                setattr(dataset, name, value)
    dataset.save_as(path)


def values(scan):
    return [float(scan.read(index).mean()) for index in range(len(scan))]


def test_another_patient_with_a_blank_study_excludes_nothing(write_series, scans_of):
    original = {"ImageType": ["ORIGINAL", "PRIMARY"], "StudyInstanceUID": ""}
    write_series([0, 5, 10], series="1.1", PatientID="a", **original)
    derived = {"ImageType": ["DERIVED", "SECONDARY"], "ImagePositionPatient": None}
    write_series([0, 5], series="1.2", StudyInstanceUID="", PatientID="b", **derived)
    assert sorted(map(len, scans_of())) == [2, 3]


def test_a_series_in_sub_folders_is_one_scan_and_its_copy_another(tmp_path, write_series, scans_of):
    write_series([5 * k for k in range(12)])
    for number, path in enumerate(sorted((tmp_path / "in").iterdir())):
        (tmp_path / f"in/DIR{number // 4}").mkdir(exist_ok=True)
        path.rename(tmp_path / f"in/DIR{number // 4}/{path.name}")
    (scan,) = scans_of()
    assert scan.positions == [5 * k for k in range(12)] and "/" not in scan.name
    shutil.copytree(tmp_path / "in/DIR0", tmp_path / "in/copy")
    assert sum(len(scan) for scan in scans_of()) == 16


def test_single_slices_of_many_patients_without_names_stay_single(write_series, scans_of):
    for number, height in enumerate([3, 40, 44, 90, 97]):
        position = [-50 + 7 * (number % 3), -40, height]
        tags = {"StudyInstanceUID": f"2.{number}", "ImagePositionPatient": position}
        write_series([height], series=f"1.{number}", **tags)
    assert [len(scan) for scan in scans_of()] == [1] * 5


def test_digits_at_a_rounding_edge_divide_nothing(write_series, scans_of):
    def digits(number):
        edge = 0.0050001 if number % 2 else 0.0049999
        turned = [np.sqrt(1 - edge**2), edge, 0, -edge, np.sqrt(1 - edge**2), 0]
        spacing = [0.7005001 - number % 2 * 1e-6] * 2
        return {"ImageOrientationPatient": [f"{value:.7f}" for value in turned], "PixelSpacing": spacing}

    write_series([0, 5, 10, 15], change=digits)
    (scan,) = scans_of()
    assert len(scan) == 4


def test_equal_positions_of_many_different_images_are_an_anonymisers(tmp_path, write_series, scans_of):
    write_series([0] * 12)
    (scan,) = scans_of()
    assert len(scan) == 12 and scan.affine is None and "12 images with equal positions" in scan.warnings[0]
    assert values(scan) == [10 * number - 1000 for number in reversed(range(12))], "by instance number"
    for path in (tmp_path / "in").iterdir():
        change(path, PixelData=b"\0" * 96)
    (scan,) = scans_of()
    assert len(scan) == 1 and scan.warnings[0] == "left out 11 images at the place of another one"


def test_frames_without_functional_groups_are_slices_of_unknown_length(tmp_path, write_dicom, scans_of):
    (tmp_path / "in").mkdir()
    path = write_dicom(tmp_path / "in/x", np.full((6, 8), -1000))
    change(path, NumberOfFrames=3, PixelData=lambda dataset: b"".join(bytes([k, 0]) * 48 for k in (10, 20, 30)))
    (scan,) = scans_of()
    assert values(scan) == [-1004, -984, -964] and scan.affine is None and "lengths are not known" in scan.warnings[0]


def test_axial_reformats_are_the_scan_and_test_slices_are_not(write_series, scans_of):
    write_series(range(12), series="1.1", ImageType=["DERIVED", "SECONDARY", "REFORMATTED"], SliceThickness=1)
    write_series([6, 6, 6], series="1.2", SliceThickness=10, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    write_series([9], series="1.3", SliceThickness=10, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    write_series(range(3), series="1.4", ImageType=["DERIVED", "PRIMARY", "AXIAL", "CT_SOM5 MIP"])
    (scan,) = scans_of()
    assert len(scan) == 12
    for words in ("left out 3 images of one place over time", "left out 1 single test images", "left out 3 projections of"):
        assert any(words in warning for warning in scan.warnings), scan.warnings


def test_contrast_monitoring_is_no_scan_however_long(write_series, scans_of):
    write_series(range(5), series="1.1")
    every_two_seconds = {"change": lambda number: {"AcquisitionTime": f"1012{number * 2:02d}.00"}}
    write_series([2] * 15, series="1.2", SliceThickness=10, **every_two_seconds)
    (scan,) = scans_of()
    assert len(scan) == 5 and "left out 15 images of one place over time" in scan.warnings


def test_numbers_that_are_none_are_done_without(tmp_path, write_series, scans_of):
    write_series([0, 5, 10])
    for path in (tmp_path / "in").iterdir():
        content = path.read_bytes()
        number = pydicom.dcmread(path).InstanceNumber
        element = b"\x20\x00\x13\x00IS"
        start = content.index(element) + 8
        length = content[start - 2]
        path.write_bytes(content[:start] + b"A1"[: len(str(number))].ljust(length, b" ") + content[start + length :])
    (scan,) = scans_of()
    assert scan.positions == [0, 5, 10]
    for number, path in enumerate(sorted((tmp_path / "in").iterdir())):
        change(path, PixelSpacing=[0, 0])
        path.rename(path.with_name(f"{9 - number}"))
    (scan,) = scans_of()
    assert len(scan) == 3 and scan.spacing is None and "lengths are not known" in scan.warnings[0]
    assert values(scan) == [-1000, -990, -980], "by position"


def test_images_that_share_a_uid_are_warned_of(write_series, scans_of):
    write_series([0, 5, 10], SOPInstanceUID="1.2.9")
    (scan,) = scans_of()
    assert len(scan) == 3 and "2 images have the SOPInstanceUID of another one" in scan.warnings


@pytest.mark.parametrize(
    ("signed", "stored", "tag"), [(0, 63536, 63536), (0, 63536, -2000), (1, -2000, 63536), (1, -2000, -2000)]
)
def test_padding_around_the_field_of_view_is_air(tmp_path, write_dicom, signed, stored, tag):
    path = write_dicom(tmp_path / "x.dcm", np.zeros((6, 8)))
    pixels = np.full((6, 8), 1024, np.int32)
    pixels[0], pixels[3, 3] = stored, stored  # one of them inside of the body
    change(path, RescaleSlope=1, PixelRepresentation=signed, PixelData=pixels.astype("<i2" if signed else "<u2").tobytes())
    change(path, PixelPaddingValue=("SS" if tag < 0 else "US", tag))
    hu = open_scan(path).read(0)[0].numpy()
    assert (hu[0] == -1024).all() and hu[1, 1] == 0 and hu[3, 3] == -1024


def test_a_range_of_padding_is_air(tmp_path, write_dicom):
    path = write_dicom(tmp_path / "x.dcm", np.full((6, 8), -1024))
    change(path, PixelPaddingValue=("US", 0), PixelPaddingRangeLimit=("US", 9), RescaleIntercept=0)
    assert (open_scan(path).read(0) == -1024).all()


def test_a_modality_lut_is_applied(tmp_path, write_dicom):
    path = write_dicom(tmp_path / "x.dcm", np.full((6, 8), -1020))
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [4, 0, 16])
    table.add_new("LUTData", "US", [0, 7, 500, 900])
    table.ModalityLUTType = "HU"
    change(path, RescaleSlope=None, RescaleIntercept=None, ModalityLUTSequence=[table])
    scan = open_scan(path)
    assert scan.hounsfield and (scan.read(0) == 500).all()


@pytest.mark.parametrize("kind", ["RGB", "PALETTE COLOR"])
def test_colours_become_luminance(tmp_path, write_dicom, kind):
    path = write_dicom(tmp_path / "x.dcm", np.zeros((6, 8)))
    grey = np.tile(np.arange(8, dtype=np.uint8) * 30, (6, 1))
    tags = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PhotometricInterpretation": kind}
    tags["SOPClassUID"] = SecondaryCaptureImageStorage
    if kind == "RGB":
        tags |= {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PixelData": np.repeat(grey, 3).tobytes()}
    else:
        tags["PixelData"] = grey.tobytes()
        for colour in ("Red", "Green", "Blue"):
            tags[f"{colour}PaletteColorLookupTableDescriptor"] = "US", [256, 0, 16]
            tags[f"{colour}PaletteColorLookupTableData"] = (np.arange(256, dtype="<u2") * 256).tobytes()
    change(path, **tags)
    scan = open_scan(path)
    assert not scan.hounsfield and "images in colours" in scan.warnings[0]
    read = scan.read(0)[0].numpy()
    assert (np.diff(read, axis=1) > 0).all() and (read == read[:1]).all()
