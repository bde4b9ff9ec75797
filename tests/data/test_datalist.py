import copy
import json
import math
import os
import re

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from some_tasks import some_tasks

from bundle.data.datalist import FIELDS, annotated_tasks, load_datalist, select, take, validate
from bundle.errors import UserError
from bundle.files import write_json
from bundle.tasks import Task

ROWS, COLUMNS = 40, 60


@pytest.fixture
def folder(tmp_path):
    """Empty slices, whose names say the format and whether columns and rows are exchanged."""
    names = "a.png b.png c.png d.png mask.png instances.png turned.png s.nii.gz s.mhd s.dcm turned.nii.gz"
    for name in names.split():
        size = (ROWS, COLUMNS) if name.startswith("turned") else (COLUMNS, ROWS)
        if name.endswith("png"):
            Image.new("L", size).save(tmp_path / name)
        else:
            sitk.WriteImage(sitk.Image((*size, 1), sitk.sitkInt16), str(tmp_path / name))
    return tmp_path


@pytest.fixture
def datalist():
    return {
        "name": "tiny",
        "classes": ["other", "COVID-19", "lung cancer"],
        "training": [
            {"image": "a.png", "class": 2, "boxes": [[50, 30, 60, 40]], "instances": "instances.png", "group": "p1"},
            {"image": "b.png", "mask": "mask.png", "group": "p1", "source": "x"},
        ],
        "validation": [{"image": "c.png", "class": [0, 2], "mask": "empty", "boxes": []}],
        "test": [{"image": "d.png"}],
    }


def complaint(datalist, folder):
    """The one line with which a datalist is refused, without the path of the test's folder."""
    path = folder / "datalist.json"
    path.write_text(datalist if isinstance(datalist, str) else json.dumps(datalist))
    with pytest.raises(ValueError) as error:
        load_datalist(path, folder)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ").replace(f"{folder}{os.sep}", "")


def test_a_good_datalist_is_read_as_it_was_written_in_any_encoding(folder, datalist):
    path = folder / "new/datalist.json"
    write_json(datalist, path)
    assert [path.name for path in (folder / "new").iterdir()] == ["datalist.json"]
    text = path.read_text()
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        assert load_datalist(path, folder, datalist["classes"]) == datalist


CLASSES = "expected a whole number from 0 to 2, or a list of those it may be"
NUMBERS = "expected four finite numbers [x1, y1, x2, y2] with decimal points"
SHARES = "expected pixels, not shares of the image; multiply x by its width and y by its height"
CORNERS = "expected x1 < x2 and y1 < y2, not [x, y, width, height]"
OUTSIDE = "outside the image, expected x from 0 to 60 and y from 0 to 40"
SIZE = "found (columns, rows) = (40, 60), expected (60, 40) as the image has"
FILE = "found no file z.png, expected it there; check dataset_dir"
BAD_RECORDS = [  # field, its value, the complaint
    ("image", "z.png", FILE),
    ("mask", "z.png", FILE),
    ("instances", "empty", FILE.replace("z.png", "empty")),
    *((field, None, "found None, expected a path relative to dataset_dir") for field in ("image", "mask")),
    *(("class", value, f"found {value!r}, {CLASSES}") for value in (3, -1, True, 1.0, [1], [1, 1], [0, 3], "1")),
    ("boxes", [[0.1, 0.2, 0.3, 0.4]], f"found [0.1, 0.2, 0.3, 0.4], {SHARES}"),
    ("boxes", [[50, 30, 40, 40]], f"found [50, 30, 40, 40], {CORNERS}"),
    ("boxes", [[50, 30, 60, 30]], f"found [50, 30, 60, 30], {CORNERS}"),
    ("boxes", [[50, 30, 60.5, 40]], f"found [50, 30, 60.5, 40] {OUTSIDE}"),
    ("boxes", [[30, 50, 40, 60]], f"found [30, 50, 40, 60] {OUTSIDE}"),  # columns and rows mistaken
    ("boxes", [[-1, 0, 5, 5]], f"found [-1, 0, 5, 5] {OUTSIDE}"),
    ("boxes", [[1, 2, 3]], f"found [1, 2, 3], {NUMBERS}"),
    ("boxes", [[1, 2, math.nan, 4]], f"found [1, 2, nan, 4], {NUMBERS}"),
    ("boxes", [1, 2, 3, 4], "found [1, 2, 3, 4], expected a list of boxes [[x1, y1, x2, y2], …]"),
    ("boxes", "none", "found 'none', expected a list of [x1, y1, x2, y2]"),
    ("mask", "turned.png", SIZE),
    ("mask", "turned.nii.gz", SIZE),
    ("instances", "turned.png", SIZE),
    ("label", 1, f"unknown field, expected one of {', '.join(FIELDS)}, or one that the datalist lists under `fields`"),
    ("group", 7, "found 7, expected text"),
    ("source", 7, "found 7, expected text"),
]


