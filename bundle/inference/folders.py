"""The folders of results: how they are replaced, and what must not be."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bundle.data.volumes import unreadable
from bundle.errors import UserError
from bundle.files import unwritable

PREDICTIONS = "predictions.json"
UNFINISHED = ".tmp."  # how names of folders begin that are no results, or not yet


def disk_error(error: OSError, place: Path, default) -> UserError:
    """Say that the results at `place` cannot be written, or which other file cannot be read; `default` if none is named."""
    file = Path(error.filename or default)  # a full disk names none
    unfinished = any(part.startswith(UNFINISHED) for part in file.parts)
    if unfinished or place in (file, *file.parents) or file in place.parents:
        return unwritable(place, error)
    return unreadable(file, OSError(error.strerror or str(error)))


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
