"""Fixtures that every test may use: the real data where they are, and a small phantom data set."""

import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigParser
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from bundle.data.phantom import make_phantom


def pytest_collection_modifyitems(items):
    """Commands first, as they take longest: several workers then end at about the same time."""
    items.sort(key=lambda item: "integration" not in item.path.parts)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the public data sets: CHEST_CT_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("CHEST_CT_DATA") or Path(__file__).parents[2] / "shared/data")
    if not folder.is_dir():
        pytest.skip("real data not found: set CHEST_CT_DATA")
    return folder


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory) -> Path:
    """Phantom data of 64 x 64 pixels, only to be read: three patients a split (one a class), two slices each."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    return Path(make_phantom(folder, size=64, groups=(3, 3, 3), slices_per_group=2))


@pytest.fixture(scope="session")
def save_smoke():
    """Function that writes untrained weights of the network of configs/preset_smoke.json and returns the network."""

    def save(path, **entries):
        parser = ConfigParser()
        parser.read_config([Path(__file__).parents[1] / f"configs/{name}.json" for name in ("train", "preset_smoke")])
        parser.update(entries)
        torch.manual_seed(0)
        network = parser.get_parsed_content("network_def")
        torch.save(network.state_dict(), path)
        return network

    return save


@pytest.fixture(scope="session")
def checkpoint(save_smoke, tmp_path_factory) -> Path:
    """Such weights of all tasks, only to be read."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_smoke(path)
    return path


@pytest.fixture(scope="session")
def write_dicom():
    """Function that writes HU (rows, columns) as a CT slice and returns the path."""

    def write(path, hu, spacing=(0.75, 1.5), orientation=(1, 0, 0, 0, 1, 0)) -> Path:
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
        dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "CT", "MONOCHROME2", 1
        dataset.Rows, dataset.Columns = hu.shape
        dataset.PixelSpacing, dataset.SliceThickness = list(spacing), 5
        dataset.ImageOrientationPatient, dataset.ImagePositionPatient = list(orientation), [-50, -40, 30]
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.RescaleIntercept, dataset.RescaleSlope = -1024, 2
        dataset.PixelData = ((np.asarray(hu) + 1024) // 2).astype("<u2").tobytes()
        dataset.save_as(path, enforce_file_format=True)
        return Path(path)

    return write


@pytest.fixture(scope="session")
def write_ct(write_dicom):
    """Function that writes HU (slices, rows, columns) as a CT series in a new folder, `step` mm apart; None removes a tag."""

    def write(folder, volume, spacing=(0.75, 1.5), step=5.0, **values) -> Path:
        folder.mkdir(parents=True)
        uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
        for index, hu in enumerate(volume):
            dataset = pydicom.dcmread(write_dicom(folder / str(index), hu, spacing))
            for name, value in {**uids, "ImagePositionPatient": [0, 0, step * index], **values}.items():
                if value is None:
                    delattr(dataset, name)
                else:
                    setattr(dataset, name, value)
            dataset.save_as(folder / str(index))
        return folder

    return write


@pytest.fixture(scope="session")
def chest_slice() -> tuple[np.ndarray, np.ndarray]:
    """A slice in [0, 1] and its lungs: body, two lungs with a vessel in one, air around, a table below the body."""
    y, x = np.mgrid[:128, :160]
    ellipse = lambda cx, cy, rx, ry: ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1  # noqa: E731
    image = np.full(x.shape, 0.02)
    image[ellipse(80, 60, 70, 50)] = 0.8
    lungs = ellipse(50, 60, 22, 32) | ellipse(110, 60, 22, 32)
    image[lungs] = 0.15
    image[ellipse(50, 60, 3, 3)] = 0.8
    image[118:121] = 0.7
    return image, lungs
