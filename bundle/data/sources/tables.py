"""Layouts of pictures with one table, or COCO JSON, beside them."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

from bundle.data.sources.common import (
    MIN_LESION_PIXELS,
    SPLIT_NAMES,
    Records,
    lesions,
    look_up,
    read_grey,
    read_rows,
    write_picture,
)
from bundle.errors import UserError
from bundle.names import BOXES, CLASS, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK

logger = logging.getLogger(__name__)


def labelled_slices(folder: Path, export: Path, classes: dict[str, str], group: str) -> Records:
    """labels.csv with file, label, split and a column of groups: COVID-CT and IQ-OTH/NCCD as `covid_ct`, `iqoth_nccd`."""
    for place, row in read_rows(folder / "labels.csv", ("file", "label", "split", group)):
        record = {IMAGE: str(folder / row["file"]), CLASS: look_up(classes, row, "label", place), GROUP: row[group]}
        yield look_up(SPLIT_NAMES, row, "split", place), record


covid_ct = partial(labelled_slices, classes={"other": "other", "covid": "COVID-19"}, group="patient_id")
iqoth_nccd = partial(
    labelled_slices, classes={"normal": "other", "benign": "other", "lung_cancer": "lung cancer"}, group="group_id"
)


def medseg_covid19(folder: Path, export: Path, official_split: bool = False) -> Records:
    """The COVID-19 CT segmentation set with similarity groups: masks of value 1 ground glass, 2 consolidation.

    Args:
        official_split: Inf-Net's 48 test slices, which share patients with its training slices, instead of the leak-reduced
            split; every slice is a group of its own, and the validation slices of the other split stay so.
    """
    for place, row in read_rows(folder / "labels.csv", ("file", "mask_multiclass", "group_id", "split", "official_split")):
        split, group = look_up(SPLIT_NAMES, row, "split", place), row["group_id"]
        if official_split:
            official, group = look_up(SPLIT_NAMES, row, "official_split", place), Path(row["file"]).stem
            split = "validation" if (official, split) == ("training", "validation") else official
        yield split, {IMAGE: str(folder / row["file"]), MASK: str(folder / row["mask_multiclass"]), GROUP: group}


def lung_tumor_slices(folder: Path, export: Path) -> Records:
    """labels.csv with tumour masks: their connected parts become boxes and instances, written below `export`.

    A slice whose every part is smaller than `MIN_LESION_PIXELS` is left out: it is neither free of tumour nor annotated.
    """
    left_out = 0
    for place, row in read_rows(folder / "labels.csv", ("file", "mask", "patient_id", "split")):
        image = folder / row["file"]
        record = {IMAGE: str(image), BOXES: [], GROUP: row["patient_id"]}
        if row["mask"]:
            instances, record[BOXES] = lesions(read_grey(folder / row["mask"]))
            if not record[BOXES]:
                left_out += 1
                continue
            record[INSTANCES] = write_picture(instances, export / "instances" / f"{image.stem}.png")
        yield look_up(SPLIT_NAMES, row, "split", place), record
    if left_out:
        logger.info(f"{folder}: {left_out} slices left out whose tumour has no part of {MIN_LESION_PIXELS} pixels")


def unlabelled_slices(folder: Path, export: Path) -> Records:
    """labels.csv with file and patient_id alone: slices for reconstruction, all for training."""
    for _, row in read_rows(folder / "labels.csv", ("file", "patient_id")):
        yield "training", {IMAGE: str(folder / row["file"]), GROUP: row["patient_id"]}


def coco(folder: Path, export: Path) -> Records:
    """COCO JSON, annotations_{train,val,test}.json: `bbox` [x, y, width, height]; `patient_id` of an image is its group."""
    for path in sorted(folder.glob("annotations_*.json")):
        split = SPLIT_NAMES.get(path.stem.removeprefix("annotations_"))
        if split is None:
            raise UserError(f"{path}: found an unknown split, expected annotations_train.json, _val.json or _test.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            boxes = {image["id"]: [] for image in content["images"]}
            for annotation in content["annotations"]:
                x, y, width, height = annotation["bbox"]
                boxes[annotation["image_id"]].append([x, y, x + width, y + height])
            images = [(image["file_name"], boxes[image["id"]], image.get("patient_id")) for image in content["images"]]
        except (ValueError, TypeError, KeyError) as error:
            expected = "COCO's images (id, file_name) and annotations (image_id, bbox) that name each other"
            raise UserError(f"{path}: found {type(error).__name__} {error}, expected {expected}") from None
        for name, found, patient in images:
            yield split, {IMAGE: str(folder / name), BOXES: found, GROUP: name if patient is None else str(patient)}


def table_csv(path: Path, export: Path) -> Records:
    """A CSV file with `image` and any of class, mask, boxes (JSON), instances, group, source, split.

    An empty cell is an absent field. Paths count from the folder of the file. A class is a number or a name.
    """
    for place, row in read_rows(path, ("image",)):
        row = {key: cell.strip() for key, cell in row.items() if cell.strip()}
        split = look_up(SPLIT_NAMES, row, "split", place) if "split" in row else None
        row.pop("split", None)
        if IMAGE not in row:
            raise UserError(f"{place}: {IMAGE}: found an empty cell, expected the path of an image")
        if row.get(CLASS, "").lstrip("-").isdigit():
            row[CLASS] = int(row[CLASS])
        if BOXES in row:
            try:
                row[BOXES] = json.loads(row[BOXES])
            except ValueError:
                raise UserError(f"{place}: {BOXES}: found {row[BOXES]!r}, expected [[x1, y1, x2, y2], …]") from None
        files = [key for key in (IMAGE, MASK, INSTANCES) if row.get(key, EMPTY_MASK) != EMPTY_MASK]
        yield split, {GROUP: row[IMAGE], **row, **{key: str(path.parent / row[key]) for key in files}}
