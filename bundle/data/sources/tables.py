"""Tables: one layout for every labels.csv or CSV file, whose columns are named after what they hold; and COCO JSON.

A public data set is recognised by columns that no other table has together, so its folder may have any name.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bundle.data.datalist import read_json
from bundle.data.sources.common import COMPLAINT, IMPLIED, MIN_LESION_PIXELS, SIZE, SPLIT, SPLIT_NAMES, Records
from bundle.data.sources.common import lesions, read_labels, read_rows, write_picture
from bundle.data.transforms import LoadSlice, move_boxes
from bundle.data.volumes import PICTURES
from bundle.errors import UserError
from bundle.names import BOXES, CLASS, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK, SOURCE

logger = logging.getLogger(__name__)
OBJECTS = "objects"  # a column that is no field of a record
# Column of docs/data.md -> names that it may have, in any case; of several, the first that a row fills counts.
COLUMNS = {field: (field,) for field in (MASK, OBJECTS, INSTANCES, SPLIT, SOURCE)}
COLUMNS |= {IMAGE: ("image", "file", "filename", "path"), CLASS: ("class", "label"), BOXES: ("boxes", "boxes_xyxy")}
COLUMNS[GROUP] = ("group", "patient_id", "group_id", "patient", "patientid", "subject", "subject_id")
# Columns of other tables of boxes, which would leave slices without an annotation if they were not read.
FOREIGN = ("bbox", "bboxes", "box", "x", "x1", "xmin", "x_min", "x_center", "left")
COVID, OTHER, CANCER = "COVID-19", "other", "lung cancer"
# Share of the lung or image below which a lesion is too small for its slice to stand for COVID-19.
SMALL_LESION = 0.005
# What each kind of row implies. A slice with little lesion of a COVID-19 patient may as well be of somebody healthy; a tumour
# patient was scanned before COVID-19, and whether a slice shows the cancer is not known.
MEDSEG = {"": {CLASS: COVID, BOXES: []}}
VOLUMES = {"lesion": {BOXES: [], CLASS: COVID}, "": {BOXES: [], CLASS: [OTHER, COVID]}}
TUMOURS = {"": {MASK: EMPTY_MASK, CLASS: [OTHER, CANCER]}}
MOSMED = {OTHER: {MASK: EMPTY_MASK}}
IQOTH = {"normal": {MASK: EMPTY_MASK, BOXES: []}, "benign": {MASK: EMPTY_MASK}}


class Known(NamedTuple):
    """A public data set."""

    source: str  # the name that its records carry
    mark: str  # columns that only its table has together
    fields: Callable[[Mapping], dict] = lambda row: {}  # row -> columns of docs/data.md that it has under other names
    implied: Mapping[str, dict] = {}  # kind of a row -> fields that its annotations imply for other tasks
    kind: Callable[[Mapping], str] = lambda row: row.get("label", "")
    unused: str = ""  # why it is left out, if it is


def _medseg_official(row: Mapping) -> dict:
    """Inf-Net's split: every slice is a group, and the validation slices of the other split stay so."""
    split = "val" if (row["official_split"], row[SPLIT]) == ("train", "val") else row["official_split"]
    return {MASK: row["mask_multiclass"], SPLIT: split, GROUP: Path(row["file"]).stem}


def _patient_of_volume(row: Mapping) -> dict:
    """The two tables of the volumes name patients differently. Volumes may be of one: radiopaedia_10_85902_1 and _3."""
    return {GROUP: "_".join(row["volume"].split("_")[:2])}


def _lesion_size(row: Mapping) -> str:
    return "lesion" if float(row["lesion_frac"]) > SMALL_LESION else ""


KNOWN = (
    Known("covid_ct", "coloured_mark"),
    Known("iqoth_nccd", "label group_id orig_file", implied=IQOTH),
    Known("medseg_covid19", "mask_multiclass official_split", lambda row: {MASK: row["mask_multiclass"]}, MEDSEG),
    Known("lung_tumor_slices", "mask tumour_px", lambda row: {OBJECTS: row[MASK] or EMPTY_MASK, MASK: ""}, TUMOURS),
    Known("luna16_nodules", "max_diameter_mm crop_kind", implied=TUMOURS),
    Known("mosmed_slices", "label severity source_file", implied=MOSMED),
    Known("sars_cov2_ct", "label block orig_file", lambda row: {GROUP: row["block"]}),
    Known("covid_volumes", "volume lesion_frac label_source", _patient_of_volume, VOLUMES, _lesion_size),
    Known("covid_volumes", "volume orig_file", _patient_of_volume),
    Known("lung_pet_ct_dx", "sop_uid series_uid n_boxes", unused="a DICOM series, for inference only"),
)
OFFICIAL = Known("medseg_covid19", "official_split", _medseg_official, MEDSEG)