@pytest.mark.parametrize("field, value, expected", BAD_RECORDS)
def test_a_bad_record_is_refused_by_name(folder, datalist, field, value, expected):
    datalist["training"][0][field] = value
    datalist["training"][1].pop("group")
    name = f"training[0] {datalist['training'][0]['image'] or ''}".strip()
    assert complaint(datalist, folder) == f"{name}: {field}: {expected}"


def test_boxes_are_on_the_grid_of_a_turned_file(folder, datalist):
    """The file's first axis runs to the back, so its x is the slice's row; a picture of a mask lies as the slice is read."""
    affine = np.array([[0, -0.7, 0, 0], [-0.9, 0, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(np.zeros((ROWS, COLUMNS, 1), np.int16), affine), folder / "x.nii.gz")
    datalist["training"] = [{"image": "x.nii.gz", "boxes": [[30, 50, 40, 60]], "mask": "mask.png"}]
    validate(datalist, folder)
    datalist["training"][0]["boxes"] = [[50, 30, 60, 40]]
    expected = "boxes: found [50, 30, 60, 40] outside the image, expected x from 0 to 40 and y from 0 to 60"
    assert complaint(datalist, folder) == f"training[0] x.nii.gz: {expected}"


@pytest.mark.parametrize("image", ["s.nii.gz", "s.mhd", "s.dcm"])
def test_boxes_and_masks_must_fit_volumes_too(folder, datalist, image):
    datalist["training"] = [{"image": image, "boxes": [[50, 30, 60, 40]], "mask": "mask.png"}]
    (folder / "datalist.json").write_text(json.dumps(datalist))
    load_datalist(folder / "datalist.json", folder)
    datalist["training"][0]["boxes"] = [[50, 30, 60, 41]]
    expected = "boxes: found [50, 30, 60, 41] outside the image, expected x from 0 to 60 and y from 0 to 40"
    assert complaint(datalist, folder) == f"training[0] {image}: {expected}"
    datalist["training"][0] |= {"boxes": [], "mask": "turned.png"}
    expected = "mask: found (columns, rows) = (40, 60), expected (60, 40) as the image has"
    assert complaint(datalist, folder) == f"training[0] {image}: {expected}"



AGAIN = "found in training[0] as well, expected one record with all annotations of an image"
BAD_DATALISTS = [  # what is done to it, or its text; how its complaint begins
    (lambda d: d["training"][1].update(mask="text.png"), "training[1] b.png: mask: text.png: cannot be read ("),
    (lambda d: d["training"][0].pop("boxes"), "training[0] a.png: instances: found without boxes, expected one box for"),
    (lambda d: d["test"][0].update(group="p1"), "test[0] d.png: group: found 'p1' in test and in training, expected it in"),
    (lambda d: d["test"].append({"image": "a.png", "group": "x"}), f"test[1] a.png: image: {AGAIN}"),
    (lambda d: d["training"].append({"image": "./a.png", "group": "x"}), f"training[2] ./a.png: image: {AGAIN}"),
    (
        lambda d: d["training"][0].update({"class": 9, "boxes": [[5, 5, 1, 9], [0, 0, 99, 9]]}),
        f"training[0] a.png: class: found 9, {CLASSES} (and 2 more complaints)",
    ),
    (lambda d: d.pop("classes"), "classes: found None, expected a list of class names beside the lists training"),
    (lambda d: d.update(classes=[]), "classes: found [], expected a list of class names"),
    (lambda d: d.update(classes=3), "classes: found 3, expected a list of class names"),
    (lambda d: d.update(training=[], validation=[], test=[]), "found no record, expected a non-empty list under"),
    (lambda d: d.update(train=d.pop("training")), "train: found list, expected lists of records, and only under"),
    (lambda d: d.update(test={"a": 1}), "test: found dict, expected lists of records, and only under training"),
    (lambda d: d.update(test=["d.png"]), "test[0]: found 'd.png', expected a record with image and any of class, mask"),
    ("", "found no JSON (Expecting value: line 1 column 1 (char 0)), expected a datalist"),
    ("{'a': 1}", "found no JSON (Expecting"),
    ("[]", "classes: found None"),
]


@pytest.mark.parametrize("change, expected", BAD_DATALISTS)
def test_a_bad_datalist_is_refused(folder, datalist, change, expected):
    (folder / "text.png").write_bytes(b"text")
    if callable(change):
        change(datalist)
    assert complaint(datalist if callable(change) else change, folder).startswith(expected)


def test_a_missing_datalist_is_refused(folder):
    with pytest.raises(UserError, match="no.json: no such datalist; make one with scripts/prepare_data.py, or set datalist"):
        load_datalist(folder / "no.json", folder)


@pytest.mark.parametrize("classes", [["other", "ill"], ["COVID-19", "other", "lung cancer"]])
def test_other_classes_than_the_configs_or_in_another_order_are_refused(folder, datalist, classes):
    write_json(datalist, folder / "datalist.json")
    found = "datalist.json: classes: found ['other', 'COVID-19', 'lung cancer']"
    with pytest.raises(ValueError, match=re.escape(f"{found}, expected {classes} as in the config's classes")):
        load_datalist(folder / "datalist.json", folder, classes)


def test_files_are_looked_at_only_where_the_folder_is_known_and_nothing_is_changed(folder, datalist):
    before = copy.deepcopy(datalist)
    validate(datalist, folder)
    validate(datalist)
    assert datalist == before
    datalist["training"][0]["boxes"] = [[-1, 0, 5, 5]]
    with pytest.raises(ValueError, match=r"found \[-1, 0, 5, 5\] outside the image, expected x from 0 and y from 0$"):
        validate(datalist)



@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, ("reconstruction",)),
        ({"class": 0}, ("classification", "reconstruction")),
        ({"mask": "empty", "boxes": []}, ("segmentation", "detection", "reconstruction")),
    ],
)
def test_absent_fields_are_not_annotated_and_empty_ones_are(fields, expected):
    assert annotated_tasks({"image": "a.png"} | fields) == expected


