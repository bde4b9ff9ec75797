"""What the layouts share: the rows of tables, pictures, and lesions as the connected parts of a mask."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from bundle.data.datalist import GREY_MODES
from bundle.errors import UserError

# What a layout yields: the split, or None where it knows none, and a record of absolute paths, whose class is a name. It may
# hold the size (columns, rows) that its boxes are meant for, and a complaint instead of what cannot be read.
Records = Iterator[tuple[str | None, dict]]
SIZE, COMPLAINT = "size", "complaint"
SPLIT_NAMES = {"train": "training", "val": "validation", "valid": "validation", "test": "test"}
SPLIT_NAMES |= {"training": "training", "validation": "validation"}
# Connected parts of a mask below this many pixels are dust of the annotation, not lesions to be found.
MIN_LESION_PIXELS = 20


def read_rows(path: Path, required: tuple[str, ...] = ()) -> list[tuple[str, dict[str, str]]]:
    """("file: line n", row) for the rows of a table that has at least the required columns.

    Cells may be separated by commas, semicolons or tabs. Empty rows, empty columns without a name, repetitions of the header
    and Excel's line "sep=;" are skipped, as spreadsheets and joined files have them.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a table with the columns {', '.join(required)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        lines = [(f"{path}: line {reader.line_num}", [cell.strip() for cell in cells]) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected a comma-separated table in UTF-8") from None
    if lines and lines[0][1][:1] == ["sep="]:
        lines = lines[1:]
    columns = _without_empty_end(lines[0][1]) if lines else []
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise UserError(f"{path}: found the column {twice[0]!r} twice, expected each once")
    if not columns or not set(required) <= set(columns):
        expected = f"expected {', '.join(required) or 'a header'}, separated by commas"
        raise UserError(f"{path}: found the columns {', '.join(columns) or 'none'}, {expected}")
    rows = []
    for place, cells in lines[1:]:
        cells = cells[: len(columns)] + _without_empty_end(cells[len(columns) :])
        if not any(cells) or cells == columns:
            continue
        if len(cells) != len(columns):
            expected = f"{len(columns)} cells separated by {separator!r}; quote a cell that holds one"
            raise UserError(f"{place}: found {len(cells)} cells, expected {expected}")
        rows.append((place, dict(zip(columns, cells))))
    return rows


def _without_empty_end(cells: list[str]) -> list[str]:
    return cells[: max((index + 1 for index, cell in enumerate(cells) if cell), default=0)]


def look_up(names: dict, row: dict, column: str, place: str):
    """`names[row[column]]`; a UserError names the choices if the cell is none of them."""
    if row[column] not in names:
        raise UserError(f"{place}: {column}: found {row[column]!r}, expected one of {', '.join(names)}")
    return names[row[column]]


def pictures(folder: Path) -> list[Path]:
    """PNG and JPEG files of a folder, by name."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected one of pictures")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))


def read_grey(path: Path) -> np.ndarray:
    """uint8 (rows, columns) of a picture; a UserError if it cannot be read."""
    with _opened(path) as picture:
        return np.asarray(picture.convert("L"))


def read_labels(path: Path) -> tuple[np.ndarray, bool]:
    """Labels (rows, columns) of a mask's picture, and whether they are other than the grey values that a viewer shows.

    A palette's index is the label unless its first colour is brighter than another one that is used. Of colours the strongest
    channel is the label; where the colour is the same everywhere, the lesion is what is not transparent. JPEG smears
    labels: what is brighter than half is 1.

    Raises:
        UserError: if there is no such file, it cannot be read, or all its corners are marked, as in an inverted mask.
    """
    with _opened(path) as picture:
        labels, lossy, grey = np.asarray(picture), picture.format == "JPEG", picture.mode in GREY_MODES
        rgba = None if grey else np.asarray(picture.convert("RGBA"))
        by_index = picture.mode == "P" and _background_first(labels, rgba)
    if not grey and not by_index:
        colour, opaque = rgba[..., :3].max(-1), rgba[..., 3] > 0
        by_alpha = np.ptp(colour) == 0 and opaque.any() and not opaque.all()
        labels = (opaque if by_alpha else colour * opaque).astype(np.uint8)
    labels = labels > 127 if lossy else labels
    if labels[[0, 0, -1, -1], [0, -1, 0, -1]].all():
        raise UserError(f"{path}: found a mask that marks all corners, expected 0 outside of lesions; invert it")
    return labels, lossy or not grey


def _background_first(indices: np.ndarray, rgba: np.ndarray) -> bool:
    """Whether the first colour of a palette without transparency is not brighter than another one that is used."""
    bright, background = rgba[..., :3].max(-1), indices == 0
    inverted = background.any() and not background.all() and bright[background].max() > bright[~background].min()
    return not inverted and bool((rgba[..., 3] > 0).all())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a picture")
    try:
        with open(path, "rb") as file, Image.open(file) as picture:  # see PictureScan
            yield picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow raises each for damaged files
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
