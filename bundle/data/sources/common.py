"""What the layouts share: the rows of tables, the labels of masks, and lesions as the connected parts of a mask."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from bundle.data.labels import labels_of
from bundle.data.transforms import LoadSlice
from bundle.errors import UserError

# What a layout yields: a record of absolute paths, whose class is a name. It may hold a split, the size (columns, rows) that
# its boxes are meant for, annotations that it implies for other tasks, and a complaint instead of what cannot be read.
Records = Iterator[dict]
SPLIT, SIZE, IMPLIED, COMPLAINT = "split", "size", "implied", "complaint"
SPLIT_NAMES = {"train": "training", "val": "validation", "valid": "validation", "test": "test"}
SPLIT_NAMES |= {"training": "training", "validation": "validation"}
csv.field_size_limit(2**31 - 1)  # a cell may be long
ABSENT = ("na", "n/a", "#n/a", "<na>", "nan", "none", "null")  # what programs write into an empty cell
# Connected parts of a mask below this many pixels are dust of the annotation, not lesions to be found.
MIN_LESION_PIXELS = 20


def read_rows(path: Path, required: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """("file: line n", row) for the rows of a table; a row of too few or too many cells has a `COMPLAINT`.

    Names of columns are in lower case, with _ between words; of `required`, each is "name" or "name or other". Empty rows,
    columns without a name, comments, repetitions of the header and Excel's line "sep=;" are skipped.
    """
    text = _read_text(path)
    headers = {separator: _names(next((cells for _, cells in _lines(text, separator)), [])) for separator in ",;\t"}
    missing = {s: [name for name in required if not {*name.split(" or ")} & {*headers[s]}] for s in headers}
    separator = min(headers, key=lambda s: (len(missing[s]), -len(headers[s])))
    columns = headers[separator]
    if missing[separator]:
        found, expected = ", ".join(map(repr, columns)) or "none", ", ".join(missing[separator])
        raise UserError(f"{path}: found the columns {found}, expected {expected}, separated by commas, semicolons or tabs")
    if twice := [name for name, count in Counter(filter(None, columns)).items() if count > 1]:
        raise UserError(f"{path}: found the column {twice[0]!r} twice, expected each once")
    rows = []
    for number, cells in _lines(text, separator):
        if _names(cells) == columns:
            continue
        row, count = dict(zip(columns, cells)), max(len(_filled(cells)), min(len(cells), len(columns)))
        if count != len(columns):
            expected = f"{len(columns)} cells separated by {separator!r}; quote a cell that holds one"
            row = dict.fromkeys(columns, "") | {COMPLAINT: f"{path}: line {number}: found {count} cells, expected {expected}"}
        row.pop("", None)
        rows.append((f"{path}: line {number}", row))
    if not rows:
        raise UserError(f"{path}: found no row below the header, expected one or more")
    return rows


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a table")
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
        if "\0" in text:
            raise ValueError("zero bytes, as in UTF-16")
        if text.count('"') % 2:
            raise ValueError("a quote is not closed")
    except ValueError as error:
        found = "a workbook of Excel" if content.startswith(b"PK") else error
        raise UserError(f"{path}: cannot be read ({found}), expected a comma-separated table; save it as CSV UTF-8") from None
    return text


def _lines(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of the lines that hold more than a comment."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    for cells in reader:
        cells = ["" if cell.strip().lower() in ABSENT else cell.strip() for cell in cells]
        if (filled := _filled(cells)) and not (len(filled) == 1 and filled[0].startswith(("#", "sep="))):
            yield reader.line_num, cells


def _filled(cells: list[str]) -> list[str]:
    """The cells without empty ones at the end, as spreadsheets have them."""
    return cells[: max((index + 1 for index, cell in enumerate(cells) if cell), default=0)]


def _names(cells: list[str]) -> list[str]:
    return [re.sub(r"[\s-]+", "_", cell.lower()) for cell in _filled(cells)]


def read_labels(path: Path) -> np.ndarray:
    """`labels_of` the mask in a file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a mask")
    return labels_of(LoadSlice()(path, labels=True))


def write_picture(pixels: np.ndarray, path: Path) -> str:
    """Write uint8 (rows, columns) as a PNG, making its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


def lesions(labels: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Connected parts, of one label (rows, columns) each, of at least `MIN_LESION_PIXELS`, eight neighbours touching.

    Returns uint8 (rows, columns) with n + 1 on the part of boxes[n], and the boxes [x1, y1, x2, y2] in pixels, x = column.
    """
    instances, boxes, found = np.zeros(labels.shape, np.uint8), [], []
    for label in np.unique(labels[labels > 0]):
        parts, _ = ndimage.label(labels == label, structure=np.ones((3, 3)))
        for index, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
            part = parts[rows, columns] == index
            found.append((rows.start, columns.start + int(part[0].argmax()), rows, columns, part))
    for *_, rows, columns, part in sorted(found, key=lambda one: one[:2]):  # in the order of their first pixels
        if part.sum() >= MIN_LESION_PIXELS:
            boxes.append([columns.start, rows.start, columns.stop, rows.stop])
            instances[rows, columns][part] = len(boxes)
    return instances, boxes
