"""Layouts by name, how a folder's layout is recognised, and one datalist from many folders."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from bundle.data.datalist import FIELDS, SPLITS, annotated_tasks, record_complaints, validate
from bundle.data.sources import published, tables, volumes
from bundle.data.sources.common import COMPLAINT, IMPLIED, SIZE, SPLIT, Records
from bundle.data.transforms import LoadSliced
from bundle.data.volumes import open_slice
from bundle.errors import UserError
from bundle.files import write_json
from bundle.names import ANNOTATION, BOXES, CLASS, EMPTY_MASK, GROUP, IMAGE, INSTANCES, MASK, SOURCE, TASKS

logger = logging.getLogger(__name__)
CLASSES = ("other", "COVID-19", "lung cancer")
# What tables call the classes beside their names.
ALIASES = {"covid": "covid19", "normal": "other", "benign": "other", "noncovid": "other"}
ORIGIN = "origin"  # of a record: layout and path
BAD_SHARE = 0.05  # of the slices of a folder: more that cannot be used, and none of it is taken
OUTSIDE = 1  # pixels that a box may reach out of the image to be clipped to it


class Source(NamedTuple):
    """A layout."""

    read: Callable  # (path, export) -> `Records`
    marks: tuple[str, ...]  # glob patterns that tell it apart
    source: str = ""  # the name that records carry and groups begin with, unless the record, folder or file names it


SOURCES = {
    "table": Source(tables.table, ("labels.csv",)),
    "medseg_covid19_official": Source(partial(tables.table, known=tables.OFFICIAL), ()),
    "covid_ct_original": Source(published.covid_ct_original, ("Images-processed", "Data-split"), "covid_ct"),
    "iqoth_nccd_original": Source(published.iqoth_nccd_original, ("Normal cases", "Malignant cases"), "iqoth_nccd"),
    "inf_net": Source(published.inf_net, ("TrainingSet/LungInfection-Train", "TestingSet"), "medseg_covid19"),
    "medseg_nifti": Source(volumes.medseg_nifti, ("tr_im.nii.gz", "tr_mask.nii.gz"), "medseg_covid19"),
    "msd_lung": Source(volumes.msd_lung, ("imagesTr/lung_*.nii.gz", "labelsTr"), "msd_lung"),
    "luna16": Source(volumes.luna16, ("annotations.csv", "**/*.mhd"), "luna16"),
    "coco": Source(tables.coco, ("annotations_*.json",)),
}


def detect_layout(path) -> str | None:
    """Name of the first layout of `SOURCES` all of whose marks lie in the folder; "table" for a CSV file; None for neither."""
    path = Path(path)
    if path.is_file():
        return "table" if path.suffix.lower() == ".csv" else None
    return next((n for n, s in SOURCES.items() if s.marks and all(any(path.glob(m)) for m in s.marks)), None)


def find_layouts(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """(layout, path) of every LAYOUT=PATH or PATH, each once; a folder of no layout stands for those in it that have one."""
    named: dict[Path, str] = {}
    recognised: dict[Path, str | None] = {}
    for argument in arguments:
        layout, _, path = argument.partition("=") if argument.split("=")[0] in SOURCES else ("", "", argument)
        if not Path(path).exists():
            layouts = f" and no layout; layouts: {', '.join(SOURCES)}" if "=" in argument else ""
            raise UserError(f"{argument}: no such folder or file{layouts}")
        path = Path(path).resolve()
        if layout:
            if named.setdefault(path, layout) != layout:
                raise UserError(f"{path}: found the layouts {named[path]} and {layout}, expected one")
            continue
        inside = {path: detect_layout(path)}
        if not inside[path]:
            inside = {folder: detect_layout(folder) for folder in sorted(path.glob("*")) if folder.is_dir()}
        if not any(inside.values()):
            layouts = ", ".join(f"{name} ({', '.join(source.marks)})" for name, source in SOURCES.items() if source.marks)
            raise UserError(f"{path}: found no known layout, expected one of {layouts}; name it: LAYOUT={path}")
        recognised |= inside
    for path in (path for path, layout in recognised.items() if not layout and path not in named):
        logger.warning(f"{path}: left out, it has no known layout")
    return [(layout, path) for path, layout in (recognised | named).items() if layout]  # a named one goes first


def merge(
    arguments: Sequence[str], output_dir, classes: Sequence[str] = CLASSES, seed=0, implied=False, categories=()
) -> dict:
    """Write `output_dir`/datalist.json with the records of all sources, validated, and what they export beside it.

    A folder that cannot be read is left out, with a line that says why; a UserError if none can be. Groups whose layout knows
    no split are drawn, source by source: 70 % for training, 10 % for validation, 20 % for test.

    Args:
        arguments: of `find_layouts`.
        classes: names of the classes 0, 1, 2 …; a layout's classes are found in them by name.
        implied: add what annotations of the training split imply for other tasks (`tables.KNOWN`); the datalist counts it
            under "implied", source -> field -> slices.
        categories: of COCO files that are read.
    """
    layouts = find_layouts(arguments)
    output = Path(output_dir).resolve()  # a relative path through a link would lead elsewhere
    output.mkdir(parents=True, exist_ok=True)
    sources: dict[str, list[dict]] = {}
    for number, (layout, path) in enumerate(layouts):
        export = output / "export" / f"{number:02d}_{path.stem}"
        options = {"categories": categories} if SOURCES[layout].read is tables.coco else {}
        try:
            read = tqdm(SOURCES[layout].read(path, export, **options), desc=path.name, unit="slice", disable=None)
            found = _usable(read, layout, path, output, classes)
            _refuse_strangers(layout, path, found, sources)
        except UserError as error:
            if len(layouts) == 1:
                raise
            logger.warning(f"{error}; {path.name} is left out")
            continue
        for record in found:
            sources.setdefault(record[SOURCE], []).append(record)
        logger.info(f"{path}: read as {', '.join(sorted({record[SOURCE] for record in found}))} ({layout})")
    if not sources:
        found = ", ".join(arguments)
        raise UserError(f"{found}: found no data set that can be read, expected one or more; see the lines above")
    datalist = {"name": "chest CT", "classes": list(classes), **{split: [] for split in SPLITS}}
    datalist |= {"implied": {}} if implied else {}
    for source, found in sources.items():
        for split, record in _with_splits(_without_annotated_elsewhere(found), seed):
            hints = record.get(IMPLIED, {}) if implied and split == "training" else {}
            extra = {field: value for field, value in hints.items() if field not in record}
            datalist[split].append({field: record[field] for field in record if field in FIELDS} | extra)
            if extra:
                datalist["implied"].setdefault(source, Counter()).update(extra.keys())
    validate(datalist)
    write_json(datalist, output / "datalist.json")
    return datalist


def _usable(read: Records, layout: str, path: Path, output: Path, classes: Sequence[str]) -> list[dict]:
    """The slices of a folder or table that can be used; a warning names each of the others, or counts what was changed."""
    good: dict[str, dict | None] = {}  # by image; None for one that two rows annotate differently
    bad, changes, split_of, masks = [], Counter(), {}, set()
    for record in read:
        name, image = record[IMAGE], os.path.normpath(record[IMAGE])
        try:
            _finish(record, layout, path, classes)
            own = {file for file in map(record.get, (MASK, INSTANCES)) if file} - {EMPTY_MASK}
            done = _repair_boxes(record)
            _check(record, len(classes))
            if image in good and good[image] != record:
                good[image] = None
                raise UserError(f"{IMAGE}: found in an earlier row as well, expected one row with all annotations of an image")
        except UserError as error:
            bad.append(str(error) if str(error).startswith(str(path)) else f"{path}: {name}: {error}")
            continue
        done += ["masks that an earlier image has, too; check that each belongs to its image"] * bool(own & masks)
        changes.update(done if image not in good else ["rows that repeat another one left out"])
        good[image] = record
        masks |= own
    usable = [record for record in good.values() if record]
    number = len(usable) + len(bad)
    if not number:
        raise UserError(f"{path}: found no record, expected one of the layouts of docs/data.md")
    if bad and (not usable or len(bad) > max(1, BAD_SHARE * number)):
        share = f" ({len(bad)} of {number} slices cannot be used, {len(bad) / number:.0%})" if number > 1 else ""
        raise UserError(bad[0] + share)
    for complaint in bad:
        logger.warning(f"{complaint}; this slice is left out")
    for change, count in changes.items():
        logger.warning(f"{path}: {count} {change}")
    for record in usable:
        if (split := record.get(SPLIT)) and (first := split_of.setdefault(record[GROUP], split)) != split:
            found = f"found {record[GROUP]!r} in {split} and in {first}, expected it in one split"
            raise UserError(f"{path}: {record[IMAGE]}: {GROUP}: {found}")
        for key in {IMAGE, MASK, INSTANCES} & record.keys():
            record[key] = record[key] if record[key] == EMPTY_MASK else os.path.relpath(record[key], output)
    return usable


def _finish(record: dict, layout: str, path: Path, classes: Sequence[str]) -> None:
    """Give a record its source, a class number for a name, and a group that no other source has."""
    if COMPLAINT in record:
        raise UserError(record[COMPLAINT])
    source = record.pop(SOURCE, "") or SOURCES[layout].source or (path.stem if path.is_file() else path.name)
    record |= {IMAGE: os.path.normpath(record[IMAGE]), GROUP: f"{source}/{record[GROUP]}"}
    record |= {SOURCE: source, ORIGIN: (layout, path)}
    for part in (record, record.get(IMPLIED, {})):
        if CLASS in part:
            part[CLASS] = _class_number(part[CLASS], classes)


def _check(record: dict, num_classes: int) -> None:
    """Refuse a record of absolute paths for the first thing that is wrong with it; masks and instances are read."""
    if complaint := next(record_complaints(record, num_classes, "", headers=True, known=record), None):
        raise UserError(complaint)
    size = record.get(SIZE)
    if size and record.get(BOXES) and (stored := open_slice(record[IMAGE]).stored_size) != size:
        expected = f"expected {stored} as the image has; scale them"
        raise UserError(f"{BOXES}: found boxes for (columns, rows) = {size}, {expected}")
    if record.get(MASK, EMPTY_MASK) != EMPTY_MASK or INSTANCES in record:
        LoadSliced()(record)


def _class_number(found, classes: Sequence[str]):
    """Number of a class from its name (letter case, spaces, - and _ do not matter) or an alias; or of each in a list."""
    if isinstance(found, list):
        return [_class_number(item, classes) for item in found]
    if not isinstance(found, str):
        return found
    numbers = {_plain(name): number for number, name in enumerate(classes)}
    numbers |= {name: number for number, name in enumerate(classes)}
    for name in (found, _plain(found), ALIASES.get(_plain(found))):
        if name in numbers:
            return numbers[name]
    expected = f"a number from 0 to {len(classes) - 1} or one of {', '.join(classes)}; name others with --classes"
    raise UserError(f"{CLASS}: found {found!r}, expected {expected}")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.casefold())


def _repair_boxes(record: dict) -> list[str]:
    """Clip boxes that reach out of the image by `OUTSIDE`, drop those of no width or that repeat one; one text for each.

    A slice with instances, or with no other box, keeps them, so as not to say that nothing is there.
    """
    try:
        columns, rows = open_slice(record[IMAGE]).stored_size if record.get(BOXES) else (0, 0)
        boxes = np.asarray(record.get(BOXES, []), float).reshape(-1, 4)
    except (UserError, TypeError, ValueError):
        return []
    clipped = np.clip(boxes, 0, [columns, rows] * 2)
    near, wide = (np.abs(boxes - clipped) <= OUTSIDE).all(1), (clipped[:, 2:] > clipped[:, :2]).all(1)
    new = np.isin(np.arange(len(boxes)), np.unique(clipped, axis=0, return_index=True)[1])
    outside = (boxes != clipped).any(1) & wide & new
    if not near.all() or not wide.any() or INSTANCES in record and not (wide & new).all():
        return []
    if outside.any() or not (wide & new).all():
        record[BOXES] = clipped[wide & new].tolist()
    done = {f"that reach out of the image by at most {OUTSIDE} pixel clipped": outside}
    done |= {"of no width left out": ~wide, "that repeat one of their slice left out": wide & ~new}
    return [f"boxes {change}" for change, where in done.items() for _ in range(where.sum())]


def _refuse_strangers(layout: str, path: Path, found: Sequence[dict], sources: Mapping[str, Sequence[dict]]) -> None:
    """Refuse a data set in two layouts, which name groups differently, and two of one's own that have the same name."""
    public = {entry.source for entry in (*tables.KNOWN, *SOURCES.values())}
    for source in sorted({record[SOURCE] for record in found}):
        for other, place in {record[ORIGIN] for record in sources.get(source, ())}:
            if other != layout:
                raise UserError(f"{path}: found {source} as {layout}, and as {other} in {place}, expected it in one layout")
            if source not in public and path.stem == place.stem == source:
                found = f"found the name of {place}, whose patients would count as the same"
                raise UserError(f"{path}: {found}, expected another one")


