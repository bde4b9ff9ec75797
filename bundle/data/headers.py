"""The size of a slice from its file's header, without its pixels."""

from __future__ import annotations

from typing import NamedTuple

from bundle.data.volumes import open_scan
from bundle.errors import UserError


class SliceSize(NamedTuple):
    """(columns, rows) of a slice: `stored` on the grid of its file, as boxes are; `turned` to LPS, as it is read."""

    stored: tuple[int, int]
    turned: tuple[int, int]


def slice_size(path) -> SliceSize:
    """Size of the one axial slice in a file of any format that `bundle.data.volumes` reads.

    Raises:
        UserError: if the header cannot be read, or tells of more than one slice.
    """
    scan = open_scan(path)
    if len(scan) != 1:
        raise UserError(f"found {len(scan)} slices in {path}, expected a single one")
    (rows, _), (columns, _) = scan.turned
    stored = tuple(scan.shape[axis] for axis in range(3) if axis != scan.axis)
    return SliceSize(stored, (scan.shape[columns], scan.shape[rows]))
