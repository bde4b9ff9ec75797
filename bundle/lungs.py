"""Body and lungs of an axial slice, by thresholds and connected components; nothing is learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import ndimage

# HU. Lung and air lie below the first. A part whose median lies below the second is air (-1000; lung has -900 to -500, in
# severe emphysema -950). At the border of the picture the third holds, since the foam of a table has -940.
TISSUE, AIR, AIR_AT_BORDER = -400, -950, -900
WALL = 2  # mm, radius: what is thinner than twice this (bronchi, vessels, the shell of a table) separates nothing
# mm2: the smallest part of a lung, the largest hole that is filled, and what makes a slice count as lung-bearing.
SMALLEST_PART, LARGEST_HOLE, BEARING_AREA = 200, 1000, 2000


def body_region(image: torch.Tensor) -> torch.Tensor:
    """Find the body in a slice (1, rows, columns), lungs included, so that tables and air can be cropped away.

    Air around the body is what is dark (Otsu's threshold) and holds a corner of the slice: lungs that are cut by the edge of
    a picture do not. The body is the largest component of the rest, or all if that is below 5 % of the slice. Made as
    `select_fn` of MONAI's CropForegroundd, after the intensities were scaled.
    """
    pixels = np.asarray(image[0], dtype=np.float32)
    dark, _ = ndimage.label(pixels <= otsu_threshold(pixels))
    corners = dark[[0, 0, -1, -1], [0, -1, 0, -1]]
    rest = ~_parts(dark, corners[corners > 0])
    opened = _spread(_spread(np.pad(rest, 2, mode="edge"), (2, 2), np.logical_and), (2, 2), np.logical_or)
    region = _largest(opened[2:-2, 2:-2])
    if region.mean() < 0.05:
        region[:] = True
    return torch.as_tensor(region)[None]


def lung_surroundings(image: torch.Tensor) -> torch.Tensor:
    """Find a square around both lungs in a slice (1, rows, columns), so that a chest has one size whatever else is shown.

    It holds the lungs of `lung_region` inside the body, and their mirror image in the middle of the body, because a lung that
    is opaque is not found; 6 % of its side are added on each side. It is at least half as wide or high as the body, is cut at
    the body, and is all of the body where less than 3 % of that is lung. Made as `body_region`; the search is done on a copy
    of about 256 pixels.
    """
    step = max(1, round(max(image.shape) / 256))
    pixels = np.asarray(image, dtype=np.float32)[:, ::step, ::step]
    body = body_region(pixels)[0].numpy()
    lung = lung_region(pixels[0]) & body
    outer = inner = _hull(body)
    height, width = (high - low for low, high in outer)
    if lung.sum() >= 0.03 * height * width:
        rows, (left, right) = _hull(lung)
        mirror = sum(outer[1]) - right, sum(outer[1]) - left
        inner = rows, (min(left, mirror[0]), max(right, mirror[1]))
    side = max(1.12 * max(high - low for low, high in inner), 0.5 * max(height, width))
    region = torch.zeros(image.shape, dtype=torch.bool)
    (top, bottom), (left, right) = (
        (step * round(max((low + high - side) / 2, start)), step * round(min((low + high + side) / 2, end)))
        for (low, high), (start, end) in zip(inner, outer)
    )
    region[:, top:bottom, left:right] = True
    return region


# What `cropping` may say, as select_fn of MONAI's CropForegroundd.
CROPS = {"body": body_region, "lungs": lung_surroundings}


def _hull(mask: np.ndarray) -> list[tuple[int, int]]:
    """First row and the one after the last, and so for columns, of a mask that is not empty."""
    places = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return [(int(found[0]), int(found[-1]) + 1) for found in places]


def lung_region(image: np.ndarray) -> np.ndarray:
    """Find the lungs in a slice (rows, columns) in any grey scale: the dark parts inside the body, with what lies in them.

    The body is the largest bright component (Otsu's threshold), filled. Dark parts in it, or cut by the edge of a picture that
    was cropped to the lungs, are lung if they have 0.5 % of the picture; a part that holds a corner of the picture is air.
    They are closed by a disc with a radius of 3 % of the side and filled. Lesions at the wall of the chest may be missed;
    bowel gas and the trachea are included. Rows and columns of zeros around the picture are ignored.
    """
    region = np.zeros(image.shape, bool)
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    if not len(rows):
        return region
    crop = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    bright = image[crop] > otsu_threshold(image[crop])
    body = _fill(_largest(bright))
    labels, _ = ndimage.label(~bright)
    edge = np.concatenate([labels[0], labels[:, 0], labels[:, -1]])  # not the lower one, where the table lies
    dark = _parts(labels, edge) | (body & _parts(labels, labels[body]))
    dark &= (labels > 0) & ~_parts(labels, labels[[0, 0, -1, -1], [0, -1, 0, -1]])
    side = max(image.shape)
    parts, _ = ndimage.label(dark)
    kept = (np.bincount(parts.ravel()) >= int(0.005 * side**2))[parts] & dark
    region[crop] = _fill(_close(kept, [round(0.03 * side)] * 2)) & (body | dark)
    return region


def lung_mask(hu: np.ndarray, spacing: Sequence[float], longest: int | None = None) -> np.ndarray:
    """Find the lung in an axial slice in Hounsfield units, (rows, columns); spacing of rows and columns in mm.

    Pixels below -400 HU, closed by 2 mm, are split into components. One is air if the median of its pixels below -400 HU is
    below -950 HU, or -900 HU at the border, which the foam of a table does not reach but lung in a cropped volume does; one
    below 2 cm2 is removed. The shell of a table is thin enough to be closed, so that its foam belongs to the air around it.
    Holes up to 10 cm2 (vessels, nodules) are filled. Padding (-2000, -3024) is air. Wrongly counted as lung: a trachea behind
    a thin wall, and bowel gas mixed with faeces. Larger slices are averaged to about `longest` pixels along the longer side.
    """
    if longest and (step := min(round(max(hu.shape) / longest), *hu.shape)) > 1:
        rows, columns = (size // step for size in hu.shape)
        small = hu[: rows * step, : columns * step].reshape(rows, step, columns, step).mean((1, 3))
        found = lung_mask(small, [side * step for side in spacing]).repeat(step, 0).repeat(step, 1)
        return np.pad(found, [(0, size % step) for size in hu.shape], mode="edge")
    hu, pixel = np.clip(hu, -1024, 0).astype(np.int16), spacing[0] * spacing[1]
    light = hu < TISSUE
    parts, _ = ndimage.label(_close(light, [max(1, round(WALL / side)) for side in spacing]))
    measured = np.where(light, parts, 0)
    large = 1 + np.flatnonzero(np.bincount(measured.ravel())[1:] * pixel >= SMALLEST_PART)
    medians = np.array([np.median(hu[measured == part]) for part in large])
    lung = _parts(parts, large[medians >= np.where(np.isin(large, _border(measured)), AIR_AT_BORDER, AIR)])
    return _fill(lung, LARGEST_HOLE / pixel)


def lung_bearing(areas: Sequence[float]) -> list[bool]:
    """Tell for each slice, by the area of its lung in mm2, whether it shows enough lung to speak of: 20 cm2."""
    return [area >= BEARING_AREA for area in areas]


def otsu_threshold(values: np.ndarray, bins: int = 128) -> float:
    """Threshold that separates values best into two groups (Otsu, IEEE Trans. SMC 1979): the least within-group variance."""
    counts, edges = np.histogram(values, bins)
    centres = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts)[:-1], np.cumsum(counts[::-1])[::-1][1:]
    sums = np.cumsum(counts * centres)
    means = sums[:-1] / np.maximum(below, 1), (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    return float(edges[1:-1][np.argmax(below * 1.0 * above * (means[0] - means[1]) ** 2.0)])


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected part of a mask; nothing if it is empty."""
    labels, count = ndimage.label(mask)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if count else np.zeros(mask.shape, bool)


def _parts(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Pixels of the chosen parts: np.isin by a table, ten times faster."""
    table = np.zeros(labels.max() + 1, bool)
    table[chosen] = True
    return table[labels]


def _border(labels: np.ndarray) -> np.ndarray:
    return np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])


def _fill(mask: np.ndarray, limit: float = np.inf) -> np.ndarray:
    """Fill the holes of a mask that have fewer than `limit` pixels."""
    holes, _ = ndimage.label(~mask)
    filled = np.bincount(holes.ravel()) < limit
    filled[_border(holes)] = False
    filled[0] = True  # the mask itself
    return filled[holes]


def _spread(mask: np.ndarray, radii: Sequence[int], join: Callable) -> np.ndarray:
    """Dilate (`join` or) or erode (and) by an ellipse of such radii in pixels; around the picture lies nothing."""
    (rows, columns), (height, width) = radii, mask.shape
    padded = np.pad(mask, [(radius, radius) for radius in radii])
    line, reach, joined = padded[:, columns : columns + width], 0, None
    for down in range(rows, -1, -1):  # lines of the ellipse, the outermost and shortest first
        while (down / (rows + 0.5)) ** 2 + ((reach + 1) / (columns + 0.5)) ** 2 < 1:
            reach += 1
            left, right = (padded[:, start : start + width] for start in (columns - reach, columns + reach))
            line = join(line, join(left, right))
        for start in (rows - down, rows + down):
            part = line[start : start + height]
            joined = part if joined is None else join(joined, part)
    return joined


def _close(mask: np.ndarray, radii: Sequence[int]) -> np.ndarray:
    """Close a mask by an ellipse of such radii in pixels, with nothing around the picture."""
    padded = np.pad(mask, [(2 * radius, 2 * radius) for radius in radii])
    closed = _spread(_spread(padded, radii, np.logical_or), radii, np.logical_and)
    return closed[tuple(slice(2 * radius, -2 * radius) for radius in radii)]
