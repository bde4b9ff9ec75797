import logging

import numpy as np
import pytest
import torch
from PIL import Image

from bundle.inference import ImageDataset, collate, find_images


@pytest.fixture
def folder(tmp_path, write_dicom):
    """Images of several formats, in folders and with names that a walk can get wrong."""
    source = tmp_path / "in"
    (source / "b").mkdir(parents=True)
    for name in ("b/slice.png", "slice.png", "slice.JPG"):
        Image.fromarray(np.full((6, 8), 7, np.uint8)).save(source / name)
    write_dicom(source / "a", np.zeros((6, 8)))
    write_dicom(source / "b/1.2.840", np.zeros((6, 8)))
    write_dicom(source / "DICOMDIR", np.zeros((6, 8)))
    (source / "README").write_text("no image")
    (source / "._slice.png").write_text("no image either")
    return source


def test_a_folder_is_walked_in_sorted_order(folder, caplog):
    with caplog.at_level(logging.INFO):
        found = find_images(folder, folder.parent / "out")
    assert [record["name"] for record in found] == ["a", "b/1.2.840", "b/slice.png", "slice.JPG", "slice.png"]
    assert all(record["image"] == str(folder / record["name"]) for record in found)
    assert "5 images, 2 other files" in caplog.text


def test_a_single_file_is_taken_whatever_its_name(folder):
    assert find_images(folder / "README", "out") == [{"image": str(folder / "README"), "name": "README"}]


def test_what_holds_no_image_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing: no such file or folder"):
        find_images(tmp_path / "missing", "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: found no image among 0 files"):
        find_images(tmp_path / "empty", "out")
    for inside in (folder, folder / "b/out"):
        with pytest.raises(ValueError, match="output_dir: found .* inside the input"):
            find_images(folder, inside)


def test_an_unreadable_file_says_so_and_other_errors_are_not_hidden():
    def read(record):
        if record["name"] == "bad":
            raise ValueError("bad: cannot be read")
        return {**record, "image": torch.ones(1, 4, 4)}

    dataset = ImageDataset([{"name": "good"}, {"name": "bad"}], read, image_size=4)
    batch = collate([dataset[0], dataset[1]])
    assert batch["image"].shape == (2, 1, 4, 4) and batch["image"][1].sum() == 0
    assert batch["samples"][1]["failure"] == "bad: cannot be read" and "failure" not in batch["samples"][0]
    with pytest.raises(RuntimeError):
        ImageDataset([{}], lambda record: record["image"], image_size=4)[0]
