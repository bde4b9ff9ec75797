import json
import re
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from bundle.data.transforms import LoadSliced
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


HEADS = {
    "covid_ct": "file,label,patient_id,split,coloured_mark",
    "iqoth_nccd": "file,label,group_id,split,orig_file",
    "sars_cov2_ct": "file,label,block,split,orig_file",
    "mosmed_slices": "file,label,severity,patient_id,split,source_file",
    "luna16_nodules": "file,boxes_xyxy,patient_id,max_diameter_mm,crop_kind,split",
    "lung_tumor_slices": "file,mask,tumour_px,patient_id,split",
    "medseg_covid19": "file,mask,mask_multiclass,group_id,official_split,split",
    "covid_volumes": "file,mask,patient_id,volume,lesion_frac,label_source,split",
}
LUNA, TUMOUR = [[4, 5, 9, 9]], [[20, 5, 50, 10]]
# What a row of a public data set becomes: (class, mask, boxes, group), and with --implied.
PUBLIC = [
    ("covid_ct", "a.png,covid,p1,train,0", (1, None, None, "p1"), (1, None, None, "p1")),
    ("iqoth_nccd", "a.png,normal,g1,train,x", (0, None, None, "g1"), (0, "empty", [], "g1")),
    ("iqoth_nccd", "a.png,benign,g1,train,x", (0, None, None, "g1"), (0, "empty", None, "g1")),
    ("iqoth_nccd", "a.png,lung_cancer,g1,train,x", (2, None, None, "g1"), (2, None, None, "g1")),
    ("iqoth_nccd", "a.png,normal,g1,test,x", (0, None, None, "g1"), (0, None, None, "g1")),
    ("sars_cov2_ct", "a.png,other,tr_o00,train,x", (0, None, None, "tr_o00"), (0, None, None, "tr_o00")),
    ("mosmed_slices", "a.png,other,CT-0,s1,train,x", (0, None, None, "s1"), (0, "empty", None, "s1")),
    ("mosmed_slices", "a.png,covid,CT-1,s1,train,x", (1, None, None, "s1"), (1, None, None, "s1")),
    ("luna16_nodules", 'a.png,"[[4, 5, 9, 9]]",l1,3,lung,train', (None, None, LUNA, "l1"), ([0, 2], "empty", LUNA, "l1")),
    ("lung_tumor_slices", "a.png,,0,p1,train", (None, None, [], "p1"), ([0, 2], "empty", [], "p1")),
    ("lung_tumor_slices", "a.png,m.png,9,p1,train", (None, None, TUMOUR, "p1"), ([0, 2], "empty", TUMOUR, "p1")),
    ("medseg_covid19", "a.png,z.png,m.png,g,test,train", (None, "m.png", None, "g"), (1, "m.png", [], "g")),
    ("covid_volumes", "a.png,m.png,p,r_10_85_1,0.1,doctor,train", (None, "m.png", None, "r_10"), (1, "m.png", [], "r_10")),
    ("covid_volumes", "a.png,m.png,p,r_10_85_3,0.004,d,train", (None, "m.png", None, "r_10"), ([0, 1], "m.png", [], "r_10")),
    ("covid_volumes", "a.png,z.png,p,c_1,0,d,train", (None, "empty", None, "c_1"), ([0, 1], "empty", [], "c_1")),
    ("covid_volumes", "a.png,z.png,p,c_1,0,d,val", (None, "empty", None, "c_1"), (None, "empty", None, "c_1")),
]


@pytest.fixture
def public(tmp_path, picture):
    """public(name, row): folder of a public data set with one slice, and masks with a lesion (m.png) and without (z.png)."""

    def write(name, *rows):
        folder = tmp_path / "any name"
        mask = np.zeros((40, 60))
        picture(folder / "z.png", mask)
        mask[5:10, 20:50] = 255
        picture(folder / "m.png", mask)
        for row in rows:
            picture(folder / row.split(",")[0], (40, 60))
        (folder / "labels.csv").write_text("\n".join([HEADS[name], *rows]) + "\n")
        return folder

    return write


