"""`chestct predict` on folders of studies: everything at once, again, killed in between, in several processes."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from chests import chest

from bundle.files import locked

SECRETS = {"PatientName": "Doe^Jane", "PatientID": "ID-4711", "AccessionNumber": "ACC0815", "PatientBirthDate": "19500102"}


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def studies(tmp_path_factory, write_ct):
    """A folder with a DICOM series of 4 slices, a volume of 5, two pictures and three broken files."""
    folder = tmp_path_factory.mktemp("studies")
    write_ct(folder / "study", chest(4, spot=True), (5.0, 5.0), SeriesNumber=3, **SECRETS)
    nib.save(nib.Nifti1Image(chest(5, spot=True).transpose(2, 1, 0), np.diag([-5, -5, 4, 1])), folder / "volume.nii.gz")
    for name in ("a.png", "b.jpg"):
        Image.fromarray((chest(1)[0] / 5 + 200).clip(0, 255).astype(np.uint8)).save(folder / name)
    (folder / "broken.png").write_text("no picture")
    (folder / "cut.nii.gz").write_bytes((folder / "volume.nii.gz").read_bytes()[:900])
    (folder / "empty.dcm").touch()
    return folder


def names(out):
    return sorted(path.parent.relative_to(out).as_posix() for path in out.rglob("predictions.json"))


@pytest.fixture(scope="module")
def first(studies, chestct, tmp_path_factory):
    """Folder of a first run over the studies."""
    out = tmp_path_factory.mktemp("first") / "out"
    done = chestct(studies, out, "--score_threshold", 0.06, "--batch_size", 3)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_every_study_is_predicted_and_the_broken_ones_are_reported(first):
    (series,) = (first / "study").iterdir()
    assert names(first) == ["a.png", "b.jpg", f"study/{series.name}", "volume.nii.gz"]
    failures = table(first / "failures.csv")
    assert sorted(row["scan"] for row in failures) == ["broken.png", "cut.nii.gz", "empty.dcm"]
    assert all(row["reason"] and "\n" not in row["reason"] for row in failures)
    assert [row["scan"] for row in table(first / "scans.csv")] == names(first)
    assert len(table(first / "slices.csv")) == 4 + 5 + 2
    files = {path.name for path in series.iterdir()}
    expected = {"mask", "probability"}
    assert files >= {f"{name}.nii.gz" for name in expected} | {"segmentation.dcm", "report.dcm", "report.html"}
    assert not list(first.rglob(".tmp*"))


def test_a_second_run_skips_what_is_done(first, studies, chestct):
    before = {path: path.stat().st_mtime_ns for path in first.rglob("predictions.json")}
    done = chestct(studies, first, "--score_threshold", 0.06, "--batch_size", 1)
    assert done.returncode == 0 and "5 scans, 4 of them done" in done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in first.rglob("predictions.json")} == before
    assert len(table(first / "failures.csv")) == 3 and len(table(first / "scans.csv")) == 4


def test_nothing_of_the_patient_is_in_any_result_but_dicom(first, studies, chestct, tmp_path):
    dataset = pydicom.dcmread(studies / "study/0")
    secrets = [*SECRETS.values(), dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.SOPInstanceUID, "Jane"]
    for path in first.rglob("*"):
        content = path.read_bytes() if path.is_file() and path.suffix != ".dcm" else b""
        for secret in secrets:
            assert secret.encode() not in content and secret not in path.name, f"{secret} in {path.name}"
    (series,) = (first / "study").iterdir()
    assert pydicom.dcmread(series / "segmentation.dcm").PatientName == "Doe^Jane"
    assert chestct(studies / "study", tmp_path, "--keep_identifiers", "True").returncode == 0
    (prediction,) = map(json.loads, map(Path.read_text, tmp_path.rglob("predictions.json")))
    assert SECRETS.items() <= prediction["identifiers"].items()


def test_two_processes_share_the_work_and_give_the_same_results(first, studies, chestct, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python"]
    done = chestct(studies, tmp_path, "--score_threshold", 0.06, "--batch_size", 3, before=torchrun)
    assert done.returncode == 0, done.stderr[-3000:]
    assert names(tmp_path) == names(first)
    for name in ("scans.csv", "slices.csv", "lesions.csv"):
        assert (tmp_path / name).read_text() == (first / name).read_text()
    assert table(tmp_path / "failures.csv") == table(first / "failures.csv")


def test_a_folder_that_another_command_writes_to_is_refused_in_one_line(studies, chestct, tmp_path):
    with locked(tmp_path / "out"):
        done = chestct(studies / "a.png", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    line = done.stderr.splitlines()[-1]
    holder = rf"process {os.getpid()} on \S+ since [-:+ \d]+"
    assert re.fullmatch(rf"error: {tmp_path}/out: in use by {holder}; wait for its end, or set another folder", line)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_ends_in_one_line(studies, chestct_command, tmp_path):
    """On a disk of 300 kB, where a memory map of a file that grew would have ended in SIGBUS."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs a user namespace to mount a small disk")
    source = tmp_path / "in"
    source.mkdir()
    volume = np.random.default_rng(0).integers(-1000, 100, (256, 256, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([-1, -1, 4, 1])), source / "volume.nii.gz")
    (source / "a.png").write_bytes((studies / "a.png").read_bytes())
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=300k tmpfs {tmp_path}/disk && \"$@\"; "
    mount += f"status=$?; cat {tmp_path}/disk/out/failures.csv; exit $status"
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", *chestct_command(source, tmp_path / "disk/out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
    line = "cannot be written (No space left on device); check the disk and its permissions"
    assert f"volume.nii.gz,{tmp_path}/disk/out/volume.nii.gz: {line}," in done.stdout
    assert "1 scans, 1 failures" in done.stdout + done.stderr