def _without_annotated_elsewhere(found: Sequence[dict]) -> list[dict]:
    """Without the slices that have no annotation and whose patient another folder annotates: its split counts."""
    origins, fields = defaultdict(set), set(ANNOTATION.values())
    for record in found:
        origins[record[GROUP]] |= {record[ORIGIN]} if fields & record.keys() else set()
    kept = [record for record in found if fields & record.keys() or not origins[record[GROUP]] - {record[ORIGIN]}]
    for (_, path), count in (Counter(record[ORIGIN] for record in found) - Counter(record[ORIGIN] for record in kept)).items():
        logger.info(f"{path}: {count} slices without annotation left out: another folder annotates their patients")
    return kept


def _with_splits(found: Sequence[dict], seed: int) -> list[tuple[str, dict]]:
    """The slices with a split for those that have none: their group's where it has one, otherwise drawn."""
    split_of = {record[GROUP]: record[SPLIT] for record in found if record.get(SPLIT)}
    groups = sorted({record[GROUP] for record in found} - split_of.keys())
    validation, test = (max(1, round(share * len(groups))) if len(groups) > 2 else 0 for share in (0.1, 0.2))
    drawn = ["validation"] * validation + ["test"] * test + ["training"] * (len(groups) - validation - test)
    split_of |= {groups[index]: split for index, split in zip(np.random.default_rng(seed).permutation(len(groups)), drawn)}
    return [(record.get(SPLIT) or split_of[record[GROUP]], record) for record in found]


def table(datalist: dict) -> str:
    """Markdown table of a datalist by source and split; "3 + 2" of a task: 3 slices annotated and 2 by what is implied."""
    head = ["source", "split", "slices", "groups", *TASKS, BOXES, *datalist["classes"], "one of several"]
    lines = [head, ["---"] * len(head)]
    for source in sorted({record[SOURCE] for split in SPLITS for record in datalist[split]}):
        for split in SPLITS:
            records = [record for record in datalist[split] if record[SOURCE] == source]
            tasks = Counter(task for record in records for task in annotated_tasks(record))
            implied = datalist.get("implied", {}).get(source, {}) if split == "training" else {}
            cells = [source, split, len(records), len({record[GROUP] for record in records})]
            for task, of_these in ((task, implied.get(ANNOTATION.get(task))) for task in TASKS):
                cells.append(f"{tasks[task] - of_these} + {of_these}" if of_these else tasks[task])
            cells.append(sum(len(record.get(BOXES, [])) for record in records))
            labels = Counter("several" if isinstance(r.get(CLASS), list) else r.get(CLASS) for r in records)
            lines += [[*cells, *map(labels.__getitem__, (*range(len(datalist["classes"])), "several"))]] if records else []
    return "".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|\n" for line in lines)
