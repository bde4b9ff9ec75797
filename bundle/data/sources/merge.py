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
from tqdm import tqdm

from bundle.data.datalist import SPLITS, annotated_tasks, validate
from bundle.data.sources import published, tables, volumes
from bundle.errors import UserError
from bundle.files import write_json
from bundle.names import BOXES, CLASS, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK, SOURCE, TASKS

logger = logging.getLogger(__name__)
CLASSES = ("other", "COVID-19", "lung cancer")


class Source(NamedTuple):
    """A layout: `read(folder, export)` yields (split or None, record); `marks` are glob patterns that tell it apart.

    `source` is the name that records carry and groups begin with: layouts of one data set share it, so that they count as
    one, and a merge takes one of them. Where it is empty, the folder or file gives its name.
    """

    read: Callable
    marks: tuple[str, ...]
    source: str = ""


SOURCES = {
    "covid_ct": Source(tables.covid_ct, ("labels.csv", "images/covid", "images/other"), "covid_ct"),
    "iqoth_nccd": Source(tables.iqoth_nccd, ("labels.csv", "images/lung_cancer"), "iqoth_nccd"),
    "medseg_covid19": Source(tables.medseg_covid19, ("labels.csv", "masks_multiclass"), "medseg_covid19"),
    "medseg_covid19_official": Source(partial(tables.medseg_covid19, official_split=True), (), "medseg_covid19"),
    "lung_tumor_slices": Source(tables.lung_tumor_slices, ("labels.csv", "masks/s*_*.png"), "lung_tumor_slices"),
    "covid_volumes_unlabelled": Source(
        tables.unlabelled_slices, ("labels.csv", "images/coronacases_*.png"), "covid_volumes_unlabelled"
    ),
    "covid_ct_original": Source(published.covid_ct_original, ("Images-processed", "Data-split"), "covid_ct"),
    "iqoth_nccd_original": Source(published.iqoth_nccd_original, ("Normal cases", "Malignant cases"), "iqoth_nccd"),
    "inf_net": Source(published.inf_net, ("TrainingSet/LungInfection-Train", "TestingSet"), "medseg_covid19"),
    "medseg_nifti": Source(volumes.medseg_nifti, ("tr_im.nii.gz", "tr_mask.nii.gz"), "medseg_covid19"),
    "msd_lung": Source(volumes.msd_lung, ("imagesTr/lung_*.nii.gz", "labelsTr"), "msd_lung"),
    "luna16": Source(volumes.luna16, ("annotations.csv", "**/*.mhd"), "luna16"),
    "coco": Source(tables.coco, ("annotations_*.json",)),
    "csv": Source(tables.table_csv, ()),
}


def detect_layout(path) -> str | None:
    """Name of the first layout of `SOURCES` all of whose marks lie in the folder; "csv" for a CSV file; None for neither."""
    path = Path(path)
    if path.is_file():
        return "csv" if path.suffix.lower() == ".csv" else None
    return next((n for n, s in SOURCES.items() if s.marks and all(any(path.glob(m)) for m in s.marks)), None)


