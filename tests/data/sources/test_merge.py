import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bundle.errors import UserError
from bundle.data.datalist import FIELDS, load_datalist
from bundle.data.sources import SOURCES, detect_layout, merge, table
from bundle.data.sources.merge import find_layouts

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "layout, files",
    [
        ("table", ["labels.csv", "annotations_train.json", "images/a.png"]),
        ("covid_ct_original", ["Images-processed/a", "Data-split/a"]),
        ("iqoth_nccd_original", ["Normal cases/a", "Malignant cases/a"]),
        ("inf_net", ["TrainingSet/LungInfection-Train/a", "TestingSet/a"]),
        ("medseg_nifti", ["tr_im.nii.gz", "tr_mask.nii.gz"]),
        ("msd_lung", ["imagesTr/lung_001.nii.gz", "labelsTr/lung_001.nii.gz"]),
        ("luna16", ["annotations.csv", "subset0/subset0/1.mhd"]),
        ("coco", ["annotations_val.json"]),
        ("table", None),
        (None, ["annotations.csv"]),
    ],
)
def test_layouts_are_told_apart(tmp_path, layout, files):
    for file in files or ["a.csv"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert detect_layout(tmp_path if files else tmp_path / "a.csv") == layout


def test_a_data_set_in_two_layouts_is_taken_in_one(tmp_path, picture, merged, caplog):
    picture(tmp_path / "a/1.png", np.eye(8, 12))
    head = "file,mask,mask_multiclass,group_id,split,official_split"
    (tmp_path / "a/labels.csv").write_text(f"{head}\n1.png,,1.png,1,train,train\n")
    for part in ("Imgs", "GT"):
        for place in ("TrainingSet/LungInfection-Train/Doctor-label", "TestingSet/LungInfection-Test"):
            picture(tmp_path / "b" / place / part / "1.png", (8, 12))
    records = merged(tmp_path / "a", tmp_path / "b")
    assert [len(part) for part in records.values()] == [1]
    assert "b: found medseg_covid19 as inf_net, and as table in" in caplog.text
    assert "a, expected it in one layout; b is left out" in caplog.text


def test_two_tables_of_one_name_are_no_source_together_unless_they_name_it(tmp_path, picture, merged, caplog):
    for place in ("a", "b"):
        picture(tmp_path / place / "x.png", (8, 12))
        (tmp_path / place / "mine.csv").write_text("image,group,split\nx.png,1,train\n")
    tables = [tmp_path / place / "mine.csv" for place in ("a", "b")]
    assert len(merged(*tables)["training"]) == 1
    assert "b/mine.csv: found the name of " in caplog.text and "a/mine.csv, whose patients would count as the" in caplog.text
    for place, table in zip(("east", "west"), tables):
        table.write_text(f"image,group,split,source\nx.png,1,train,{place}\n")
    assert [record["group"] for record in merged(*tables)["training"]] == ["east/1", "west/1"]


def test_one_folder_that_cannot_be_read_never_stops_the_others(hospitals, tmp_path, merged, caplog):
    (hospitals[0] / "east/annotations_train.json").write_text("{")
    assert {record["source"] for part in merged(hospitals[0]).values() for record in part} == {"west"}
    assert "east/annotations_train.json: found no JSON" in caplog.text and "; east is left out" in caplog.text
    (hospitals[0] / "west/annotations_test.json").write_text("{")
    with pytest.raises(UserError, match="data: found no data set that can be read, expected one or more; see the lines above"):
        merged(hospitals[0])


def test_every_layout_is_recognised_but_the_one_to_be_named():
    assert [name for name, source in SOURCES.items() if not source.marks] == ["medseg_covid19_official"]


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


@pytest.mark.parametrize(
    "arguments, layouts",
    [
        (["{0}"], ["coco=east", "coco=west"]),
        (["{0}", "{0}/west", "coco={0}/east/../east"], ["coco=east", "coco=west"]),
        (["{0}", "inf_net={0}/east", "table={0}/notes"], ["coco=west", "inf_net=east", "table=notes"]),
    ],
)
def test_a_folder_stands_for_the_layouts_in_it_each_once_and_as_named(hospitals, caplog, arguments, layouts):
    found = find_layouts([argument.format(hospitals[0]) for argument in arguments])
    assert sorted(f"{layout}={path.name}" for layout, path in found) == layouts
    assert (f"{hospitals[0] / 'notes'}: left out, it has no known layout" in caplog.text) == ("table=notes" not in layouts)


@pytest.mark.parametrize(
    "arguments, error, complaint",
    [
        (["{0}/nowhere"], UserError, "nowhere: no such folder or file$"),
        (["lidc={0}/east"], UserError, "lidc=.*: no such folder or file and no layout; layouts: table, "),
        (["{0}/notes"], ValueError, r"notes: found no known layout, expected one of table \(labels.csv\), .*; name it: LAYOU"),
        (["{0}/notes.txt"], ValueError, "notes.txt: found no known layout"),
        (["coco={0}/east", "table={0}/east"], ValueError, "east: found the layouts coco and table, expected one$"),
        (["coco={0}/notes"], ValueError, "notes: found no record, expected one of the layouts of docs/data.md"),
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
        (folder / "labels.csv").write_text(
            f"file,objects,patient_id,split,source\nimages/s0_1.png,masks/s0_1.png,1,train,{place}\n"
        )
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


@pytest.mark.parametrize("patients, expected", [(1, (1, 0, 0)), (2, (2, 0, 0)), (3, (1, 1, 1)), (10, (7, 1, 2))])
def test_draw_of_few_groups(no_splits, merged, patients, expected):
    header, *rows = no_splits.read_text().splitlines()
    no_splits.write_text("\n".join([header, *rows[: 3 * patients]]) + "\n")
    found = merged(no_splits)
    assert tuple(len(found.get(split, ())) // 3 for split in ("training", "validation", "test")) == expected


def test_a_group_with_a_split_keeps_it(no_splits, merged):
    """One slice of the first ten patients names a split, the others none."""
    rows = [line.split(",") for line in no_splits.read_text().splitlines()[1:]]
    splits = 10 * ["test", "", ""] + 90 * [""]
    lines = [f"{image},{group},{split}" for (image, group), split in zip(rows, splits, strict=True)]
    no_splits.write_text("image,group,split\n" + "\n".join(lines) + "\n")
    tested = Counter(record["group"] for record in merged(no_splits)["test"])
    assert all(tested[f"mine/p{patient:02d}"] == 3 for patient in range(10))
    assert len(tested) == 10 + 6


def test_class_names_decide_the_numbers(tmp_path, picture, merged):
    picture(tmp_path / "a.png", (8, 12))
    (tmp_path / "mine.csv").write_text("file,label,split\na.png,covid,train\n")
    assert merged(tmp_path / "mine.csv", classes=["COVID-19", "other"])["training"][0]["class"] == 0
    with pytest.raises(UserError, match="a.png: class: found 'covid', expected a number from 0 to 1 or one of heal"):
        merged(tmp_path / "mine.csv", classes=["healthy", "ill"])
    (tmp_path / "mine.csv").write_text('file,label,split\na.png,"[""other"", ""lung_cancer""]",train\n')
    assert merged(tmp_path / "mine.csv")["training"][0]["class"] == [0, 2]


def test_output_may_be_relative_and_behind_a_link(hospitals, tmp_path, monkeypatch):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far/away")
    monkeypatch.chdir(tmp_path)
    merge(["data"], "near/merged")
    datalist = load_datalist("near/merged/datalist.json", "near/merged")
    assert not Path(datalist["training"][0]["image"]).is_absolute()


def test_table(hospitals, tmp_path, picture):
    lines = table(merge([str(hospitals[0] / "east")], tmp_path / "out")).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        *("source", "split", "slices", "groups", "classification", "segmentation", "reconstruction", "detection", "boxes"),
        *("other", "COVID-19", "lung cancer", "one of several"),
    ]
    assert lines[2:] == [
        "| east | training | 1 | 1 | 0 | 0 | 1 | 1 | 2 | 0 | 0 | 0 | 0 |",
        "| east | test | 1 | 1 | 0 | 0 | 1 | 1 | 0 | 0 | 0 | 0 | 0 |",
    ]


def test_the_table_tells_what_is_implied_from_what_is_annotated(tmp_path, picture):
    picture(tmp_path / "iq/a.png", (8, 12))
    (tmp_path / "iq/labels.csv").write_text("file,label,group_id,split,orig_file\na.png,normal,1,train,x\n")
    datalist = merge([str(tmp_path / "iq")], tmp_path / "out", implied=True)
    assert datalist["implied"] == {"iqoth_nccd": {"mask": 1, "boxes": 1}}
    assert table(datalist).splitlines()[2] == "| iqoth_nccd | training | 1 | 1 | 1 | 0 + 1 | 1 | 0 + 1 | 0 | 1 | 0 | 0 | 0 |"
    assert load_datalist(tmp_path / "out/datalist.json", tmp_path / "out") == datalist


def test_prepare_data_prints_the_table_or_one_line(hospitals, tmp_path):
    def prepare_data(folder):
        command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), str(folder), "--output", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = prepare_data(hospitals[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout == table(json.loads((tmp_path / "out/datalist.json").read_text()))
    assert "notes: left out, it has no known layout" in done.stderr
    done = prepare_data(hospitals[0] / "notes")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "notes: found no known layout" in done.stderr
