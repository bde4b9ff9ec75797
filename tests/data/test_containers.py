"""The same volume comes out of every container, and what cannot be read is named in one line."""

import os
import zipfile

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from containers import CENTRE, CONTAINERS, HU, dicom, dicoms, itk, nifti
from pydicom.fileset import FileSet
from pydicom.uid import HTJ2KLossless, JPEGLosslessSV1, RLELossless

from bundle.data.volumes import find_scans, open_scan
from bundle.errors import UserError
from bundle.lungs import lung_mask


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_volume(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    CONTAINERS[name](folder)
    (scan,), failures = find_scans(folder, tmp_path / "out")
    assert failures == [] and scan.hounsfield and scan.spacing == pytest.approx((2.2, 2.2), abs=1e-4)
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
def test_a_folder_for_each_slice_as_in_archives(tmp_path, more, lengths):
    dicoms(tmp_path / "in", name="{}/IM")
    dicoms(tmp_path / "in", name="again {}/IM", **more)
    scans, failures = find_scans(tmp_path / "in", tmp_path / "out")
    assert failures == [] and [len(scan) for scan in scans] == lengths


def test_a_slice_without_rescaling_is_not_mixed_with_others(tmp_path):
    def change(dataset, z):
        del dataset.SOPInstanceUID  # names of the results differ without it
        if z == 4:
            del dataset.RescaleIntercept

    dicoms(tmp_path / "in", change)
    scans, failures = find_scans(tmp_path / "in", tmp_path / "out")
    assert len({scan.name for scan in scans}) == 2
    assert failures == [] and sorted((len(scan), scan.hounsfield) for scan in scans) == [(1, False), (9, True)]


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
def test_two_scans_in_one_folder_stay_two(tmp_path, series):
    several(tmp_path / "in", *series)
    scans, failures = find_scans(tmp_path / "in", tmp_path / "out")
    expected = [len(tags.get("slices", range(10))) for tags in series]
    assert failures == [] and [len(scan) for scan in scans] == expected and len({scan.name for scan in scans}) == 2


@pytest.mark.parametrize("tags", [{"AcquisitionNumber": 2}, {"SliceThickness": 1}])
@pytest.mark.parametrize(("up", "lengths"), [(2, [10, 10]), (2.5, [20]), (42, [20]), (52, [20])])
def test_two_stacks_are_two_scans_unless_they_interleave_evenly_or_hardly_overlap(tmp_path, tags, up, lengths):
    dicoms(tmp_path / "in")

    def lift(dataset, z):
        dataset.ImagePositionPatient = [-140, -123, -1000 + 5 * z + up]

    dicoms(tmp_path / "in", lift, name="other {}", **tags)
    scans, failures = find_scans(tmp_path / "in", tmp_path / "out")
    assert failures == [] and [len(scan) for scan in scans] == lengths


@pytest.mark.parametrize("tags", [{"SliceThickness": 10}, {"SliceThickness": 5}, {"SliceThickness": None}])
def test_a_monitored_slice_without_times_is_no_scan(tmp_path, tags):
    dicoms(tmp_path / "in")
    for number in range(14):
        position = {"ImagePositionPatient": [-140, -123, -980], "InstanceNumber": number}
        dicoms(tmp_path / "in", name=f"b{number}", slices=[4], SeriesInstanceUID="1.9", **position, **tags)
    (scan,), failures = find_scans(tmp_path / "in", tmp_path / "out")
    assert len(scan) == 10 and failures == [] and scan.warnings == ["left out 14 images of one place over time"]


@pytest.mark.parametrize(
    "absent", [["InstanceNumber"], [], ["SeriesInstanceUID"], ["ImagePositionPatient", "SeriesInstanceUID"]]
)
def test_slices_without_a_place_keep_their_order(tmp_path, absent):
    def anonymise(dataset, z):
        if "ImagePositionPatient" in dataset:
            dataset.ImagePositionPatient = [0, 0, 0]
        if "SeriesInstanceUID" not in dataset:
            dataset.SeriesInstanceUID = f"1.{z}"

    dicoms(tmp_path / "in", anonymise, **dict.fromkeys(absent))
    (scan,), failures = find_scans(tmp_path / "in", tmp_path / "out")
    assert failures == [] and scan.affine is None and "lengths are not known" in scan.warnings[0]
    np.testing.assert_array_equal(scan.read_volume(), HU)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"RescaleIntercept": None}, "no rescale intercept"),
        ({"RescaleType": "MGML"}, "the values are MGML"),  # iodine of a dual-energy scan
        ({"Modality": "PT"}, "the modality is PT, not CT"),
    ],
)
def test_what_is_not_known_to_be_hu_is_a_picture(tmp_path, tags, words):
    dicoms(tmp_path / "in", **tags)
    (scan,), _ = find_scans(tmp_path / "in", tmp_path / "out")
    assert not scan.hounsfield and len(scan.warnings) == 1 and words in scan.warnings[0]


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
    "complex": (lambda f: nifti(f / "x.nii", HU.astype(np.complex64)), "found values of type complex64, expected numbers"),
    "colours": (lambda f: sitk.WriteImage(sitk.Compose([itk()] * 3), str(f / "x.nrrd")), "found 3 values in a pixel"),
    "archive": (zipped, "found an archive, expected the files in it; unpack it"),
    "other format": (lambda f: nib.save(nib.MGHImage(HU, None), f / "x.mgz"), "found no DICOM header, expected DICOM or"),
    "DICOMDIR": (dicomdir, "found a directory of files .*; give its folder"),
    "JPEG": (lambda f: decoder_missing(f, JPEGLosslessSV1), "found JPEG Lossless.*pip install pylibjpeg"),
    "HTJ2K": (lambda f: decoder_missing(f, HTJ2KLossless), "found High-Throughput JPEG 2000.*pip install pylibjpeg"),
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
