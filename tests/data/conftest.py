"""DICOM series for the tests of reading."""

import numpy as np
import pydicom
import pytest


@pytest.fixture
def write_series(write_dicom):
    """Function that writes slices of constant HU at the given heights, the last of them first, as one series."""

    def write(folder, heights, series="1.2.3.4", **tags):
        folder.mkdir(exist_ok=True)
        for number, height in reversed(list(enumerate(heights))):
            path = write_dicom(folder / f"{series}-{number}", np.full((6, 8), 10 * number - 1000))
            dataset = pydicom.dcmread(path)
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.InstanceNumber = "1.2.3", series, 100 - number
            dataset.ImagePositionPatient = [-50, -40, height]
            for name, value in tags.items():
                setattr(dataset, name, value)
            dataset.save_as(path)

    return write
