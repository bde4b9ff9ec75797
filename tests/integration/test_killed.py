"""`chestct predict` killed at random moments: nothing half-written has a name, and the repeated command ends as unbroken.

CHEST_CT_KILLS is how often it is killed; 3 by default.
"""

import os
import random
import shutil
import signal
import time

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image

import command

KNOBS = ("--score_threshold", 0.06, "--batch_size", 2)
OF_A_RUN = ("UI", "DT", "DA", "TM", "SQ")  # DICOM elements that differ from run to run: UIDs, times, what holds them


@pytest.fixture(scope="module")
def scans(tmp_path_factory, write_ct):
    """Six small scans: a series, three volumes, two pictures."""
    folder, random_hu = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    write_ct(folder / "series", random_hu.integers(-500, 50, (4, 64, 64)) * 2)
    for name in "abc":
        hu = random_hu.integers(-1000, 100, (64, 64, 6)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hu, np.diag([-5, -5, 5, 1])), folder / f"{name}.nii.gz")
    for name in "de":
        Image.fromarray(random_hu.integers(0, 255, (64, 64)).astype(np.uint8)).save(folder / f"{name}.png")
    return folder


def content(path):
    """Bytes of a file; of DICOM, everything that does not differ from run to run."""
    if path.suffix != ".dcm":
        return path.read_bytes()
    dataset = pydicom.dcmread(path)
    return str([element for element in dataset.iterall() if element.VR not in OF_A_RUN])


def whole(out):
    """Every file that a reader sees, by name: those of folders and files whose names do not start with a point."""
    names = {path: path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    return {name: content(path) for path, name in names.items() if not any(part.startswith(".") for part in name.parts)}


def test_a_killed_command_is_repeated_to_the_same_end(scans, chestct, chestct_command, tmp_path):
    words = chestct_command(scans, tmp_path / "out", *KNOBS)
    begin = time.monotonic()
    assert chestct(scans, tmp_path / "whole", *KNOBS).returncode == 0
    seconds, expected = time.monotonic() - begin, whole(tmp_path / "whole")
    tables = {name for name in expected if name.suffix == ".csv"}
    moments, hits = random.Random(0), 0
    for _ in range(int(os.environ.get("CHEST_CT_KILLS", 3))):
        process = command.start("chestct", *words[1:], log=tmp_path / "log")
        deadline = time.monotonic() + 3 * seconds
        while process.exitcode is None and not list(tmp_path.glob("out/.lock")) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.random() * seconds / 3)
        process.kill()
        process.join()
        hits += process.exitcode == -signal.SIGKILL
        seen = whole(tmp_path / "out")
        assert all(seen[name] == expected[name] for name in seen.keys() - tables)
        for name in tables & seen.keys():  # of scans so far
            assert seen[name].splitlines() and set(seen[name].splitlines()) <= set(expected[name].splitlines())
        scanned = {name.parts[:-1] for name in seen if name.name == "predictions.json"}
        for folder in scanned:
            files = {name for name in expected if name.parts[: len(folder)] == folder}
            assert files <= seen.keys(), "a folder with a name has all of its files"
        if moments.random() < 0.5:
            shutil.rmtree(tmp_path / "out")
    assert hits > 0
    assert chestct(scans, tmp_path / "out", *KNOBS).returncode == 0
    assert whole(tmp_path / "out") == expected
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.name not in (".lock", ".lock.holder")]
