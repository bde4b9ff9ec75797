"""The same volume comes out of every container, and what cannot be read is named in one line."""

import gzip
import os
import zipfile

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from containers import CENTRE, CONTAINERS, HU, UIDS, dicom, dicoms, enhanced, itk, nifti, patched, scrambled, stored
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet
from pydicom.uid import HTJ2KLossless, JPEGLosslessSV1, RLELossless

from bundle.data import series
from bundle.data.transforms import LoadSlice
from bundle.data.volumes import NO_GEOMETRY, NO_THICKNESS, find_scans, open_scan
from bundle.errors import UserError
from bundle.lungs import lung_mask


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_volume(tmp_path, name, scans_of):
    folder = tmp_path / "in"
    folder.mkdir()
    CONTAINERS[name](folder)
    (scan,) = scans_of()
    assert scan.hounsfield and scan.spacing == pytest.approx((2.2, 2.2), abs=1e-4)
    pixel, thickness = np.prod(scan.spacing), np.reshape(scan.thickness, (-1, 1, 1))
    slices = np.stack([scan.read(index)[0].numpy() for index in range(len(scan))])
    air = (slices == -1024) & (HU.T == -1000)  # padding and NaN
    np.testing.assert_array_equal(np.where(air, -1000, slices), HU.T)
    lungs = np.stack([lung_mask(slice_, scan.spacing) for slice_ in slices])
    assert (lungs * thickness).sum() * pixel / 1000 == pytest.approx(809.7, abs=0.1)
    assert ((slices > 200) * thickness).sum() * pixel / 1000 == pytest.approx(14.06, abs=0.01)
    ball = np.argwhere(scan.read_volume() > 200).mean(0)
    np.testing.assert_allclose(scan.affine @ [*ball, 1], CENTRE, atol=0.01)  # and the last row is 0 0 0 1


def several(folder, *series) -> None:
    for number, tags in enumerate(series):
        dicoms(folder, name=f"{number} {{}}", **tags)


@pytest.mark.parametrize(("more", "lengths"), [({"slices": [3]}, [10]), ({"AcquisitionNumber": 2}, [10, 10])])
def test_a_folder_for_each_slice_as_in_archives(tmp_path, more, lengths, scans_of):
    dicoms(tmp_path / "in", name="{}/IM")
    dicoms(tmp_path / "in", name="again {}/IM", **more)
    assert [len(scan) for scan in scans_of()] == lengths


def test_a_slice_without_rescaling_is_not_mixed_with_others(tmp_path, scans_of):
    def change(dataset, z):
        del dataset.SOPInstanceUID  # names of the results differ without it
        if z == 4:
            del dataset.RescaleIntercept

    dicoms(tmp_path / "in", change)
    scans = scans_of()
    assert len({scan.name for scan in scans}) == 2
    assert sorted((len(scan), scan.hounsfield) for scan in scans) == [(1, False), (9, True)]


BLANK = dict.fromkeys(("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"), "")


@pytest.mark.parametrize(
    "series",
    [
        [{"PatientID": "a"}, {"PatientID": "b"}],
        [{"PatientID": p, **BLANK} for p in "ab"],
        [{"PatientID": "", "slices": range(5), **BLANK}, {"PatientID": "b", "slices": range(5, 10), **BLANK}],
        [{"PatientID": "", "PatientName": p, "SeriesInstanceUID": ""} for p in "ab"],
        [{"StudyInstanceUID": s} for s in ("1.1", "1.2")],
        [{"ConvolutionKernel": k} for k in ("B30f", "B70f")],
        [{"ConvolutionKernel": k} for k in ("", "B70f")],
        [{"TemporalPositionIdentifier": t} for t in (1, 2)],
        [{"AcquisitionNumber": t} for t in (1, 2)],
        [{"FrameOfReferenceUID": uid} for uid in ("1.8", "1.9")],
        [{"SliceThickness": t} for t in (1, 5)],
    ],
)
def test_two_scans_in_one_folder_stay_two(tmp_path, series, scans_of):
    several(tmp_path / "in", *series)
    scans = scans_of()
    expected = [len(tags.get("slices", range(10))) for tags in series]
    assert [len(scan) for scan in scans] == expected


