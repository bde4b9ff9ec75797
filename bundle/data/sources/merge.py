"""Layouts by name, how a folder's layout is recognised, and one datalist from many folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bundle.data.datalist import SPLITS, annotated_tasks, validate, write_datalist
from bundle.data.sources import tables, volumes
from bundle.tasks import CLASS, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK, SOURCE, TASKS

logger = logging.getLogger(__name__)
CLASSES = ("other", "COVID-19", "lung cancer")


class Source(NamedTuple):
    """A layout: `read(folder, export)` yields (split or None, record); `marks` are glob patterns that tell it apart.

    `source` is the name records carry: layouts of one data set share it, so that they count as one.
    """

    read: Callable
    marks: tuple[str, ...]
    source: str


SOURCES = {
    "covid_ct": Source(tables.covid_ct, ("labels.csv", "images/covid", "images/other"), "covid_ct"),
    "iqoth_nccd": Source(tables.iqoth_nccd, ("labels.csv", "images/lung_cancer"), "iqoth_nccd"),
    "medseg_covid19": Source(tables.medseg_covid19, ("labels.csv", "masks_multiclass"), "medseg_covid19"),
    "medseg_covid19_official": Source(partial(tables.medseg_covid19, official_split=True), (), "medseg_covid19"),
    "lung_tumor_slices": Source(tables.lung_tumor_slices, ("labels.csv", "masks/s*_*.png"), "lung_tumor_slices"),
    "covid_volumes_unlabelled": Source(
        tables.unlabelled_slices, ("labels.csv", "images/coronacases_*.png"), "covid_volumes_unlabelled"
    ),
    "covid_ct_original": Source(tables.covid_ct_original, ("Images-processed", "Data-split"), "covid_ct"),
    "iqoth_nccd_original": Source(tables.iqoth_nccd_original, ("Normal cases", "Malignant cases"), "iqoth_nccd"),
    "inf_net": Source(tables.inf_net, ("TrainingSet/LungInfection-Train", "TestingSet"), "medseg_covid19"),
    "medseg_nifti": Source(volumes.medseg_nifti, ("tr_im.nii.gz", "tr_mask.nii.gz"), "medseg_covid19"),
    "msd_lung": Source(volumes.msd_lung, ("imagesTr/lung_*.nii.gz", "labelsTr"), "msd_lung"),
    "luna16": Source(volumes.luna16, ("annotations.csv",), "luna16"),
    "coco": Source(tables.coco, ("annotations_*.json",), "coco"),
    "csv": Source(tables.table_csv, (), "csv"),
}


def detect_layout(path) -> str | None:
    """Name of the first layout of `SOURCES` all of whose marks lie in the folder; "csv" for a CSV file; None for neither."""
    path = Path(path)
    if path.is_file():
        return "csv" if path.suffix.lower() == ".csv" else None
    return next((n for n, s in SOURCES.items() if s.marks and all(any(path.glob(m)) for m in s.marks)), None)


def find_layouts(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """(layout, path) of every LAYOUT=PATH or PATH; a folder of no layout stands for those in it that have one.

    Raises:
        ValueError: if a layout is unknown or nothing is recognised.
        FileNotFoundError: if there is no such path.
    """
    found = []
    for argument in arguments:
        name, _, path = argument.rpartition("=") if argument.split("=")[0] in SOURCES else ("", "", argument)
        path = Path(path)
        if not path.exists():
            layouts = f" and no layout; layouts: {', '.join(SOURCES)}" if "=" in argument else ""
            raise FileNotFoundError(f"{argument}: no such folder or file{layouts}")
        named = name or detect_layout(path)
        inside = [(named, path)] if named else [(detect_layout(p), p) for p in sorted(path.glob("*")) if p.is_dir()]
        known = [(layout, place) for layout, place in inside if layout]
        if not known:
            raise ValueError(f"{path}: found no known layout, expected one of {', '.join(SOURCES)}; name it: LAYOUT={path}")
        for place in (place for layout, place in inside if not layout):
            logger.warning(f"{place}: left out, it has no known layout")
        found += known
    return found


def merge(arguments: Sequence[str], output_dir, classes: Sequence[str] = CLASSES, seed: int = 0) -> dict:
    """Write `output_dir`/datalist.json with the records of all sources, validated, and what they export beside it.

    Layouts without splits are divided by group: 70 % for training, 10 % for validation, 20 % for test.

    Args:
        arguments: of `find_layouts`.
        output_dir: made if missing; paths in the datalist are relative to it.
        classes: names of the classes 0, 1, 2 …
        seed: of the division into splits.

    Returns:
        The datalist.

    Raises:
        ValueError, FileNotFoundError: in one line, before anything but exported slices is written.
    """
    output = Path(output_dir)
    datalist = {"name": "chest CT", "classes": list(classes), **{split: [] for split in SPLITS}}
    for layout, path in find_layouts(arguments):
        source = SOURCES[layout]
        records = list(source.read(path, output / "export"))
        if not records:
            raise ValueError(f"{path}: found no record, expected the layout {layout} as docs/data.md describes it")
        for split, record in _with_splits(records, seed):
            files = {
                key: os.path.relpath(record[key], output)
                for key in (IMAGE, MASK, INSTANCES)
                if record.get(key, EMPTY_MASK) != EMPTY_MASK
            }
            datalist[split].append({**record, **files, SOURCE: record.get(SOURCE, source.source)})
    validate(datalist, output)
    write_datalist(datalist, output / "datalist.json")
    return datalist


def _with_splits(records: list[tuple[str | None, dict]], seed: int) -> list[tuple[str, dict]]:
    groups = sorted({record[GROUP] for split, record in records if split is None})
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    split_of = {groups[g]: "training" for g in shuffled}
    tenth = len(groups) // 10 or min(1, len(groups) // 3)
    split_of |= {groups[g]: "validation" for g in shuffled[:tenth]}
    split_of |= {groups[g]: "test" for g in shuffled[tenth : 3 * tenth]}
    return [(split or split_of[record[GROUP]], record) for split, record in records]


def table(datalist: dict) -> str:
    """Markdown table of a datalist: for each source and split the records, groups, annotations by task and classes."""
    classes = datalist["classes"]
    lines = [
        f"| source | split | slices | groups | {' | '.join(TASKS)} | {' | '.join(classes)} |",
        "|" + "---|" * (4 + len(TASKS) + len(classes)),
    ]
    for source in sorted({record[SOURCE] for split in SPLITS for record in datalist[split]}):
        for split in SPLITS:
            records = [record for record in datalist[split] if record[SOURCE] == source]
            if not records:
                continue
            tasks = Counter(task for record in records for task in annotated_tasks(record))
            labels = Counter(record.get(CLASS) for record in records)
            counts = [len(records), len({record[GROUP] for record in records}), *(tasks[task] for task in TASKS)]
            counts += [labels[index] for index in range(len(classes))]
            lines.append(f"| {source} | {split} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"
