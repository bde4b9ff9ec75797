"""What the layouts share: the rows of tables, pictures, and lesions as the connected parts of a mask."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from bundle.errors import UserError

# What a layout yields: the split, or None where it knows none, and a record of absolute paths, whose class is a name.
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


def read_rows(path: Path, required: tuple[str, ...]) -> list[tuple[str, dict]]:
    """("file: line n", row) for the rows of a CSV file that has at least the required columns.

    Raises:
        UserError: if there is no such file.
        UserError: in one line, if it is no UTF-8 table, lacks a column, or has a row of more or fewer cells than columns.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a table with the columns {', '.join(required)}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [(f"{path}: line {reader.line_num}", row) for row in reader]
            columns = reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected a comma-separated table in UTF-8") from None
    if not set(required) <= set(columns):
        raise UserError(
            f"{path}: found the columns {', '.join(columns) or 'none'}, expected {', '.join(required)}, separated by commas"
        )
    for place, row in rows:
        cells = sum(isinstance(cell, str) for cell in row.values()) + len(row.get(None, ()))
        if cells != len(columns):
            raise UserError(f"{place}: found {cells} cells, expected {len(columns)}; quote a cell that holds commas")
    return rows


def look_up(names: dict, row: dict, column: str, place: str):
    """`names[row[column]]`.

    Raises:
        UserError: in one line, if the cell is not one of the names.
    """
    if row[column] not in names:
        raise UserError(f"{place}: {column}: found {row[column]!r}, expected one of {', '.join(names)}")
    return names[row[column]]


def pictures(folder: Path) -> list[Path]:
    """PNG and JPEG files of a folder, by name.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected one of pictures")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))


def read_grey(path: Path) -> np.ndarray:
    """uint8 (rows, columns) of a picture.

    Raises:
        UserError: if there is no such file.
        UserError: if it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a picture")
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def write_picture(pixels: np.ndarray, path: Path) -> str:
    """Write uint8 (rows, columns) as a PNG, making its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


def lesions(mask: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """Connected parts of a mask (rows, columns) of at least `MIN_LESION_PIXELS`, eight neighbours touching.

    Returns:
        uint8 (rows, columns) with n + 1 on the part of boxes[n], and the boxes [x1, y1, x2, y2] in pixels, x = column.
    """
    parts, _ = ndimage.label(mask > 0, structure=np.ones((3, 3)))
    instances, boxes = np.zeros(mask.shape, np.uint8), []
    for index, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
        part = parts[rows, columns] == index
        if part.sum() >= MIN_LESION_PIXELS:
            boxes.append([columns.start, rows.start, columns.stop, rows.stop])
            instances[rows, columns][part] = len(boxes)
    return instances, boxes
