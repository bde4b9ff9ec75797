"""Tables: one layout for every labels.csv or CSV file, whose columns are named after what they hold; and COCO JSON."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bundle.data.sources.common import COMPLAINT, MIN_LESION_PIXELS, SIZE, SPLIT_NAMES, Records
from bundle.data.sources.common import lesions, look_up, read_labels, read_rows, write_picture
from bundle.data.sources.known import IMPLIED, OBJECTS, SPLIT, Known, recognise
from bundle.data.volumes import PICTURES
from bundle.errors import UserError
from bundle.names import BOXES, CLASS, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK, SOURCE

logger = logging.getLogger(__name__)
# Column of docs/data.md -> names that it may have, in any case; of several, the first that a row fills counts.
COLUMNS = {
    IMAGE: ("image", "file"),
    CLASS: ("class", "label"),
    MASK: ("mask",),
    OBJECTS: ("objects",),
    BOXES: ("boxes", "boxes_xyxy"),
    INSTANCES: ("instances",),
    GROUP: ("group", "patient_id", "group_id"),
    SPLIT: ("split",),
    SOURCE: ("source",),
}


def table(path: Path, export: Path, known: Known | None = None) -> Records:
    """Records of a CSV file, or of the labels.csv of a folder; paths in it count from its folder.

    Args:
        path: of the file or folder.
        export: folder for the masks and instances that have to be written.
        known: the public data set that it is; by default the one that its columns tell.
    """
    path = path / "labels.csv" if path.is_dir() else path
    rows = [(place, {name.lower(): cell for name, cell in row.items()}) for place, row in read_rows(path)]
    columns = list(rows[0][1]) if rows else []
    known = known or recognise(columns)
    if known and known.unused:
        raise UserError(f"{path}: {known.unused}")
    if not set(COLUMNS[IMAGE]) & set(columns):
        raise UserError(f"{path}: found the columns {', '.join(columns) or 'none'}, expected {' or '.join(COLUMNS[IMAGE])}")
    unread = set(columns) - {"width", "height"} - {name for names in COLUMNS.values() for name in names}
    if unread and not known:
        logger.info(f"{path}: columns that are not read: {', '.join(sorted(unread))}")
    dust = 0
    for number, (place, row) in enumerate(rows):
        image = row.get("image") or row.get("file") or place
        try:
            record = _record(row, known, place, path.parent, export, f"{number:05d}_{Path(image).stem}.png")
            split = record.pop(SPLIT).lower()
            split = look_up(SPLIT_NAMES, {SPLIT: split}, SPLIT, place) if split else None
        except UserError as error:  # of one row, which stops no data set
            yield None, {IMAGE: image, COMPLAINT: str(error)}
            continue
        if record.pop(OBJECTS, None):
            dust += 1
        else:
            yield split, record
    if dust:
        logger.info(f"{path.parent}: {dust} slices left out whose tumour has no part of {MIN_LESION_PIXELS} pixels")


def _record(row: Mapping, known: Known | None, place: str, folder: Path, export: Path, name: str) -> dict:
    """Record of a row, with its cell of the split, and with OBJECTS where its mask of objects holds nothing but dust.

    `name` is that of the pictures that it exports.
    """
    try:
        row = row | (known.fields(row) if known else {})
        record = {IMPLIED: known.implied(row)} if known else {}
    except (ValueError, KeyError) as error:
        raise UserError(f"{place}: found {type(error).__name__} {error}, expected the table of {known.source}") from None
    cells = {field: next(filter(None, map(row.get, names)), "") for field, names in COLUMNS.items()}
    files = {field: folder / cells[field].replace("\\", "/") for field in (IMAGE, MASK, OBJECTS, INSTANCES)}
    if not cells[IMAGE]:
        raise UserError(f"{place}: {IMAGE}: found an empty cell, expected the path of an image")
    record |= {IMAGE: str(files[IMAGE]), GROUP: cells[GROUP] or cells[IMAGE], SPLIT: cells[SPLIT]}
    if source := known.source if known else cells[SOURCE]:
        record[SOURCE] = source
    if cells[CLASS]:
        record[CLASS] = _class(cells[CLASS])
    if cells[MASK]:
        empty = cells[MASK].lower() == EMPTY_MASK
        record[MASK] = EMPTY_MASK if empty else _mask(files[MASK], export / "masks" / name)
    if cells[BOXES]:
        record[BOXES] = _boxes(cells[BOXES], place)
        if row.get("width", "").isdigit() and row.get("height", "").isdigit():
            record[SIZE] = int(row["width"]), int(row["height"])
    if cells[INSTANCES]:
        record[INSTANCES] = str(files[INSTANCES])
    if cells[OBJECTS].lower() == EMPTY_MASK:
        record[BOXES] = []
    elif cells[OBJECTS]:
        instances, boxes = lesions(read_labels(files[OBJECTS])[0])
        if boxes:
            record |= {BOXES: boxes, INSTANCES: write_picture(instances, export / "instances" / name)}
        elif BOXES not in record:
            record[OBJECTS] = "dust"
    return record


def _class(cell: str) -> int | str | list:
    """Number, name, or list of them, of a class; a whole number may have a decimal point or comma, as in spreadsheets."""
    try:
        if cell.startswith("["):
            return json.loads(cell)
        number = float(cell.replace(",", "."))
        return int(number) if number.is_integer() else cell
    except (ValueError, OverflowError):
        return cell


def _boxes(cell: str, place: str):
    try:
        return json.loads(cell)
    except ValueError:
        expected = "[[x1, y1, x2, y2], …] with decimal points, or []"
        raise UserError(f"{place}: {BOXES}: found {cell!r}, expected {expected}") from None


def _mask(path: Path, export: Path) -> str:
    """Path of a mask, "empty" if no pixel of it is marked; one whose labels are not its grey values is written anew."""
    if path.suffix.lower() not in PICTURES:
        return str(path)
    labels, convert = read_labels(path)
    if not labels.any():
        return EMPTY_MASK
    return write_picture(np.uint8(labels), export) if convert else str(path)


def coco(folder: Path, export: Path, categories: Sequence[str] = ()) -> Records:
    """COCO JSON, annotations_{train,val,test}.json: `bbox` [x, y, width, height]; `patient_id` of an image is its group.

    Args:
        folder: of the files; `file_name` counts from it.
        export: not used.
        categories: names of those to be read; without it there may be only one.
    """
    for path in sorted(folder.glob("annotations_*.json")):
        split = SPLIT_NAMES.get(path.stem.removeprefix("annotations_"))
        if split is None:
            raise UserError(f"{path}: found an unknown split, expected annotations_train.json, _val.json or _test.json")
        try:
            records = _coco_records(path, json.loads(path.read_text(encoding="utf-8-sig")), categories)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            expected = "COCO's images (id, file_name) and annotations (image_id, bbox) that name each other"
            raise UserError(f"{path}: found {type(error).__name__} {error}, expected {expected}") from None
        yield from ((split, record) for record in records)


def _coco_records(path: Path, content: Mapping, categories: Sequence[str]) -> list[dict]:
    read = _read_categories(content, categories)
    boxes = {image["id"]: [] for image in content["images"]}
    annotations = [item for item in content["annotations"] if item.get("category_id") in read]
    crowded = {item["image_id"] for item in annotations if item.get("iscrowd")}
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        boxes[annotation["image_id"]].append([x, y, x + width, y + height])
    if others := len(content["annotations"]) - len(annotations):
        logger.info(f"{path}: {others} annotations of other categories left out")
    if crowded:
        logger.info(f"{path}: {len(crowded)} slices left out whose objects are marked as a crowd (iscrowd)")
    records = []
    for image in content["images"]:
        record = {IMAGE: str(path.parent / image["file_name"]), BOXES: boxes[image["id"]]}
        record[GROUP] = str(image.get("patient_id") or image["file_name"])
        if image.get("width") and image.get("height"):
            record[SIZE] = image["width"], image["height"]
        records += [record] if image["id"] not in crowded else []
    return records


def _read_categories(content: Mapping, categories: Sequence[str]) -> set:
    """Ids of the categories to be read."""
    names = {item["id"]: str(item.get("name", item["id"])) for item in content.get("categories", [])}
    found = Counter(item.get("category_id") for item in content["annotations"])
    known = {names.get(id, str(id)) for id in (*names, *found)}
    if known and (unknown := set(categories) - known):
        raise UserError(f"categories: found {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(known))}")
    if categories:
        return {id for id in found if names.get(id, str(id)) in categories}
    if len(found) > 1:
        listed = ", ".join(f"{names.get(id, id)} ({count})" for id, count in found.items())
        raise UserError(f"found the categories {listed}, expected one; choose with --categories")
    return set(found)
