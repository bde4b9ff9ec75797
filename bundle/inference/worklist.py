"""The scans of a run: found, shared among processes, those that are done left out; and the tables over all of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch.distributed as dist

import bundle
from bundle.config import running_workflow
from bundle.data.volumes import Scan, find_scans
from bundle.errors import UserError
from bundle.files import file_hash, write_table

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.json"
UNFINISHED = ".tmp."  # how names of folders begin that are no results, or not yet
# Knobs that do not change what is predicted for a scan; the files behind checkpoint and reference count by their content.
WITHOUT_EFFECT = ("bundle_root", "dataset_dir", "input", "output_dir", "checkpoint", "reference", "device", "batch_size")
WITHOUT_EFFECT += ("num_workers", "imports", "initialize", "run", "network_def", "export_task")


class Worklist:
    """The scans that this process has to predict, in the order of their paths.

    Every scan has a folder of results; it gets its name when all of it is written, so that one with predictions.json in it
    is done. A scan that is done with the same input, weights and knobs is left out. Processes started by torchrun take
    every WORLD_SIZE-th scan, each from another start.

    Args:
        source: file, folder or glob pattern.
        output_dir: folder of the results.
        run: text that stands for the weights and knobs, see `fingerprint`.

    Attributes:
        scans: to be predicted by this process.
        failures: {"scan" or file, "reason"} of what could not be read so far.

    Raises:
        FileNotFoundError, ValueError: of `find_scans`.
        UserError: if something else than results of a scan lies where its results belong.
    """

    def __init__(self, source, output_dir, run: str) -> None:
        self.folder, self.run = Path(output_dir), run
        self.rank, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        scans, failures = find_scans(source, output_dir)
        for failure in failures:
            logger.warning(f"skipped {failure['reason']}")
        # Dealt out before looking at what is done: another process may have finished scans by now, and all must agree.
        mine = scans[self.rank :: self.processes]
        self.scans = [scan for scan in mine if not self._is_done(scan)]
        for scan in self.scans:
            self._check_place(self.folder / scan.name)
        self.failures: list[dict] = failures if self.rank == 0 else []
        share = "" if self.processes == 1 else f", {len(mine)} of them for process {self.rank}"
        done = len(mine) - len(self.scans)
        logger.info(f"{source}: {len(scans)} scans{share}, {done} of them done, {len(failures)} files unreadable")

    def stamp(self, scan: Scan) -> str:
        """What the results of a scan depend on: its files, the weights and the knobs."""
        return hashlib.sha256(f"{scan.stamp} {self.run}".encode()).hexdigest()

    def _is_done(self, scan: Scan) -> bool:
        found = _read_prediction(self.folder / scan.name / PREDICTIONS)
        return found is not None and found["stamp"] == self.stamp(scan)

    def _check_place(self, place: Path) -> None:
        """Refuse to put results where they would replace, or not be let in by, what this package has not written."""
        files = [path for path in (place, *place.parents) if path.is_file()]
        strange = place.is_dir() and any(place.iterdir()) and _read_prediction(place / PREDICTIONS) is None
        if files or strange:
            found = f"the file {files[0]}" if files else f"{place} with other content"
            raise UserError(f"output_dir: found {found}, expected a folder of results there or none; set another output_dir")

    def fail(self, name: str, reason: str) -> None:
        """Note that a scan could not be predicted; what was written of it is removed."""
        logger.warning(f"skipped {reason}")
        shutil.rmtree(self.unfinished(name), ignore_errors=True)
        self.failures.append({"file": name, "reason": reason})

    def unfinished(self, name: str) -> Path:
        """Folder of the results of a scan until all of them are written."""
        return (self.folder / name).with_name(f"{UNFINISHED}{Path(name).name}")

    def begin(self, name: str) -> Path:
        """Make that folder anew."""
        folder = self.unfinished(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def complete(self, name: str) -> None:
        """Give the folder its name, in place of older results."""
        folder, older = self.folder / name, f"{UNFINISHED}older"
        if folder.exists():  # moved away whole: killed in the middle of removing it, a half would be left
            os.replace(folder, self.unfinished(name) / older)
        os.replace(self.unfinished(name), folder)
        shutil.rmtree(folder / older, ignore_errors=True)

    def finish(self) -> None:
        """Write failures.csv, of this run, and scans.csv, slices.csv and lesions.csv over everything else in the folder.

        Older results of a scan that failed now stay in its folder and are not in the tables; those of a DICOM series whose
        files cannot be read any more are, since nothing tells which series they were of. Where there are several processes,
        one writes, when all are ready.

        Raises:
            UserError: if nothing at all could be predicted.
        """
        failures = self.failures
        if self.processes > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=7))  # the others may have much longer to go
            gathered = [None] * self.processes if self.rank == 0 else None
            dist.gather_object(failures, gathered)
            dist.destroy_process_group()
            if self.rank:
                return
            failures = [failure for part in gathered for failure in part]
        failed = {self.folder / failure["file"] / PREDICTIONS for failure in failures}
        found = sorted(set(self.folder.glob(f"**/*/{PREDICTIONS}")) - failed)
        whole = [path for path in found if not path.parent.name.startswith(UNFINISHED)]
        predictions = [prediction for path in whole if (prediction := _read_prediction(path))]
        write_table(failures, self.folder / "failures.csv", ("file", "reason"))
        rows = {"scans": map(scan_row, predictions)}
        rows["slices"] = chain.from_iterable(map(slice_rows, predictions))
        rows["lesions"] = chain.from_iterable(map(lesion_rows, predictions))
        for name, table in rows.items():
            path = self.folder / f"{name}.csv"
            if predictions:
                write_table(table, path, ("scan",))
            else:
                path.unlink(missing_ok=True)  # of an earlier run
        if not predictions:
            raise UserError(f"input: nothing could be read; {failures[0]['reason']}")
        logger.info(f"{self.folder}: {len(predictions)} scans, {len(failures)} failures; see scans.csv and failures.csv")


def _read_prediction(path: Path) -> dict | None:
    """Content of predictions.json; None if there is no such file or another program has written it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) and "stamp" in found else None