@pytest.mark.parametrize("implied", [False, True])
@pytest.mark.parametrize(("name", "row", "annotated", "with_implied"), PUBLIC)
def test_public_data_sets(public, merged, name, row, annotated, with_implied, implied):
    ((split, (record,)),) = merged(public(name, row), implied=implied).items()
    assert split == next(name for name in ("training", "validation", "test") if {name[:3], name[:5]} & set(row.split(",")))
    expected = dict(zip(("class", "mask", "boxes", "group"), with_implied if implied else annotated))
    found = {**record, "group": record["group"].removeprefix(f"{name}/")}
    found["mask"] = found["mask"].rpartition("/")[2] if "mask" in found else None
    assert {field: found.get(field) for field in expected} == expected
    assert record["source"] == name


def test_a_damaged_cell_of_a_public_data_set_is_named(public, merged):
    with pytest.raises(UserError, match="line 2: found ValueError could not .*: 'x', expected the table of covid_volumes"):
        merged(public("covid_volumes", "a.png,m.png,p,c_1,x,d,train"))
    folder = public("mosmed_slices", "a.png,other,CT-0,s1,train,x")
    with pytest.raises(UserError, match="line 2: found KeyError 'official_split', expected the table of medseg_covid19"):
        merged(f"medseg_covid19_official={folder}")


def test_a_table_of_ones_own_may_share_a_column_with_a_public_one(table, merged):
    table.write_text("image,label,severity,block,split\nslices/a.png,other,mild,3,train\n")
    assert summary(merged(table), "source", "group") == {"training": [("mine", "mine/slices/a.png")]}


def test_slices_of_patients_that_another_folder_annotates_are_left_out(public, tmp_path, merged, picture, caplog):
    """The unlabelled slices of the volumes: those of validation and test patients must not be trained on."""
    caplog.set_level("INFO")
    masks = public("covid_volumes", "a.png,m.png,p1,v_1_85,0.1,d,val")
    rows = ["a.png,v_1,v_1_85,1,train,x", "b.png,v_1,v_1_85,2,train,x", "c.png,v_2,v_2_99,1,train,x"]
    for row in rows:
        picture(tmp_path / "more" / row.split(",")[0], (40, 60))
    (tmp_path / "more/labels.csv").write_text("\n".join(["file,patient_id,volume,slice_index,split,orig_file", *rows]))
    records = merged(masks, tmp_path / "more")
    assert summary(records, "group", "source") == {
        "training": [("covid_volumes/v_2", "covid_volumes")],
        "validation": [("covid_volumes/v_1", "covid_volumes")],
    }
    assert f"{tmp_path}/more: 2 slices without annotation left out" in caplog.text


def test_medseg_covid19_official_split(public, merged, samples):
    splits = (("train", "train"), ("train", "val"), ("test", "train"), ("test", "test"))  # the official and the other one
    rows = [f"{n}.png,z.png,m.png,g{n},{official},{split}" for n, (official, split) in enumerate(splits)]
    folder = public("medseg_covid19", *rows)
    assert summary(merged(folder), "group") == {
        "training": [("medseg_covid19/g0",), ("medseg_covid19/g2",)],
        "validation": [("medseg_covid19/g1",)],
        "test": [("medseg_covid19/g3",)],
    }
    assert summary(merged(f"medseg_covid19_official={folder}"), "group") == {
        "training": [("medseg_covid19/0",)],
        "validation": [("medseg_covid19/1",)],
        "test": [("medseg_covid19/2",), ("medseg_covid19/3",)],
    }


