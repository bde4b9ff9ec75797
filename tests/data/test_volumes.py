"""Files and folders become scans whose slices are where the scanner put them."""

import errno
import os
import pickle
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.data import get_testdata_file

from bundle.data.volumes import find_scans, open_scan
from bundle.errors import UserError

SERIES = "1.2.3.4"


def read(scan):
    return [float(scan.read(index).mean()) for index in range(len(scan))]


def test_slices_are_sorted_by_position_whatever_their_names_and_numbers(write_series, scans_of):
    write_series([0, 5, 10, 15])
    (scan,) = scans_of()
    assert scan.warnings == [] and scan.kind == "dicom" and scan.hounsfield
    assert read(scan) == [-1000, -990, -980, -970] and scan.positions == [0, 5, 10, 15] and scan.thickness == [5] * 4
    assert scan.shape == (8, 6, 4) and scan.spacing == (0.75, 1.5)
    np.testing.assert_allclose(scan.affine[:3, 3], [50, 40, 0])
    assert read(pickle.loads(pickle.dumps(scan))) == read(scan)


@pytest.mark.parametrize(
    ("heights", "words", "count"),
    [
        ([0, 5, 15, 20], "about 1 slices are missing: gaps up to 10.00 mm, usually 5.00 mm", 4),
        ([0, 5, 11, 16], "unequal spacing of the slices: 5.00 to 6.00 mm", 4),
        ([0, 5, 5, 10], "left out 1 images at the place of another one", 3),
    ],
)
def test_gaps_and_duplicates_are_reported(write_series, heights, words, count, scans_of):
    write_series(heights)
    (scan,) = scans_of()
    assert words in scan.warnings and len(scan) == count
    assert sum(scan.thickness) == pytest.approx((heights[-1] - heights[0]) * count / (count - 1), rel=0.2)


def test_images_without_a_position_are_left_out_of_a_series_that_has_them(write_series, scans_of):
    write_series([0, 5, 10], change=lambda number: {"ImagePositionPatient": None} if number == 2 else {})
    (scan,) = scans_of()
    assert scan.warnings == ["left out 1 images without a position"] and scan.positions == [0, 5]


def test_training_needs_no_simpleitk_itk_or_highdicom():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('SimpleITK', 'itk', 'highdicom'))); "
    rooms = "bundle.training.trainer, bundle.training.curriculum, bundle.evaluation.handler, bundle.data.sources, bundle.lungs"
    done = subprocess.run([sys.executable, "-c", f"{blocked}import {rooms}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_header_costs_little_memory_whatever_is_in_it(write_series, scans_of):
    write_series(range(100), ImageComments="x" * 10_000, SeriesDescription="y" * 60)
    tracemalloc.start()
    scans = scans_of()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(scans) == 1 and kept / 100 < 4096


def test_another_time_size_or_name_of_any_file_makes_another_scan(tmp_path, write_series):
    folder = tmp_path / "in"
    write_series([0, 5, 10])

    def stamp():
        return find_scans(folder, tmp_path / "out")[0][0].stamp

    first, middle = stamp(), folder / f"{SERIES}-1"
    os.utime(middle, (1e9, 1e9))  # older than the others
    older = stamp()
    middle.rename(folder / "other")
    assert len({first, older, stamp()}) == 3
    folder.rename(tmp_path / "moved")
    moved = find_scans(tmp_path / "moved", tmp_path / "out")[0][0].stamp
    (tmp_path / "moved").rename(folder)
    assert moved == stamp(), "where the folder lies does not matter"


@pytest.mark.parametrize("name", ["x.mhd", "x.nhdr"])
def test_other_pixels_are_another_scan_where_they_lie_beside_the_header(tmp_path, name):
    header = tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 5, 4), np.int16)), str(header))
    (pixels,) = set(tmp_path.iterdir()) - {header}
    before = open_scan(header).stamp
    os.utime(pixels, (4e9, 4e9))
    assert open_scan(header).stamp != before


