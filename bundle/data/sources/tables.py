"""Layouts of pictures with a table, list files or COCO JSON beside them."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from bundle.tasks import BOXES, CLASS, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK

logger = logging.getLogger(__name__)

# What a source yields: the split, or None where the layout knows none, and a record whose paths are absolute.
Records = Iterator[tuple[str | None, dict]]
SPLIT_NAMES = {
    "train": "training",
    "training": "training",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
# Connected parts of a mask below this many pixels are dust of the annotation, not lesions to be found.
MIN_LESION_PIXELS = 20


def read_rows(path: Path, required: tuple[str, ...]) -> list[dict]:
    """Rows of a CSV file that has at least the required columns.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the columns that are missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a table with the columns {', '.join(required)}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in required if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"{path}: found no column or no row of {', '.join(missing)}, expected {', '.join(required)}")
    return rows


def lesions(mask: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Connected parts of a mask (rows, columns) of at least `MIN_LESION_PIXELS`, eight neighbours touching.

    Returns:
        uint8 (rows, columns) with n + 1 on the part of boxes[n], and the boxes [x1, y1, x2, y2] in pixels, x = column.
    """
    parts, _ = ndimage.label(mask > 0, structure=np.ones((3, 3)))
    instances, boxes = np.zeros(mask.shape, np.uint8), []
    for index, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
        if (parts == index).sum() >= MIN_LESION_PIXELS:
            boxes.append([columns.start, rows.start, columns.stop, rows.stop])
            instances[parts == index] = len(boxes)
    return instances, boxes


def labelled_slices(folder: Path, export: Path, classes: dict[str, int], group: str) -> Records:
    """labels.csv with file, label, split and a column of groups: COVID-CT and IQ-OTH/NCCD as `covid_ct`, `iqoth_nccd`."""
    for row in read_rows(folder / "labels.csv", ("file", "label", "split", group)):
        record = {IMAGE: str(folder / row["file"]), CLASS: classes[row["label"]], GROUP: f"{folder.name}/{row[group]}"}
        yield SPLIT_NAMES[row["split"]], record


covid_ct = partial(labelled_slices, classes={"other": 0, "covid": 1}, group="patient_id")
iqoth_nccd = partial(labelled_slices, classes={"normal": 0, "benign": 0, "lung_cancer": 2}, group="group_id")


def medseg_covid19(folder: Path, export: Path, official_split: bool = False) -> Records:
    """The COVID-19 CT segmentation set with similarity groups: masks of value 1 ground glass, 2 consolidation.

    Args:
        official_split: Inf-Net's 48 test slices, which share patients with its training slices, instead of the leak-reduced
            split; every slice is a group of its own, and the validation slices of the other split stay so.
    """
    for row in read_rows(folder / "labels.csv", ("file", "mask_multiclass", "group_id", "split", "official_split")):
        split, group = row["split"], row["group_id"]
        if official_split:
            group = Path(row["file"]).stem
            split = "test" if row["official_split"] == "test" else "val" if split == "val" else "train"
        record = {IMAGE: str(folder / row["file"]), MASK: str(folder / row["mask_multiclass"])}
        yield SPLIT_NAMES[split], {**record, GROUP: f"medseg_covid19/{group}"}


def lung_tumor_slices(folder: Path, export: Path) -> Records:
    """labels.csv with tumour masks: their connected parts become boxes and instances, written below `export`.

    A slice whose every part is smaller than `MIN_LESION_PIXELS` is left out: it is neither free of tumour nor annotated.
    """
    for row in read_rows(folder / "labels.csv", ("file", "mask", "patient_id", "split")):
        image = folder / row["file"]
        record = {IMAGE: str(image), BOXES: [], GROUP: f"lung_tumor_slices/{row['patient_id']}"}
        if row["mask"]:
            with Image.open(folder / row["mask"]) as mask:
                instances, record[BOXES] = lesions(np.asarray(mask.convert("L")))
            if not record[BOXES]:
                logger.info(f"{image}: left out, every part of its mask is below {MIN_LESION_PIXELS} pixels")
                continue
            record[INSTANCES] = write_picture(instances, export / "instances" / f"{folder.name}_{image.stem}.png")
        yield SPLIT_NAMES[row["split"]], record


def write_picture(pixels: np.ndarray, path: Path) -> str:
    """Write uint8 (rows, columns) as a PNG, making its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


def unlabelled_slices(folder: Path, export: Path) -> Records:
    """labels.csv with file and patient_id alone: slices for reconstruction, all for training."""
    for row in read_rows(folder / "labels.csv", ("file", "patient_id")):
        yield "training", {IMAGE: str(folder / row["file"]), GROUP: f"{folder.name}/{row['patient_id']}"}


def covid_ct_original(folder: Path, export: Path) -> Records:
    """COVID-CT as published: Images-processed/CT_COVID and CT_NonCOVID, Data-split/{COVID,NonCOVID}/{train,val,test}CT_*.txt.

    Patients come from *MetaInfo*.csv beside them where there is one, otherwise every image is a group of its own.
    """
    patients = {}
    for path in sorted(folder.rglob("*MetaInfo*.csv")):
        for row in csv.DictReader(path.open(newline="", encoding="utf-8-sig", errors="replace")):
            row = {str(key).strip().lower(): value for key, value in row.items()}
            name = row.get("file name") or row.get("image name") or ""
            if row.get("patient id"):
                patients[name.strip()] = f"{path.stem}/{row['patient id'].strip()}"
    for class_name, label in (("COVID", 1), ("NonCOVID", 0)):
        for split in ("train", "val", "test"):
            listing = folder / "Data-split" / class_name / f"{split}CT_{class_name}.txt"
            if not listing.is_file():
                raise FileNotFoundError(f"{listing}: no such file, expected the official list of COVID-CT")
            for name in filter(None, map(str.strip, listing.read_text(errors="replace").splitlines())):
                image = folder / "Images-processed" / f"CT_{class_name}" / name
                yield SPLIT_NAMES[split], {IMAGE: str(image), CLASS: label, GROUP: f"covid_ct/{patients.get(name, name)}"}


def iqoth_nccd_original(folder: Path, export: Path) -> Records:
    """IQ-OTH/NCCD as published: folders "Normal cases", "Bengin cases" (so spelt), "Malignant cases" of numbered pictures.

    No patient is named, but numbers run patient by patient: a group is a run of slices that resemble their neighbour.
    """
    for case, label in (("Normal", 0), ("Bengin", 0), ("Malignant", 2)):
        images = sorted(_pictures(folder / f"{case} cases"), key=lambda path: int("".join(filter(str.isdigit, path.stem)) or 0))
        run, before = 0, None
        for image in images:
            thumbnail = _thumbnail(image)
            run += before is not None and float((thumbnail * before).mean()) < 0.9
            before = thumbnail
            yield None, {IMAGE: str(image), CLASS: label, GROUP: f"iqoth_nccd/{case.lower()}_{run}"}


def _thumbnail(path: Path) -> np.ndarray:
    """32 x 32 pixels of mean 0 and variance 1, so that the mean of a product is the correlation of two images."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L").resize((32, 32)), float)
    return (pixels - pixels.mean()) / max(pixels.std(), 1e-6)


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))


def inf_net(folder: Path, export: Path) -> Records:
    """Inf-Net's release: TrainingSet/LungInfection-Train/Doctor-label and TestingSet/LungInfection-Test, each Imgs and GT.

    The pictures lie transposed there: they are written below `export` with the spine down. A seventh of the training slices,
    evenly spaced, is for validation.
    """
    places = (
        (folder / "TrainingSet/LungInfection-Train/Doctor-label", ["validation"] + 6 * ["training"]),
        (folder / "TestingSet/LungInfection-Test", ["test"]),
    )
    for place, splits in places:
        masks = {path.stem: path for path in _pictures(place / "GT")}
        for index, image in enumerate(_pictures(place / "Imgs")):
            if image.stem not in masks:
                raise FileNotFoundError(f"{place / 'GT' / image.stem}.png: no such file, expected the mask of {image}")
            record = {GROUP: f"inf_net/{place.name}_{image.stem}"}
            for key, path in ((IMAGE, image), (MASK, masks[image.stem])):
                with Image.open(path) as picture:
                    pixels = np.asarray(picture.convert("L")).T
                pixels = pixels if key == IMAGE else np.uint8(pixels > 127)
                record[key] = write_picture(pixels, export / "inf_net" / place.name / key / f"{image.stem}.png")
            yield splits[index % len(splits)], record


def coco(folder: Path, export: Path) -> Records:
    """COCO JSON, annotations_{train,val,test}.json: `bbox` [x, y, width, height]; `patient_id` of an image is its group."""
    for path in sorted(folder.glob("annotations_*.json")):
        split = SPLIT_NAMES.get(path.stem.removeprefix("annotations_"))
        if split is None:
            raise ValueError(f"{path}: found an unknown split, expected annotations_train.json, _val.json or _test.json")
        content = json.loads(path.read_text())
        boxes = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            boxes[annotation["image_id"]].append([x, y, x + width, y + height])
        for image in content["images"]:
            record = {IMAGE: str(folder / image["file_name"]), BOXES: boxes[image["id"]]}
            yield split, {**record, GROUP: f"{folder.name}/{image.get('patient_id', image['file_name'])}"}


def table_csv(path: Path, export: Path) -> Records:
    """A CSV file with `image` and any of class, mask, boxes (JSON), instances, group, split; an empty cell is an absent field.

    Paths count from the folder of the file.
    """
    for number, row in enumerate(read_rows(path, ("image",)), start=2):
        row = {key: value.strip() for key, value in row.items() if key and value and value.strip()}
        split = row.pop("split", None)
        if split is not None and split not in SPLIT_NAMES:
            raise ValueError(f"{path}: line {number}: split: found {split!r}, expected train, val or test")
        for key, parse in ((CLASS, int), (BOXES, json.loads)):
            try:
                row |= {key: parse(row[key])} if key in row else {}
            except ValueError:
                kind = "a class number" if key == CLASS else "[[x1, y1, x2, y2], …]"
                raise ValueError(f"{path}: line {number}: {key}: found {row[key]!r}, expected {kind}") from None
        files = {k: str(path.parent / row[k]) for k in (IMAGE, MASK, INSTANCES) if row.get(k, EMPTY_MASK) != EMPTY_MASK}
        yield SPLIT_NAMES.get(split), {**row, **files, GROUP: f"{path.stem}/{row.get(GROUP, row[IMAGE])}"}