def test_objects_become_boxes_and_instances(tmp_path, samples, picture, caplog):
    caplog.set_level("INFO")
    masks = {name: np.zeros((40, 60)) for name in ("two", "dust")}
    masks["two"][5:10, 20:50], masks["two"][30:36, 2:8], masks["two"][20, 20:23] = 255, 255, 255
    masks["dust"][20, 20:23] = 255
    rows = [{"image": f"{name}.png", "objects": f"{name}_mask.png", "split": "train"} for name in masks]
    for name, mask in masks.items():
        picture(tmp_path / f"tumours/{name}_mask.png", mask)
    rows.append({"image": "free.png", "objects": "empty", "split": "train"})
    for row in rows:
        picture(tmp_path / "tumours" / row["image"], (40, 60))
    two, free = samples(write_table(tmp_path / "tumours", rows))
    np.testing.assert_array_equal(two["boxes"], [[20, 5, 50, 10], [2, 30, 8, 36]])
    assert two["instances"].shape == (2, 40, 60)
    assert two["instances"][0, 5:10, 20:50].all() and two["instances"][0].sum() == 150
    assert two["instances"][1, 30:36, 2:8].all() and two["instances"][1].sum() == 36
    assert free["boxes"].shape == (0, 4)
    assert "mask" not in two and "mask" not in free  # tumours are no infection
    assert "tumours: 1 slices left out whose tumour has no part of 20 pixels" in caplog.text


LESION = np.zeros((40, 60), np.uint8)
LESION[5:10, 20:50] = 1
CT = np.add.outer(np.arange(40) * 3, np.arange(60) * 2).astype(np.uint8)
HU = CT.astype(np.int16) * 8 - 1000
NOISE = np.random.default_rng(0).integers(0, 4, (40, 60)).astype(np.uint8)
LPS = np.diag([-0.7, -0.9, 5, 1])


def palette(indices, *colours):
    picture = Image.fromarray(indices, "P")
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def nifti(pixels, affine=LPS):
    return nibabel.Nifti1Image(np.asarray(pixels).T[..., None], affine)


