"""Predictions come back on the very pixels they were made for; a network that marks what is bright stands in."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image
from torch import nn
from torchvision.ops import masks_to_boxes

from bundle.data.transforms import LoadSliced, ScaleIntensityd
from bundle.inference import BoxesToFiled, PredictionWriter

ROOT = Path(__file__).parents[2]
ROWS, COLUMNS, LESION = 40, 64, (slice(8, 20), slice(30, 54))
# Axes of the file as (axis of the patient's L P S, direction): as drawn, flipped, turned by 90 degrees, slice axis first.
ORIENTATIONS = {
    "lps": [[0, 1], [1, 1], [2, 1]],
    "ras": [[0, -1], [1, -1], [2, 1]],
    "pls": [[1, 1], [0, 1], [2, 1]],
    "ari": [[1, -1], [0, -1], [2, -1]],
    "slp": [[1, 1], [2, 1], [0, 1]],
}


class Bright(nn.Module):
    """Calls a lesion what is brighter than 0.6, boxes it with three scores, and copies the image."""

    def forward(self, image):
        lesion = image > 0.6
        boxes = [masks_to_boxes(mask) + torch.tensor([0, 0, 1, 1]) if mask.any() else torch.zeros(0, 4) for mask in lesion]
        return {
            "classification": torch.tensor([0.0, 2.0, 1.0]).repeat(len(image), 1),
            "segmentation": torch.where(lesion, 9.0, -9.0),
            "reconstruction": image,
            "detection": [
                {"boxes": box.repeat(3, 1), "scores": torch.tensor([0.9, 0.6, 0.3])[: 3 * len(box)]} for box in boxes
            ],
        }


def predict(source, output_dir, **knobs):
    parser = ConfigParser()
    parser.read_config([ROOT / "configs/inference.json", ROOT / "configs/preset_smoke.json"])
    parser.update({"input": str(source), "output_dir": str(output_dir), "device": "$torch.device('cpu')", **knobs})
    evaluator = parser.get_parsed_content("evaluator")
    evaluator.network = Bright()
    evaluator.run()
    return json.loads((output_dir / "predictions.json").read_text())


def drawn(scale=1):
    """HU of a slice that is wider than high, scaled, with a lesion off its middle."""
    hu = np.full((ROWS, COLUMNS), -1000, np.int16)
    hu[LESION] = 100
    return hu.repeat(scale, 0).repeat(scale, 1)


def as_nifti(pixels, orientation):
    affine = np.diag([-1.5, -0.75, 5.0, 1.0])
    affine[:3, 3] = [9, 8, 7]
    return nib.Nifti1Image(pixels.T[..., None], affine).as_reoriented(np.array(ORIENTATIONS[orientation]))


def extent(mask):
    """[x1, y1, x2, y2] of a mask (x, y, …) of a file."""
    x, y = np.nonzero(np.squeeze(mask))
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_nifti_of_any_orientation_gets_its_own_pixels_back(tmp_path):
    (tmp_path / "in").mkdir()
    stored = {name: as_nifti(drawn(), name) for name in ORIENTATIONS}
    for name, image in stored.items():
        nib.save(image, tmp_path / "in" / f"{name}.nii.gz")
    report = predict(tmp_path / "in", tmp_path / "out")
    assert [entry["file"] for entry in report["images"]] == sorted(f"{name}.nii.gz" for name in ORIENTATIONS)
    assert report["failures"] == []
    for entry in report["images"]:
        expected = stored[entry["file"].removesuffix(".nii.gz")]
        mask = nib.load(tmp_path / "out" / entry["segmentation"]["mask"])
        np.testing.assert_array_equal(mask.get_fdata(), expected.get_fdata() == 100)
        rebuilt = nib.load(tmp_path / "out" / entry["reconstruction"]["image"])
        np.testing.assert_array_equal(rebuilt.get_fdata(), expected.get_fdata())
        for image in (mask, rebuilt):
            np.testing.assert_allclose(image.affine, expected.affine)
            assert image.shape == expected.shape and image.header.get_xyzt_units()[0] == "mm"
        boxes, scores = zip(*[(found["box"], found["score"]) for found in entry["detection"]])
        np.testing.assert_allclose(boxes, [extent(expected.get_fdata() == 100)] * 2, atol=0.01)
        assert scores == pytest.approx((0.9, 0.6)), "the score threshold is 0.5"
        assert entry["segmentation"]["area"] == {"lesion": {"pixels": 12 * 24, "mm2": 12 * 24 * 1.5 * 0.75}}
        assert entry["classification"]["predicted"] == "COVID-19"
        assert sum(entry["classification"]["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [2, 3])
def test_a_file_larger_than_the_network_sees_is_answered_at_its_size(tmp_path, scale):
    image = as_nifti(drawn(scale), "pls")
    nib.save(image, tmp_path / "x.nii.gz")
    (entry,) = predict(tmp_path / "x.nii.gz", tmp_path / "out")["images"]
    truth = image.get_fdata() == 100
    mask = nib.load(tmp_path / "out" / entry["segmentation"]["mask"]).get_fdata() > 0
    # Corners are rounded off by the interpolation; edges are where they were.
    assert extent(mask) == extent(truth) and (mask != truth).sum() <= 4 * scale**2
    np.testing.assert_allclose(entry["detection"][0]["box"], extent(truth), atol=0.01)


def test_a_smaller_picture_comes_back_as_a_picture(tmp_path):
    pixels = np.full((20, 32), 30, np.uint8)
    pixels[4:10, 15:27] = 220
    Image.fromarray(pixels).save(tmp_path / "x.jpeg.png")
    (entry,) = predict(tmp_path / "x.jpeg.png", tmp_path / "out")["images"]
    assert entry["segmentation"] == {"mask": "x.jpeg.png.mask.png", "area": {"lesion": {"pixels": 72, "mm2": None}}}
    mask = np.asarray(Image.open(tmp_path / "out" / entry["segmentation"]["mask"]))
    np.testing.assert_array_equal(mask, np.where(pixels == 220, 255, 0))
    rebuilt = np.asarray(Image.open(tmp_path / "out" / entry["reconstruction"]["image"]))
    assert rebuilt.dtype == np.uint8 and rebuilt.shape == (20, 32)
    assert rebuilt[6, 20] == 255 and rebuilt[15, 5] == 0
    np.testing.assert_allclose(entry["detection"][0]["box"], [15, 4, 27, 10], atol=0.01)


def test_dicom_comes_back_as_nifti_in_its_own_geometry(tmp_path, write_dicom):
    path = write_dicom(tmp_path / "IM0001", drawn(), spacing=(0.75, 1.5), orientation=(-1, 0, 0, 0, 1, 0))
    (entry,) = predict(path, tmp_path / "out")["images"]
    mask = nib.load(tmp_path / "out" / entry["segmentation"]["mask"])
    np.testing.assert_array_equal(mask.get_fdata()[..., 0].T, drawn() == 100)
    # DICOM's position [-50, -40, 30] is LPS, NIfTI's world RAS; columns run to the patient's right here.
    np.testing.assert_allclose(mask.affine[:3, 3], [50, 40, 30])
    np.testing.assert_allclose(mask.affine[:3, :2].T, [[1.5, 0, 0], [0, -0.75, 0]], atol=1e-6)
    np.testing.assert_allclose(entry["detection"][0]["box"], [30, 8, 54, 20], atol=0.01)


def test_real_dicom_keeps_its_size_and_place(real_data, tmp_path):
    path = real_data / "lung_pet_ct_dx/Lung_Dx-A0001_s2_L/030.dcm"
    (entry,) = predict(path, tmp_path / "out", image_size=256)["images"]
    rebuilt = nib.load(tmp_path / "out" / entry["reconstruction"]["image"])
    assert rebuilt.shape == (512, 512, 1)
    np.testing.assert_allclose(rebuilt.header.get_zooms()[:2], 0.841796875)
    dataset = pydicom.dcmread(path)
    hu = np.clip(dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept), -1350, 150)
    difference = np.abs(rebuilt.get_fdata()[..., 0].T - hu)
    flipped = np.abs(rebuilt.get_fdata()[::-1, :, 0].T - hu)
    assert difference.mean() < 60 < flipped.mean()


def test_bad_files_are_skipped_and_reported_and_same_stems_kept_apart(tmp_path, caplog):
    source, out = tmp_path / "in", tmp_path / "out"
    for name in ("a/x.png", "b/x.png", "b/x.bmp"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn().clip(0, 255).astype(np.uint8)).save(source / name)
    (source / "truncated.png").write_bytes((source / "a/x.png").read_bytes()[:60])
    (source / "text.png").write_text("not a picture")
    for name, shape, value in (("nan", (8, 8, 1), np.nan), ("volume", (8, 8, 3), 0)):
        nib.save(nib.Nifti1Image(np.full(shape, value, np.float32), np.eye(4)), source / f"{name}.nii.gz")
    report = predict(source, out, batch_size=2)
    assert [entry["file"] for entry in report["images"]] == ["a/x.png", "b/x.bmp", "b/x.png"]
    reasons = {failure["file"]: failure["reason"] for failure in report["failures"]}
    words = {"truncated.png": "cannot be read", "text.png": "cannot identify", "nan.nii.gz": "NaN"}
    words["volume.nii.gz"] = "(8, 8, 3)"
    assert reasons.keys() == words.keys() and all(word in reasons[name] for name, word in words.items())
    skipped = [record.message for record in caplog.records if record.message.startswith("skipped")]
    assert len(skipped) == 4 and not any("\n" in line for line in skipped)
    kinds = ["mask.png", "overlay.png", "reconstruction.png"]
    expected = [f"{name}.{kind}" for name in ("a/x.png", "b/x.bmp", "b/x.png") for kind in kinds]
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert written == [*expected, "predictions.json"]


def test_nothing_readable_is_an_error_after_the_report(tmp_path):
    (tmp_path / "x.png").write_text("not a picture")
    with pytest.raises(ValueError, match="none of 1 files could be read; .*x.png"):
        predict(tmp_path / "x.png", tmp_path / "out")
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())["failures"]) == 1


@pytest.mark.parametrize("task", ["classification", "segmentation", "reconstruction", "detection"])
def test_only_the_tasks_asked_for_are_answered(tmp_path, task):
    Image.fromarray(drawn().clip(0, 255).astype(np.uint8)).save(tmp_path / "x.png")
    (entry,) = predict(tmp_path / "x.png", tmp_path / "out", tasks={task: 1.0})["images"]
    assert entry.keys() == {"file", task, "overlay"}
    files = {"segmentation": ["x.png.mask.png"], "reconstruction": ["x.png.reconstruction.png"]}.get(task, [])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"predictions.json", "x.png.overlay.png", *files}


def test_lesions_of_several_classes(tmp_path, phantom_dir):
    image = sorted((phantom_dir / "images").iterdir())[0]
    slice_ = ScaleIntensityd("image")(LoadSliced()({"image": image}))["image"]
    probabilities = torch.zeros(2, 64, 64)
    probabilities[0, 10:20, 10:20], probabilities[1, 15:20, 10:20], probabilities[1, 30:32, 5] = 0.7, 0.9, 0.6
    writer = PredictionWriter(tmp_path, ["segmentation"], ["a"], ["ground glass", "consolidation"])
    entry = writer.write({"name": "x", "slice": slice_}, {"segmentation": probabilities})
    area = {name: value["pixels"] for name, value in entry["segmentation"]["area"].items()}
    assert area == {"ground glass": 50, "consolidation": 52}
    mask = nib.load(tmp_path / entry["segmentation"]["mask"]).get_fdata()
    assert mask[12, 12, 0] == 1 and mask[12, 17, 0] == 2 and mask[5, 31, 0] == 2


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(slice_, answer, entry, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("bundle.inference.outputs.draw_overlay", interrupted)
    Image.fromarray(drawn().clip(0, 255).astype(np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "x.png", tmp_path / "out", tasks={"classification": 1.0})
    assert list((tmp_path / "out").iterdir()) == []


def test_score_threshold_must_be_a_probability():
    with pytest.raises(ValueError, match="score_threshold: found 7"):
        BoxesToFiled("detection", score_threshold=7)