PHASES = {
    "acquisition": lambda phase, z: {"AcquisitionNumber": phase},
    "time": lambda phase, z: {"AcquisitionTime": f"10101{phase}"},
    "content time": lambda phase, z: {"ContentTime": f"10101{phase}.5"},
    "kernel": lambda phase, z: {"ConvolutionKernel": ("B30f", "B70f")[phase]},
    "series number": lambda phase, z: {"SeriesNumber": phase},
    "energy": lambda phase, z: {"KVP": 80 + 60 * phase},
    "numbers that run on": lambda phase, z: {"InstanceNumber": 10 * phase + z},
    "numbers that alternate": lambda phase, z: {"InstanceNumber": phase + 2 * z},
    "one slice less": lambda phase, z: {"InstanceNumber": 10 * phase + z},
    "1 mm higher": lambda phase, z: {"InstanceNumber": 10 * phase + z, "ImagePositionPatient": [-140, -123, 5 * z + phase]},
    "another field of view": lambda phase, z: {"ImagePositionPatient": [60 * phase, -123, -1000 + 5 * z]},
}


@pytest.mark.parametrize("fields", [(), ("SeriesInstanceUID",), UIDS], ids=len)
@pytest.mark.parametrize("name", PHASES)
def test_two_phases_are_two_scans_whatever_tells_them_apart(tmp_path, fields, name, scans_of):
    def change(dataset, z):
        stored(dataset, (HU.T[z] + 1024 + phase).astype("<u2"), **PHASES[name](phase, z))
        scrambled(*fields)(dataset, z)

    for phase in (0, 1):
        slices = [z for z in range(10) if name != "one slice less" or not phase or z != 4]
        dicoms(tmp_path / "in", change, name=f"{phase} {{}}", slices=slices)
    scans = scans_of()
    assert len(scans) == 2
    denser = [{int(value) for value in np.unique(scan.read_volume()[0, 0] + 1000)} for scan in scans]
    assert sorted(map(sorted, denser)) == [[0], [1]] and sum(map(len, scans)) == 19 + (name != "one slice less")


def content(frame, **tags):
    frame.FrameContentSequence = [Dataset()]
    for tag, value in tags.items():
        setattr(frame.FrameContentSequence[0], tag, value)


def cardiac(frame, phase, z):
    frame.CardiacSynchronizationSequence = [Dataset()]
    frame.CardiacSynchronizationSequence[0].NominalPercentageOfCardiacPhase = 40.0 + 35 * phase


@pytest.mark.parametrize(
    "mark",
    [
        lambda frame, phase, z: content(frame, TemporalPositionIndex=phase + 1),
        lambda frame, phase, z: content(frame, FrameAcquisitionNumber=phase + 1),
        lambda frame, phase, z: content(frame, DimensionIndexValues=[1, z + 1, phase + 1]),
        cardiac,
        lambda frame, phase, z: None,
    ],
)
def test_phases_of_a_multi_frame_file_are_scans(tmp_path, mark, monkeypatch):
    enhanced(tmp_path, 3, mark)
    for source in (tmp_path, tmp_path / "x"):
        scans, failures = find_scans(source)
        assert failures == [] and [len(scan) for scan in scans] == [10] * 3 and len({scan.name for scan in scans}) == 3
    parsed, read_header = [], series.read_header
    monkeypatch.setattr(series, "read_header", lambda file, *tags: parsed.append(file) or read_header(file, *tags))
    for phase, scan in enumerate(scans):
        np.testing.assert_array_equal(scan.read_volume(), HU + phase)
        assert scan.sources[:2] == [(str(tmp_path / "x"), 2 * 3 + phase), (str(tmp_path / "x"), 3 + phase)]
    assert len(parsed) == 3, "the header is parsed once, not once for each frame"
    with pytest.raises(UserError, match=r"x: found 3 scans \(phases, say\), expected one"):
        open_scan(tmp_path / "x")