def save(picture, path):
    """A picture, its pixels or a NIfTI image; EXIF mirrors a picture whose name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, nibabel.Nifti1Image):
        return nibabel.save(picture, path)
    exif = Image.Exif()
    exif[0x112] = 2
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture.save(path, **({"exif": exif} if "mirrored" in path.name else {}))


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)
GREY = Image.new("L", (60, 40))
MASKS = {  # a lesion of 150 pixels as programs save it
    "alpha.png": Image.merge("RGBA", [GREY] * 3 + [Image.fromarray(LESION * 255)]),
    "white with alpha.png": Image.merge("LA", [Image.new("L", (60, 40), 255), Image.fromarray(LESION * 255)]),
    "black palette.png": palette(LESION, *[BLACK] * 256),
    "red on white.png": palette(LESION, WHITE, RED),
    "white first.png": palette(1 - LESION, WHITE, BLACK),
    "faint blue.png": Image.merge("RGB", [GREY] * 2 + [Image.fromarray(LESION)]),
    "16 bits.png": Image.fromarray(LESION.astype(np.uint16) * 65535),
    "1 bit.png": Image.fromarray(LESION * 255).convert("1"),
    "0.9999999.tif": Image.fromarray(LESION * np.float32(0.9999999)),
    "half.tif": Image.fromarray(LESION * np.float32(0.5)),
    "nan.nii": nifti(np.where(LESION, np.float32(1), np.nan)),
    "65535.nii": nifti(LESION.astype(np.int32) * 65535),
    "turned.nii.gz": nifti(LESION[::-1, ::-1], LPS @ [[-1, 0, 0, 59], [0, -1, 0, 39], [0, 0, 1, 0], [0, 0, 0, 1]]),
    "smeared.jpg": Image.fromarray(LESION * 255),
    "smeared.webp": Image.fromarray(LESION * 255),
    "was a JPEG.png": Image.fromarray(np.where(LESION, 255 - NOISE, NOISE)),
    "mirrored.png": Image.fromarray(LESION[:, ::-1] * 255),
    "mirrored alpha.png": Image.merge("RGBA", [GREY] * 3 + [Image.fromarray(LESION[:, ::-1] * 255)]),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_lesion_is_read_wherever_a_program_put_it(tmp_path, name, samples):
    image = "a.nii" if ".nii" in name else "a.png"
    save(nifti(HU) if ".nii" in name else CT, tmp_path / "mine" / image)
    save(MASKS[name], tmp_path / "mine" / name)
    found = [LoadSliced()({"image": tmp_path / "mine" / image, "mask": tmp_path / "mine" / name})["mask"]]  # of any datalist
    for column, field in (("mask", "mask"), ("objects", "instances")):
        (sample,) = samples(write_table(tmp_path / "mine", [{"image": image, column: name, "split": "train"}]))
        found.append(sample[field])
    assert all(mask[0, 5:10, 20:50].all() and mask.sum() == 150 for mask in found)


NO_LABELS = "expected a mask: black and white, or labels 0, 1, 2"
BAD_MASKS = {  # with the image that each is given for
    "inverted.png": (CT, 255 - 255 * LESION, "found 255 or more in all corners, expected 0 outside of lesions; invert it"),
    "254 and 255.png": (CT, 254 + LESION, "found 254 or more in all corners"),
    "probability.tif": (CT, LESION * np.float32(0.9) + np.float32(0.01), "found 0.01 or more in all corners"),
    "inverted.nii": (nifti(HU), nifti(1 - LESION), "found 1 or more in all corners"),
    "a CT.png": (CT, CT, f"found [0-9]+ values from 0 to 235, {NO_LABELS}"),
    "on the CT.png": (CT, np.where(LESION[..., None], RED, CT[..., None]).astype(np.uint8), NO_LABELS),
    "labels.jpg": (CT, LESION, f"found 2 values from 0 to 1, {NO_LABELS}"),
    "two shades.jpg": (CT, LESION * np.where(np.arange(60) < 35, 127, 255).astype(np.uint8), NO_LABELS),
    "below 0.tif": (CT, -LESION.astype(np.int32), "found the value -1, expected labels from 0"),
    "below 0.nii": (nifti(HU), nifti(-LESION.astype(np.int16)), "found the value -1, expected labels from 0"),
    "air.nii": (nifti(HU), nifti(-1024 * LESION.astype(np.int16)), "found the value -1024, expected labels from 0"),
    "high.nii": (nifti(HU), nifti(LESION * np.int32(70000)), "found the value 70000, expected labels from 0 to 65535"),
    "turned.nii": (CT, nifti(LESION, np.eye(4)), "found a header that turns the mask, while .*a.png has none"),
    "elsewhere.nii": (nifti(HU), nifti(LESION, np.eye(4)), "found a header that turns the mask otherwise"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_an_inverted_mask_is_refused(tmp_path, name, merged):
    image, mask, words = BAD_MASKS[name]
    source = "a.nii" if isinstance(image, nibabel.Nifti1Image) else "a.png"
    save(image, tmp_path / "mine" / source)
    save(mask, tmp_path / "mine" / name)
    with pytest.raises(UserError, match=f"{name}: .*{words}"):
        LoadSliced()({"image": tmp_path / "mine" / source, "mask": tmp_path / "mine" / name})
    for column in ("mask", "objects")[: 1 if "turns" in words else 2]:
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            merged(write_table(tmp_path / "mine", [{"image": source, column: name, "split": "train"}]))


def test_objects_of_two_labels_stay_apart_and_lie_on_the_grid_of_the_file(tmp_path, samples):
    """The file's axes run to the right and to the front, its mask is a picture, in which the objects touch."""
    save(nifti(HU[::-1, ::-1], np.eye(4)), tmp_path / "mine/a.nii")
    save(LESION * np.where(np.arange(60) < 35, 1, 2).astype(np.uint8), tmp_path / "mine/m.png")
    save(0 * LESION, tmp_path / "mine/z.png")
    (sample,) = samples(write_table(tmp_path / "mine", [{"image": "a.nii", "objects": "m.png", "split": "train"}]))
    assert sample["boxes"].tolist() == [[25, 30, 40, 35], [10, 30, 25, 35]]
    assert sample["instances"].sum((1, 2)).tolist() == [75, 75]
    (sample,) = samples(write_table(tmp_path / "mine", [{"image": "a.nii", "objects": "z.png", "split": "train"}]))
    assert sample["boxes"].shape == (0, 4), "a black mask says that nothing is there"