def test_mixed_series_are_scans_and_what_is_no_axial_image_is_left_out(write_series, scans_of):
    write_series([0, 5], ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    coarse = {"change": lambda number: {"PixelSpacing": [3, 3]} if number == 3 else {}}
    write_series([0, 2, 4, 6], series="1.2.3.5", ImageType=["ORIGINAL", "PRIMARY", "AXIAL"], **coarse)
    write_series([0], series="1.2.3.6", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series([0], series="1.2.3.7", ImageType=["DERIVED", "SECONDARY"], ImagePositionPatient=None)
    write_series([0], series="1.2.3.8", ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    scans = scans_of()
    assert sorted(map(len, scans)) == [1, 2, 3] and len({scan.name for scan in scans}) == 3
    assert next(scan.spacing for scan in scans if len(scan) == 1) == (3, 3)
    kinds = ("localizers", "derived images without a position", "images that are not axial")
    assert all({f"left out 1 {kind}" for kind in kinds} <= set(scan.warnings) for scan in scans)
    assert not any("1.2.3" in scan.name for scan in scans)


@pytest.mark.parametrize(
    ("tags", "kind"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizers"),
        ({"Modality": "RTDOSE"}, "objects without images"),
        ({"Modality": "SR", "Rows": None, "PixelData": None}, "objects without images"),
    ],
)
def test_derived_images_are_the_scan_of_a_study_without_other_images(write_series, scans_of, tags, kind):
    write_series([0, 2, 4], ImageType=["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"])
    write_series([0], series="1.2.3.6", **tags)
    (scan,) = scans_of()
    assert len(scan) == 3 and scan.warnings == [f"left out 1 {kind}"]


def test_a_series_keeps_its_name_when_another_joins_it_in_the_folder(write_series, scans_of):
    write_series([0])
    (alone,) = scans_of()
    write_series([0, 5], series="1.2.3.5")
    assert alone.name in {scan.name for scan in scans_of()}


def test_one_damaged_header_costs_one_file(tmp_path, write_series):
    write_series([0, 5, 10])
    path = tmp_path / f"in/{SERIES}-2"
    content, tag = path.read_bytes(), b"\x20\x00\x0d\x00"  # StudyInstanceUID
    assert content.count(tag + b"UI") == 1
    path.write_bytes(content.replace(tag + b"UI", tag + b"ZZ"))
    (scan,), (failure,) = find_scans(tmp_path / "in", tmp_path / "out")
    assert len(scan) == 2 and failure["file"] == path.name and "\n" not in failure["reason"]


def test_a_nifti_that_does_not_tell_how_it_lies_is_read_as_itk_reads_it(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (8, 6, 4)).astype(np.int16)
    image = nib.Nifti1Image(voxels, None)
    image.header.set_zooms((0.7, 0.8, 2.5))
    nib.save(image, tmp_path / "x.nii")
    scan, itk = open_scan(tmp_path / "x.nii"), sitk.ReadImage(str(tmp_path / "x.nii"))
    pixels = sitk.GetArrayFromImage(itk)
    assert not scan.oriented and len(scan.warnings) == 1 and "qform and sform codes 0" in scan.warnings[0]
    assert scan.spacing == pytest.approx((0.8, 0.7)) and scan.positions == pytest.approx([0, 2.5, 5, 7.5])
    for index in range(4):
        np.testing.assert_array_equal(scan.read(index)[0], pixels[index])
    np.testing.assert_allclose((np.diag([-1, -1, 1, 1]) @ scan.affine)[:3, :3], np.diag(itk.GetSpacing()), atol=1e-6)
    nib.save(nib.Nifti1Image(voxels[:, :1], np.diag([1.0, 1, 2, 1])), tmp_path / "thin.nii")
    np.testing.assert_array_equal(open_scan(tmp_path / "thin.nii").read(1)[0, 0], voxels[::-1, 0, 1])  # turned round


def test_a_missing_thickness_is_warned_of(tmp_path, write_series):
    write_series([0], SliceThickness=None)
    image = sitk.GetImageFromArray(np.zeros((6, 8), np.int16))
    image.SetSpacing((2, 2))
    sitk.WriteImage(image, str(tmp_path / "x.nrrd"))
    nib.save(nib.Nifti1Image(np.zeros((6, 8), np.int16), np.diag([2, 2, 1, 1])), tmp_path / "x.nii")
    for source in ("in", "x.nrrd", "x.nii"):
        (scan,), _ = find_scans(tmp_path / source, tmp_path / "out")
        assert scan.warnings == ["the file gives no thickness of the slice: volumes count 1 mm"] and scan.thickness == [1]


def test_a_picture_whose_white_is_zero_is_inverted(tmp_path, write_dicom):
    hu = np.arange(48).reshape(6, 8) * 2 - 100
    dataset = pydicom.dcmread(write_dicom(tmp_path / "x", hu))
    dataset.Modality, dataset.PhotometricInterpretation = "DX", "MONOCHROME1"
    dataset.save_as(tmp_path / "x")
    np.testing.assert_array_equal(open_scan(tmp_path / "x").read(0)[0], hu.max() - hu)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.nrrd", "x.mha"])
def test_volumes_of_every_format_are_read_slice_by_slice(tmp_path, name):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (24, 100, 80)).astype(np.int16)  # slices, rows, columns
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((3, 4, 5))
    sitk.WriteImage(image, str(tmp_path / name))
    (scan,), _ = find_scans(tmp_path / name, tmp_path / "out")
    assert len(scan) == 24 and scan.spacing == pytest.approx((0.8, 0.7)) and scan.positions[1] == pytest.approx(7.5)
    scan.read(0)
    tracemalloc.start()
    for index in range(24):
        np.testing.assert_array_equal(scan.read(index)[0], voxels[index])
    assert tracemalloc.get_traced_memory()[1] < voxels.nbytes, "no slice costs a copy of the volume"
    tracemalloc.stop()


def test_a_compressed_volume_is_unpacked_once(tmp_path, monkeypatch):
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 6), np.int16), np.eye(4)), tmp_path / "x.nii.gz")
    scan, opened, opener = open_scan(tmp_path / "x.nii.gz"), [], nib.openers.ImageOpener
    monkeypatch.setattr(nib.openers, "ImageOpener", lambda *args, **options: opened.append(args) or opener(*args, **options))
    scan.read(0)
    count = len(opened)
    assert count > 0 and len(read(scan)) == 6
    assert len(opened) == count, "the file stays open: a slice does not begin at its start again"


