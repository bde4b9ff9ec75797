"""Synthetic axial chest CT with all four kinds of label: the data set that is used where no other is named.

It looks enough like a chest for every step of the way to be exercised; it says nothing about how well a network does on
patients. `python -m bundle.data.phantom FOLDER` writes it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

from bundle.errors import UserError, exit_in_one_line
from bundle.names import BOXES, CLASS, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK, SOURCE

CLASSES = ("other", "COVID-19", "lung cancer")
SPLITS = ("training", "validation", "test")
MIN_SIZE = 64  # below it the smallest nodules and the ribs are no longer there
FINE = 4  # lines are drawn this many times finer, so that vessels thinner than a pixel are faint instead of missing


@lru_cache(maxsize=64)
def _spread(cells: int, size: int) -> np.ndarray:
    """Matrix (size, cells) of cubic interpolation: much faster than interpolating each field anew."""
    eye = np.eye(cells, dtype=np.float32)
    return ndimage.zoom(eye, (size / cells, 1), order=3, mode="nearest", grid_mode=True)


class _Canvas:
    """A slice in the making: HU image, and where its pixels lie in mm from the middle of the chest (x left, y back)."""

    def __init__(self, rng: np.random.Generator, size: int, patient: dict) -> None:
        self.rng, self.size, self.pixel, self.offset = rng, size, patient["spacing"], patient["offset"]
        axis = (np.arange(size, dtype=np.float32) + 0.5 - size / 2) * self.pixel
        # No outline in a body is a perfect ellipse: bend the coordinates a little.
        self.straight = axis[None, :] - self.offset[0], axis[:, None] - self.offset[1]
        self.x = self.straight[0] + 1.3 * self.noise(34)
        self.y = self.straight[1] + 1.3 * self.noise(34)
        self.image = np.full((size, size), -1000, np.float32)

    def noise(self, scale: float) -> np.ndarray:
        """Smooth random field of mean 0 and deviation about 1 whose features are `scale` mm long."""
        cells = max(4, round(self.size * self.pixel / scale))
        spread = _spread(cells, self.size)
        return spread @ self.rng.normal(0, 1.5, (cells, cells)).astype(np.float32) @ spread.T

    def ellipse(self, cx, cy, rx, ry, tilt: float = 0, power: float = 2) -> np.ndarray:
        """Distance in mm to the edge of a (super)ellipse, negative inside; `tilt` in degrees, clockwise on screen."""
        cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
        u, v = (self.x - cx) * cos + (self.y - cy) * sin, (self.y - cy) * cos - (self.x - cx) * sin
        if power == 2:
            scale = np.sqrt(np.square(u / rx) + np.square(v / ry))
        else:
            scale = (np.abs(u / rx) ** power + np.abs(v / ry) ** power) ** (1 / power)
        return np.sqrt(u * u + v * v) * (1 - 1 / np.maximum(scale, 1e-3))

    def alpha(self, distance: np.ndarray, softness: float = 0) -> np.ndarray:
        """Share of each pixel inside an edge, which is `softness` mm wide or a pixel at least."""
        return np.clip(0.5 - distance / max(softness, self.pixel), 0, 1)

    def paint(self, distance: np.ndarray, hu, softness: float = 0) -> None:
        self.blend(self.alpha(distance, softness), hu)

    def blend(self, alpha: np.ndarray, hu) -> None:
        self.image += alpha * (hu - self.image)

    def bone(self, distance: np.ndarray, marrow: float, cortex: float = 1.6) -> None:
        self.paint(distance, 750)
        self.paint(distance + cortex, marrow)

    def lines(self, segments) -> np.ndarray:
        """Share of each pixel covered by line segments (x0, y0, x1, y1, width), in mm."""
        fine = Image.new("L", (self.size * FINE, self.size * FINE))
        draw = ImageDraw.Draw(fine)
        for x0, y0, x1, y1, width in segments:
            ends = np.array([[x0, y0], [x1, y1]]) + self.offset
            ends = (ends / self.pixel + self.size / 2) * FINE
            draw.line(ends.ravel().tolist(), fill=255, width=max(1, round(width / self.pixel * FINE)))
        return np.asarray(fine.reduce(FINE), np.float32) / 255


def make_patient(rng: np.random.Generator, size: int = 256) -> dict:
    """Draw what the slices of one patient share: build, depth of breath, contrast medium, scanner.

    Args:
        rng: source of everything random.
        size: rows and columns in pixels, for the pixel spacing.

    Returns:
        Lengths in mm, densities in HU; `spacing` is the width of a pixel.
    """
    wide, deep = rng.uniform(150, 182), rng.uniform(100, 122)
    breath = rng.uniform(0, 1)
    return {
        "wide": wide,
        "deep": deep,
        "fat": rng.uniform(4, 14),
        "spacing": 2 * (wide + 18) * rng.uniform(1.03, 1.2) / size,
        "offset": (rng.uniform(-6, 6), rng.uniform(-16, -4)),
        "breath": breath,
        "lung": -825 - 55 * breath + rng.normal(0, 8),
        "blood": 42 if rng.random() < 0.6 else rng.uniform(130, 240),
        "heart": rng.uniform(0.88, 1.1),
        "noise": rng.uniform(8, 30),
        "sharpness": rng.uniform(0.35, 0.8),
        "table": rng.uniform(-350, 50),
    }


def make_slice(
    rng: np.random.Generator, size: int = 256, label: int = 0, patient: dict | None = None, level: float | None = None
) -> dict:
    """Draw one slice as radiologists see it: the patient's right on the left of the picture, the spine below.

    Args:
        rng: source of everything random.
        size: rows and columns in pixels, at least 64.
        label: 0 normal, 1 COVID-19 (ground glass and consolidation in both lungs), 2 lung cancer (one to three nodules
            or masses of about 4 to 40 pixels at size 256).
        patient: of `make_patient` with the same size; drawn where there is none.
        level: from 0 (arch of the aorta) to 1 (heart); drawn where there is none.

    Returns:
        image, int16 HU (size, size); mask, uint8 {0, 1} (size, size), the COVID-19 lesion; instances, uint8
        (size, size), value n + 1 for nodule n; boxes, a list of [x1, y1, x2, y2] in pixels, one for each nodule;
        class, `label`; spacing, mm per pixel.

    Raises:
        UserError: if `size` or `label` is not one of these.
    """
    if size < MIN_SIZE:
        raise UserError(f"size: found {size}, expected at least {MIN_SIZE} pixels")
    if label not in range(len(CLASSES)):
        raise UserError(f"label: found {label!r}, expected 0 to {len(CLASSES) - 1}")
    patient = patient or make_patient(rng, size)
    level = rng.uniform(0, 1) if level is None else level
    canvas = _Canvas(rng, size, patient)
    lungs = _draw_chest(canvas, patient, level)
    inside = lungs > 0.5
    mask, instances = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    if label == 1:
        mask = _add_covid(canvas, lungs)
    if label == 2:
        instances = _add_nodules(canvas, inside)
    boxes = [[columns.start, rows.start, columns.stop, rows.stop] for rows, columns in ndimage.find_objects(instances)]
    image = ndimage.gaussian_filter(canvas.image, patient["sharpness"] * size / 256)
    grain = ndimage.gaussian_filter(rng.normal(0, 1, (size, size)).astype(np.float32), 0.6)
    image += patient["noise"] * grain / float(grain.std())
    image = np.clip(np.rint(image), -1024, 3071).astype(np.int16)
    return {
        IMAGE: image,
        MASK: mask,
        INSTANCES: instances,
        BOXES: boxes,
        CLASS: label,
        "spacing": patient["spacing"],
    }


def _union(*distances, k: float = 6) -> np.ndarray:
    """Union of shapes with their meeting corners filled over about `k` mm."""
    union = distances[0]
    for distance in distances[1:]:
        union = (union + distance - np.sqrt((union - distance) ** 2 + k**2)) / 2
    return union


def _draw_chest(canvas: _Canvas, patient: dict, level: float) -> np.ndarray:
    """Draw a normal chest; returns the share of each pixel that is lung."""
    rng, ellipse, noise = canvas.rng, canvas.ellipse, canvas.noise
    body = ellipse(0, 0, patient["wide"] + 16 * (1 - level), patient["deep"], power=2.5)
    width = (patient["wide"] - patient["fat"] - 13) * (0.88 + 0.12 * level)  # half of the rib cage inside
    depth = patient["deep"] - patient["fat"] - 10
    cavity = ellipse(0, -3, width, depth, power=2.3)
    low = min(max((level - 0.3) / 0.5, 0), 1)  # 0 above the heart, 1 at its widest
    scale = patient["heart"] * width / 130
    heart = ellipse(21 * scale + 3 * low, -0.3 * depth, (30 + 32 * low) * scale, (26 + 19 * low) * scale, tilt=28)
    aorta = ellipse(19, 0.4 * depth, 12, 12.5)
    front, middle = ellipse(4, -0.78 * depth, 15 + 8 * low, 0.3 * depth), ellipse(1, -0.06 * depth, 34 - 9 * low, 0.42 * depth)
    between = _union(front, middle, ellipse(0, 0.62 * depth, 21, 0.34 * depth), aorta - 2, *([heart - 4] if low > 0.1 else []))
    lung = -_union(-cavity, between + 1.2 * noise(14), k=14)  # the cavity without what is between, with rounded corners
    lungs = canvas.alpha(lung)

    across, down = canvas.straight
    for gap in (5, 17):  # table: two thin curved sheets below the back
        canvas.paint(np.abs(down - patient["deep"] - gap + 0.0011 * across**2) - 1.2, patient["table"])
    canvas.paint(body, 10)  # skin
    canvas.paint(body + 2.5, -100 + 6 * noise(10))
    canvas.paint(body + patient["fat"] + 3 + 2 * noise(40), 45 + 8 * noise(8))  # muscle
    canvas.paint(cavity - 1, -60 + 10 * noise(6))  # mediastinal fat; organs and lungs are drawn over it
    for organ, hu in ((heart, 48), (aorta, patient["blood"]), (ellipse(6, 0.3 * depth, 6, 5), 35)):
        canvas.paint(organ, hu + 6 * noise(12), softness=2.5)
    canvas.paint(np.maximum(np.abs(lung - 1.2) - 1.2, cavity - 2), 20)  # pleura
    _draw_bones(canvas, cavity, depth)

    grain = ndimage.gaussian_filter(rng.normal(0, 1, canvas.image.shape).astype(np.float32), 1.1)
    gravity = (35 + 45 * (1 - patient["breath"])) * canvas.y / depth
    canvas.blend(lungs, patient["lung"] + gravity + 22 * grain / float(grain.std()) + 9 * noise(35))
    canvas.blend(canvas.lines(_vessels(canvas, lung, width)) * lungs, min(patient["blood"], 70))
    tubes = [(-3, 0.12, 8.5)] if level < 0.45 else [(-30, 0.16, 4.5), (30, 0.16, 4.5)]  # trachea, or its two branches
    for x, y, radius in tubes:
        tube = ellipse(x, y * depth, radius, radius)
        canvas.paint(tube - 1.5, 0)
        canvas.paint(tube, -990)
    return lungs


def _draw_bones(canvas: _Canvas, cavity: np.ndarray, depth: float) -> None:
    rng, ellipse = canvas.rng, canvas.ellipse
    angle = np.arctan2(canvas.y + 3, canvas.x)
    gaps = 10 * np.cos(15 * angle + rng.uniform(0, 6.3)) + 3 * canvas.noise(30)
    gaps = np.maximum(gaps, 25 - np.abs(canvas.x))  # none at the breastbone
    canvas.bone(np.maximum(np.abs(cavity - 6) - 2.8, gaps), rng.uniform(180, 300), 1.3)  # ribs
    canvas.bone(ellipse(0, -depth - 6, 18, 4.8, power=3), 160, 1.4)  # breastbone
    down = 0.6 * depth
    for side in (-1, 1):
        canvas.bone(ellipse(side * 24, down + 21, 17, 4.5, tilt=side * 22), 300)  # transverse processes
    canvas.bone(ellipse(0, down + 30, 9, 22), 300)  # arch and spinous process
    canvas.bone(ellipse(0, down, 16.5, 14, power=2.4), 170 + 25 * canvas.noise(4), 1.3)  # vertebral body
    canvas.paint(ellipse(0, down + 20, 9, 7.5), 28)  # canal


def _vessels(canvas: _Canvas, lung: np.ndarray, width: float) -> list[tuple[float, ...]]:
    """Line segments of vessels, which point to the hila and are thickest near them."""
    rng, segments = canvas.rng, []
    rows, columns = np.nonzero(lung < -7)
    places = np.stack([canvas.x[rows, columns], canvas.y[rows, columns]], 1)
    for side in (-1, 1):
        own, hilum = places[places[:, 0] * side > 0], np.array([side * 38.0, 4.0])
        for place in own[rng.choice(len(own), 150)] if len(own) else ():
            away = place - hilum
            near = np.clip(1 - np.hypot(*away) / (0.95 * width), 0.12, 1)
            angle = np.arctan2(away[1], away[0]) + rng.normal(0, 0.45)
            end = place + (rng.exponential(9) * near + 0.8) * np.array([np.cos(angle), np.sin(angle)])
            segments.append((*place, *end, 0.5 + 3.2 * near**1.5 * rng.uniform(0.5, 1)))
    return segments


def _blob(canvas, row, column, across, along, tilt: float, roughness: float, waves: int = 8) -> np.ndarray:
    """Distance to a pixel in units of an uneven radius (below 1 is inside); radii in pixels, `tilt` in radians."""
    rng = canvas.rng
    rows, columns = np.ogrid[: canvas.size, : canvas.size]
    rows, columns = (rows - row).astype(np.float32), (columns - column).astype(np.float32)
    cos, sin = math.cos(tilt), math.sin(tilt)
    u, v = (columns * cos + rows * sin) / across, (rows * cos - columns * sin) / along
    angle = np.arctan2(v, u)
    edge = sum(rng.normal(0, roughness / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(2, waves))
    return np.sqrt(u * u + v * v) / np.maximum(1 + edge, 0.5)


def _add_covid(canvas: _Canvas, lungs: np.ndarray) -> np.ndarray:
    """Ground glass along the pleura of both lungs, more at the back, consolidated in parts; returns its mask."""
    rng, inside = canvas.rng, lungs > 0.5
    depth = ndimage.distance_transform_edt(inside) * canvas.pixel
    haze = np.zeros_like(canvas.image)
    mottle, extent = 1 + 0.3 * canvas.noise(5) + 0.2 * canvas.noise(14), rng.uniform(0.7, 1.3)
    for half in (canvas.x < 0, canvas.x >= 0):
        rows, columns = np.nonzero(inside & half)
        chance = np.where(depth[rows, columns] < 16, 1, 0.06) * np.where(canvas.x[rows, columns] ** 2 > 45**2, 1, 0.15)
        chance *= 1 + 3 * (canvas.y[rows, columns] > 5)
        for pick in rng.choice(len(rows), rng.integers(1, 5), p=chance / chance.sum()):
            row, column = rows[pick], columns[pick]
            outward = np.arctan2(row - rows.mean(), column - columns.mean())
            across, along = (rng.uniform(*r) * extent / canvas.pixel for r in ((9, 17), (14, 34)))
            blob = _blob(canvas, row, column, across, along, outward, 0.35)
            glass = np.clip(mottle * rng.uniform(0.4, 0.58), 0.25, 0.75)  # above the mask's threshold: no holes
            haze = np.maximum(haze, np.clip(2.2 * (1.25 - blob), 0, 1) * glass)
            if rng.random() < 0.4:
                core = _blob(canvas, row, column, 0.5 * across, 0.65 * along, outward, 0.35)
                haze = np.maximum(haze, np.clip(2.5 * (1.2 - core), 0, 0.98))
    haze *= lungs
    canvas.blend(haze, 35)  # a mixture of air and fluid, through which vessels stay visible
    return (haze > 0.2).astype(np.uint8)


def _add_nodules(canvas: _Canvas, inside: np.ndarray) -> np.ndarray:
    """One to three solid nodules or masses with spiculated edges that do not touch; returns their instances."""
    rng, size = canvas.rng, canvas.size
    instances = np.zeros((size, size), np.uint8)
    depth = ndimage.distance_transform_edt(inside)
    wanted, count = rng.integers(1, 4), 0
    while count < wanted:
        radius = max(1.6, size / 256 * np.exp(rng.uniform(np.log(2.3), np.log(16))))
        rows, columns = np.nonzero(depth > min(max(2, 0.5 * radius), depth.max() - 1))
        pick = rng.integers(len(rows))
        row, column = rows[pick], columns[pick]
        blob = _blob(canvas, row, column, radius * rng.uniform(0.85, 1.1), radius, rng.uniform(0, 3.1), 0.22, 16)
        parts, _ = ndimage.label((blob < 1) & inside)
        nodule = parts == parts[row, column]
        if (ndimage.binary_dilation(nodule, iterations=2) & (instances > 0)).any():
            wanted -= 1  # no room here: fewer nodules, never none, as the first one always has room
            continue
        count += 1
        instances[nodule] = count
        hu = rng.uniform(20, 60) + 8 * canvas.noise(4)
        x, y = ((v + 0.5 - size / 2) * canvas.pixel - canvas.offset[n] for n, v in enumerate((column, row)))
        if radius > 3:
            angles, reach = rng.uniform(0, 6.3, 16), rng.uniform(1.1, 1.8, 16) * radius * canvas.pixel
            spikes = canvas.lines([(x, y, x + r * np.cos(a), y + r * np.sin(a), 0.7) for a, r in zip(angles, reach)])
            canvas.blend(0.7 * spikes * inside, hu)
        # Soft over a pixel, and no denser than tissue where it meets the chest wall.
        canvas.blend(np.clip((1 - blob) * radius + 0.5, 0, 1) * inside, hu)
    return instances


def make_phantom(
    folder, size: int = 256, groups: Sequence[int] = (16, 6, 6), slices_per_group: int = 3, seed: int = 0
) -> str:
    """Make the phantom data set in a folder, unless it is already there.

    A group is a patient, who has COVID-19, lung cancer or neither. As in real collections the labels are partial. Every
    slice has its class, but for the last one of every second training patient, which has no label at all. COVID-19
    slices have masks, cancer slices have boxes and instances; of each three normal slices, the first has both ("empty"
    and []), the second the mask, the third the boxes.

    Args:
        folder: to make; written under a temporary name beside it, then renamed.
        size: rows and columns of the slices.
        groups: number of patients for training, validation and test, at least 3 each.
        slices_per_group: slices of a patient.
        seed: of everything random.

    Returns:
        The folder, with datalist.json, images (NIfTI in HU), masks and instances (PNG).

    Raises:
        UserError: if an argument is out of range, or the folder holds something else, or phantom data made with other
            arguments.
    """
    groups = list(groups) if isinstance(groups, Sequence) else [groups]
    if size < MIN_SIZE:
        raise UserError(f"size: found {size}, expected at least {MIN_SIZE} pixels")
    if len(groups) != len(SPLITS) or min(groups) < len(CLASSES):
        raise UserError(f"groups: found {groups}, expected three numbers from 3 up, for {', '.join(SPLITS)}")
    if slices_per_group < 1:
        raise UserError(f"slices_per_group: found {slices_per_group}, expected 1 or more")
    arguments = {"size": size, "groups": groups, "slices_per_group": slices_per_group, "seed": seed}
    folder = Path(folder)
    if _is_made(folder, arguments):
        return str(folder)
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        for name in ("images", "masks", "instances"):
            (temporary / name).mkdir(parents=True)
        datalist = {"name": "phantom", "phantom": arguments, "classes": list(CLASSES)} | {split: [] for split in SPLITS}
        patients = [(split, number) for split, count in zip(SPLITS, groups) for number in range(count)]
        for index, (split, number) in enumerate(tqdm(patients, desc="phantom data", unit="patient")):
            datalist[split] += _write_patient(temporary, arguments, index, number, split)
        (temporary / "datalist.json").write_text(json.dumps(datalist, indent=1) + "\n")
        try:
            os.replace(temporary, folder)
        except OSError:
            if not _is_made(folder, arguments):  # otherwise another process was faster, as under torchrun
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)


def _is_made(folder: Path, arguments: dict) -> bool:
    """Whether the folder holds this data set; False if it is missing or empty, refused if it holds anything else."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return False
    try:
        found = json.loads((folder / "datalist.json").read_text())["phantom"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: found other files, expected an empty or missing one") from None
    if found != arguments:
        raise UserError(f"{folder}: found phantom data of {found}, expected {arguments}; name another folder")
    return True


def _write_patient(folder: Path, arguments: dict, index: int, number: int, split: str) -> list[dict]:
    """Write the slices of one patient and return their records."""
    size, count = arguments["size"], arguments["slices_per_group"]
    rng = np.random.default_rng([arguments["seed"], index])
    patient, label, records = make_patient(rng, size), (number + 1) % len(CLASSES), []
    for position in range(count):
        level = (position + rng.uniform(0.1, 0.9)) / count
        drawn = make_slice(rng, size, label, patient, level)
        name = f"p{index:02d}_{position}"
        record = {IMAGE: f"images/{name}.nii.gz", GROUP: f"phantom/p{index:02d}", SOURCE: "phantom"}
        _write_image(folder / record[IMAGE], drawn[IMAGE], drawn["spacing"], position)
        if not (split == "training" and number % 2 == 0 and 0 < position == count - 1):
            record |= {CLASS: label} | _write_labels(folder, name, drawn, position)
        records.append(record)
    return records


def _write_image(path: Path, image: np.ndarray, spacing: float, position: int) -> None:
    # NIfTI's first axis is x, the column. Columns run to the patient's left and rows to posterior: both are negative in
    # NIfTI's RAS. The middle of the slice is the origin; slices of a patient are 30 mm apart, from the head down.
    affine = np.diag([-spacing, -spacing, 5.0, 1.0])
    affine[:3, 3] = [(image.shape[1] - 1) / 2 * spacing, (image.shape[0] - 1) / 2 * spacing, -30.0 * position]
    nifti = nib.Nifti1Image(image.T[..., None], affine)
    nifti.header.set_xyzt_units("mm")
    nib.save(nifti, path)


def _write_labels(folder: Path, name: str, drawn: dict, position: int) -> dict:
    """Write the label files of a slice and return its fields mask, boxes and instances, as far as it has them."""
    if drawn[CLASS] == 0:
        return ({MASK: EMPTY_MASK} if position % 3 != 2 else {}) | ({BOXES: []} if position % 3 != 1 else {})
    if drawn[CLASS] == 1:
        Image.fromarray(drawn[MASK] * 255).save(folder / f"masks/{name}.png")
        return {MASK: f"masks/{name}.png"}
    Image.fromarray(drawn[INSTANCES]).save(folder / f"instances/{name}.png")
    return {BOXES: drawn[BOXES], INSTANCES: f"instances/{name}.png"}


if __name__ == "__main__":
    import fire

    with exit_in_one_line():
        fire.Fire(make_phantom)