def test_a_folder_of_many_series_is_listed_once(tmp_path, monkeypatch):
    for number in range(5):
        dicoms(tmp_path, name=f"{number} {{}}", slices=range(3), SeriesInstanceUID=f"1.{number}")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    assert len(find_scans(tmp_path)[0]) == 5 and len(listed) == 1


@pytest.mark.parametrize("tags", [{"AcquisitionNumber": 2}, {"SliceThickness": 1}])
@pytest.mark.parametrize(("up", "lengths"), [(2, [10, 10]), (2.5, [20]), (42, [20]), (52, [20])])
def test_two_stacks_are_two_scans_unless_they_interleave_evenly_or_hardly_overlap(tmp_path, tags, up, lengths, scans_of):
    dicoms(tmp_path / "in")

    def lift(dataset, z):
        dataset.ImagePositionPatient = [-140, -123, -1000 + 5 * z + up]

    dicoms(tmp_path / "in", lift, name="other {}", **tags)
    assert [len(scan) for scan in scans_of()] == lengths


@pytest.mark.parametrize("tags", [{"SliceThickness": 10}, {"SliceThickness": 5}, {"SliceThickness": None}])
def test_a_monitored_slice_without_times_is_no_scan(tmp_path, tags, scans_of):
    dicoms(tmp_path / "in")
    for number in range(14):
        position = {"ImagePositionPatient": [-140, -123, -980], "InstanceNumber": number}
        dicoms(tmp_path / "in", name=f"b{number}", slices=[4], SeriesInstanceUID="1.9", **position, **tags)
    (scan,) = scans_of()
    assert len(scan) == 10 and scan.warnings == ["left out 14 images of one place over time"]


@pytest.mark.parametrize(
    "absent", [["InstanceNumber"], [], ["SeriesInstanceUID"], ["ImagePositionPatient", "SeriesInstanceUID"]]
)
def test_slices_without_a_place_keep_their_order(tmp_path, absent, scans_of):
    def anonymise(dataset, z):
        if "ImagePositionPatient" in dataset:
            dataset.ImagePositionPatient = [0, 0, 0]
        if "SeriesInstanceUID" not in dataset:
            dataset.SeriesInstanceUID = f"1.{z}"

    dicoms(tmp_path / "in", anonymise, **dict.fromkeys(absent))
    (scan,) = scans_of()
    assert scan.affine is None and "lengths are not known" in scan.warnings[0]
    np.testing.assert_array_equal(scan.read_volume(), HU)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"RescaleIntercept": None}, "no rescale intercept"),
        ({"RescaleSlope": 0}, "no rescale slope"),
        ({"RescaleSlope": None}, "no rescale slope"),
        ({"BitsStored": 8, "HighBit": 7, "BitsAllocated": 8, "PixelData": b"\7" * 128 * 112}, "images of 8 bits"),
        ({"RescaleType": "MGML"}, "the values are MGML"),  # iodine of a dual-energy scan
        ({"Modality": "PT"}, "the modality is PT, not CT"),
    ],
)
def test_what_is_not_known_to_be_hu_is_a_picture(tmp_path, tags, words, scans_of):
    dicoms(tmp_path / "in", **tags)
    (scan,) = scans_of()
    assert not scan.hounsfield and len(scan.warnings) == 1 and words in scan.warnings[0]
    assert np.isfinite(scan.read(0).numpy()).all() and not scan.read(0).meta["hounsfield"]


