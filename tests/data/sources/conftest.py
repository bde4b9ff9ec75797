"""What the tests of the layouts share: tiny pictures, and a layout merged and read back as training would."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from some_tasks import some_tasks

from bundle.data.datalist import load_datalist, select
from bundle.data.sources import merge
from bundle.data.transforms import LoadSliced


@pytest.fixture
def picture():
    """picture(path, shape or pixels): write a grey PNG or JPEG, by default darker than any lesion."""

    def write(path: Path, pixels) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full(pixels, 20) if isinstance(pixels, tuple) else np.asarray(pixels)
        Image.fromarray(pixels.astype(np.uint8)).save(path)

    return write


@pytest.fixture
def merged(tmp_path):
    """merged(argument, …): the layouts' datalist written, validated and read; split -> records of absolute paths."""

    def read(*arguments, **options) -> dict[str, list[dict]]:
        merge([str(argument) for argument in arguments], tmp_path / "merged", **options)
        datalist = load_datalist(tmp_path / "merged/datalist.json", tmp_path / "merged")
        splits = [split for split in ("training", "validation", "test") if datalist[split]]
        return {split: select(datalist, split, some_tasks("reconstruction"), str(tmp_path / "merged")) for split in splits}

    return read


@pytest.fixture
def samples(merged):
    """samples(argument, …): the records of all splits with their pixels, as the network's transforms read them."""

    def read(*arguments, segmentation_classes=1, **options) -> list[dict]:
        load = LoadSliced(segmentation_classes)
        return [load(record) for records in merged(*arguments, **options).values() for record in records]

    return read


@pytest.fixture
def coco(picture):
    """coco(folder): a COCO layout of one training slice of 40 x 60 with two boxes and one test slice with none."""

    def write(folder: Path) -> Path:
        for split, image, boxes in (("train", 3, [[10, 5, 30, 12.5], [0, 0, 4, 4]]), ("test", 8, [])):
            picture(folder / f"images/{image}.png", (40, 60))
            content = {
                "images": [{"id": image, "file_name": f"images/{image}.png", "patient_id": f"p{image}"}],
                "annotations": [{"image_id": image, "bbox": box, "category_id": 1} for box in boxes],
            }
            (folder / f"annotations_{split}.json").write_text(json.dumps(content))
        return folder

    return write