class Severity(Task):
    name, field = "severity", "severity"

    def complaints(self, value):
        if not 0 <= value <= 1:
            yield f"found {value}, expected a number from 0 to 1"


def test_the_field_of_a_further_task_is_listed_and_checked_by_the_task(folder, datalist):
    datalist["validation"][0]["severity"] = 2
    with pytest.raises(UserError, match="severity: unknown field, .* or one that the datalist lists under `fields`"):
        validate(datalist, folder, [Severity()])
    datalist["fields"] = ["severity"]
    validate(datalist, folder)
    with pytest.raises(UserError, match=r"^validation\[0\] c.png: severity: found 2, expected a number from 0 to 1$"):
        validate(datalist, folder, [Severity()])
    assert select(datalist, "validation", [Severity()]) == datalist["validation"]


@pytest.mark.parametrize(
    "split, tasks, expected",
    [
        ("training", ["classification"], ["a.png"]),
        ("training", ["segmentation", "detection"], ["a.png", "b.png"]),
        ("training", ["reconstruction"], ["a.png", "b.png"]),
        ("validation", ["detection"], ["c.png"]),
    ],
)
def test_selection_by_split_and_task(datalist, split, tasks, expected):
    records = select(datalist, split, some_tasks(*tasks), "data")
    assert [record["image"] for record in records] == [os.path.join("data", name) for name in expected]


def test_a_source_that_is_left_out_is_in_neither_split_and_measured_apart(datalist):
    def images(split):
        return [record["image"] for record in select(datalist, split, some_tasks("reconstruction"), "", ["x"])]

    datalist["validation"][0]["source"] = datalist["test"][0]["source"] = "x"
    datalist["validation"].append({"image": "e.png"})
    assert [images(split) for split in ("training", "validation", "test", "left_out")] == [
        ["a.png"],
        ["e.png"],
        ["d.png"],
        ["b.png", "c.png"],
    ]
    with pytest.raises(UserError, match="leave_out: found y, expected some of x"):
        select(datalist, "training", some_tasks("reconstruction"), "", ["y"])
    with pytest.raises(UserError, match="leave_out: found x, expected sources that the weights were not trained on"):
        select(datalist, "left_out", some_tasks("reconstruction"), "", ["x"], ["w", "x"])


def test_selection_joins_the_paths_of_annotations(datalist):
    a, b = select(datalist, "training", some_tasks("reconstruction"), "data")
    assert a["instances"] == os.path.join("data", "instances.png") and b["mask"] == os.path.join("data", "mask.png")
    assert select(datalist, "validation", some_tasks("segmentation"), "data")[0]["mask"] == "empty"
    assert datalist["training"][0]["image"] == "a.png"
    with pytest.raises(UserError, match="split: found 'dev', expected one of training, validation, test"):
        select(datalist, "dev", some_tasks("detection"))
    with pytest.raises(UserError, match="split test: found no record annotated for segmentation; name other tasks or add"):
        select(datalist, "test", some_tasks("segmentation"))


def test_fewer_images_or_patients_lie_within_more():
    records = [{"image": f"{group}{slice}", "group": group} for group in "abcdef" for slice in range(3)] + [{"image": "alone"}]
    few, more = ({record["image"] for record in take(records, count, seed=3)} for count in (4, 9))
    assert len(few) == 4 and len(more) == 9 and few < more
    assert few != {record["image"] for record in take(records, 4, seed=4)}, "another seed, another draw"
    patients = take(records, 2, seed=0, by="group")
    assert len({record.get("group") for record in patients}) == 2 and len(patients) in (4, 6)
    assert take(records, 7, seed=0, by="group") == records
    for count in (0, 8):
        with pytest.raises(ValueError, match=f"records: found 7 values of group, expected {count}, at least 1"):
            take(records, count, seed=0, by="group")
