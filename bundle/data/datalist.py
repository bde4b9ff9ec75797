"""The datalist: one JSON file of partially labelled records: read, validate, select. docs/data.md describes it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from bundle.data.volumes import open_slice
from bundle.errors import UserError
from bundle.names import ANNOTATION, BOXES, CLASS, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK, RECONSTRUCTION, SOURCE

SPLITS = ("training", "validation", "test")
LEFT_OUT = "left_out"
FIELDS = (IMAGE, CLASS, MASK, BOXES, INSTANCES, GROUP, SOURCE)


def load_datalist(path, dataset_dir=None, classes: Sequence[str] | None = None, tasks: Sequence = ()) -> dict:
    """Read and validate a datalist; a UserError names the first thing that is wrong.

    Args:
        dataset_dir: folder of the files; if given, they must be there, and boxes, masks and instances fit the image.
        classes: names that the configuration expects, in its order.
        tasks: `bundle.tasks.Task` whose fields are checked beside those of `FIELDS`.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such datalist; make one with scripts/prepare_data.py, or set datalist")
    datalist = read_json(path, "a datalist")
    try:
        validate(datalist, dataset_dir, tasks)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if classes is not None and list(classes) != (found := datalist["classes"]):
        raise UserError(f"{path}: classes: found {found}, expected {list(classes)} as in the config's classes")
    return datalist


def read_json(path, expected: str):
    try:
        return json.loads(Path(path).read_bytes())  # which finds out the encoding
    except ValueError as error:
        raise UserError(f"{path}: found no JSON ({error}), expected {expected}") from None


def validate(datalist: Mapping, dataset_dir=None, tasks: Sequence = ()) -> None:
    """Refuse a datalist that breaks the contract, in one line, with how many more complaints follow."""
    complaints = list(_complaints(datalist, dataset_dir, tasks))
    if complaints:
        more = f" (and {len(complaints) - 1} more complaints)" if len(complaints) > 1 else ""
        raise UserError(complaints[0] + more)


def _complaints(datalist, dataset_dir, tasks):
    classes = datalist.get("classes") if isinstance(datalist, Mapping) else None
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        yield f"classes: found {classes!r}, expected a list of class names beside the lists training, validation and test"
        return
    known = {*FIELDS, *datalist.get("fields", ())}
    for key, value in datalist.items():
        has_records = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
        if has_records if key not in SPLITS else not isinstance(value, list):
            yield f"{key}: found {type(value).__name__}, expected lists of records, and only under {', '.join(SPLITS)}"
            return
    if not any(datalist.get(split) for split in SPLITS):
        yield f"found no record, expected a non-empty list under {', '.join(SPLITS)}"
    place_of: dict[str, str] = {}
    split_of: dict[str, str] = {}
    for split in SPLITS:
        for index, record in enumerate(datalist.get(split, [])):
            place = f"{split}[{index}]"
            if not isinstance(record, Mapping):
                yield f"{place}: found {record!r}, expected a record with {IMAGE} and any of {', '.join(FIELDS[1:])}"
                continue
            image = record.get(IMAGE)
            name = f"{place} {image or ''}".strip()
            complaints = record_complaints(record, len(classes), dataset_dir, known=known)
            yield from (f"{name}: {complaint}" for complaint in complaints)
            for task in tasks:
                if task.field in record and task.field not in FIELDS:
                    yield from (f"{name}: {task.field}: {complaint}" for complaint in task.complaints(record[task.field]))
            if isinstance(image, str) and (first := place_of.setdefault(os.path.normpath(image), place)) != place:
                yield f"{name}: {IMAGE}: found in {first} as well, expected one record with all annotations of an image"
            group = record.get(GROUP, image)
            if isinstance(group, str) and (first := split_of.setdefault(group, split)) != split:
                expected = "expected it in one split only; keep all slices of a patient together"
                yield f"{name}: {GROUP}: found {group!r} in {split} and in {first}, {expected}"