@pytest.mark.parametrize("name", ["x.nii", "x.mha"])
def test_a_volume_of_8_bits_is_not_known_to_be_hu(tmp_path, name):
    sitk.WriteImage(sitk.Cast(itk() > 0, sitk.sitkUInt8), str(tmp_path / name))
    (scan,), _ = find_scans(tmp_path)
    assert not scan.hounsfield and "values of 8 bits" in scan.warnings[0] and scan.read(5).max() == 1


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (lambda hu: ((hu + 1024) / 3000).astype(np.float32), "values from 0.008 to 0.44"),
        (lambda hu: np.where(hu == -1000, np.nan, (hu + 1024) / 3000), "values from 0.07"),
        (lambda hu: (hu + 1024).astype(np.float32), "values from 24 to 1324"),  # of a scanner, without its intercept
        (lambda hu: hu.clip(-160, 240), "values from -160 to 240"),  # a window
        (lambda hu: ((hu - hu.mean()) / hu.std()).astype(np.float32), "values from -0."),
    ],
)
def test_a_volume_without_values_of_a_lung_is_not_known_to_be_hu(tmp_path, scale, words):
    nifti(tmp_path / "x.nii.gz", scale(HU))
    scan = open_scan(tmp_path / "x.nii.gz")
    scan.check_values()
    assert not scan.hounsfield and [words in text and "count as pictures" in text for text in scan.warnings] == [True]
    assert np.isfinite(scan.read_volume()).all() and scan.read(0).min() >= -160
    nifti(tmp_path / "y.nii", scale(HU)[..., 5])
    assert not LoadSlice()(tmp_path / "y.nii").meta["hounsfield"]


@pytest.mark.parametrize(
    ("sides", "slices", "codes", "lengths"),
    [
        ([2.2, 2.2, 0], 10, (1, 0), None),
        ([0, 0, 0], 10, (0, 0), None),
        ([2.2, 2.2, 0], 1, (1, 0), 1.0),
        ([0, 0, 0], 10, (1, 1), 5.0),  # the sform counts
        ([-2.2, -2.2, 5], 10, (1, 0), 5.0),
        ([2.2e-3, 2.2e-3, 5e-3], 10, (1, 0), None),  # metres, which the header does not say
        ([2200, 2200, 5000], 10, (1, 0), None),
    ],
)
def test_sides_of_voxels_that_are_none_leave_lengths_unknown(tmp_path, sides, slices, codes, lengths):
    nifti(tmp_path / "x.nii", HU[..., :slices], qform_code=codes[0], sform_code=codes[1])
    patched(tmp_path / "x.nii", {80: np.array(sides, "<f4").tobytes(), 252: np.array(codes, "<i2").tobytes()})
    scan = open_scan(tmp_path / "x.nii")
    if lengths:
        assert scan.thickness == pytest.approx([lengths] * slices) and scan.spacing == pytest.approx((2.2, 2.2))
        assert scan.warnings == [NO_THICKNESS] * (slices == 1)
    else:
        assert scan.affine is scan.spacing is scan.thickness is None and "mm: lengths are not known" in scan.warnings[0]
    np.testing.assert_array_equal(scan.read(0)[0], HU.T[0])


def test_the_geometry_that_libraries_write_by_default_is_warned_of(tmp_path):
    nifti(tmp_path / "x.nii", affine=np.eye(4))
    sitk.WriteImage(sitk.GetImageFromArray(HU.T.copy()), str(tmp_path / "y.mha"))
    assert [open_scan(tmp_path / name).warnings for name in ("x.nii", "y.mha")] == [[NO_GEOMETRY]] * 2


def zipped(folder):
    nifti(folder / "x.nii")
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.write(folder / "x.nii")
    (folder / "x.nii").unlink()


def dicomdir(folder):
    dicoms(folder, StudyDate="20200101", StudyTime="10", StudyID="1", SeriesNumber="1", PatientName="x")
    files = FileSet()
    for path in folder.iterdir():
        files.add(path)
    files.write(folder / "set")
    (folder / "set/DICOMDIR").rename(folder / "x.dcm")


def decoder_missing(folder, syntax):
    dataset = dicom(0)
    dataset.compress(RLELossless)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(folder / "x.dcm")


