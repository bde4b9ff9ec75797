"""`from bundle import Model`: every kind of input, the folder that the command writes, and a process left as it was."""

import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from PIL import Image
from chests import chest

import bundle
from bundle.data.volumes import NO_THICKNESS
from bundle.errors import UserError
from bundle.files import ROOT
from bundle.inference import Model

SIDES = (4.0, 5.0, 6.0)  # mm between slices, rows and columns
CHEST = chest(4, spot=True)[:, 4:60]


@pytest.fixture(scope="module")
def weights(checkpoint, tmp_path_factory):
    """Weights without training that call about half of the pixels lesion."""
    weights, path = torch.load(checkpoint, weights_only=True), tmp_path_factory.mktemp("weights") / "model.pt"
    image = torch.tensor(np.pad((CHEST[:1] + 1000) / 1100, ((0, 0), (4, 4), (0, 0))), dtype=torch.float32)
    with torch.no_grad():
        logits = Model.load(checkpoint).evaluator.network.eval()(image[None])["segmentation"]
    weight, bias = (f"heads.segmentation.output.0.{name}" for name in ("weight", "bias"))
    weights[bias] -= logits.median()
    for key in (weight, bias):
        weights[key] *= 2 / logits.std()
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def model(weights):
    return Model.load(weights, score_threshold=0.06, batch_size=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_ct):
    """The volume as NIfTI and as a DICOM series."""
    folder = tmp_path_factory.mktemp("input")
    affine = np.diag([-SIDES[2], -SIDES[1], SIDES[0], 1])
    nibabel.save(nibabel.Nifti1Image(CHEST.transpose(2, 1, 0), affine), folder / "a.nii.gz")
    write_ct(folder / "series", CHEST, SIDES[1:], SIDES[0])
    return folder


def inputs(folder):
    image = nibabel.load(folder / "a.nii.gz")
    return {
        "path": [folder / "a.nii.gz"],
        "folder": [str(folder / "series")],
        "nibabel of a file": [image],
        "nibabel": [nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine)],
        "nibabel, turned": [image.as_reoriented(np.array([[1, 1], [2, -1], [0, 1]]))],
        "SimpleITK": [SimpleITK.ReadImage(str(folder / "a.nii.gz"))],
        "array": [CHEST, SIDES],
        "scaled": [((CHEST + 1000) / 1100).astype(np.float64), SIDES, (-1000, 100)],
        "tensor": [torch.tensor(CHEST), SIDES],
    }


def in_space(image):
    return np.asarray(nibabel.as_closest_canonical(image).dataobj)


def test_every_kind_of_input_gives_the_same_result(model, folder):
    expected = model.predict(folder / "a.nii.gz")
    assert 0.1 < expected.mask.get_fdata().mean() < 0.9 and len(expected.lesions) > 1 and len(expected.classes) == 3
    np.testing.assert_allclose(expected.mask.affine, nibabel.load(folder / "a.nii.gz").affine)
    for name, arguments in inputs(folder).items():
        found = model.predict(*arguments)
        assert found.classes == pytest.approx(expected.classes, abs=1e-5), name
        assert (in_space(found.mask) != in_space(expected.mask)).mean() <= 1e-3 * (name == "scaled"), name
        for one, other in zip(found.lesions, expected.lesions, strict=True):
            assert one["score"] == pytest.approx(other["score"], abs=1e-5), name
            assert one["center_mm"] == pytest.approx(other["center_mm"], abs=0.02), name
            if name != "nibabel, turned":  # x is the column
                assert one["box"] == pytest.approx(other["box"], abs=0.02) and one["slices"] == other["slices"], name
        shape = getattr(arguments[0], "shape", None)
        assert shape is None or found.mask.shape == tuple(shape), name


def test_a_slice_and_a_picture(model, folder, tmp_path):
    pixels = (CHEST[1] / 5 + 200).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    file, array = model.predict(tmp_path / "a.png"), model.predict(pixels)
    assert file.classes == array.classes and file.lesions == array.lesions and file.mask.shape == (*pixels.shape, 1)
    np.testing.assert_array_equal(file.mask.get_fdata(), array.mask.get_fdata())
    one, alone = model.predict(folder / "series/1"), model.predict(CHEST[1], SIDES[1:])
    assert one.classes == alone.classes and alone.mask.shape == (56, 64, 1)
    np.testing.assert_array_equal(in_space(one.mask), in_space(alone.mask))
    assert NO_THICKNESS in alone.warnings and NO_THICKNESS not in one.warnings


def test_threads_that_share_a_model_get_their_own_results(model):
    scans = [CHEST, np.full_like(CHEST, 40)]
    alone = [model.predict(scan, SIDES).slices for scan in scans]
    with ThreadPoolExecutor(4) as pool:
        together = [found.slices for found in pool.map(lambda scan: model.predict(scan, SIDES), scans * 2)]
    assert together == alone * 2 and alone[0] != alone[1]


def test_files_of_a_folder_that_cannot_be_read_are_a_warning(model, folder, tmp_path):
    shutil.copy(folder / "a.nii.gz", tmp_path)
    (tmp_path / "b.nii.gz").write_bytes(b"broken")
    assert "left out 1 files that cannot be read" in model.predict(tmp_path).warnings