def table(path: Path, export: Path, known: Known | None = None) -> Records:
    """Records of a CSV file, or of the labels.csv of a folder; the public data set that it is shows by its columns."""
    path = path / "labels.csv" if path.is_dir() else path
    rows = read_rows(path, (" or ".join(COLUMNS[IMAGE]),))
    columns = rows[0][1].keys() - {COMPLAINT}
    known = known or next((known for known in KNOWN if {*known.mark.split()} <= columns), None)
    if known and known.unused:
        raise UserError(f"{path}: {known.unused}")
    unread = columns - {"width", "height"} - {name for names in COLUMNS.values() for name in names}
    if foreign := [name for name in FOREIGN if name in unread and not known]:
        expected = f"one column {BOXES} with all boxes of an image, [[x1, y1, x2, y2], …] in pixels"
        raise UserError(f"{path}: found the column {foreign[0]!r}, expected {expected}")
    if unread and not known:
        logger.info(f"{path}: columns that are not read: {', '.join(sorted(unread))}")
    dust = 0  # slices
    for number, (place, row) in enumerate(rows):
        image = next(filter(None, map(row.get, COLUMNS[IMAGE])), place)
        try:
            record = _record(row, known, place, path.parent, export, f"{number:05d}_{Path(image).stem}.png")
        except UserError as error:  # of one row, which stops no data set
            record = {IMAGE: image, COMPLAINT: str(error)}
        dust += OBJECTS in record
        if OBJECTS not in record:
            yield record
    if dust:
        logger.info(f"{path.parent}: {dust} slices left out whose tumour has no part of {MIN_LESION_PIXELS} pixels")


def _record(row: Mapping, known: Known | None, place: str, folder: Path, export: Path, name: str) -> dict:
    """Record of a row, with OBJECTS where its mask of objects is nothing but dust; `name` is that of its export."""
    if COMPLAINT in row:
        raise UserError(row[COMPLAINT])
    try:
        row = row | (known.fields(row) if known else {})
        record = {IMPLIED: dict(known.implied.get(known.kind(row), {}))} if known else {}
    except (ValueError, KeyError) as error:
        raise UserError(f"{place}: found {type(error).__name__} {error}, expected the table of {known.source}") from None
    cells = {field: next(filter(None, map(row.get, names)), "") for field, names in COLUMNS.items()}
    files = {field: folder / cells[field].replace("\\", "/") for field in (IMAGE, MASK, OBJECTS, INSTANCES)}
    if not cells[IMAGE]:
        raise UserError(f"{place}: {IMAGE}: found an empty cell, expected the path of an image")
    if cells[SPLIT] and cells[SPLIT].lower() not in SPLIT_NAMES:
        raise UserError(f"{place}: {SPLIT}: found {cells[SPLIT]!r}, expected one of {', '.join(SPLIT_NAMES)}")
    group = re.sub(r"^(\d+)\.0$", r"\1", cells[GROUP])  # pandas writes numbers so in a column that has an empty cell
    group = group or os.path.normpath(cells[IMAGE].replace("\\", "/"))
    record |= {IMAGE: str(files[IMAGE]), GROUP: group, SPLIT: SPLIT_NAMES.get(cells[SPLIT].lower())}
    if cells[CLASS]:
        record[CLASS] = _class(cells[CLASS])
    if source := known.source if known else cells[SOURCE]:
        record[SOURCE] = source
    if cells[MASK]:
        marked = cells[MASK].lower() != EMPTY_MASK and read_labels(files[MASK]).any()
        record[MASK] = str(files[MASK]) if marked else EMPTY_MASK
    if cells[BOXES]:
        if (boxes := _value(cells[BOXES])) is None:
            expected = "[[x1, y1, x2, y2], …] with decimal points, or []"
            raise UserError(f"{place}: {BOXES}: found {cells[BOXES]!r}, expected {expected}")
        record[BOXES] = boxes
        sizes = [_value(row.get(side, "")) for side in ("width", "height")]
        if all(isinstance(size, (int, float)) for size in sizes):
            record[SIZE] = tuple(map(int, sizes))
    if cells[INSTANCES]:
        record[INSTANCES] = str(files[INSTANCES])
    if cells[OBJECTS]:
        record[BOXES] = []
    if cells[OBJECTS] and cells[OBJECTS].lower() != EMPTY_MASK and (labels := read_labels(files[OBJECTS])).any():
        instances, boxes = lesions(labels)
        if not boxes:
            return record | {OBJECTS: "dust"}
        record |= {BOXES: _stored(boxes, files[IMAGE]), INSTANCES: write_picture(instances, export / "instances" / name)}
    return record


