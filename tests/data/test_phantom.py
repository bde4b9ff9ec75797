import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import LoadImage, Orientation
from PIL import Image
from scipy import ndimage

from bundle.data import phantom
from bundle.data.datalist import annotated_tasks, load_datalist
from bundle.data.phantom import make_patient, make_phantom, make_slice
from bundle.names import TASKS

SPLITS = ("training", "validation", "test")
SMALL = {"size": 64, "groups": (3, 3, 3), "slices_per_group": 1}


def extent(mask):
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def inside_body(image):
    """The body with its lungs, without the table."""
    parts, _ = ndimage.label(ndimage.binary_opening(image > -300, iterations=3))
    largest = np.argmax(np.bincount(parts.ravel())[1:]) + 1
    return ndimage.binary_fill_holes(parts == largest)


@pytest.mark.parametrize("size", [64, 97, 256])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_slice_has_consistent_labels(size, label):
    for seed in range(8):
        drawn = make_slice(np.random.default_rng(seed), size, label)
        image, mask, instances, boxes = (drawn[key] for key in ("image", "mask", "instances", "boxes"))
        assert image.shape == mask.shape == instances.shape == (size, size)
        assert (image.dtype, mask.dtype, instances.dtype, drawn["class"]) == (np.int16, np.uint8, np.uint8, label)
        assert image.min() >= -1024 and image.max() <= 3071
        assert set(np.unique(mask)) == ({0, 1} if label == 1 else {0})
        assert len(boxes) in ((1, 2, 3) if label == 2 else (0,))
        assert set(np.unique(instances)) == set(range(len(boxes) + 1))
        for n, (x1, y1, x2, y2) in enumerate(boxes):
            assert [x1, y1, x2, y2] == extent(instances == n + 1)
            assert ndimage.label(instances == n + 1)[1] == 1
            assert 3 <= max(x2 - x1, y2 - y1) <= 0.2 * size


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_densities_are_those_of_a_chest(level):
    for seed in range(4):
        image = make_slice(np.random.default_rng(seed), 256, 0, level=level)["image"]
        body = inside_body(image)
        air = ~ndimage.binary_dilation(body, iterations=30)
        assert abs(np.median(image[air]) + 1000) < 10
        lungs = ndimage.binary_opening(body & (image < -600), iterations=2)
        assert -900 < np.median(image[lungs]) < -780
        assert 0.25 < lungs.sum() / body.sum() < 0.6
        tissue = body & ~ndimage.binary_dilation(lungs, iterations=4) & (image > -200) & (image < 130)
        assert -110 < np.median(image[tissue]) < 70
        assert (image[body] > 300).mean() > 0.03 and not (image[air] > 300).any()


def test_orientation_is_radiological():
    """Heart on the right of the picture (the patient's left), vertebra below the lungs' middle."""
    for seed in range(4):
        image = make_slice(np.random.default_rng(seed), 256, 0, level=0.9)["image"]
        body = inside_body(image)
        lungs = ndimage.binary_opening(body & (image < -600), iterations=2)
        middle = round(ndimage.center_of_mass(body)[1])
        assert lungs[:, :middle].sum() > 1.15 * lungs[:, middle:].sum(), "the heart takes room from the left lung"
        bone = (image > 300)[:, middle - 12 : middle + 12]
        half = round(ndimage.center_of_mass(body)[0])
        assert bone[half:].sum() > 2 * bone[:half].sum()


def test_lesions_lie_in_both_lungs_and_are_denser_than_they():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        patient = make_patient(rng)
        normal = make_slice(np.random.default_rng(seed), 256, 0, patient, 0.6)["image"]
        sick = make_slice(np.random.default_rng(seed), 256, 1, patient, 0.6)  # the same chest: lesions are drawn last
        lesion = sick["mask"] > 0
        lungs = ndimage.binary_closing(inside_body(normal) & (normal < -500), iterations=4)
        assert (lesion & lungs).sum() > 0.85 * lesion.sum()
        middle = round(ndimage.center_of_mass(inside_body(normal))[1])
        assert lesion[:, :middle].any() and lesion[:, middle:].any()
        assert -650 < np.median(sick["image"][lesion]) < 60
        added = ndimage.uniform_filter(sick["image"].astype(float), 5) - ndimage.uniform_filter(normal.astype(float), 5)
        assert np.median(added[lesion]) > 200 and abs(np.median(added[~lesion])) < 5


def test_nodules_are_solid_and_in_the_lungs():
    for seed in range(6):
        patient = make_patient(np.random.default_rng(seed))
        normal = make_slice(np.random.default_rng(seed), 256, 0, patient, 0.6)["image"]
        sick = make_slice(np.random.default_rng(seed), 256, 2, patient, 0.6)
        lungs = ndimage.binary_closing(inside_body(normal) & (normal < -500), iterations=4)
        for n in range(len(sick["boxes"])):
            nodule = sick["instances"] == n + 1
            assert (nodule & lungs).sum() > 0.6 * nodule.sum()
            core = ndimage.binary_erosion(nodule, iterations=2)
            if core.sum() > 20:
                assert -20 < np.median(sick["image"][core]) < 80


def test_seed_decides_everything():
    first, again, other = (make_slice(np.random.default_rng(seed), 96, 2) for seed in (5, 5, 6))
    assert first["image"].tobytes() == again["image"].tobytes() and first["boxes"] == again["boxes"]
    assert first["image"].tobytes() != other["image"].tobytes()