def test_an_image_of_simpleitk_lives_as_long_as_its_result(model, folder):
    scan = model.predict(SimpleITK.ReadImage(str(folder / "a.nii.gz"))).scan
    assert isinstance(scan.image, SimpleITK.Image), "its voxels are read by a view"


def test_save_writes_what_the_command_writes(model, weights, folder, chestct, tmp_path):
    knobs = ("--checkpoint", weights, "--score_threshold", 0.06, "--batch_size", 3)
    done = chestct(folder / "a.nii.gz", tmp_path / "out", *knobs)
    assert done.returncode == 0, done.stderr[-2000:]
    for _ in range(2):  # an older result is replaced
        model.predict(folder / "a.nii.gz").save(tmp_path / "saved")
    folders = (tmp_path / "out/a.nii.gz", tmp_path / "saved")
    written, saved = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert saved == written and len(saved) > 8


def test_nothing_is_saved_over_the_files_of_another_program(model, folder, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=f"^output_dir: found {tmp_path} with other content"):
        model.predict(folder / "a.nii.gz").save(tmp_path)


def state():
    root = logging.getLogger()
    random = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    logs = list(root.handlers), root.level, root.disabled
    flushes = float(torch.tensor(1e-39) * 1) == 0
    return random, logs, flushes, torch.get_num_threads(), os.getcwd(), list(sys.path), sys.excepthook


def test_the_process_stays_as_it_was_and_nothing_is_written(checkpoint, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = state()
    Model.load(checkpoint).predict(folder / "a.nii.gz")
    assert state() == before
    assert capfd.readouterr().out == "" and not list(tmp_path.iterdir())


def test_the_configuration_of_the_command_is_what_runs(checkpoint, folder, tmp_path):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    config = json.loads((tmp_path / "configs/inference.json").read_text())
    config["preprocessing"]["transforms"] += [{"_target_": "ScaleIntensityd", "keys": "image", "minv": 0.0, "maxv": 0.0}]
    (tmp_path / "configs/inference.json").write_text(json.dumps(config))
    knobs = ({"bundle_root": tmp_path}, {})
    edited, shipped = (Model.load(checkpoint, **of_model).predict(folder / "a.nii.gz") for of_model in knobs)
    assert edited.slices[0]["probabilities"] == edited.slices[1]["probabilities"], "every slice is black"
    assert edited.classes != shipped.classes and edited.stamp != shipped.stamp
    (tmp_path / "overlay.json").write_text('{"tasks": {"classification": 1.0}}')
    alone = Model.load(checkpoint, config=[tmp_path / "overlay.json"]).predict(folder / "a.nii.gz")
    assert alone.mask is None and alone.lesions == [] and alone.classes == shipped.classes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([nibabel.Nifti1Image(CHEST, None)], "found an image of nibabel without an affine"),
        (["nowhere"], "input: nowhere: no such file or folder"),
        ([3], "found a int, expected a path, an image of nibabel or SimpleITK, or an array"),
        ([CHEST], "spacing: found none, expected mm between slices, rows and columns"),
        ([CHEST, (1, 1)], "spacing: found (1, 1), expected 3 numbers in mm above 0"),
        ([CHEST, (1, 1, 0)], "spacing: found (1, 1, 0), expected 3 numbers"),
        ([CHEST, SIDES, (0, 1)], "window: found int16 values from -1000 to 60, expected 8-bit values or 0 to 1"),
        ([np.zeros((2, 8, 8), np.uint8), SIDES, (1, 0)], "window: found (1, 0), expected two numbers in HU"),
        ([CHEST[None], SIDES], "array: found int16 of shape (1, 4, 56, 64), expected"),
        ([CHEST.astype(str), SIDES], "array: found <U6 of shape"),
        ([np.full((8, 8), np.nan), (1, 1)], "cannot be read (array: found NaN or infinite pixels"),
        (["a.png", (1, 1)], "spacing, window: found one with something else than an array"),
    ],
)
def test_bad_input_is_refused_in_one_line(model, arguments, message):
    with pytest.raises(UserError) as caught:
        model.predict(*arguments)
    assert message.removeprefix("cannot be read (") in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_of_several_scans_is_refused(model, folder):
    with pytest.raises(UserError, match=r"found 2 scans \(a.nii.gz, series/series_\w+\), expected one"):
        model.predict(folder)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"checkpoint": "missing.pt"}, "missing.pt: no such checkpoint"),
        ({"flip": False}, "found 'flip', which no workflow has"),
        ({"flips": 3}, "flips: found 3, expected True or False"),
        ({"link_iou": 0}, "link_iou: found 0, expected a number above 0"),
        ({"output_dir": "OUT"}, "output_dir: a knob of the command"),
    ],
)
def test_knobs_are_checked(checkpoint, knobs, message):
    with pytest.raises(UserError) as caught:
        Model.load(**{"checkpoint": checkpoint, **knobs})
    assert message in str(caught.value)


def test_the_package_alone_imports_no_torch():
    script = "import sys, bundle; assert bundle.__version__ and not {'torch', 'monai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert bundle.Model is Model
    with pytest.raises(AttributeError, match="has no attribute 'Modell'"):
        bundle.Modell
