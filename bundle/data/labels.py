"""Labels of masks and instances, wherever a program put them: of a datalist, of `chestct prepare` and of MONAI Label alike."""

from __future__ import annotations

import numpy as np
from monai.data import MetaTensor
from PIL import Image
from scipy import ndimage

from bundle.data.volumes import unreadable, upright
from bundle.errors import UserError

GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # of Pillow: the value of a pixel is its label
MANY_VALUES = 16  # more are labels only if they follow one another and lie in areas
HIGHEST = 65535


def labels_of(slice_: MetaTensor) -> np.ndarray:
    """Labels (rows, columns) in a slice that `Scan.read` has read as labels.

    A palette's index is the label unless its first colour is brighter than another one that is used. Of colours the strongest
    channel is the label; where the colour is the same everywhere, the lesion is what is not transparent. Of black and white
    with grey edges, as JPEG and scaling leave it, what is brighter than half is 255.

    Raises:
        UserError: if the values are no labels: shades of grey, below 0, or in all corners.
    """
    path, mode = slice_.meta["filename_or_obj"], slice_.meta["mode"] or GREY_MODES[0]
    grey = mode.split()[0] in GREY_MODES
    stored = labels = whole_labels(slice_[0].numpy(), path) if grey else _colour_labels(path)
    values = np.unique(labels)
    lossy = "JPEG" in mode or path.lower().endswith(".webp")
    white = 255 if lossy else next(full for full in (1, 255, HIGHEST) if values[-1] <= full)
    marked = labels[:, 1:] > 0
    flat = (marked & (labels[:, 1:] == labels[:, :-1])).sum() >= 0.5 * marked.sum()  # neighbours in a picture differ
    in_order = flat and values[-1] <= 2 * len(values) and not (values % 1).any()
    if lossy or not in_order and (len(values) > MANY_VALUES or (values > 0.875 * white).sum() > 1):
        share = labels / white
        shades = ndimage.binary_erosion((share > 0.125) & (share < 0.875), np.ones((3, 3))).any()
        if shades or labels.any() and share.max() < 0.875:
            found = f"{len(values)} values from {values[0]:g} to {values[-1]:g}"
            raise UserError(f"{path}: found {found}, expected a mask: black and white, or labels 0, 1, 2 … in PNG or NIfTI")
        labels = np.where(share > 0.5, np.uint8(255), np.uint8(0))
    corners = [0, 0, -1, -1], [0, -1, 0, -1]
    if labels[corners].all():
        found = f"found {stored[corners].min():g} or more in all corners"
        raise UserError(f"{path}: {found}, expected 0 outside of lesions; invert it")
    return labels


def whole_labels(values: np.ndarray, path) -> np.ndarray:
    """The values of a mask, 0.9999999 as 1; a UserError for values that are no labels."""
    rounded = values.round()
    values = rounded if np.abs(values - rounded).max() < 1e-3 else values
    if wrong := [value for value in (values.min(), values.max()) if not 0 <= value <= HIGHEST]:
        raise UserError(f"{path}: found the value {wrong[0]:g}, expected labels from 0 to {HIGHEST}")
    return values


def _colour_labels(path) -> np.ndarray:
    try:
        with open(path, "rb") as file, Image.open(file) as stored:  # by its path, Pillow maps a turned TIFF wrongly
            picture = upright(stored)
            indices, rgba = np.asarray(picture), np.asarray(picture.convert("RGBA"))
    except Exception as error:  # Pillow raises anything for damaged files
        raise unreadable(path, error) from None
    colour, opaque = rgba[..., :3].max(-1), rgba[..., 3] > 0
    background = indices == 0
    if picture.mode == "P" and opaque.all():
        if background.all() or not background.any() or colour[background].max() <= colour[~background].min():
            return indices
    by_alpha = np.ptp(colour) == 0 and opaque.any() and not opaque.all()
    return opaque.astype(np.uint8) if by_alpha else colour * opaque
