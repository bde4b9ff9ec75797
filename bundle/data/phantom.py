"""Synthetic axial chest CT with all four kinds of label: the data set that is used where no other is named.

It looks enough like a chest for every step of the way to be exercised; it says nothing about how well a network does on patients.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

CLASSES = ("other", "COVID-19", "lung cancer")
PIXEL_MM = 360.0  # field of view in mm, shared by the pixels of a row
SPLIT_GROUPS = {"training": 18, "validation": 6, "test": 6}
SLICES_PER_GROUP = 3


def make_slice(rng: np.random.Generator, size: int = 256, label: int = 0) -> dict:
    """Draw one slice as seen from the feet: the patient's right on the left of the picture, the spine below.

    Args:
        rng: source of everything random.
        size: rows and columns in pixels, at least 32.
        label: 0 normal, 1 COVID-19 (ground glass and consolidation in both lungs), 2 lung cancer (one to three nodules).

    Returns:
        image, int16 HU (size, size); mask, bool (size, size), the COVID-19 lesion; instances, uint8 (size, size), value n + 1
        for nodule n; boxes, a list of [x1, y1, x2, y2] in pixels, one for each nodule.
    """
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1  # -1 to 1, y down

    def ellipse(cx, cy, rx, ry):
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2

    wide, deep = rng.uniform(0.8, 0.93), rng.uniform(0.58, 0.7)
    image = np.full((size, size), -1000.0)
    image[(np.abs(y - deep - 0.1 + 0.05 * x**2) < 0.015) & (np.abs(x) < 0.8)] = -300  # table
    body = ellipse(0, 0, wide, deep) + 0.15 * x**4
    image[body < 1] = -100  # fat
    image[body < 0.86] = 45  # muscle
    lungs = _lungs(x, y, ellipse, rng, wide, deep)
    ribs = np.zeros_like(lungs)
    for angle in np.arange(0, 2 * np.pi, np.pi / 7) + rng.uniform(0, 0.3):
        ribs |= ellipse(0.79 * wide * np.cos(angle), 0.8 * deep * np.sin(angle), 0.055, 0.025) < 1
    image[ribs & ~lungs] = 450
    spine = ellipse(0, 0.6 * deep, 0.13, 0.12)
    image[spine < 1] = 350
    image[spine < 0.6] = 180
    image[ellipse(0, 0.6 * deep + 0.16, 0.05, 0.045) < 1] = 30  # canal
    image[ellipse(0, -0.78 * deep, 0.08, 0.03) < 1] = 400  # sternum
    air = rng.uniform(-880, -780)
    texture = ndimage.gaussian_filter(rng.normal(0, 1, (size, size)), size / 64)
    image[lungs] = air + 25 * texture[lungs] / texture.std()
    _add_vessels(image, lungs, x, y, rng)
    image[ellipse(0.0, -0.12, 0.035, 0.04) < 1] = -980  # trachea
    mask, instances, boxes = np.zeros_like(lungs), np.zeros((size, size), np.uint8), []
    if label == 1:
        mask = _add_covid(image, lungs, rng)
    if label == 2:
        instances, boxes = _add_nodules(image, lungs, rng)
    noise = ndimage.gaussian_filter(rng.normal(0, 1, (size, size)), 0.6)
    image = ndimage.gaussian_filter(image, 0.5 * size / 256) + rng.uniform(8, 25) * noise / noise.std()
    return {"image": np.clip(image, -1024, 3071).astype(np.int16), "mask": mask, "instances": instances, "boxes": boxes}


def _lungs(x, y, ellipse, rng, wide, deep) -> np.ndarray:
    """Both lungs, without heart and aorta, which lie to the patient's left (the right of the picture)."""
    right = ellipse(-0.42 * wide, 0.02, 0.33 * wide, 0.72 * deep * rng.uniform(0.9, 1)) < 1
    left = ellipse(0.44 * wide, 0.02, 0.31 * wide, 0.72 * deep * rng.uniform(0.9, 1)) < 1
    heart = ellipse(0.14, -0.12 * deep, 0.27 * wide, 0.4 * deep * rng.uniform(0.85, 1.05)) < 1
    aorta = ellipse(0.15, 0.42 * deep, 0.08, 0.08) < 1
    return (right | left) & ~heart & ~aorta & (np.abs(x) > 0.08)


def _add_vessels(image, lungs, x, y, rng) -> None:
    """Bright branches that leave the hilum of each lung and taper."""
    for side in (-1, 1):
        for _ in range(14):
            angle, turn = rng.uniform(0, 2 * np.pi), rng.normal(0, 1.2)
            t = np.linspace(0, 1, image.shape[0])
            px = side * 0.22 + 0.5 * t * np.cos(angle + turn * t)
            py = 0.5 * t * np.sin(angle + turn * t)
            column, row = (((p + 1) / 2 * (image.shape[0] - 1)).round().astype(int) for p in (px, py))
            inside = (np.minimum(column, row) >= 0) & (np.maximum(column, row) < image.shape[0])
            column, row, t = column[inside], row[inside], t[inside]
            hit = lungs[row, column]
            image[row[hit], column[hit]] = np.maximum(image[row[hit], column[hit]], -200 - 450 * t[hit])