def test_jpeg_ls_is_decoded_and_a_missing_decoder_is_named(monkeypatch):
    scan = open_scan(get_testdata_file("MR_small_jpeg_ls_lossless.dcm", download=False))
    uncompressed = open_scan(get_testdata_file("MR_small.dcm", download=False))
    np.testing.assert_array_equal(scan.read(0), uncompressed.read(0))

    def without_plugins(*arguments, **options):
        raise RuntimeError("Unable to decompress: all plugins are missing dependencies:\n\tlibjpeg\n\tgdcm")

    monkeypatch.setattr(pydicom.pixels.decoders.base.Decoder, "as_array", without_plugins)
    with pytest.raises(ValueError, match="found JPEG-LS Lossless .*, for which no decoder .*: pip install pylibjpeg"):
        scan.read(0)


def test_patterns_and_folders_without_images(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png", "c.jpg", ".hidden.png"):
        Image.new("L", (9, 7)).save(tmp_path / "in" / name)
    scans, _ = find_scans(tmp_path / "in/*.png", tmp_path / "out")
    assert [(scan.name, scan.shape) for scan in scans] == [("a.png", (9, 7, 1)), ("b.png", (9, 7, 1))]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="found no image among 0 files"):
        find_scans(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="no such file or folder"):
        find_scans(tmp_path / "*.gif", tmp_path / "out")
    with pytest.raises(ValueError, match="^output_dir: .* expected a folder outside of it"):
        find_scans(tmp_path / "in", tmp_path / "in/out")


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    closed, scandir = tmp_path / "in/closed", os.scandir
    closed.mkdir(parents=True)
    Image.new("L", (9, 7)).save(tmp_path / "in/a.png")

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # the administrator, who may run this test, can list every folder
    (scan,), failures = find_scans(tmp_path / "in", tmp_path / "out")
    assert scan.name == "a.png"
    assert failures == [{"file": "closed", "reason": f"{closed}: cannot be listed (Permission denied)"}]
    with pytest.raises(ValueError, match=r"found no image among 0 files, .*closed: cannot be listed"):
        find_scans(closed, tmp_path / "out")