BAD_ROWS = [  # of image, class, mask, boxes, group, split; words of the line that names it
    ("z.png,,,,p9,train", "image: found no file .*mine/z.png, expected it there; this"),
    (",1,,,,train", "line 8: image: found an empty cell, expected the path of an image"),
    ("a.png,flu,,,,train", "a.png: class: found 'flu', expected a number from 0 to 2 or one of other, COV"),
    ("a.png,-1,,,,train", "a.png: class: found -1, expected a whole number from 0 to 2"),
    ("a.png,1.5,,,,train", "a.png: class: found '1.5', expected a number"),
    ("a.png,[1],,,,train", r"a.png: class: found \[1\], expected a whole number from 0 to 2, or a list of those"),
    ("a.png,,z.png,,p9,train", "z.png: no such file, expected a mask"),
    ("a.png,,cut.png,,p9,train", "cut.png: cannot be read"),
    ("a.png,,,[[1;2]],,train", r"line 8: boxes: found '\[\[1;2\]\]', expected \[\[x1, y1, x2, y2\], …\] with decimal points"),
    ('a.png,,,"[[1,5, 2,5, 30,5, 40,5]]",p9,train', "expected four finite numbers .* with decimal points"),
    ('a.png,,,"[1, 2, 30, 40]",p9,train', r"boxes: found \[1, 2, 30, 40\], expected a list of boxes \[\[x1, y1, x2, y2"),
    ('a.png,,,"[[0.5, 0.5, 0.1, 0.1]]",p9,train', "expected pixels, not shares of the image; multiply x"),
    ('a.png,,,"[[30, 20, 10, 5]]",p9,train', "expected x1 < x2 and y1 < y2, not .x, y, width, height"),
    ("0.png,,,,p0,train", "0.png: image: found in an earlier row as well, expected one row with all annotations"),
    ("a.png,,,,p9,dev", "split: found 'dev', expected one of train"),
    ("a.png,,,[[1, 2, 3, 4]],,train", "line 8: found 9 cells, expected 6 cells separated by ','"),
    ("a.png,,", "line 8: found 3 cells, expected 6 cells"),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_one_bad_row_stops_no_table(tmp_path, picture, merged, caplog, row, words):
    rows = [f"{number}.png,,empty,[],p{number},train" for number in range(6)]
    for name in ("a.png", "cut.png", *(f"{number}.png" for number in range(6))):
        picture(tmp_path / "mine" / name, (40, 60))
    (tmp_path / "mine/cut.png").write_bytes((tmp_path / "mine/cut.png").read_bytes()[:60])
    (tmp_path / "mine/labels.csv").write_text("\n".join(["Image,Class,Mask,Boxes,Group,Split", *rows, row]))
    assert len(merged(tmp_path / "mine")["training"]) == (5 if row.startswith("0.png") else 6), "of two, neither is right"
    (message,) = [record.message for record in caplog.records if record.message.endswith("this slice is left out")]
    assert re.search(words, message) and "\n" not in message


def test_boxes_for_a_picture_of_another_size_are_refused(tmp_path, merged, coco):
    folder = coco(tmp_path / "hospital")
    path = folder / "annotations_train.json"
    content = json.loads(path.read_text())
    content["images"][0] |= {"width": 60, "height": 40}
    path.write_text(json.dumps(content))
    assert merged(folder)["training"]
    content["images"][0] |= {"width": 512}
    path.write_text(json.dumps(content))
    (folder / "annotations_test.json").unlink()
    with pytest.raises(UserError, match=r"boxes: found boxes for \(columns, rows\) = \(512, 40\), expected \(60, 40\) as"):
        merged(folder)
    (tmp_path / "mine.csv").write_text('image,boxes,Width,Height\nhospital/images/3.png,"[[1, 2, 30, 40]]",512.0,40.0\n')
    with pytest.raises(UserError, match="boxes: found boxes for"):
        merged(tmp_path / "mine.csv")


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


ANNOTATION = {"image_id": 3, "bbox": [0, 0, 5, 5]}
BAD_COCO = [  # what takes the place of parts of it, or of its text
    ("{", "annotations_train.json: found no JSON .Expecting"),
    ('{"a": 1}\n{"b": 2}', "annotations_train.json: found no JSON .Extra data: line 2"),
    ("[]", "annotations_train.json: found list, expected COCO's lists images and annotations"),
    ('{"images": []}', "found the keys images, expected COCO's lists images and annotations .empty, where nothing"),
    ({"images": [{"id": 3}]}, "found the image {'id': 3}, expected an id and a file_name"),
    ({"images": 2 * [{"id": 3, "file_name": "a.png"}]}, "found the image id 3 twice, expected each once"),
    ({"annotations": [ANNOTATION | {"image_id": "3"}]}, "found an annotation of image_id '3', expected the id of an image"),
    ({"annotations": [ANNOTATION | {"bbox": [0, 0, 1]}]}, r"3.png: boxes: found \[0, 0, 1\], expected four finite"),
    ({"annotations": [{"image_id": 3}]}, r"3.png: boxes: found \[None\], expected a list of boxes"),
    ({"categories": ["nodule"]}, "found TypeError .*, expected COCO's images .id, file_name., annotations"),
    (None, "annotations_dev.json: found an unknown split, expected annotations_train.json"),
]


@pytest.mark.parametrize("change, complaint", BAD_COCO)
def test_bad_coco_is_refused_in_one_line(tmp_path, merged, coco, change, complaint):
    folder = coco(tmp_path / "hospital")
    (folder / "annotations_test.json").unlink()
    content = json.loads((folder / "annotations_train.json").read_text())
    text = change if isinstance(change, str) else json.dumps(content | (change or {}))
    (folder / f"annotations_{'train' if change else 'dev'}.json").write_text(text)
    with pytest.raises(UserError, match=complaint) as error:
        merged(folder)
    assert "\n" not in str(error.value)


def test_coco_of_other_programs(tmp_path, merged, coco, caplog):
    """UTF-16, backslashes, numbers as text, patient 0, a crowd of "0", a box that is there twice."""
    folder = coco(tmp_path / "hospital")
    image = {"id": 3, "file_name": "images\\3.png", "patient_id": 0}
    boxes = 2 * [{"image_id": 3, "bbox": ["10", "5", "30", "12.5"], "iscrowd": "0"}]
    (folder / "annotations_train.json").write_text(json.dumps({"images": [image], "annotations": boxes}), encoding="utf-16")
    assert summary(merged(folder), "boxes", "group")["training"] == [([[10, 5, 40, 17.5]], "hospital/0")]
    assert "hospital: 1 boxes that repeat one of their slice left out" in caplog.text


def test_categories_of_coco_are_chosen_and_crowds_left_out(tmp_path, merged, coco, caplog):
    caplog.set_level("INFO")
    folder = coco(tmp_path / "hospital")
    path = folder / "annotations_train.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 1, "name": "nodule"}, {"id": 2, "name": "rib"}]
    content["annotations"][1]["category_id"] = 2
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    with pytest.raises(UserError, match=r"found the categories nodule \(1\), rib \(1\), expected one; choose with --cate"):
        merged(folder)
    assert merged(folder, categories=["nodule"])["training"][0]["boxes"] == [[10, 5, 40, 17.5]]
    assert "1 annotations of other categories left out" in caplog.text
    with pytest.raises(UserError, match="categories: found mass, expected some of nodule"):
        merged(folder, categories=["mass"])
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    assert "training" not in merged(folder, categories=["nodule"])
    assert "1 slices left out whose objects are marked as a crowd" in caplog.text
    test = json.loads((folder / "annotations_test.json").read_text())
    test["annotations"] = [{"image_id": 8, "bbox": [1, 2, 3, 4], "category_id": 2}]
    (folder / "annotations_test.json").write_text(json.dumps(test | {"categories": [{"id": 2, "name": "mass"}]}))
    path.write_text(json.dumps(content | {"annotations": [ANNOTATION | {"category_id": 1}]}))
    with pytest.raises(UserError, match=r"hospital: found the categories mass \(1\), nodule \(1\), expected one"):
        merged(folder)


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


def test_columns_that_are_not_read_are_named(table, merged, caplog):
    caplog.set_level("INFO")
    table.write_text("image,age,clas\nslices/a.png,64,1\n")
    assert "class" not in merged(table)["training"][0]
    assert "mine.csv: columns that are not read: age, clas" in caplog.text
    table.write_text("image,xmin,ymin,xmax,ymax\nslices/a.png,1,2,30,40\n")
    with pytest.raises(UserError, match="mine.csv: found the column 'xmin', expected one column boxes with all boxes of an"):
        merged(table)


SPREADSHEETS = {
    "empty columns": "image,class,split,,\nslices/a.png,2,train,,\n,,,,\n",
    "a header twice": "image,class,split\nslices/a.png,2.0,train\nimage,class,split\n",
    "semicolons": "image;class;split\nslices/a.png;2,0;train\n",
    "tabs and a byte order mark": "\ufeffimage\tclass\tsplit\r\nslices/a.png\tLung_Cancer\tTrain\r\n",
    "Excel, of Windows": "sep=;\nImage;Class;Split\nslices\\a.png;2,0;train\n",
    "commas in a header of semicolons": "image;class;notes (a, b, c, d);split\nslices/a.png;2;;train\n",
    "tabs in UTF-16": "image\tclass\tsplit\r\nslices/a.png\t2\ttrain\r\n",
    "a long note": f"image,class,split,note\nslices/a.png,2,train,{'x' * 200_000}\n",
    "an index": ",image,class,split\n0,slices/a.png,2,train\n",
    "comments and empty lines": "# of 2020\n,,\nimage,class,split\n# Monday\nslices/a.png,2,train\n",
    "blanks": ' Image , CLASS, split \n "slices/a.png" , "lung  cancer", "train"\n',
    "words for nothing": "image,class,mask,boxes,group,source,split\nslices/a.png,2,NA,nan,None,<NA>,train\n",
    "Python": "image,class,boxes,split\nslices/a.png,LUNGCANCER,\"[(1, 2, 30, 40)]\",train\n",
    "text in text": 'filename,class,boxes,split\nslices/a.png,2,"""[[1, 2, 30, 40]]""",train\n',
}


@pytest.mark.parametrize("name", SPREADSHEETS)
def test_tables_of_spreadsheets(table, merged, name):
    table.write_text(SPREADSHEETS[name], encoding="utf-16" if "UTF-16" in name else "utf-8", newline="")
    boxes = [[1, 2, 30, 40]] if "boxes" in SPREADSHEETS[name] and "NA" not in SPREADSHEETS[name] else None
    assert summary(merged(table), "class", "boxes", "mask", "group") == {
        "training": [(2, boxes, None, "mine/slices/a.png")]
    }


@pytest.mark.parametrize("column", ["Group", "patient", "Patient ID", "PatientID", "subject"])
@pytest.mark.parametrize("ids", [("7", "7.0"), ("7", "7")])  # pandas writes 7.0 where another cell of the column is empty
def test_patients_stay_in_one_split_whatever_their_column_is_called(table, merged, column, ids):
    table.write_text(f"image,{column},split\nslices/a.png,{ids[0]},train\nslices/b.png,{ids[1]},test\n")
    with pytest.raises(UserError, match="mine.csv: .*b.png: group: found 'mine/7' in test and in training, expected it in"):
        merged(table)


def test_rows_and_masks_that_repeat_are_named(table, merged, caplog):
    rows = (f"slices/{image},slices/a_mark.png,train\n" for image in ("a.png", "../slices/a.png", "b.png"))
    table.write_text("image,mask,split\n" + "".join(rows))
    assert len(merged(table)["training"]) == 2
    assert "1 rows that repeat another one left out" in caplog.text
    assert "1 masks that an earlier image has, too; check that each belongs to its image" in caplog.text


def test_one_bad_slice_never_stops_a_data_set_and_many_do(tmp_path, picture, merged, caplog):
    def write(bad, count=40):
        rows = []
        for number in range(count):
            picture(tmp_path / f"mine/{number}.png", (40, 60))
            box = [50, 5, 90, 9] if number < bad else [50, 5, 60.5, 9] if number == 20 else [50, 5, 55, 9]
            rows.append(f'{number}.png,"{[box, [7, 7, 7, 9]] if number == 21 else [box]}",train')
        (tmp_path / "mine/labels.csv").write_text("\n".join(["image,boxes,split", *rows]))
        return tmp_path / "mine"

    records = merged(write(bad=2))["training"]
    boxes = {Path(record["image"]).stem: record["boxes"] for record in records}
    assert len(boxes) == 38 and boxes["20"] == [[50, 5, 60, 9]] and boxes["21"] == [[50, 5, 55, 9]]
    assert caplog.text.count("outside the image, expected x from 0 to 60 and y from 0 to 40; this slice is left out") == 2
    assert "mine: 1 boxes that reach out of the image by at most 1 pixel clipped" in caplog.text
    assert "mine: 1 boxes of no width left out" in caplog.text
    with pytest.raises(UserError, match=r"mine: .*0.png: boxes: found .* \(3 of 40 slices cannot be used, 8%\)"):
        merged(write(bad=3))


REAL = {  # source -> slices of the splits, and of training: class 0, 1, 2, in part; masks with and without lesion; boxes, none
    "covid_ct": ((425, 118, 203), (234, 191, 0, 0), (0, 0), (0, 0)),
    "covid_volumes": ((492, 73, 115), (0, 361, 0, 131), (372, 120), (0, 492)),
    "iqoth_nccd": ((284, 73, 128), (136, 0, 148, 0), (0, 136), (0, 93)),
    "luna16_nodules": ((570, 78, 123), (0, 0, 0, 570), (0, 570), (570, 0)),
    "lung_tumor_slices": ((1162, 150, 155), (0, 0, 0, 1162), (0, 1162), (967, 195)),
    "medseg_covid19": ((50, 7, 41), (0, 50, 0, 0), (50, 0), (0, 50)),
    "mosmed_slices": ((359, 53, 102), (147, 212, 0, 0), (0, 147), (0, 0)),
    "sars_cov2_ct": ((1008, 122, 358), (524, 484, 0, 0), (0, 0), (0, 0)),
}


def test_real_data_merge_into_one_datalist(real_data, merged, caplog):
    caplog.set_level("INFO")
    records = merged(real_data, implied=True)
    for source, (sizes, classes, masks, boxes) in REAL.items():
        found = {split: [record for record in part if record["source"] == source] for split, part in records.items()}
        assert tuple(map(len, found.values())) == sizes, source
        training = found["training"]
        labels = Counter(str(record.get("class")) for record in training)
        assert (*(labels[str(n)] for n in range(3)), labels["[0, 1]"] + labels["[0, 2]"]) == classes, source
        empty = [record["mask"] == "empty" for record in training if "mask" in record]
        assert (empty.count(False), empty.count(True)) == masks, source
        free = [record["boxes"] == [] for record in training if "boxes" in record]
        assert (free.count(False), free.count(True)) == boxes, source
    assert {record["source"] for part in records.values() for record in part} == set(REAL)
    assert "volumes: left out, it has no known layout" in caplog.text
    assert "for inference only; lung_pet_ct_dx is left out" in caplog.text
    assert "84 slices left out" in caplog.text and "33 slices left out" in caplog.text
    assert "covid_volumes_unlabelled: 685 slices without annotation left out" in caplog.text


def test_real_boxes_are_those_of_the_data_sets_own_coco_file(real_data, merged):
    """Those are one pixel larger, above and to the right, than the tumours in the masks; parts that touch at a corner are
    two there and one here, and dust is left out here."""
    mine = merged(real_data / "lung_tumor_slices")["test"]
    theirs = {record["image"]: record["boxes"] for record in merged(f"coco={real_data / 'lung_tumor_slices'}")["test"]}
    assert len(theirs) == 179
    same = [[x1, y1 - 1, x2 + 1, y2] in theirs[record["image"]] for record in mine for x1, y1, x2, y2 in record["boxes"]]
    assert len(same) == 129 and np.mean(same) > 0.97
