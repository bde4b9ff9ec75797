"""Public data sets that come as a table: what their columns mean beside what they are called, and what they imply.

A data set is recognised by columns that no other table has together, so its folder may have any name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bundle.names import BOXES, CLASS, EMPTY_MASK, GROUP, MASK

# Columns that are no fields of a record, and the key of what a record implies until `merge` takes it or drops it.
OBJECTS, SPLIT, IMPLIED = "objects", "split", "implied"
COVID, OTHER, CANCER = "COVID-19", "other", "lung cancer"
# Share of the lung or image below which a lesion is too small for its slice to stand for COVID-19.
SMALL_LESION = 0.005
# What each kind of row implies. A slice with little lesion of a COVID-19 patient may as well be of somebody healthy; a tumour
# patient was scanned before COVID-19, and whether a slice shows the cancer is not known.
MEDSEG = {"": {CLASS: COVID, BOXES: []}}
VOLUMES = {"lesion": {BOXES: [], CLASS: COVID}, "": {BOXES: [], CLASS: [OTHER, COVID]}}
TUMOURS = {"": {MASK: EMPTY_MASK, CLASS: [OTHER, CANCER]}}
MOSMED = {OTHER: {MASK: EMPTY_MASK}}
IQOTH = {"normal": {MASK: EMPTY_MASK, BOXES: []}, "benign": {MASK: EMPTY_MASK}}


class Known(NamedTuple):
    """A public data set: the name that its records carry, and the columns that only its table has together.

    Args:
        fields: row -> columns of docs/data.md that the row has under other names.
        implied: kind of a row -> fields that its annotations imply for other tasks.
        kind: row -> its kind.
        unused: why it is left out, if it is.
    """

    source: str
    mark: str
    fields: Callable[[Mapping], dict] = lambda row: {}
    implied: Mapping[str, dict] = {}
    kind: Callable[[Mapping], str] = lambda row: row.get("label", "")
    unused: str = ""


def _medseg_official(row: Mapping) -> dict:
    """Inf-Net's split: every slice is a group, and the validation slices of the other split stay so."""
    split = "val" if (row["official_split"], row[SPLIT]) == ("train", "val") else row["official_split"]
    return {MASK: row["mask_multiclass"], SPLIT: split, GROUP: Path(row["file"]).stem}


def _patient_of_volume(row: Mapping) -> dict:
    """The two tables of the volumes name patients differently. Volumes may be of one: radiopaedia_10_85902_1 and _3."""
    return {GROUP: "_".join(row["volume"].split("_")[:2])}


def _lesion_size(row: Mapping) -> str:
    return "lesion" if float(row["lesion_frac"]) > SMALL_LESION else ""


KNOWN = (
    Known("covid_ct", "coloured_mark"),
    Known("iqoth_nccd", "label group_id orig_file", implied=IQOTH),
    Known("medseg_covid19", "mask_multiclass official_split", lambda row: {MASK: row["mask_multiclass"]}, MEDSEG),
    Known("lung_tumor_slices", "mask tumour_px", lambda row: {OBJECTS: row[MASK] or EMPTY_MASK, MASK: ""}, TUMOURS),
    Known("luna16_nodules", "max_diameter_mm crop_kind", implied=TUMOURS),
    Known("mosmed_slices", "label severity source_file", implied=MOSMED),
    Known("sars_cov2_ct", "label block orig_file", lambda row: {GROUP: row["block"]}),
    Known("covid_volumes", "volume lesion_frac label_source", _patient_of_volume, VOLUMES, _lesion_size),
    Known("covid_volumes", "volume orig_file", _patient_of_volume),
    Known("lung_pet_ct_dx", "sop_uid series_uid n_boxes", unused="a DICOM series, for inference only"),
)
OFFICIAL = Known("medseg_covid19", "official_split", _medseg_official, MEDSEG)


def recognise(columns: Sequence[str]) -> Known | None:
    """The public data set whose table has these columns; None for a table of one's own."""
    return next((known for known in KNOWN if set(known.mark.split()) <= set(columns)), None)
