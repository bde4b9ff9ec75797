import json
from collections import Counter

import numpy as np
import pytest
from bundle.errors import UserError


def write_table(folder, rows, picture=None, shape=(40, 60)):
    """labels.csv of dictionaries, and a picture for each value of `file`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    for row in rows if picture else ():
        picture(folder / row["file"], shape)
    return folder


def summary(records, *fields):
    return {split: [tuple(record.get(field) for field in fields) for record in found] for split, found in records.items()}


def test_covid_ct(tmp_path, merged, picture):
    rows = [
        {"file": "images/covid/a.png", "label": "covid", "patient_id": "cov_1", "split": "train"},
        {"file": "images/other/b.png", "label": "other", "patient_id": "non_2", "split": "val"},
        {"file": "images/covid/c.png", "label": "covid", "patient_id": "cov_3", "split": "test"},
    ]
    records = merged(write_table(tmp_path / "some name", rows, picture))
    assert summary(records, "class", "group", "source") == {
        "training": [(1, "covid_ct/cov_1", "covid_ct")],
        "validation": [(0, "covid_ct/non_2", "covid_ct")],
        "test": [(1, "covid_ct/cov_3", "covid_ct")],
    }
    assert not any({"mask", "boxes"} & record.keys() for found in records.values() for record in found)


def test_iqoth_nccd(tmp_path, merged, picture):
    labels = ["normal", "benign", "lung_cancer"]
    rows = [{"file": f"images/{k}/{k}.png", "label": k, "group_id": f"g{k}", "split": "train"} for k in labels]
    records = merged(write_table(tmp_path / "iq", rows, picture))["training"]
    assert [record["class"] for record in records] == [0, 0, 2]
    # The label is the case's: a slice of it may show no tumour, and one of a normal case was never searched for lesions.
    assert not any({"mask", "boxes"} & record.keys() for record in records)
    assert {record["source"] for record in records} == {"iqoth_nccd"}


@pytest.mark.parametrize("column, cell, expected", [("label", "flu", "covid"), ("split", "dev", "train")])
def test_unknown_cells_are_refused(tmp_path, merged, picture, column, cell, expected):
    row = {"file": "images/covid/a.png", "label": "covid", "patient_id": "1", "split": "train"}
    folder = write_table(tmp_path / "covid", [row | {column: cell}], picture)
    with pytest.raises(ValueError, match=rf"labels.csv: line 2: {column}: found '{cell}', expected one of .*{expected}"):
        merged(f"covid_ct={folder}")


def medseg(folder, picture):
    splits = [("train", "train"), ("val", "train"), ("train", "test"), ("test", "test")]
    rows = []
    for index, (split, official) in enumerate(splits):
        files = {"file": f"images/{index}.png", "mask_multiclass": f"masks_multiclass/{index}.png"}
        rows.append({**files, "group_id": f"m{index}", "split": split, "official_split": official})
        mask = np.zeros((40, 60))
        mask[5:10, 20:50], mask[30:35, 2:8] = 1, 2
        picture(folder / rows[-1]["mask_multiclass"], mask)
    return write_table(folder, rows, picture)


def test_medseg_covid19(tmp_path, merged, samples, picture):
    folder = medseg(tmp_path / "medseg", picture)
    records = summary(merged(folder), "group")
    assert records["training"] == [("medseg_covid19/m0",), ("medseg_covid19/m2",)]
    assert records["validation"] == [("medseg_covid19/m1",)] and records["test"] == [("medseg_covid19/m3",)]
    sample = samples(folder, segmentation_classes=2)[0]
    assert sample["mask"].shape == (2, 40, 60)
    assert sample["mask"][0, 5:10, 20:50].all() and sample["mask"][0].sum() == 150
    assert sample["mask"][1, 30:35, 2:8].all() and sample["mask"][1].sum() == 30
    assert samples(folder)[0]["mask"].sum() == 180
    assert not {"class", "boxes"} & sample.keys()


def test_medseg_covid19_official_split(tmp_path, merged, picture):
    records = summary(merged(f"medseg_covid19_official={medseg(tmp_path / 'medseg', picture)}"), "group")
    assert records == {
        "training": [("medseg_covid19/0",)],
        "validation": [("medseg_covid19/1",)],
        "test": [("medseg_covid19/2",), ("medseg_covid19/3",)],
    }


def test_lung_tumor_slices(tmp_path, samples, picture, caplog):
    caplog.set_level("INFO")
    masks = {name: np.zeros((40, 60)) for name in ("two", "dust")}
    masks["two"][5:10, 20:50], masks["two"][30:36, 2:8], masks["two"][20, 20:23] = 255, 255, 255
    masks["dust"][20, 20:23] = 255
    rows = []
    for index, name in enumerate(["two", "free", "dust"]):
        mask = f"masks/s0_{name}.png" if name in masks else ""
        rows.append({"file": f"images/s0_{name}.png", "mask": mask, "patient_id": f"p{index}", "split": "train"})
        if mask:
            picture(tmp_path / "tumours" / mask, masks[name])
    two, free = samples(write_table(tmp_path / "tumours", rows, picture))
    np.testing.assert_array_equal(two["boxes"], [[20, 5, 50, 10], [2, 30, 8, 36]])
    assert two["instances"].shape == (2, 40, 60)
    assert two["instances"][0, 5:10, 20:50].all() and two["instances"][0].sum() == 150
    assert two["instances"][1, 30:36, 2:8].all() and two["instances"][1].sum() == 36
    assert free["boxes"].shape == (0, 4)
    assert "mask" not in two and "mask" not in free  # tumours are no infection
    assert two["record"]["group"] == "lung_tumor_slices/p0"
    assert "tumours: 1 slices left out whose tumour has no part of 20 pixels" in caplog.text


def test_unlabelled_slices(tmp_path, merged, picture):
    rows = [{"file": f"images/coronacases_{i}.png", "patient_id": f"c{i}"} for i in range(2)]
    records = merged(write_table(tmp_path / "volumes", rows, picture))
    assert summary(records, "group", "class", "mask", "boxes") == {
        "training": [(f"covid_volumes_unlabelled/c{i}", None, None, None) for i in range(2)]
    }


def test_coco(tmp_path, merged, samples, coco):
    folder = coco(tmp_path / "hospital")
    records = merged(folder)
    assert summary(records, "boxes", "group", "source") == {
        "training": [([[10, 5, 40, 17.5], [0, 0, 4, 4]], "hospital/p3", "hospital")],
        "test": [([], "hospital/p8", "hospital")],
    }
    train, test = samples(folder)
    np.testing.assert_array_equal(train["boxes"], [[10, 5, 40, 17.5], [0, 0, 4, 4]])
    assert train["image"].shape == (1, 40, 60) and test["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    "name, change, complaint",
    [
        ("train", lambda c: "{", "found JSONDecodeError"),
        ("train", lambda c: json.dumps({"images": c["images"]}), "found KeyError 'annotations'"),
        ("train", lambda c: json.dumps(c | {"annotations": [{"image_id": 99, "bbox": [0, 0, 1, 1]}]}), "found KeyError 99"),
        ("train", lambda c: json.dumps(c | {"annotations": [{"image_id": 3, "bbox": [0, 0, 1]}]}), "found ValueError"),
        ("dev", json.dumps, "found an unknown split, expected annotations_train.json"),
    ],
)
def test_bad_coco_is_refused_in_one_line(tmp_path, merged, coco, name, change, complaint):
    folder = coco(tmp_path / "hospital")
    content = json.loads((folder / "annotations_train.json").read_text())
    (folder / f"annotations_{name}.json").write_text(change(content))
    with pytest.raises(ValueError, match=rf"annotations_{name}.json: {complaint}") as error:
        merged(folder)
    assert "\n" not in str(error.value)


@pytest.fixture
def table(tmp_path, picture):
    """A CSV with every column, and a slice for each of its kinds of annotation."""
    for name in ("a", "b", "c", "d"):
        picture(tmp_path / f"slices/{name}.png", (40, 60))
    marks = np.zeros((40, 60))
    marks[5:15, 10:40] = 1
    picture(tmp_path / "slices/a_mark.png", marks)
    path = tmp_path / "mine.csv"
    path.write_text(
        "image,class,mask,boxes,instances,group,source,split\n"
        'slices/a.png,2,slices/a_mark.png,"[[10, 5, 40, 15]]",slices/a_mark.png,p1,ward,train\n'
        "slices/b.png,COVID-19,empty,[],,p2,,val\n"
        "slices/c.png,,,,,p3,,\n"
        "slices/d.png,0,,,,,,test\n"
    )
    return path


def test_table_csv(table, merged, samples):
    records = merged(table)
    assert summary(records, "class", "boxes", "group", "source") == {
        "training": [(2, [[10, 5, 40, 15]], "ward/p1", "ward"), (None, None, "mine/p3", "mine")],
        "validation": [(1, [], "mine/p2", "mine")],
        "test": [(0, None, "mine/slices/d.png", "mine")],
    }
    a, c, b, _ = samples(table)
    assert a["mask"].sum() == a["instances"].sum() == 300 and a["instances"][0, 5:15, 10:40].all()
    assert b["mask"].sum() == 0 and b["boxes"].shape == (0, 4)
    assert not {"class", "mask", "boxes", "instances"} & c.keys()


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("slices/a.png,2,,[[1;2]],,,,train", r"line 2: boxes: found '\[\[1;2\]\]', expected \[\[x1, y1, x2, y2\], …\]"),
        ("slices/a.png,,,[[1, 2, 3, 4]],,,,train", "line 2: found 11 cells, expected 8; quote a cell that holds commas"),
        ("slices/a.png,,,,,,,dev", "line 2: split: found 'dev', expected one of train"),
        (",1,,,,,,train", "line 2: image: found an empty cell, expected the path of an image"),
        ("slices/a.png,flu,,,,,,train", "a.png: class: found 'flu', expected a number from 0 to 2 or one of other, COV"),
        ("slices/a.png,-1,,,,,,train", "a.png: class: found -1, expected a whole number from 0 to 2"),
        ("slices/a.png,1.0,,,,,,train", "a.png: class: found '1.0', expected a number"),
        ("slices/z.png,1,,,,,,train", "image: found no file .*z.png, expected it there"),
    ],
)
def test_bad_csv_is_refused_in_one_line(table, merged, row, complaint):
    table.write_text("image,class,mask,boxes,instances,group,source,split\n" + row + "\n")
    with pytest.raises(UserError, match=complaint) as error:
        merged(table)
    assert "\n" not in str(error.value)


def test_csv_column_that_is_no_field_is_refused(table, merged):
    table.write_text("image,age\nslices/a.png,64\n")
    with pytest.raises(ValueError, match="slices/a.png: age: unknown field, expected one of image, class"):
        merged(table)


def counts(records):
    return {split: dict(Counter(record.get("class") for record in found)) for split, found in records.items()}


def test_real_covid_ct_has_the_official_counts(real_data, merged):
    assert counts(merged(real_data / "covid_ct")) == {
        "training": {1: 191, 0: 234},
        "validation": {1: 60, 0: 58},
        "test": {1: 98, 0: 105},
    }


def test_real_iqoth_nccd(real_data, merged):
    found = counts(merged(real_data / "iqoth_nccd"))
    sizes = {split: sum(labels.values()) for split, labels in found.items()}
    assert sizes == {"training": 284, "validation": 73, "test": 128}
    assert sum(labels[2] for labels in found.values()) == 255


@pytest.mark.parametrize("layout, expected", [("medseg_covid19", (50, 7, 41)), ("medseg_covid19_official", (43, 7, 48))])
def test_real_medseg_covid19(real_data, merged, layout, expected):
    records = merged(f"{layout}={real_data / 'medseg_covid19'}")
    assert tuple(len(found) for found in records.values()) == expected
    assert all(record["mask"] != "empty" for found in records.values() for record in found)


def test_real_unlabelled_slices(real_data, merged):
    records = merged(real_data / "covid_volumes_unlabelled")
    assert {split: len(found) for split, found in records.items()} == {"training": 805}


def test_real_lung_tumor_slices(real_data, samples, merged, caplog):
    caplog.set_level("INFO")
    folders = real_data / "lung_tumor_slices", real_data / "lung_tumor_slices_more"
    records = merged(*folders)
    assert "84 slices left out" in caplog.text and "33 slices left out" in caplog.text
    assert sum(map(len, records.values())) == 706 + 878 - 84 - 33
    assert {split: len({record["group"] for record in found}) for split, found in records.items()} == {
        "training": 39,
        "validation": 7,
        "test": 15,
    }
    assert {record["source"] for found in records.values() for record in found} == {"lung_tumor_slices"}
    assert sum(not record["boxes"] for found in records.values() for record in found) == 108 + 152
    assert not any({"mask", "class"} & record.keys() for found in records.values() for record in found)


def test_real_boxes_are_those_of_the_data_sets_own_coco_file(real_data, merged):
    """Those are one pixel larger, above and to the right, than the tumours in the masks; parts that touch at a corner are
    two there and one here, and dust is left out here."""
    mine = merged(real_data / "lung_tumor_slices")["test"]
    theirs = {record["image"]: record["boxes"] for record in merged(f"coco={real_data / 'lung_tumor_slices'}")["test"]}
    assert len(theirs) == 179
    same = [[x1, y1 - 1, x2 + 1, y2] in theirs[record["image"]] for record in mine for x1, y1, x2, y2 in record["boxes"]]
    assert len(same) == 129 and np.mean(same) > 0.97
