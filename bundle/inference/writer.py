"""A result of a scan as a folder of files, in the forms that other programs read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bundle.data.series import read_header
from bundle.data.volumes import Scan, unreadable
from bundle.errors import UserError
from bundle.files import unwritable
from bundle.inference.markups import write_markups
from bundle.inference.results import Result

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.json"
UNFINISHED = ".tmp."  # how names of folders begin that are no results, or not yet

# Tags of patient and examination that predictions.json has with `keep_identifiers`; no other result ever has them.
IDENTIFIERS = ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "StudyID", "StudyDate")
IDENTIFIERS += ("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription")


def save_result(result: Result, folder) -> None:
    """`Result.save`: the folder is replaced as a whole."""
    folder = Path(folder)
    check_place(folder)
    try:
        with replacing_folder(folder) as new:
            write_result(result, new)
    except OSError as error:
        raise disk_error(error, folder, folder) from error


def disk_error(error: OSError, place: Path, default) -> UserError:
    """Say that the results at `place` cannot be written, or which other file cannot be read; `default` if none is named."""
    file = Path(error.filename or default)  # a full disk names none
    unfinished = any(part.startswith(UNFINISHED) for part in file.parts)
    if unfinished or place in (file, *file.parents) or file in place.parents:
        return unwritable(place, error)
    return unreadable(file, OSError(error.strerror or str(error)))


def write_result(result: Result, folder: Path) -> None:
    """Write all files of a result to an empty folder, predictions.json last; an OSError if one cannot be written."""
    scan, prediction = result.scan, result.prediction()
    if result.keep_identifiers and scan.kind == "dicom":
        prediction["identifiers"] = read_identifiers(scan)
    files = {"overlays": "overlays", "report": "report.html"}
    for kind, volume in result.volumes.items():
        files[kind] = f"{kind}.png" if scan.kind == "picture" else f"{kind}.nii.gz"
        volume.write(folder / files[kind])
    if scan.kind == "dicom":
        from bundle.inference.dicom import write_dicom  # highdicom needs pydicom 3, and MONAI Label pydicom 2

        labels = result.volumes["mask"].voxels() if "mask" in result.volumes else None
        files |= write_dicom(folder, scan.frames, prediction, labels)
    if "boxes" in result.slices[0] and scan.affine is not None:
        write_markups(folder / "markups.mrk.json", result.lesions, scan.affine, scan.axis)
        files["markups"] = "markups.mrk.json"
    prediction["files"] = files
    result.report.write(folder, prediction)
    (folder / PREDICTIONS).write_text(json.dumps(prediction, indent=1) + "\n")
    logger.info("; ".join([str(result), *prediction["warnings"][len(result.warnings) :]]))  # with those of what was written


def read_identifiers(scan: Scan) -> dict[str, str]:
    """Read those of `IDENTIFIERS` that the header of a DICOM scan has."""
    header = read_header(scan.sources[0][0], IDENTIFIERS)
    return {name: str(header[name].value) for name in IDENTIFIERS if name in header}


def read_prediction(folder) -> dict | None:
    """Content of the predictions.json in a folder; None if there is none or another program has written it."""
    try:
        found = json.loads(Path(folder, PREDICTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "stamp" in found else None


def check_place(place: Path) -> None:
    """Refuse a place that holds, or lies below, a file that this package has not written."""
    try:
        blocking = [path for path in (place, *place.parents) if path.is_file()]
        strange = place.is_dir() and any(place.iterdir()) and read_prediction(place) is None
    except OSError:  # a name that is too long: this scan fails when its turn comes
        return
    if blocking or strange:
        found = f"the file {blocking[0]}" if blocking else f"{place} with other content"
        raise UserError(f"output_dir: found {found}, expected a folder of results there or none; set another output_dir")


@contextmanager
def replacing_folder(place: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of the older one when the block ends, and is removed where it fails."""
    new, old = (place.with_name(f"{UNFINISHED}{uuid.uuid4().hex}") for _ in range(2))
    try:
        new.mkdir(parents=True)
        yield new
        if place.exists():  # moved away as a whole: a process killed while it removes the files would leave some
            os.replace(place, old)
        os.replace(new, place)
    except BaseException:
        if old.exists() and not place.exists():
            os.replace(old, place)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
