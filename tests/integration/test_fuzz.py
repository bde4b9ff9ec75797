"""Damaged and malicious files: each is refused in one line, nothing crashes, nothing is written.

CHEST_CT_FUZZ sets how many; the default is small, 500 were tried.
"""

import csv
import gzip
import io
import os
import shutil
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom.uid import JPEGLSLossless, RLELossless

from bundle.data.volumes import find_scans

COUNT = int(os.environ.get("CHEST_CT_FUZZ", 120))
TRICKS = ("../../escape", "/tmp/escape", "..\\..\\escape", "a" * 64, "<script>", "")


@pytest.fixture(scope="session")
def intact(tmp_path_factory, write_dicom) -> list[Path]:
    """One small file of every format."""
    folder = tmp_path_factory.mktemp("intact")
    voxels = np.random.default_rng(0).integers(-1000, 200, (24, 20, 3)).astype(np.int16)
    for name in ("x.nii", "x.nii.gz"):
        nib.save(nib.Nifti1Image(voxels, np.diag([-1, -1, 2, 1])), folder / name)
    nib.save(nib.Nifti2Image(voxels, np.diag([-1, -1, 2, 1])), folder / "y.nii")
    for name in ("x.mha", "x.nrrd", "x.mhd"):
        sitk.WriteImage(sitk.GetImageFromArray(voxels.T), str(folder / name))
    for name in ("x.png", "x.jpg", "x.tif", "x.bmp", "x.webp", "x.gif"):
        Image.fromarray(voxels[..., 0].clip(0, 255).astype(np.uint8)).save(folder / name)
    for name, syntax in (("x.dcm", None), ("rle.dcm", RLELossless), ("ls.dcm", JPEGLSLossless)):
        write_dicom(folder / name, voxels[..., 0])
        if syntax:
            compressed = pydicom.dcmread(folder / name)
            compressed.compress(syntax)
            compressed.save_as(folder / name)
    bare = pydicom.dcmread(folder / "x.dcm")
    bare.preamble, bare.file_meta = None, pydicom.dataset.FileMetaDataset()
    bare.save_as(folder / "x.ima", implicit_vr=True, little_endian=True, enforce_file_format=False)
    return sorted(path for path in folder.iterdir() if path.suffix != ".raw")


def mutate(path: Path, folder: Path, number: int, rng: np.random.Generator) -> None:
    """Write one damaged copy of a file, or something else under its name."""
    content, target = bytearray(path.read_bytes()), folder / f"{number:03d}{path.name}"
    kind = rng.integers(8)
    if kind == 0 or kind == 1:
        for _ in range(int(rng.integers(1, 40))):  # headers come first
            content[int(rng.integers(min(len(content), 600 if kind else len(content))))] = int(rng.integers(256))
    elif kind == 2:
        content = content[: int(rng.integers(len(content)))]
    elif kind == 3:
        content = b"this is text, whatever its name says\n" * int(rng.integers(30))
    elif kind == 4:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("../../escape.txt", bytes(10**7))
        content = archive.getvalue()
    elif kind == 5:
        content = gzip.compress(bytes(content[:352]) + bytes(10**7)) if path.suffix == ".gz" else bytes(content) * 2
    elif path.suffix == ".dcm":
        dataset = pydicom.dcmread(path)
        elements = list(dataset)
        if kind == 6:
            for index in rng.choice(len(elements), 3, replace=False):
                del dataset[elements[index].tag]
        else:
            dataset.Rows = int(rng.choice([0, 1, 7, 65535]))
        trick = str(rng.choice(TRICKS))
        dataset.PatientID = dataset.PatientName = dataset.StudyID = trick
        with pydicom.config.disable_value_validation():
            dataset.SeriesInstanceUID = trick
            dataset.save_as(target)
        return
    else:
        start = int(rng.integers(len(content)))
        content[start : start + int(rng.integers(200))] = b"\xff" * int(rng.integers(200))
    target.write_bytes(bytes(content))


@pytest.fixture(scope="session")
def damaged(intact, tmp_path_factory) -> Path:
    """A folder of damaged files."""
    folder, rng = tmp_path_factory.mktemp("fuzz") / "in", np.random.default_rng(0)
    folder.mkdir()
    shutil.copy(intact[0].parent / "x.raw", folder)
    for number in range(COUNT):
        mutate(intact[number % len(intact)], folder, number, rng)
    return folder


def test_damaged_files_raise_nothing_but_one_line(damaged):
    folder, out = damaged, damaged.parent / "out"
    before = sorted(folder.parent.rglob("*"))
    scans, failures = find_scans(folder, out)
    reasons, intact_after_all = [failure["reason"] for failure in failures], 0
    for scan in scans:
        assert (out / scan.name).resolve().is_relative_to(out.resolve()), "no name of a tag is part of a path"
        try:
            for index in range(min(len(scan), 8)):
                assert np.isfinite(scan.read(index).numpy()).all()
            intact_after_all += 1
        except ValueError as error:
            reasons.append(str(error))
        scan.close()
    assert all(reason.strip() and "\n" not in reason for reason in reasons)
    assert len(reasons) > 0.4 * COUNT and intact_after_all > 0.04 * COUNT, "some damage is fatal, some is not"
    assert sorted(folder.parent.rglob("*")) == before


def test_the_command_goes_through_all_of_them(damaged, chestct, tmp_path):
    done = chestct(damaged, tmp_path / "a/b/out", "--score_threshold", 0.9, "--batch_size", 16)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr[-3000:]
    with (tmp_path / "a/b/out/failures.csv").open(newline="") as file:
        failures = list(csv.DictReader(file))
    with (tmp_path / "a/b/out/scans.csv").open(newline="") as file:
        scans = [row["scan"] for row in csv.DictReader(file)]
    assert len(failures) > 0.4 * COUNT and len(scans) > 0.04 * COUNT
    assert all(row["reason"].strip() and "\n" not in row["reason"] for row in failures)
    folders = {path.parent.relative_to(tmp_path / "a/b/out").as_posix() for path in tmp_path.rglob("predictions.json")}
    assert folders == set(scans) and not list(tmp_path.rglob(".tmp*"))
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b"}, "nothing outside of the output folder"
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {"out"} and not Path("/tmp/escape").exists()
