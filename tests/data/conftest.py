"""DICOM series for the tests of reading."""

import numpy as np
import pydicom
import pytest

from bundle.data.volumes import find_scans


@pytest.fixture
def scans_of(tmp_path):
    """Function that finds the scans of tmp_path/in, of which none may fail and no two have one name."""

    def find():
        scans, failures = find_scans(tmp_path / "in", tmp_path / "out")
        assert failures == [] and len({scan.name for scan in scans}) == len(scans), failures
        return scans

    return find


@pytest.fixture
def write_series(write_dicom, tmp_path):
    """Function that writes slices of constant HU at heights, the last first; `change` gives tags by number, None removes."""

    def write(heights, series="1.2.3.4", change=lambda number: {}, **tags):
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        for number, height in reversed(list(enumerate(heights))):
            path = write_dicom(folder / f"{series}-{number}", np.full((6, 8), 10 * number - 1000))
            dataset = pydicom.dcmread(path)
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.InstanceNumber = "1.2.3", series, 100 - number
            dataset.ImagePositionPatient = [-50, -40, height]
            for name, value in {**tags, **change(number)}.items():
                delattr(dataset, name) if value is None else setattr(dataset, name, value)
            dataset.save_as(path)

    return write
