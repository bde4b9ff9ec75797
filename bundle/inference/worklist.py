"""The scans of a run, those that are still to be predicted, the folder of their results, and the tables over all of them."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from monai.bundle import ConfigWorkflow

import bundle
from bundle import files
from bundle.data.volumes import Scan, find_scans
from bundle.errors import UserError, user_message
from bundle.files import file_hash, text_hash, write_table
from bundle.inference.folders import PREDICTIONS, UNFINISHED, check_place, disk_error, read_prediction, replacing_folder
from bundle.inference.results import Result
from bundle.tasks import Task

logger = logging.getLogger(__name__)

LOG = "failures.log"  # tracebacks of this run
LEFTOVER = re.compile(r"\.tmp\.[0-9a-f]{32}|\.[0-9a-f]{32}\.tmp")  # names that only a killed run leaves behind
# Knobs that do not change what is predicted for a scan; the files behind checkpoint and reference count by their content.
WITHOUT_EFFECT = ("bundle_root", "dataset_dir", "input", "output_dir", "checkpoint", "reference", "device", "batch_size")
WITHOUT_EFFECT += ("num_workers", "imports", "initialize", "load", "run", "workflow", "network_def", "export_task")


class Worklist:
    """The scans that this process has to predict, in the order of their paths, and the folder of their results.

    A scan with a predictions.json of the same input, weights and knobs is done. Of several processes started by torchrun,
    each takes every WORLD_SIZE-th scan. Without a `source` there are no scans.

    Attributes:
        scans: of this process, done or not.
        failures: {"scan", "reason", "log"} of what could not be predicted so far.
    """

    def __init__(self, source, output_dir) -> None:
        self.source, self.folder = source, Path(output_dir)
        self.rank, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        scans, failures = find_scans(source, output_dir) if source else ([], [])
        for failure in failures:
            logger.warning(f"skipped {failure['reason']}")
        # Shared out before what is done is looked up: another process may have finished scans by now, and all must agree.
        self.scans, self.total = scans[self.rank :: self.processes], len(scans)
        self.failures = [{"scan": row["file"], "reason": row["reason"]} for row in failures if self.rank == 0]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder while the block runs, and remove what killed runs have left in it."""
        if self.processes > 1:
            dist.init_process_group("gloo", timeout=timedelta(days=7))  # the others may have much longer to go
        try:
            with files.locked(self.folder) if self.rank == 0 else nullcontext():
                if self.rank == 0:
                    (self.folder / LOG).unlink(missing_ok=True)
                    for path in [path for path in self.folder.rglob("*") if LEFTOVER.fullmatch(path.name)]:
                        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                if self.processes > 1:
                    dist.barrier()  # the first process has the lock
                yield
        finally:
            if self.processes > 1:
                dist.destroy_process_group()

    def pending(self, stamp: Callable[[Scan], str]) -> list[Scan]:
        """The scans without results of their `stamp`; a UserError if something else lies in the place."""
        done = ((read_prediction(self.folder / scan.name) or {}).get("stamp") for scan in self.scans)
        pending = [scan for scan, found in zip(self.scans, done) if found != stamp(scan)]
        for scan in pending:
            check_place(self.folder / scan.name)
        share = "" if self.processes == 1 else f", {len(self.scans)} of them for process {self.rank}"
        done = len(self.scans) - len(pending)
        logger.info(f"{self.source}: {self.total} scans{share}, {done} of them done, {len(self.failures)} files unreadable")
        return pending

    @contextmanager
    def attempt(self, scan: Scan, writing: bool = False) -> Iterator[None]:
        """Let an exception of the block, which reads the scan or is `writing` results, fail this scan alone, and close it."""
        try:
            yield
        except Exception as error:
            self.fail(scan, error, writing)
        finally:
            scan.close()

    def publish(self, scan: Scan, result: Result) -> None:
        """Write a result in place of older ones of the scan."""
        with self.attempt(scan, writing=True), replacing_folder(self.folder / scan.name) as new:
            result.write(new)

    def fail(self, scan: Scan, error: Exception, writing: bool = False) -> None:
        """Record in one line why a scan could not be predicted; the traceback of a bug goes to a log file."""
        row, place = {"scan": scan.name, "reason": user_message(error)}, self.folder / scan.name
        if row["reason"] is None and isinstance(error, OSError) and error.strerror:
            row["reason"] = str(disk_error(error, place, place if writing else scan.path))
        elif row["reason"] is None:
            cause = error
            while cause.__cause__ is not None:  # MONAI wraps what a transform raises
                cause = cause.__cause__
            what = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
            row |= {"reason": f"{scan.path}: a bug of this program, {what}; see {LOG}", "log": LOG}
            self._log(scan, error)
        logger.warning(f"skipped {row['reason']}")
        self.failures.append(row)

    def _log(self, scan: Scan, error: Exception) -> None:
        text = f"{scan.name}\n{''.join(traceback.format_exception(error))}\n"
        try:
            with (self.folder / LOG).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)  # at once: the processes of torchrun share the file
        except OSError:
            logger.error(text)

    def finish(self, tasks: Sequence[Task]) -> None:
        """Write failures.csv, of this run, and scans.csv, slices.csv and lesions.csv over everything else in the folder.

        Older results of a scan that fails now stay in their folder but are not in the tables, except those of a DICOM series
        none of whose files can be read: such a series cannot be recognised. Of several processes the first one writes.
        """
        failures = self.failures
        if self.processes > 1:
            gathered = [None] * self.processes if self.rank == 0 else None
            dist.gather_object(failures, gathered)
            if self.rank:
                return
            failures = [failure for part in gathered for failure in part]
        failures = sorted(failures, key=lambda failure: failure["scan"])
        write_table(failures, self.folder / "failures.csv", ("scan", "reason", "log"))
        failed = {self.folder / failure["scan"] for failure in failures}
        found = sorted({path.parent for path in self.folder.glob(f"**/*/{PREDICTIONS}")} - failed)
        whole = [folder for folder in found if not folder.name.startswith(UNFINISHED)]
        scans = 0
        for name, rows in {"scans": scan_rows, "slices": slice_rows, "lesions": lesion_rows}.items():
            table = []
            for prediction in filter(None, map(read_prediction, whole)):  # once a table: one is in memory at a time
                table += rows(prediction, tasks)
                scans += name == "scans"
            if scans:
                write_table(table, self.folder / f"{name}.csv", ("scan",))
            else:
                (self.folder / f"{name}.csv").unlink(missing_ok=True)  # of an earlier run
        if not scans:
            raise UserError(f"input: nothing could be read; {failures[0]['reason']}")
        where = "see report.html of each scan, scans.csv and failures.csv"
        logger.info(f"{self.folder}: {scans} scans, {len(failures)} failures; {where}")


