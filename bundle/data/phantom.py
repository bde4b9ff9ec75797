"""Synthetic axial chest CT with all four kinds of label, the default data set: `python -m bundle.data.phantom FOLDER`.

A small network learns it in two minutes. It says nothing about how well a network does on patients.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from bundle.errors import UserError, exit_in_one_line
from bundle.names import BOXES, CLASS, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK, SOURCE

CLASSES = ("other", "COVID-19", "lung cancer")
SPLITS = ("training", "validation", "test")
MIN_SIZE = 64  # below it the ribs are no longer there


class _Canvas:
    """A slice in the making: HU image, and where its pixels lie in mm from the middle of the chest (x left, y back)."""

    def __init__(self, rng: np.random.Generator, size: int, pixel: float) -> None:
        self.rng, self.pixel = rng, pixel
        self.image = np.full((size, size), -1000, np.float32)
        axis = (np.arange(size, dtype=np.float32) + 0.5 - size / 2) * pixel
        self.x = axis[None, :] + 1.3 * self.noise(17)  # no outline in a body is a perfect ellipse
        self.y = axis[:, None] + 8 + 1.3 * self.noise(17)

    def noise(self, scale: float) -> np.ndarray:
        """Smooth random field of deviation 1 whose features are about `scale` mm wide."""
        white = self.rng.standard_normal(self.image.shape, np.float32)
        field = ndimage.gaussian_filter(white, scale / self.pixel / 2, mode="wrap")
        return field / field.std()

    def ellipse(self, cx, cy, rx, ry) -> np.ndarray:
        """Distance in mm to the edge of an ellipse, negative inside."""
        u, v = self.x - cx + 1e-4, self.y - cy  # never 0 both
        return np.hypot(u, v) * (1 - 1 / np.hypot(u / rx, v / ry))

    def paint(self, distance: np.ndarray, hu, opacity=1.0, softness: float = 0) -> np.ndarray:
        """Blend a shape in; its edge is `softness` mm wide, a pixel at least. Returns the share of each pixel that changed."""
        alpha = opacity * np.clip(0.5 - distance / max(softness, self.pixel), 0, 1)
        self.image += alpha * (hu - self.image)
        return alpha


def make_patient(rng: np.random.Generator, size: int = 256) -> dict:
    """Draw what the slices of one patient share; lengths in mm, densities in HU; `spacing` is the width of a pixel."""
    limits = {"wide": (150, 182), "deep": (100, 122), "fat": (4, 14), "lung": (-870, -830), "blood": (42, 240)}
    limits |= {"noise": (8, 30), "table": (-350, 50), "margin": (1.03, 1.2)}
    patient = {name: rng.uniform(*values) for name, values in limits.items()}
    return {**patient, "spacing": 2 * (patient["wide"] + 18) * patient["margin"] / size}


def make_slice(
    rng: np.random.Generator, size: int = 256, label: int = 0, patient: dict | None = None, level: float | None = None
) -> dict:
    """Draw one slice as radiologists see it: the patient's right on the left of the picture, the spine below.

    Args:
        label: 0 normal, 1 COVID-19 (hazy opacities in both lungs), 2 lung cancer (two or three nodules of 20 to 40 mm).
        patient: of `make_patient` with the same size; by default drawn.
        level: from 0 (above the heart) to 1 (heart); by default drawn.

    Returns:
        image in HU, mask of the COVID-19 lesion, instances (n + 1 on nodule n), all (size, size); boxes; class; spacing in mm.
    """
    if size < MIN_SIZE:
        raise UserError(f"size: found {size}, expected at least {MIN_SIZE} pixels")
    if label not in range(len(CLASSES)):
        raise UserError(f"label: found {label!r}, expected 0 to {len(CLASSES) - 1}")
    patient = patient or make_patient(rng, size)
    canvas = _Canvas(rng, size, patient["spacing"])
    lungs = _draw_chest(canvas, patient, rng.uniform(0, 1) if level is None else level)
    mask = _add_opacities(canvas, lungs) if label == 1 else np.zeros((size, size), np.uint8)
    instances = _add_nodules(canvas, lungs) if label == 2 else np.zeros((size, size), np.uint8)
    boxes = [[columns.start, rows.start, columns.stop, rows.stop] for rows, columns in ndimage.find_objects(instances)]
    image = ndimage.gaussian_filter(canvas.image, 0.5 * size / 256) + patient["noise"] * canvas.noise(1.3 * canvas.pixel)
    image = np.clip(np.rint(image), -1024, 3071).astype(np.int16)
    return {IMAGE: image, MASK: mask, INSTANCES: instances, BOXES: boxes, CLASS: label, "spacing": patient["spacing"]}


def _draw_chest(canvas: _Canvas, patient: dict, level: float) -> np.ndarray:
    """Draw a normal chest; returns the distance in mm to the edge of the lungs, negative inside."""
    paint, ellipse = canvas.paint, canvas.ellipse
    wide, deep, fat = patient["wide"] + 10 * (1 - level), patient["deep"], patient["fat"]
    body, width, depth = ellipse(0, 0, wide, deep), wide - fat - 18, deep - fat - 12
    cavity, spine = ellipse(0, -2, width, depth), ellipse(0, 0.68 * depth, 19, 16)
    heart = ellipse(18 + 6 * level, -0.25 * depth, 32 + 26 * level, 28 + 16 * level)
    aorta = ellipse(20, 0.42 * depth, 12, 12)
    between = np.minimum.reduce([ellipse(2, -0.3 * depth, 30, 0.75 * depth), heart - 2, spine - 6, aorta - 2])
    lungs = np.maximum(cavity, -between)

    texture = canvas.noise(8)
    paint(np.abs(canvas.y - deep - 14 + 0.001 * canvas.x**2) - 1.5, patient["table"])
    paint(body, 10)  # skin
    paint(body + 2.5, -100 + 6 * texture)  # fat
    paint(body + fat + 3, 45 + 8 * texture)  # muscle
    gaps = 8 * np.cos(14 * np.arctan2(canvas.y, canvas.x) + canvas.rng.uniform(0, 6.3)) - 1
    paint(np.maximum(np.abs(cavity - 6) - 4, gaps), 650)  # ribs
    paint(cavity - 1, -40 + 10 * texture)  # mediastinum
    paint(heart, 48 + 6 * texture, softness=2.5)
    paint(aorta, patient["blood"])
    for bone, marrow in ((spine, 220), (ellipse(0, 0.68 * depth + 34, 7, 18), 400), (ellipse(0, -depth - 6, 18, 5), 200)):
        paint(bone, 700)
        paint(bone + 2.5, marrow)
    paint(lungs, patient["lung"] + 50 * canvas.y / depth + 25 * canvas.noise(2.5))  # denser at the back
    paint(np.maximum(12 * (2 - canvas.noise(6)), lungs + 4), 20, 0.8)  # vessels
    for x in (-28, 28) if level > 0.45 else (0,):  # the trachea or its two branches
        paint(ellipse(x, 0.12 * depth, 9, 9), 0)
        paint(ellipse(x, 0.12 * depth, 7, 7), -990)
    return lungs


def _add_opacities(canvas: _Canvas, lungs: np.ndarray) -> np.ndarray:
    """Draw hazy opacities near the pleura of both lungs, more at the back; returns their mask."""
    rng, mask = canvas.rng, np.zeros(lungs.shape, np.uint8)
    for half in (canvas.x < 0, canvas.x >= 0):
        rows, columns = np.nonzero((lungs < -6) & (lungs > -22) & half & (np.abs(canvas.x) > 45))
        chance = 1.0 + 3 * (canvas.y[rows, columns] > 5)
        for pick in rng.choice(len(rows), rng.integers(2, 4), p=chance / chance.sum()):
            x, y = canvas.x[rows[pick], columns[pick]], canvas.y[rows[pick], columns[pick]]
            blob = canvas.ellipse(x, y, rng.uniform(16, 30), rng.uniform(18, 40)) + 4 * canvas.noise(12)
            glass = np.clip(0.62 + 0.1 * canvas.noise(8), 0.4, 0.85)  # air and fluid mixed
            mask |= canvas.paint(np.maximum(blob, lungs), 35, glass, softness=6) > 0.25
    return mask


def _add_nodules(canvas: _Canvas, lungs: np.ndarray) -> np.ndarray:
    """Draw two or three solid nodules that do not touch; returns their instances."""
    rng, instances = canvas.rng, np.zeros(lungs.shape, np.uint8)
    for _ in range(rng.integers(2, 4)):
        radius = max(rng.uniform(10, 20), 1.7 * canvas.pixel)
        free = lungs < max(-0.8 * radius, lungs.min() + 1)
        if instances.any():
            free &= ndimage.distance_transform_edt(instances == 0) * canvas.pixel > 1.3 * radius + 3 * canvas.pixel
        rows, columns = np.nonzero(free)
        if not len(rows):
            break  # no room for another one
        pick = rng.integers(len(rows))
        x, y = canvas.x[rows[pick], columns[pick]], canvas.y[rows[pick], columns[pick]]
        nodule = np.maximum(canvas.ellipse(x, y, radius, radius * rng.uniform(0.8, 1)), lungs)
        canvas.paint(nodule, rng.uniform(25, 60))
        instances[nodule < 0] = instances.max() + 1
    return instances


def make_phantom(folder, size: int = 256, groups: Sequence[int] = (36, 9, 9), slices_per_group=2, seed: int = 0) -> str:
    """Make the phantom data set in a folder, unless it is already there; return the folder.

    A group is a patient, who has COVID-19, lung cancer or neither; `groups` are for training, validation and test. As in real
    collections the labels are partial: COVID-19 slices have masks, cancer slices boxes and instances; of each three normal
    slices, the first has both ("empty" and []), the second the mask, the third the boxes; the last slice of every second
    training patient has no label at all.
    """
    groups = list(groups) if isinstance(groups, Sequence) else [groups]
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
        for index, (split, number) in enumerate(tqdm(patients, desc="phantom data", unit="patient", disable=None)):
            datalist[split] += _write_patient(temporary, arguments, index, number, split)
        (temporary / "datalist.json").write_text(json.dumps(datalist, indent=1) + "\n")
        os.replace(temporary, folder)
    except OSError:
        if not _is_made(folder, arguments):  # otherwise another process was faster, as under torchrun
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)


def make_volume(path, label: int = 1, slices: int = 24, size: int = 256, seed: int = 0) -> None:
    """Write a volume of one patient as NIfTI in HU, its slices 10 mm apart."""
    rng = np.random.default_rng(seed)
    patient = make_patient(rng, size)
    drawn = [make_slice(rng, size, label, patient, level)[IMAGE] for level in np.linspace(1, 0, slices)]
    _write_image(path, np.stack(drawn, -1), patient["spacing"], 10.0)


def _is_made(folder: Path, arguments: dict) -> bool:
    """Whether the folder holds this data set; False if it is missing or empty, an error if it holds anything else."""
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
        _write_image(folder / record[IMAGE], drawn[IMAGE][..., None], drawn["spacing"], 5.0, -30.0 * position)
        records.append(record)
        if split == "training" and number % 2 == 0 and 0 < position == count - 1:
            continue  # no label
        record[CLASS] = label
        if label == 0:
            record |= ({MASK: EMPTY_MASK} if position % 3 != 2 else {}) | ({BOXES: []} if position % 3 != 1 else {})
        elif label == 1:
            record[MASK] = f"masks/{name}.png"
            Image.fromarray(drawn[MASK] * 255).save(folder / record[MASK])
        else:
            record |= {BOXES: drawn[BOXES], INSTANCES: f"instances/{name}.png"}
            Image.fromarray(drawn[INSTANCES]).save(folder / record[INSTANCES])
    return records


def _write_image(path, volume: np.ndarray, spacing: float, distance: float, bottom: float = 0.0) -> None:
    """Write slices (rows, columns, slices) from the feet up, the first at `bottom` mm, the middle of the slice at 0."""
    # NIfTI's first axis is x, the column. Columns run to the patient's left, rows to posterior: both negative in its RAS.
    affine = np.diag([-spacing, -spacing, distance, 1.0])
    affine[:3, 3] = [(volume.shape[1] - 1) / 2 * spacing, (volume.shape[0] - 1) / 2 * spacing, bottom]
    image = nib.Nifti1Image(volume.swapaxes(0, 1), affine)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


if __name__ == "__main__":
    import fire

    with exit_in_one_line():
        fire.Fire(make_phantom)