def _blob(shape, row, column, radius, rng, roughness) -> np.ndarray:
    """A round region whose radius is disturbed, as distance to its edge in units of the radius (below 1 is inside)."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    angle = np.arctan2(rows - row, columns - column)
    waves = sum(rng.normal(0, roughness / k) * np.cos(k * angle + rng.uniform(0, 6)) for k in range(2, 8))
    return np.hypot(rows - row, columns - column) / (radius * (1 + waves))


def _points(region, rng, count) -> list[tuple[int, int]]:
    rows, columns = np.nonzero(region)
    return [(int(rows[i]), int(columns[i])) for i in rng.integers(len(rows), size=count)]


def _add_covid(image, lungs, rng) -> np.ndarray:
    """Ground glass near the pleura of both lungs, consolidated in parts; returns its mask."""
    size = len(image)
    depth = ndimage.distance_transform_edt(lungs)
    haze = np.zeros(image.shape)
    middle = np.arange(size) < size // 2
    for half in (middle, ~middle):
        for row, column in _points(lungs & half & (depth < 0.07 * size), rng, rng.integers(1, 4)):
            blob = _blob(image.shape, row, column, size * rng.uniform(0.04, 0.11), rng, 0.15)
            haze = np.maximum(haze, np.clip(1.6 - blob, 0, 1) * rng.choice([0.5, 0.6, 1.0], p=[0.4, 0.35, 0.25]))
    haze = haze * lungs
    image += haze * (30 - image) * (haze > 0.1)
    return haze > 0.25


def _add_nodules(image, lungs, rng) -> tuple[np.ndarray, list[list[int]]]:
    """One to three solid nodules with rough edges that do not touch; returns instances and boxes."""
    size = len(image)
    instances, boxes = np.zeros(image.shape, np.uint8), []
    inner = lungs & (ndimage.distance_transform_edt(lungs) > 0.02 * size)
    for row, column in _points(inner, rng, rng.integers(1, 4)):
        nodule = _blob(image.shape, row, column, max(1.5, size * np.exp(rng.uniform(np.log(0.012), np.log(0.08)))), rng, 0.1) < 1
        if (ndimage.binary_dilation(nodule, iterations=2) & (instances > 0)).any():
            continue
        image[nodule] = rng.uniform(10, 60)
        instances[nodule] = len(boxes) + 1
        rows, columns = ndimage.find_objects(nodule.astype(np.uint8))[0]
        boxes.append([columns.start, rows.start, columns.stop, rows.stop])
    return instances, boxes


def make_phantom(folder, size: int = 256, seed: int = 0) -> str:
    """Make the phantom data set in a folder, unless it is already there.

    Every patient is normal, has COVID-19 or lung cancer, and gives three slices. As in real collections the labels are
    partial: every slice of the validation and test splits has a class; training slices lack one in turn; masks exist for
    COVID-19, boxes and instances for cancer, and both for normal slices ("empty" and []).

    Args:
        folder: to make; written under a temporary name, then renamed.
        size: rows and columns of the slices.
        seed: of everything random.

    Returns:
        The folder, with datalist.json, images (NIfTI in HU), masks and instances (PNG).

    Raises:
        ValueError: if the folder holds something else, or phantom data made with other arguments.
    """
    folder, arguments = Path(folder), {"size": size, "seed": seed}
    if (folder / "datalist.json").exists():
        found = json.loads((folder / "datalist.json").read_text()).get("phantom")
        if found != arguments:
            raise ValueError(f"{folder}: found phantom data of {found}, expected {arguments}; name or empty another folder")
        return str(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: found other files, expected an empty or missing folder for the phantom data")
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    for name in ("images", "masks", "instances"):
        (temporary / name).mkdir(parents=True, exist_ok=True)
    datalist = {"name": "phantom", "phantom": arguments, "classes": list(CLASSES)}
    patients = [(split, number) for split, count in SPLIT_GROUPS.items() for number in range(count)]
    for index, (split, number) in enumerate(tqdm(patients, desc="phantom data", unit="patient")):
        rng = np.random.default_rng([seed, size, index])
        for position in range(SLICES_PER_GROUP):
            record = _write_slice(temporary, rng, size, f"p{index:02d}_{position}", number % 3)
            if split == "training" and (number + position) % 4 == 0:
                del record["class"]
            datalist.setdefault(split, []).append({**record, "group": f"phantom/p{index:02d}", "source": "phantom"})
    (temporary / "datalist.json").write_text(json.dumps(datalist, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return str(folder)


def _write_slice(folder: Path, rng, size: int, name: str, label: int) -> dict:
    slice_ = make_slice(rng, size, label)
    # NIfTI's first axis is the column. Columns run to the patient's left and rows to posterior, both negative in RAS.
    affine = np.diag([-PIXEL_MM / size, -PIXEL_MM / size, 5.0, 1.0])
    nib.save(nib.Nifti1Image(slice_["image"].T[..., None], affine), folder / f"images/{name}.nii.gz")
    record = {"image": f"images/{name}.nii.gz", "class": label}
    if label == 0:
        record |= {"mask": "empty", "boxes": []}
    if label == 1:
        record["mask"] = f"masks/{name}.png"
        Image.fromarray(slice_["mask"].astype(np.uint8) * 255).save(folder / record["mask"])
    if label == 2:
        record |= {"boxes": slice_["boxes"], "instances": f"instances/{name}.png"}
        Image.fromarray(slice_["instances"]).save(folder / record["instances"])
    return record