def test_the_real_series_is_what_simpleitk_reads(real_data, tmp_path):
    folder = real_data / "lung_pet_ct_dx/Lung_Dx-A0001_s2_L"
    (scan,), failures = find_scans(folder, tmp_path)
    assert failures == []
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    voxels = sitk.GetArrayViewFromImage(image)
    assert scan.shape == image.GetSize()
    for index in range(0, len(scan), 9):
        np.testing.assert_array_equal(scan.read(index)[0], voxels[index])
    lps = np.diag([-1.0, -1, 1, 1]) @ scan.affine
    np.testing.assert_allclose(lps[:3, 3], image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(lps[:3, :3], axis=0), image.GetSpacing(), atol=1e-5)


GREY = np.add.outer(np.arange(20) * 4, np.arange(30) * 4).astype(np.uint8)  # brighter to the right and down
L = Image.fromarray(GREY)
COLOURS = sitk.GetImageFromArray(np.repeat(GREY[..., None], 3, 2).astype(np.uint16) * 257, isVector=True)
MPO = {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (30, 20))], "quality": 95}
PICTURES = {  # file: how it is written
    "white is zero 8.tif": lambda path: L.save(path, tiffinfo={262: 0}),  # Pillow inverts 8 bits itself
    "white is zero 16.tif": lambda path: Image.fromarray(60000 - GREY.astype(np.uint16) * 200).save(path, tiffinfo={262: 0}),
    "RGB 16.tif": lambda path: sitk.WriteImage(COLOURS, str(path)),
    "RGB 16.png": lambda path: sitk.WriteImage(COLOURS, str(path)),
    "MPO.jpg": lambda path: L.convert("RGB").save(path, **MPO),
    "NaN.tif": lambda path: Image.fromarray(np.where(GREY == 0, np.nan, GREY).astype(np.float32)).save(path),
    "lossless.webp": lambda path: L.save(path, lossless=True),
    "x.gif": lambda path: L.save(path),
    "unnamed": lambda path: L.save(path, "PNG"),
    "damaged EXIF.jpg": lambda path: L.save(path, exif=b"Exif\0\0damaged"),
}
TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}


def turned(path, number, **options):
    exif = Image.Exif()
    exif[0x0112] = number
    L.transpose(TURNS[number]).save(path, exif=exif, **options)


for _number in TURNS:
    for _suffix, _options in {"jpg": {"quality": 95}, "png": {}, "tif": {}, "webp": {"lossless": True}}.items():
        PICTURES[f"EXIF {_number}.{_suffix}"] = partial(turned, number=_number, **_options)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_read_as_a_viewer_shows_them(tmp_path, name):
    PICTURES[name](tmp_path / name)
    ((scan,), _) = find_scans(tmp_path / name, tmp_path / "out")
    read = scan.read(0)[0].numpy()
    assert read.shape == (20, 30) == (scan.shape[1], scan.shape[0])
    assert np.corrcoef(read.ravel(), GREY.ravel())[0, 1] > 0.999


def test_metal_at_the_highest_signed_value_is_not_air(tmp_path):
    voxels = np.full((12, 10, 3), -800, np.int16)
    voxels[5, 5] = 32767
    nib.save(nib.Nifti1Image(voxels, np.diag([-1, -1, 2, 1])), tmp_path / "metal.nii")
    (scan,), _ = find_scans(tmp_path / "metal.nii")
    assert (scan.read_volume() == voxels).all()