def private_syntax(folder):
    dataset = dicom(0)
    dataset.file_meta.TransferSyntaxUID = "1.2.840.113619.5.2"
    dataset.save_as(folder / "x.dcm", implicit_vr=True, little_endian=True, enforce_file_format=True)


def renamed_metaimage(folder):
    sitk.WriteImage(itk(), str(folder / "x.mhd"))
    (folder / "x.raw").rename(folder / "y.raw")


REFUSED = {
    "4D": (lambda f: nifti(f / "x.nii", np.stack([HU] * 3, -1)), r"found shape \(128, 112, 10, 3\), expected 2 or 3 axes"),
    "cut": (lambda f: nifti(f / "x.nii") or os.truncate(f / "x.nii", 9000), "Expected 286720 bytes, got 8648 .*: could the"),
    "complex": (lambda f: nifti(f / "x.nii", HU.astype(np.complex64)), "found values of type complex64, expected numbers"),
    "colours": (lambda f: sitk.WriteImage(sitk.Compose([itk()] * 3), str(f / "x.nrrd")), "found 3 values in a pixel"),
    "archive": (zipped, "found an archive, expected the files in it; unpack it"),
    "Analyze": (lambda f: nib.save(nib.AnalyzeImage(HU, None), f / "x.hdr"), "found Analyze 7.5, which does not say"),
    "gzip": (lambda f: dicoms(f) or (f / "x.gz").write_bytes(gzip.compress((f / "0").read_bytes())), "compressed by gzip"),
    "other format": (lambda f: nib.save(nib.MGHImage(HU, None), f / "x.mgz"), "found no DICOM header, expected DICOM or"),
    "DICOMDIR": (dicomdir, "found a directory of files .*; give its folder"),
    "JPEG": (lambda f: decoder_missing(f, JPEGLosslessSV1), "found JPEG Lossless.*pip install pylibjpeg"),
    "HTJ2K": (lambda f: decoder_missing(f, HTJ2KLossless), "found High-Throughput JPEG 2000.*pip install pylibjpeg"),
    "segmentation": (lambda f: dicoms(f, name="x.dcm", slices=[0], Modality="SEG"), "found objects without images"),
    "dose": (lambda f: dicoms(f, name="x.dcm", slices=[0], Modality="RTDOSE"), "found objects without images"),
    "NaN": (lambda f: nifti(f / "x.nii", np.full((8, 6, 1), np.nan, np.float32)), "found NaN or infinite pixels"),
    "thin": (lambda f: Image.new("L", (3, 2000)).save(f / "x.png"), "found axial slices of 3 x 2000 pixels"),
    "private syntax": (private_syntax, "found the private transfer syntax 1.2.840.113619.5.2"),
    "pixels elsewhere": (renamed_metaimage, "found no file x.raw beside it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name):
    write, words = REFUSED[name]
    write(tmp_path)
    path = next(path for path in sorted(tmp_path.iterdir()) if path.name.startswith("x."))
    with pytest.raises(UserError, match=rf"^{path}: .*{words}") as error:
        open_scan(path).read(0)
    assert "\n" not in str(error.value)


def test_links_that_lead_nowhere_and_lists_of_files_stop_nothing(tmp_path):
    folder = tmp_path / "in"
    dicomdir(folder / "cd")
    for path in (folder / "cd").glob("[0-9]"):
        path.unlink()  # they lie in cd/set as well
    for name, target in (("loop", folder), ("self.nii", "self.nii"), ("lost.nii", "/nowhere/x.nii")):
        os.symlink(target, folder / name)
    (scan,), failures = find_scans(folder, tmp_path / "out")
    assert len(scan) == 10 and [failure["file"] for failure in failures] == ["lost.nii", "self.nii"]
    for path in (folder / "cd/set").rglob("*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(UserError, match="found no image among 1 files"):
        find_scans(folder / "cd", tmp_path / "out")