def test_data_set_keeps_the_contract(phantom_dir):
    datalist = load_datalist(phantom_dir / "datalist.json", phantom_dir, ["other", "COVID-19", "lung cancer"])
    assert datalist["name"] == "phantom" and datalist["classes"] == ["other", "COVID-19", "lung cancer"]
    assert [len(datalist[split]) for split in SPLITS] == [6, 6, 6]
    groups = [{record["group"] for record in datalist[split]} for split in SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 9
    for record in sum((datalist[split] for split in SPLITS), []):
        assert record["source"] == "phantom"
        if record.get("boxes"):
            instances = np.asarray(Image.open(phantom_dir / record["instances"]))
            assert record["boxes"] == [extent(instances == n + 1) for n in range(len(record["boxes"]))]
        if record.get("mask", "empty") != "empty":
            assert record["class"] == 1 and set(np.unique(Image.open(phantom_dir / record["mask"]))) == {0, 255}
        if record.get("mask") == "empty" or record.get("boxes") == []:
            assert record["class"] == 0


@pytest.mark.parametrize("slices", [1, 2, 3, 5])
def test_every_split_teaches_every_task_and_labels_are_partial(slices, tmp_path, monkeypatch):
    drawn = [make_slice(np.random.default_rng(0), 64, label) for label in range(3)]
    monkeypatch.setattr(phantom, "make_slice", lambda rng, size, label, *_: drawn[label])  # only bookkeeping is tested
    folder = make_phantom(tmp_path / "phantom", **SMALL | {"slices_per_group": slices})
    datalist = load_datalist(folder + "/datalist.json", folder)
    for split in SPLITS:
        records = datalist[split]
        assert {task for record in records for task in annotated_tasks(record)} == set(TASKS)
        assert {record["class"] for record in records if "class" in record} == {0, 1, 2}
        assert {record["mask"] == "empty" for record in records if "mask" in record} == {True, False}
        assert {record["boxes"] == [] for record in records if "boxes" in record} == {True, False}
        unlabelled = [record for record in records if annotated_tasks(record) == ("reconstruction",)]
        assert len(unlabelled) == (2 if split == "training" and slices > 1 else 0)


def test_files_show_the_slice_to_viewers_and_to_monai(phantom_dir):
    record = json.loads((phantom_dir / "datalist.json").read_text())["training"][0]
    path = phantom_dir / record["image"]
    rng = np.random.default_rng([0, 0])
    patient = make_patient(rng, 64)
    expected = make_slice(rng, 64, 1, patient, rng.uniform(0.1, 0.9) / 2)
    file = nib.load(path)
    assert file.get_data_dtype() == np.int16 and nib.aff2axcodes(file.affine) == ("L", "P", "S")
    np.testing.assert_allclose(file.header.get_zooms()[:2], patient["spacing"], rtol=1e-5)
    assert 2 < patient["spacing"] < 8 and file.header.get_xyzt_units()[0] == "mm"
    image = Orientation(axcodes="LPS", labels=None)(LoadImage(image_only=True, ensure_channel_first=True)(path))
    assert torch.equal(image[0, ..., 0].T.as_tensor(), torch.from_numpy(expected["image"]).float())
    np.testing.assert_array_equal(np.asarray(Image.open(phantom_dir / record["mask"])), expected["mask"] * 255)


def test_folder_is_reused_and_other_arguments_are_refused(tmp_path):
    folder = tmp_path / "phantom"
    folder.mkdir()  # empty: may be filled
    assert make_phantom(str(folder), **SMALL) == str(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make_phantom(folder, **SMALL | {"groups": [3, 3, 3]}) == str(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match="found phantom data of .*'seed': 0.*expected .*'seed': 1.*") as error:
        make_phantom(folder, **SMALL, seed=1)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["phantom"]


@pytest.mark.parametrize("name, text", [("notes.txt", "mine"), ("datalist.json", "{"), ("datalist.json", '{"training": []}')])
def test_foreign_folder_is_refused_and_left_alone(name, text, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(text)
    with pytest.raises(ValueError, match="found other files"):
        make_phantom(tmp_path / "data", **SMALL)
    assert (tmp_path / "data" / name).read_text() == text and os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize(
    "arguments",
    [{"size": 63}, *({"label": n} for n in (3, -1)), *({"groups": n} for n in (3, (3, 3), (2, 3, 3))), {"slices_per_group": 0}],
)
def test_arguments_out_of_range_are_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match=f"{list(arguments)[0]}: found"):
        if "label" in arguments:
            make_slice(np.random.default_rng(0), **arguments)
        make_phantom(tmp_path / "phantom", **SMALL | arguments)
    assert not any(tmp_path.iterdir())


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "make_slice", stop)
    with pytest.raises(KeyboardInterrupt):
        make_phantom(tmp_path / "phantom", **SMALL)
    assert not any(tmp_path.iterdir())


def test_process_that_comes_second_uses_what_the_first_made(phantom_dir, tmp_path, monkeypatch):
    folder = tmp_path / "phantom"
    arguments = {"size": 64, "groups": (3, 3, 3), "slices_per_group": 2}
    write = phantom._write_patient

    def overtaken(*args):
        if not folder.exists():
            shutil.copytree(phantom_dir, folder)
        return write(*args)

    monkeypatch.setattr(phantom, "_write_patient", overtaken)
    assert make_phantom(folder, **arguments) == str(folder)
    assert os.listdir(tmp_path) == ["phantom"]