def record_complaints(
    record: Mapping, num_classes: int, dataset_dir=None, headers: bool = False, known: Iterable[str] = FIELDS
) -> Iterator[str]:
    """What is wrong with a record, each thing as "field: found …, expected …"; see `load_datalist`.

    With `headers`, that of every file is read, otherwise of those that have to fit another.
    """
    for field in record.keys() - set(known):
        yield f"{field}: unknown field, expected one of {', '.join(FIELDS)}, or one that the datalist lists under `fields`"
    files = {}
    for field in (IMAGE, MASK, INSTANCES):
        if field not in record and field != IMAGE:
            continue
        value = record.get(field)
        if not isinstance(value, str) or not value:
            yield f"{field}: found {value!r}, expected a path relative to dataset_dir"
        elif dataset_dir is not None and (field, value) != (MASK, EMPTY_MASK):
            files[field] = Path(dataset_dir) / value
            if not files[field].is_file():
                hint = "; check dataset_dir" if dataset_dir else ""
                yield f"{field}: found no file {os.path.normpath(files.pop(field))}, expected it there{hint}"
    for field in (GROUP, SOURCE):
        if not isinstance(record.get(field, ""), str):
            yield f"{field}: found {record[field]!r}, expected text"
    label = record.get(CLASS, 0)  # or a list of at least two of which it is one, not known which
    labels = label if isinstance(label, list) and len(set(map(str, label))) == len(label) > 1 else [label]
    if not all(type(item) is int and 0 <= item < num_classes for item in labels):
        yield f"{CLASS}: found {label!r}, expected a whole number from 0 to {num_classes - 1}, or a list of those it may be"
    if INSTANCES in record and BOXES not in record:
        yield f"{INSTANCES}: found without boxes, expected one box for each instance"
    slices = {}
    if headers or len(files) > 1 or record.get(BOXES):  # headers are read only where something has to fit the image
        for field, path in files.items():
            try:
                slices[field] = open_slice(path)
            except ValueError as error:
                yield f"{field}: {error}"
    image = slices.get(IMAGE)
    for field in (MASK, INSTANCES):
        if image and field in slices and slices[field].size != image.size:
            yield f"{field}: found (columns, rows) = {slices[field].size}, expected {image.size} as the image has"
    yield from _box_complaints(record.get(BOXES, []), image and image.stored_size)


def _box_complaints(boxes, size: tuple[int, int] | None):
    if not isinstance(boxes, list):
        yield f"{BOXES}: found {boxes!r}, expected a list of [x1, y1, x2, y2]"
        return
    for box in boxes:
        if not isinstance(box, list):
            yield f"{BOXES}: found {boxes!r}, expected a list of boxes [[x1, y1, x2, y2], …]"
            return
        if not (len(box) == 4 and all(type(value) in (int, float) and math.isfinite(value) for value in box)):
            yield f"{BOXES}: found {box!r}, expected four finite numbers [x1, y1, x2, y2] with decimal points"
        elif max(map(abs, box)) < 2:
            expected = "pixels, not shares of the image; multiply x by its width and y by its height"
            yield f"{BOXES}: found {box}, expected {expected}"
        elif box[2] <= box[0] or box[3] <= box[1]:
            yield f"{BOXES}: found {box}, expected x1 < x2 and y1 < y2, not [x, y, width, height]"
        elif min(box) < 0 or size and (box[2] > size[0] or box[3] > size[1]):
            limits = f"0 to {size[0]} and y from 0 to {size[1]}" if size else "0 and y from 0"
            yield f"{BOXES}: found {box} outside the image, expected x from {limits}"


def annotated_tasks(record: Mapping) -> tuple[str, ...]:
    """Tasks that a record is annotated for; reconstruction always is."""
    return tuple(task for task, field in ANNOTATION.items() if field in record) + (RECONSTRUCTION,)


def select(
    datalist: Mapping, split: str, tasks: Iterable, dataset_dir="", leave_out: Sequence[str] = (), seen: Iterable[str] = ()
) -> list[dict]:
    """Records of a split that are annotated for at least one of the tasks, with paths joined to `dataset_dir`.

    `split` is one of `SPLITS`, or left_out for what `leave_out`, sources, takes away from training and validation; of these
    none may be `seen`: the weights were trained on them.
    """
    if split not in (*SPLITS, LEFT_OUT):
        raise UserError(f"split: found {split!r}, expected one of {', '.join((*SPLITS, LEFT_OUT))}")
    sources = {record.get(SOURCE) for name in SPLITS for record in datalist.get(name, [])} - {None}
    if unknown := set(leave_out) - sources:
        raise UserError(f"leave_out: found {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(sources))}")
    if split == LEFT_OUT and (known := set(leave_out) & set(seen)):
        raise UserError(f"leave_out: found {', '.join(sorted(known))}, expected sources that the weights were not trained on")
    if split == LEFT_OUT:
        found = [record for name in SPLITS[:2] for record in datalist.get(name, []) if record.get(SOURCE) in leave_out]
    else:
        found = [record for record in datalist.get(split, []) if split == "test" or record.get(SOURCE) not in leave_out]
    records = [dict(record) for record in found if any(task.is_annotated(record) for task in tasks)]
    if not records:
        names = ", ".join(task.name for task in tasks)
        raise UserError(f"split {split}: found no record annotated for {names}; name other tasks or add records")
    for record in records:
        for field in {IMAGE, MASK, INSTANCES} & record.keys():
            record[field] = EMPTY_MASK if record[field] == EMPTY_MASK else os.path.join(dataset_dir, record[field])
    return records


def take(records: Sequence[dict], count: int, seed: int, by: str = IMAGE) -> list[dict]:
    """Records of so many images or groups (patients), drawn at random; fewer lie within more of the same seed."""
    units = sorted({record.get(by, record[IMAGE]) for record in records})
    if not 1 <= count <= len(units):
        raise UserError(f"records: found {len(units)} values of {by}, expected {count}, at least 1; take fewer or add records")
    taken = set(np.random.default_rng(seed).permutation(units)[:count].tolist())
    return [record for record in records if record.get(by, record[IMAGE]) in taken]