def fingerprint(workflow: ConfigWorkflow, *files) -> str:
    """Text that changes with the content of the files (those that exist) and with every knob that changes predictions."""
    knobs = {id: value for id, value in workflow.parser.get().items() if id not in WITHOUT_EFFECT and not id.startswith("_")}
    text = json.dumps(knobs, sort_keys=True, default=str)
    return " ".join([bundle.__version__, *map(file_hash, files), text_hash(text)])


def scan_rows(prediction: Mapping, tasks: Sequence[Task]) -> Iterable[dict]:
    """The row of scans.csv: what is known of a scan as a whole."""
    row = {"scan": prediction["scan"]}
    for task in tasks:
        row |= task.scan_columns(prediction[task.name]) if task.name in prediction else {}
    row["lung_ml"] = prediction["lung"] and prediction["lung"]["volume_ml"]
    row["novelty"] = prediction["novelty"] and prediction["novelty"]["distance"]
    yield row | {"slices": len(prediction["slices"]), "warnings": "; ".join(prediction["warnings"])}


def slice_rows(prediction: Mapping, tasks: Sequence[Task]) -> Iterable[dict]:
    """Rows of slices.csv."""
    for found in prediction["slices"]:
        row = {"scan": prediction["scan"], "slice": found["index"], "position_mm": found["position_mm"]}
        for task in tasks:
            row |= task.slice_columns(found) if task.name in prediction else {}
        yield row | {key: found[key] for key in ("lung_mm2", "novelty")}


def lesion_rows(prediction: Mapping, tasks: Sequence[Task]) -> Iterable[dict]:
    """Rows of lesions.csv."""
    for lesion in (lesion for task in tasks if task.name in prediction for lesion in task.lesions(prediction[task.name])):
        row = {"scan": prediction["scan"], "lesion": lesion["id"], "score": lesion["score"]}
        row |= dict(zip(("first slice", "last slice"), lesion["slices"]))
        row |= dict(zip(("x1", "y1", "x2", "y2"), lesion["box"]))
        row |= {f"center {axis} LPS mm": value for axis, value in zip("xyz", lesion["center_mm"] or [None] * 3)}
        row |= {f"size {axis} mm": value for axis, value in zip("xyz", lesion["size_mm"] or [None] * 3)}
        yield row | {"volume_ml": lesion["volume_ml"]}
