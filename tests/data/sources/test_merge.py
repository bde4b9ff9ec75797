import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bundle.data.datalist import FIELDS, load_datalist
from bundle.data.sources import SOURCES, detect_layout, merge, table
from bundle.data.sources.merge import find_layouts

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "layout, files",
    [
        ("covid_ct", ["labels.csv", "images/covid/a.png", "images/other/a.png"]),
        ("iqoth_nccd", ["labels.csv", "images/lung_cancer/a.png"]),
        ("medseg_covid19", ["labels.csv", "masks_multiclass/a.png"]),
        ("lung_tumor_slices", ["labels.csv", "masks/s00_1.png", "annotations_train.json"]),
        ("covid_volumes_unlabelled", ["labels.csv", "images/coronacases_1.png"]),
        ("covid_ct_original", ["Images-processed/a", "Data-split/a"]),
        ("iqoth_nccd_original", ["Normal cases/a", "Malignant cases/a"]),
        ("inf_net", ["TrainingSet/LungInfection-Train/a", "TestingSet/a"]),
        ("medseg_nifti", ["tr_im.nii.gz", "tr_mask.nii.gz"]),
        ("msd_lung", ["imagesTr/lung_001.nii.gz", "labelsTr/lung_001.nii.gz"]),
        ("luna16", ["annotations.csv", "subset0/subset0/1.mhd"]),
        ("coco", ["annotations_val.json"]),
        ("csv", None),
        (None, ["labels.csv", "images/a.png"]),
        (None, ["annotations.csv"]),
        (None, ["labels.csv", "Lung_Dx-A0001_s2_L/000.dcm"]),
    ],
)
def test_layouts_are_told_apart(tmp_path, layout, files):
    for file in files or ["a.csv"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert detect_layout(tmp_path if files else tmp_path / "a.csv") == layout


def test_a_data_set_in_two_layouts_is_refused(tmp_path):
    for file in ("a/labels.csv", "a/masks_multiclass/1.png", "b/TrainingSet/LungInfection-Train/1", "b/TestingSet/1"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    message = "b: found medseg_covid19 as inf_net, and as medseg_covid19 in .*a, expected it in one layout"
    with pytest.raises(ValueError, match=message):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_tables_of_one_name_are_no_source_together_unless_they_name_it(tmp_path, picture, merged):
    for place in ("a", "b"):
        picture(tmp_path / place / "x.png", (8, 12))
        (tmp_path / place / "labels.csv").write_text("image,group,split\nx.png,1,train\n")
    tables = [tmp_path / place / "labels.csv" for place in ("a", "b")]
    with pytest.raises(
        ValueError, match="b/labels.csv: found the name of .*a/labels.csv, whose patients would count as the same"
    ):
        merge([str(table) for table in tables], tmp_path / "out")
    for place, table in zip(("east", "west"), tables):
        table.write_text(f"image,group,split,source\nx.png,1,train,{place}\n")
    assert [record["group"] for record in merged(*tables)["training"]] == ["east/1", "west/1"]


def test_every_layout_is_recognised_but_the_one_to_be_named():
    assert [name for name, source in SOURCES.items() if not source.marks] == ["medseg_covid19_official", "csv"]


def test_the_document_names_every_layout_with_its_marks_and_every_field():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8").replace("\\*", "*").replace("\\_", "_")
    for name, source in SOURCES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        for mark in source.marks if name not in ("coco", "luna16") else ():  # these two are told in other words
            assert f"**{mark}**" in row
    for field in FIELDS:
        assert f"\n| `{field}` |" in text


@pytest.fixture
def hospitals(tmp_path, coco):
    """Two folders of COCO and one of no layout."""
    (tmp_path / "data/notes").mkdir(parents=True)
    return coco(tmp_path / "data/east").parent, coco(tmp_path / "data/west").parent


def test_a_folder_stands_for_the_layouts_in_it(hospitals, caplog):
    caplog.set_level("INFO")
    folder = hospitals[0]
    assert find_layouts([str(folder)]) == [("coco", folder / "east"), ("coco", folder / "west")]
    assert f"{folder / 'notes'}: left out, it has no known layout" in caplog.text
    assert f"{folder / 'east'}: read as coco" in caplog.text


def test_no_folder_is_read_twice(hospitals):
    folder = hospitals[0]
    expected = [("coco", folder / "east"), ("coco", folder / "west")]
    assert find_layouts([str(folder), str(folder / "west"), f"coco={folder / 'east'}/../east"]) == expected


def test_a_named_layout_goes_before_the_recognised_one(hospitals, caplog):
    folder = hospitals[0]
    found = find_layouts([str(folder), f"iqoth_nccd={folder / 'east'}", f"covid_ct={folder / 'notes'}"])
    assert sorted(found) == [("coco", folder / "west"), ("covid_ct", folder / "notes"), ("iqoth_nccd", folder / "east")]
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    "arguments, error, complaint",
    [
        (["{0}/nowhere"], FileNotFoundError, "nowhere: no such folder or file$"),
        (["lidc={0}/east"], FileNotFoundError, "lidc=.*: no such folder or file and no layout; layouts: covid_ct, "),
        (["{0}/notes"], ValueError, "notes: found no known layout, expected one of covid_ct, .*; name it: LAYOUT="),
        (["{0}/notes.txt"], ValueError, "notes.txt: found no known layout"),
        (["coco={0}/east", "covid_ct={0}/east"], ValueError, "east: found the layouts coco and covid_ct, expected one$"),
        (["coco={0}/notes"], ValueError, "notes: found no record, expected the layout coco as docs/data.md describes it"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(hospitals, tmp_path, arguments, error, complaint):
    (hospitals[0] / "notes.txt").touch()
    with pytest.raises(error, match=complaint) as found:
        merge([argument.format(hospitals[0]) for argument in arguments], tmp_path / "out")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out/datalist.json").exists()


def test_sources_and_groups_of_two_folders_stay_apart(hospitals, merged):
    records = merged(hospitals[0])["training"]
    assert [(record["source"], record["group"]) for record in records] == [("east", "east/p3"), ("west", "west/p3")]


def test_exports_of_folders_of_one_name_stay_apart(tmp_path, picture, samples):
    """Each folder holds the tumour at another place, under the same file names."""
    for number, place in enumerate(("a", "b")):
        folder, mask = tmp_path / place / "tumours", np.zeros((40, 60))
        mask[10 : 15 + 5 * number, 20:50] = 255
        picture(folder / "masks/s0_1.png", mask)
        picture(folder / "images/s0_1.png", (40, 60))
        (folder / "labels.csv").write_text("file,mask,patient_id,split\nimages/s0_1.png,masks/s0_1.png,1,train\n")
    found = samples(tmp_path / "a/tumours", tmp_path / "b/tumours")
    assert sorted(float(sample["instances"].sum()) for sample in found) == [150, 300]


@pytest.fixture
def no_splits(tmp_path, picture):
    """CSV of 40 patients of three slices each, without splits."""
    rows = [f"slices/{patient}_{index}.png,p{patient:02d}" for patient in range(40) for index in range(3)]
    for row in rows:
        picture(tmp_path / row.split(",")[0], (8, 12))
    path = tmp_path / "mine.csv"
    path.write_text("image,group\n" + "\n".join(rows) + "\n")
    return path


def test_groups_without_split_are_drawn_whole(no_splits, merged):
    def groups(**options):
        records = merged(no_splits, **options)
        return {split: Counter(record["group"] for record in found) for split, found in records.items()}

    drawn = groups()
    assert {split: len(found) for split, found in drawn.items()} == {"training": 28, "validation": 4, "test": 8}
    assert all(count == 3 for found in drawn.values() for count in found.values())  # so no group is in two
    assert groups(seed=0) == drawn != groups(seed=1)


@pytest.mark.parametrize(
    "patients, expected",
    [
        (1, {"training": 1}),
        (2, {"training": 2}),
        (3, {"training": 1, "validation": 1, "test": 1}),
        (10, {"training": 7, "validation": 1, "test": 2}),
    ],
)
def test_draw_of_few_groups(no_splits, merged, patients, expected):
    header, *rows = no_splits.read_text().splitlines()
    no_splits.write_text("\n".join([header, *rows[: 3 * patients]]) + "\n")
    assert {split: len(found) // 3 for split, found in merged(no_splits).items()} == expected


def test_a_group_with_a_split_keeps_it(no_splits, merged):
    """One slice of the first ten patients names a split, the others none."""
    rows = [line.split(",") for line in no_splits.read_text().splitlines()[1:]]
    splits = 10 * ["test", "", ""] + 90 * [""]
    lines = [f"{image},{group},{split}" for (image, group), split in zip(rows, splits, strict=True)]
    no_splits.write_text("image,group,split\n" + "\n".join(lines) + "\n")
    tested = Counter(record["group"] for record in merged(no_splits)["test"])
    assert all(tested[f"mine/p{patient:02d}"] == 3 for patient in range(10))
    assert len(tested) == 10 + 6


def test_a_group_in_two_splits_is_refused(tmp_path, picture):
    for name in "ab":
        picture(tmp_path / f"{name}.png", (8, 12))
    (tmp_path / "mine.csv").write_text("image,group,split\na.png,p1,train\nb.png,p1,test\n")
    with pytest.raises(ValueError, match=r"^test\[0\] \.\./b.png: group: found 'mine/p1' in test and in training, expected"):
        merge([str(tmp_path / "mine.csv")], tmp_path / "out")


def test_class_names_decide_the_numbers(tmp_path, picture, merged):
    folder = tmp_path / "covid"
    picture(folder / "images/covid/a.png", (8, 12))
    (folder / "images/other").mkdir()
    (folder / "labels.csv").write_text("file,label,patient_id,split\nimages/covid/a.png,covid,1,train\n")
    assert merged(folder, classes=["COVID-19", "other"])["training"][0]["class"] == 0
    with pytest.raises(ValueError, match="a.png: class: found 'COVID-19', expected a number from 0 to 1 or one of heal"):
        merged(folder, classes=["healthy", "ill"])


def test_output_may_be_relative_and_behind_a_link(hospitals, tmp_path, monkeypatch):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far/away")
    monkeypatch.chdir(tmp_path)
    merge(["data"], "near/merged")
    datalist = load_datalist("near/merged/datalist.json", "near/merged")
    assert not Path(datalist["training"][0]["image"]).is_absolute()


def test_table(tmp_path, hospitals):
    lines = table(merge([str(hospitals[0] / "east")], tmp_path / "out")).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        *("source", "split", "slices", "groups", "classification", "segmentation", "reconstruction", "detection", "boxes"),
        *("other", "COVID-19", "lung cancer"),
    ]
    assert lines[2:] == [
        "| east | training | 1 | 1 | 0 | 0 | 1 | 1 | 2 | 0 | 0 | 0 |",
        "| east | test | 1 | 1 | 0 | 0 | 1 | 1 | 0 | 0 | 0 | 0 |",
    ]


def prepare_data(*arguments):
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_prepare_data_prints_the_table(hospitals, tmp_path):
    done = prepare_data(hospitals[0], "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == table(json.loads((tmp_path / "out/datalist.json").read_text()))
    assert "notes: left out, it has no known layout" in done.stderr


def test_prepare_data_refuses_in_one_line(hospitals, tmp_path):
    done = prepare_data(hospitals[0] / "notes", "--output", tmp_path / "out")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "notes: found no known layout" in done.stderr


def test_real_data_merge_into_one_datalist(real_data, tmp_path, caplog):
    datalist = merge([str(real_data), f"medseg_covid19_official={real_data / 'medseg_covid19'}"], tmp_path)
    for folder in ("lung_pet_ct_dx", "volumes"):  # of inference only
        assert f"{folder}: left out, it has no known layout" in caplog.text
    read = {f"{folder.name}/" for folder in real_data.iterdir() if folder.is_dir()} - {"lung_pet_ct_dx/", "volumes/"}
    records = [record for split in ("training", "validation", "test") for record in datalist[split]]
    images = [record["image"] for record in records]
    assert all(any(folder in image for image in images) for folder in read)
    assert len(images) == len(set(images)) == 746 + 485 + 98 + 706 + 878 - 84 - 33 + 805
    assert Counter(record["source"] for record in datalist["test"]) == {
        "covid_ct": 203,
        "iqoth_nccd": 128,
        "medseg_covid19": 48,
        "lung_tumor_slices": 155,
    }
    assert {record["source"] for record in records if "mask" in record} == {"medseg_covid19"}