def find_layouts(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """(layout, path) of every LAYOUT=PATH or PATH; a folder of no layout stands for those in it that have one.

    No path is returned twice: the layout that an argument names for it goes before the one that is recognised.

    Raises:
        UserError: if two layouts are named for one path, or none is recognised.
        UserError: if there is no such path.
    """
    named: dict[Path, str] = {}
    recognised: dict[Path, str] = {}
    for argument in arguments:
        layout, _, path = argument.partition("=") if argument.split("=")[0] in SOURCES else ("", "", argument)
        if not Path(path).exists():
            layouts = f" and no layout; layouts: {', '.join(SOURCES)}" if "=" in argument else ""
            raise UserError(f"{argument}: no such folder or file{layouts}")
        path = Path(path).resolve()
        if layout and named.setdefault(path, layout) != layout:
            raise UserError(f"{path}: found the layouts {named[path]} and {layout}, expected one")
        if not layout:
            recognised |= _recognised(path)
    found = recognised | named
    for path, layout in recognised.items():
        if not layout and path not in named:
            logger.warning(f"{path}: left out, it has no known layout")
    known = [(layout, path) for path, layout in found.items() if layout]
    for layout, path in known:
        logger.info(f"{path}: read as {layout}")
    return known


def _recognised(path: Path) -> dict[Path, str]:
    """Path -> layout, of the path itself or of the folders in it; "" for a folder in it that has none."""
    layout = detect_layout(path)
    inside = {path: layout} if layout else {p: detect_layout(p) or "" for p in sorted(path.glob("*")) if p.is_dir()}
    if not any(inside.values()):
        raise UserError(f"{path}: found no known layout, expected one of {', '.join(SOURCES)}; name it: LAYOUT={path}")
    return inside


def merge(arguments: Sequence[str], output_dir, classes: Sequence[str] = CLASSES, seed: int = 0) -> dict:
    """Write `output_dir`/datalist.json with the records of all sources, validated, and what they export beside it.

    Groups whose layout knows no split are drawn, source by source: 70 % for training, 10 % for validation, 20 % for test.

    Args:
        arguments: of `find_layouts`.
        output_dir: made if missing; paths in the datalist are relative to it.
        classes: names of the classes 0, 1, 2 …; a layout's classes are found in them by name.
        seed: of the draw.

    Returns:
        The datalist.

    Raises:
        ValueError, FileNotFoundError: in one line, before anything but exported slices is written.
    """
    layouts = find_layouts(arguments)
    _refuse_two_layouts_of_one(layouts)
    output = Path(output_dir).resolve()  # a relative path through a link would lead elsewhere
    output.mkdir(parents=True, exist_ok=True)
    sources: dict[str, list[tuple[str | None, dict]]] = {}
    named: dict[str, Path] = {}  # what a source is called after, where neither its layout nor its records name it
    for number, (layout, path) in enumerate(layouts):
        source = SOURCES[layout]
        export = output / "export" / f"{number:02d}_{path.stem}"
        records = list(tqdm(source.read(path, export), desc=path.name, unit="slice", disable=None))
        if not records:
            raise UserError(f"{path}: found no record, expected the layout {layout} as docs/data.md describes it")
        unnamed = not source.source and any(SOURCE not in record for _, record in records)
        if unnamed and named.setdefault(path.stem, path) != path:
            raise UserError(
                f"{path}: found the name of {named[path.stem]}, whose patients would count as the same, expected another one"
            )
        for split, record in records:
            record = _finished(record, source.source or path.stem, output, classes)
            sources.setdefault(record[SOURCE], []).append((split, record))
    datalist = {"name": "chest CT", "classes": list(classes), **{split: [] for split in SPLITS}}
    for records in sources.values():
        for split, record in _with_splits(records, seed):
            datalist[split].append(record)
    validate(datalist, output)
    write_json(datalist, output / "datalist.json")
    return datalist


def _refuse_two_layouts_of_one(layouts: Sequence[tuple[str, Path]]) -> None:
    """Refuse a data set in two layouts: they name groups differently, so that a slice could lie in two splits unseen."""
    first: dict[str, tuple[str, Path]] = {}
    for layout, path in layouts:
        source = SOURCES[layout].source
        if source and first.setdefault(source, (layout, path))[0] != layout:
            raise UserError(
                f"{path}: found {source} as {layout}, and as {first[source][0]} in {first[source][1]}, expected it in one layout"
            )


def _finished(record: dict, source: str, output: Path, classes: Sequence[str]) -> dict:
    """The record with its source, paths from `output`, a class number for a name, and a group that no other source has."""
    source = record.get(SOURCE, source)
    finished = {**record, GROUP: f"{source}/{record[GROUP]}", SOURCE: source}
    for key in (IMAGE, MASK, INSTANCES):
        if record.get(key, EMPTY_MASK) != EMPTY_MASK:
            finished[key] = os.path.relpath(record[key], output)
    if isinstance(record.get(CLASS), str):
        if record[CLASS] not in classes:
            expected = f"a number from 0 to {len(classes) - 1} or one of {', '.join(classes)}; name others with --classes"
            raise UserError(f"{record[IMAGE]}: {CLASS}: found {record[CLASS]!r}, expected {expected}")
        finished[CLASS] = list(classes).index(record[CLASS])
    return finished


def _with_splits(records: list[tuple[str | None, dict]], seed: int) -> list[tuple[str, dict]]:
    """The records with a split for those that have none: their group's where it has one, otherwise drawn."""
    split_of = {record[GROUP]: split for split, record in records if split}
    groups = sorted({record[GROUP] for _, record in records} - split_of.keys())
    shuffled = [groups[index] for index in np.random.default_rng(seed).permutation(len(groups))]
    few = len(groups) < 3
    validation = 0 if few else max(1, round(0.1 * len(groups)))
    test = 0 if few else max(1, round(0.2 * len(groups)))
    split_of |= dict.fromkeys(shuffled[:validation], "validation")
    split_of |= dict.fromkeys(shuffled[validation : validation + test], "test")
    split_of |= dict.fromkeys(shuffled[validation + test :], "training")
    return [(split or split_of[record[GROUP]], record) for split, record in records]


def table(datalist: dict) -> str:
    """Markdown table of a datalist: slices, groups, annotations by task, boxes and classes of each source and split."""
    classes = datalist["classes"]
    lines = [
        f"| source | split | slices | groups | {' | '.join(TASKS)} | {BOXES} | {' | '.join(classes)} |",
        "|" + "---|" * (5 + len(TASKS) + len(classes)),
    ]
    for source in sorted({record[SOURCE] for split in SPLITS for record in datalist[split]}):
        for split in SPLITS:
            records = [record for record in datalist[split] if record[SOURCE] == source]
            if not records:
                continue
            tasks = Counter(task for record in records for task in annotated_tasks(record))
            labels = Counter(record[CLASS] for record in records if isinstance(record.get(CLASS), int))  # those known alone
            counts = [len(records), len({record[GROUP] for record in records}), *(tasks[task] for task in TASKS)]
            counts.append(sum(len(record.get(BOXES, [])) for record in records))
            counts += [labels[index] for index in range(len(classes))]
            lines.append(f"| {source} | {split} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"
