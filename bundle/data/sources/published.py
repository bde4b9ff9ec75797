"""Layouts of pictures in folders, as their authors published them."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from bundle.data.sources.common import SPLIT, SPLIT_NAMES, Records, write_picture
from bundle.data.transforms import LoadSlice
from bundle.errors import UserError
from bundle.names import CLASS, GROUP, IMAGE, MASK

logger = logging.getLogger(__name__)
# Correlation of neighbours' thumbnails below which IQ-OTH/NCCD's numbering is taken to have reached another patient.
SAME_PATIENT = 0.9


def covid_ct_original(folder: Path, export: Path) -> Records:
    """COVID-CT; patients come from *MetaInfo*.csv; an image that these do not name is a group of its own."""
    patients, unknown = _patients(folder), 0
    for kind, label in (("COVID", "COVID-19"), ("NonCOVID", "other")):
        for split in ("train", "val", "test"):
            listing = folder / "Data-split" / kind / f"{split}CT_{kind}.txt"
            if not listing.is_file():
                raise UserError(f"{listing}: no such file, expected the official list of COVID-CT")
            for name in filter(None, map(str.strip, listing.read_text(errors="replace").splitlines())):
                image = folder / "Images-processed" / f"CT_{kind}" / name
                unknown += name not in patients
                yield {IMAGE: str(image), CLASS: label, GROUP: patients.get(name, name), SPLIT: SPLIT_NAMES[split]}
    if unknown:
        logger.info(f"{folder}: {unknown} images of patients that no *MetaInfo*.csv names, each a group of its own")


def _patients(folder: Path) -> dict[str, str]:
    """File name -> patient, from COVID-CT's *MetaInfo*.csv, whose rows have more or fewer cells than columns."""
    patients = {}
    for path in sorted(folder.rglob("*MetaInfo*.csv")):
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            for row in csv.DictReader(file):
                row = {str(key).strip().lower(): cell for key, cell in row.items()}
                name, patient = row.get("file name") or row.get("image name"), row.get("patient id")
                if name and patient:
                    name = name.strip() if name.strip().endswith((".png", ".jpg")) else f"{name.strip()}.png"  # some lack it
                    patients[name] = f"{path.stem} {patient.strip()}"
    return patients


def iqoth_nccd_original(folder: Path, export: Path) -> Records:
    """IQ-OTH/NCCD. No patient is named, but numbers run patient by patient: a group is a run of like slices."""
    for case, label in (("Normal", "other"), ("Bengin", "other"), ("Malignant", "lung cancer")):
        run, before = 0, None
        images = pictures(folder / f"{case} cases")
        for image in sorted(images, key=lambda path: int("".join(filter(str.isdigit, path.stem)) or 0)):
            thumbnail = np.asarray(Image.fromarray(_grey(image)).resize((32, 32)), float)
            thumbnail = (thumbnail - thumbnail.mean()) / max(thumbnail.std(), 1e-6)
            run += before is not None and float((thumbnail * before).mean()) < SAME_PATIENT  # their correlation
            before = thumbnail
            yield {IMAGE: str(image), CLASS: label, GROUP: f"{case.lower()}_{run}"}


def pictures(folder: Path) -> list[Path]:
    """PNG and JPEG files of a folder, by name."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected one of pictures")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))


def _grey(path: Path) -> np.ndarray:
    return LoadSlice()(path)[0].numpy().astype(np.uint8)


def inf_net(folder: Path, export: Path) -> Records:
    """Inf-Net's release, whose pictures lie transposed: they are written below `export` with the spine down.

    A seventh of the training slices, evenly spaced, is for validation. Patients are not named: every slice is a group.
    """
    training, test = folder / "TrainingSet/LungInfection-Train/Doctor-label", folder / "TestingSet/LungInfection-Test"
    for place, splits in ((training, ["validation"] + 6 * ["training"]), (test, ["test"])):
        masks = {path.stem: path for path in pictures(place / "GT")}
        for index, image in enumerate(pictures(place / "Imgs")):
            if image.stem not in masks:
                raise UserError(f"{place / 'GT' / image.stem}.png: no such file, expected the mask of {image}")
            split, mask = splits[index % len(splits)], _grey(masks[image.stem])
            record = {
                IMAGE: write_picture(_grey(image).T, export / place.name / "image" / f"{image.stem}.png"),
                MASK: write_picture(np.uint8(mask.T > 127), export / place.name / "mask" / f"{image.stem}.png"),
            }
            yield {**record, GROUP: f"{place.name} {image.stem}", SPLIT: split}