def _value(cell: str):
    """What a cell says in JSON or in Python, whose tuples become lists; None if it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = json.loads(json.dumps(read(cell)))
            return _value(value) if isinstance(value, str) else value
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _class(cell: str) -> int | str | list:
    """Number, name, or list of them, of a class; a whole number may have a decimal point or comma, as in spreadsheets."""
    if cell.startswith(("[", "(")):
        return _value(cell) or cell
    return int(number[1]) if (number := re.fullmatch(r"([+-]?\d+)([.,]0*)?", cell)) else cell


def _stored(boxes: list, image: Path) -> list:
    """Boxes in LPS on the grid that the file of the image stores."""
    if image.suffix.lower() in PICTURES:
        return boxes
    return move_boxes(torch.tensor(boxes, dtype=torch.float64), LoadSlice()(image).affine).round().int().tolist()


def coco(folder: Path, export: Path, categories: Sequence[str] = ()) -> Records:
    """COCO JSON, annotations_{train,val,test}.json: `bbox` [x, y, width, height]; `patient_id` of an image is its group.

    `categories` names those to be read; without it there may be only one.
    """
    contents, chosen, found = {}, {}, Counter()
    for path in sorted(folder.glob("annotations_*.json")):
        try:
            contents[path] = content = _coco_content(path)
            names = {item["id"]: str(item.get("name", item["id"])) for item in content.get("categories") or ()}
            used = [names.get(item.get("category_id"), str(item.get("category_id"))) for item in content["annotations"]]
        except (TypeError, KeyError, AttributeError) as error:
            expected = "expected COCO's images (id, file_name), annotations (image_id, bbox) and categories (id, name)"
            raise UserError(f"{path}: found {type(error).__name__} {error}, {expected}") from None
        chosen[path] = [item for item, name in zip(content["annotations"], used) if not categories or name in categories]
        found.update({**dict.fromkeys(names.values(), 0), **Counter(used)})
    if unknown := found and ", ".join(sorted({*categories} - {*found})):
        raise UserError(f"{folder}: categories: found {unknown}, expected some of {', '.join(sorted(found))}")
    if not categories and len(+found) > 1:
        listed = ", ".join(f"{name} ({count})" for name, count in (+found).items())
        raise UserError(f"{folder}: found the categories {listed}, expected one; choose with --categories")
    for path, content in contents.items():
        if others := len(content["annotations"]) - len(chosen[path]):
            logger.info(f"{path}: {others} annotations of other categories left out")
        for record in _coco_records(path, content["images"], chosen[path]):
            yield record | {SPLIT: SPLIT_NAMES[path.stem.removeprefix("annotations_")]}


def _coco_content(path: Path) -> dict:
    if path.stem.removeprefix("annotations_") not in SPLIT_NAMES:
        raise UserError(f"{path}: found an unknown split, expected annotations_train.json, _val.json or _test.json")
    content = read_json(path, "COCO's")
    is_mapping = isinstance(content, Mapping)
    images, annotations = [content.get(key) if is_mapping else None for key in ("images", "annotations")]
    lists = isinstance(images, list) and isinstance(annotations, list)
    if not lists or not all(isinstance(item, Mapping) for item in images + annotations):
        found = f"the keys {', '.join(content)}" if is_mapping else type(content).__name__
        raise UserError(f"{path}: found {found}, expected COCO's lists images and annotations (empty, where nothing is there)")
    if nameless := [image for image in images if "id" not in image or not isinstance(image.get("file_name"), str)]:
        raise UserError(f"{path}: found the image {nameless[0]}, expected an id and a file_name")
    ids = Counter(image["id"] for image in images)
    if twice := [id for id, count in ids.items() if count > 1]:
        raise UserError(f"{path}: found the image id {twice[0]!r} twice, expected each once")
    if strays := [item.get("image_id") for item in annotations if item.get("image_id") not in ids]:
        raise UserError(f"{path}: found an annotation of image_id {strays[0]!r}, expected the id of an image")
    return content


def _coco_records(path: Path, images: Sequence[Mapping], annotations: Sequence[Mapping]) -> Iterator[dict]:
    boxes = {image["id"]: [] for image in images}
    crowded = {item["image_id"] for item in annotations if item.get("iscrowd") not in (None, 0, "0")}
    for annotation in annotations:
        try:
            x, y, width, height = map(float, annotation.get("bbox"))
            box = [x, y, x + width, y + height]
        except (TypeError, ValueError):
            box = annotation.get("bbox")  # the check of its slice names it
        boxes[annotation["image_id"]].append(box)
    if crowded:
        logger.info(f"{path}: {len(crowded)} slices left out whose objects are marked as a crowd (iscrowd)")
    for image in (image for image in images if image["id"] not in crowded):
        name, patient = image["file_name"], image.get("patient_id")
        record = {IMAGE: str(path.parent / name.replace("\\", "/")), BOXES: boxes[image["id"]]}
        size = [str(image.get(side) or "") for side in ("width", "height")]
        record |= {SIZE: tuple(map(int, size))} if all(map(str.isdigit, size)) else {}
        yield {**record, GROUP: str(name if patient in (None, "") else patient)}