def fingerprint(*files) -> str:
    """Text that changes with the content of the files (those that exist) and with every knob that changes predictions."""
    config = running_workflow().parser.get()
    knobs = {id: value for id, value in config.items() if id not in WITHOUT_EFFECT and not id.startswith("_")}
    text = json.dumps(knobs, sort_keys=True, default=str)
    return " ".join([bundle.__version__, *map(file_hash, files), hashlib.sha256(text.encode()).hexdigest()])


def scan_row(prediction: Mapping) -> dict:
    """Row of scans.csv: what is known of a scan as a whole."""
    row = {"scan": prediction["scan"]}
    if classification := prediction.get("classification"):
        row["predicted"] = classification["predicted"]
        row |= {f"probability {name}": value for name, value in classification["probabilities"].items()}
    for name, found in prediction.get("segmentation", {}).items():
        row |= {f"{name} {key}": found[key] for key in ("volume_ml", "share_of_lung", "pixels")}
    if "detection" in prediction:
        row["lesions"] = len(prediction["detection"])
        row["highest score"] = max((lesion["score"] for lesion in prediction["detection"]), default=None)
    row["lung_ml"] = prediction["lung"] and prediction["lung"]["volume_ml"]
    if reconstruction := prediction.get("reconstruction"):
        row["reconstruction_error"] = reconstruction["mean_error"]
    row["novelty"] = prediction["novelty"] and prediction["novelty"]["distance"]
    return row | {"slices": len(prediction["slices"]), "warnings": "; ".join(prediction["warnings"])}


def slice_rows(prediction: Mapping) -> Iterable[dict]:
    """Rows of slices.csv."""
    for found in prediction["slices"]:
        row = {"scan": prediction["scan"], "slice": found["index"], "position_mm": found["position_mm"]}
        row |= {f"probability {name}": value for name, value in found.get("probabilities", {}).items()}
        for name, pixels in found.get("lesion_pixels", {}).items():
            row |= {f"{name} pixels": pixels, f"{name} mm2": found["lesion_mm2"] and found["lesion_mm2"][name]}
        if "boxes" in found:
            row |= {
                "boxes": len(found["boxes"]),
                "highest score": max((box["score"] for box in found["boxes"]), default=None),
            }
        keys = ("lung_mm2", "reconstruction_error", "novelty")
        yield row | {key: found[key] for key in keys if key in found}


def lesion_rows(prediction: Mapping) -> Iterable[dict]:
    """Rows of lesions.csv."""
    for lesion in prediction.get("detection", []):
        row = {"scan": prediction["scan"], "lesion": lesion["id"], "score": lesion["score"]}
        row |= dict(zip(("first slice", "last slice"), lesion["slices"]))
        row |= dict(zip(("x1", "y1", "x2", "y2"), lesion["box"]))
        row |= {f"center {axis} LPS mm": value for axis, value in zip("xyz", lesion["center_mm"] or [None] * 3)}
        row |= {f"size {axis} mm": value for axis, value in zip("xyz", lesion["size_mm"] or [None] * 3)}
        yield row | {"volume_ml": lesion["volume_ml"]}
