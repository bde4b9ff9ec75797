"""Predictions come back on the very pixels they were made for; a network that marks what is bright stands in."""

import csv
import errno
import json
import os
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image
from chests import chest
from some_tasks import some_tasks
from torch import nn
from torchvision.ops import masks_to_boxes

from bundle.names import TASKS

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
        extents = [masks_to_boxes(mask) + torch.tensor([0, 0, 1, 1]) if mask.any() else torch.zeros(0, 4) for mask in lesion]
        return {
            "classification": torch.tensor([0.0, 2.0, 1.0]).repeat(len(image), 1),
            "segmentation": torch.where(lesion, 9.0, -9.0),
            "reconstruction": image,
            "detection": [
                {
                    "boxes": extent.repeat(3, 1),
                    "scores": torch.tensor([0.9, 0.6, 0.3])[: 3 * len(extent)],
                    "masks": mask[None].float().repeat(3 * len(extent), 1, 1, 1),
                }
                for mask, extent in zip(lesion, extents)
            ],
            "embedding": image.mean((2, 3)),
        }


class Meanwhile(Bright):
    """Does something before each answer; `action` gets its number, from 1."""

    def __init__(self, action):
        super().__init__()
        self.action, self.count = action, 0

    def forward(self, image):
        self.count += 1
        self.action(self.count)
        return super().forward(image)


def predict(source, output_dir, network=None, **knobs):
    """Run configs/inference.json in this process with a network that stands in; predictions by the name of the scan.

    Without flips: the boxes of the network that stands in lie on one another and would be fused.
    """
    usual = {"tasks": dict.fromkeys(TASKS, 1.0), "image_size": 64, "batch_size": 4, "flips": False, "save_reconstruction": True}
    knobs = {**usual, **knobs}
    config = {"input": str(source), "output_dir": str(output_dir), "device": "$torch.device('cpu')", **knobs}
    workflow = ConfigWorkflow(str(ROOT / "configs/inference.json"), logging_file=False, **config)
    workflow.parser["model"] = "$bundle.tasks.read_model(None, @network_knobs)"
    workflow.parser["run"] = workflow.parser["run"][1:]  # no weights to load
    workflow.parser["predictor"]["novelty"] = None  # the reference that is shipped is of other weights
    workflow.parser["network"] = "$@stand_in.to(@device)"
    workflow.parser["stand_in"] = network or Bright()
    workflow.initialize()
    workflow.run()
    files = sorted(output_dir.rglob("predictions.json"))
    return {prediction["scan"]: prediction for prediction in map(json.loads, map(Path.read_text, files))}


def drawn(scale=1):
    """HU of a slice that is wider than high, scaled, with a lesion off its middle."""
    hu = np.full((ROWS, COLUMNS), -1000, np.int16)
    hu[LESION] = 100
    return hu.repeat(scale, 0).repeat(scale, 1)


def as_nifti(pixels, orientation):
    """A slice (rows, columns), or a volume (rows, columns, slices), with the axes of its file as they are named."""
    affine = np.diag([-1.5, -0.75, 5.0, 1.0])
    affine[:3, 3] = [9, 8, 7]
    return nib.Nifti1Image(pixels.reshape(*pixels.shape[:2], -1).swapaxes(0, 1), affine).as_reoriented(
        np.array(ORIENTATIONS[orientation])
    )


def extent(mask):
    """[x1, y1, x2, y2] of a mask (x, y, …) of a file."""
    x, y = np.nonzero(np.squeeze(mask))
    return [x.min(), y.min(), x.max() + 1, y.max() + 1]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_nifti_of_any_orientation_gets_its_own_pixels_back(tmp_path):
    (tmp_path / "in").mkdir()
    stored = {name: as_nifti(drawn(), name) for name in ORIENTATIONS}
    for name, image in stored.items():
        nib.save(image, tmp_path / "in" / f"{name}.nii.gz")
    predictions = predict(tmp_path / "in", tmp_path / "out")
    assert list(predictions) == sorted(f"{name}.nii.gz" for name in ORIENTATIONS)
    assert table(tmp_path / "out/failures.csv") == []
    for name, prediction in predictions.items():
        expected, folder = stored[name.removesuffix(".nii.gz")], tmp_path / "out" / name
        mask = nib.load(folder / prediction["files"]["mask"])
        np.testing.assert_array_equal(mask.get_fdata(), expected.get_fdata() == 100)
        rebuilt = nib.load(folder / prediction["files"]["reconstruction"])
        np.testing.assert_array_equal(rebuilt.get_fdata(), expected.get_fdata())
        probability = nib.load(folder / prediction["files"]["probability"])
        np.testing.assert_array_equal(probability.get_fdata() > 0.5, expected.get_fdata() == 100)
        assert probability.get_fdata().max() == pytest.approx(1 / (1 + np.exp(-9)), abs=1 / 510)
        assert nib.load(folder / prediction["files"]["reconstruction_error"]).get_fdata().max() < 1 / 255
        for image in (mask, rebuilt, probability):
            np.testing.assert_allclose(image.affine, expected.affine)
            assert image.shape == expected.shape and image.header.get_xyzt_units()[0] == "mm"
        (row,) = prediction["slices"]
        boxes, scores = zip(*[(found["box"], found["score"]) for found in row["boxes"]])
        np.testing.assert_allclose(boxes, [extent(expected.get_fdata() == 100)] * 2, atol=0.01)
        assert scores == pytest.approx((0.9, 0.6)), "the score threshold is 0.5"
        assert row["lesion_pixels"] == {"lesion": 12 * 24} and row["lesion_mm2"] == {"lesion": 12 * 24 * 1.5 * 0.75}
        assert prediction["classification"]["predicted"] == "COVID-19"
        assert sum(prediction["classification"]["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_masks_of_a_file_that_does_not_tell_how_it_lies_lie_as_it_does(tmp_path):
    pixels = np.full((ROWS, COLUMNS, 2), -1350, np.int16)
    pixels[LESION] = 150
    image = nib.Nifti1Image(pixels.transpose(1, 0, 2), None)
    image.header.set_zooms((0.7, 0.8, 2.0))
    nib.save(image, tmp_path / "x.nii.gz")
    (prediction,) = predict(tmp_path / "x.nii.gz", tmp_path / "out").values()
    assert prediction["warnings"][0].startswith("the file gives no orientation (qform and sform codes 0)")
    scan, mask = (sitk.ReadImage(str(path)) for path in (tmp_path / "x.nii.gz", tmp_path / "out/x.nii.gz/mask.nii.gz"))
    for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(mask, name)() == pytest.approx(getattr(scan, name)())
    shown = re.search(r'"spacing": ?\[([\d.]+), ([\d.]+)\]', (tmp_path / "out/x.nii.gz/report.html").read_text())
    assert [float(side) for side in shown.groups()] == pytest.approx([0.8, 0.7]), "of rows and columns"
    bright = sitk.GetArrayFromImage(scan) > 0
    assert (bright == (sitk.GetArrayFromImage(mask) > 0)).mean() > 0.97
    center = prediction["detection"][0]["center_mm"]
    middle = scan.TransformContinuousIndexToPhysicalPoint(np.argwhere(bright)[:, ::-1].mean(0).tolist())
    assert center == pytest.approx(middle, abs=1)


def test_a_scan_of_several_batches_is_one_with_workers_too(tmp_path):
    """A worker sends another Scan with each batch."""
    volume = np.repeat(drawn()[..., None], 6, 2)
    volume[..., [0, 1, 5]] = -1000
    nib.save(as_nifti(volume, "ras"), tmp_path / "scan.nii.gz")
    alone, workers = (
        predict(tmp_path / "scan.nii.gz", tmp_path / str(number), batch_size=2, num_workers=number) for number in (0, 1)
    )
    (expected,), (found,) = alone.values(), workers.values()
    assert len(found["slices"]) == 6 and found["detection"][0]["slices"] == [2, 4]
    for name in ("slices", "classification", "segmentation", "detection", "reconstruction"):
        assert found[name] == expected[name], name


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_lesion_of_an_oblique_anisotropic_volume_comes_back_on_its_voxels(tmp_path, orientation):
    volume = np.repeat(drawn()[..., None], 6, 2)
    volume[..., [0, 1, 5]] = -1000  # the lesion is on slices 2 to 4
    image = as_nifti(volume, orientation)
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.1, 0.15))
    nib.save(nib.Nifti1Image(image.get_fdata().astype(np.int16), turn @ image.affine), tmp_path / "x.nii.gz")
    (prediction,) = predict(tmp_path / "x.nii.gz", tmp_path / "out", batch_size=4).values()
    mask = nib.load(tmp_path / "out/x.nii.gz/mask.nii.gz")
    np.testing.assert_array_equal(mask.get_fdata(), image.get_fdata() == 100)
    np.testing.assert_allclose(mask.affine, turn @ image.affine, atol=1e-5)
    assert mask.shape == image.shape
    lesion = prediction["detection"][0]
    voxels = np.argwhere(image.get_fdata() == 100)
    middle = (turn @ image.affine)[:3] @ [*(voxels.min(0) + voxels.max(0)) / 2, 1]
    np.testing.assert_allclose(np.array(lesion["center_mm"]) * [-1, -1, 1], middle, atol=0.01)
    assert lesion["volume_ml"] == pytest.approx(3 * 12 * 24 * 1.5 * 0.75 * 5 / 1000, rel=1e-3)
    assert prediction["segmentation"]["lesion"]["volume_ml"] == pytest.approx(lesion["volume_ml"], rel=1e-3)
    assert lesion["slices"][1] - lesion["slices"][0] == 2 and len(lesion["boxes"]) == 3
    (row,) = [row for row in table(tmp_path / "out/lesions.csv") if row["lesion"] == str(lesion["id"])]
    assert float(row["volume_ml"]) == lesion["volume_ml"] and row["scan"] == "x.nii.gz"
    assert len(table(tmp_path / "out/slices.csv")) == 6 and len(table(tmp_path / "out/scans.csv")) == 1


@pytest.mark.parametrize("scale", [2, 3])
def test_a_file_larger_than_the_network_sees_is_answered_at_its_size(tmp_path, scale):
    image = as_nifti(drawn(scale), "pls")
    nib.save(image, tmp_path / "x.nii.gz")
    (prediction,) = predict(tmp_path / "x.nii.gz", tmp_path / "out").values()
    truth = image.get_fdata() == 100
    mask = nib.load(tmp_path / "out/x.nii.gz/mask.nii.gz").get_fdata() > 0
    # Corners are rounded off by the interpolation; edges are where they were.
    assert extent(mask) == extent(truth) and (mask != truth).sum() <= 4 * scale**2
    np.testing.assert_allclose(prediction["slices"][0]["boxes"][0]["box"], extent(truth), atol=0.01)


def test_a_smaller_picture_comes_back_as_a_picture(tmp_path):
    pixels = np.full((20, 32), 30, np.uint8)
    pixels[4:10, 15:27] = 220
    Image.fromarray(pixels).save(tmp_path / "x.jpeg.png")
    (prediction,) = predict(tmp_path / "x.jpeg.png", tmp_path / "out").values()
    assert prediction["segmentation"] == {"lesion": {"volume_ml": None, "share_of_lung": None, "pixels": 72}}
    mask = np.asarray(Image.open(tmp_path / "out/x.jpeg.png/mask.png"))
    np.testing.assert_array_equal(mask, np.where(pixels == 220, 255, 0))
    rebuilt = np.asarray(Image.open(tmp_path / "out/x.jpeg.png" / prediction["files"]["reconstruction"]))
    assert rebuilt.dtype == np.uint8 and rebuilt.shape == (20, 32)
    assert rebuilt[6, 20] == 255 and rebuilt[15, 5] == 0
    (row,) = prediction["slices"]
    np.testing.assert_allclose(row["boxes"][0]["box"], [15, 4, 27, 10], atol=0.01)
    assert prediction["lung"] is None and row["lung_mm2"] is None and row["position_mm"] is None


def test_dicom_comes_back_as_nifti_in_its_own_geometry(tmp_path, write_dicom, caplog):
    caplog.set_level("INFO", "bundle")
    path = write_dicom(tmp_path / "IM0001", drawn(), spacing=(0.75, 1.5), orientation=(-1, 0, 0, 0, 1, 0))
    (prediction,) = predict(path, tmp_path / "out").values()
    folder = tmp_path / "out" / prediction["scan"]
    mask = nib.load(folder / "mask.nii.gz")
    np.testing.assert_array_equal(mask.get_fdata()[..., 0].T, drawn() == 100)
    # DICOM's position [-50, -40, 30] is LPS, NIfTI's world RAS; columns run to the patient's right here.
    np.testing.assert_allclose(mask.affine[:3, 3], [50, 40, 30])
    np.testing.assert_allclose(mask.affine[:3, :2].T, [[1.5, 0, 0], [0, -0.75, 0]], atol=1e-6)
    np.testing.assert_allclose(prediction["slices"][0]["boxes"][0]["box"], [30, 8, 54, 20], atol=0.01)
    assert "; no DICOM Segmentation is written: found no FrameOfReferenceUID" in caplog.text, "in the line of the scan"


def test_lung_is_looked_for_without_a_pixel_spacing(tmp_path, write_ct):
    write_ct(tmp_path / "in", [*chest(2), np.full((64, 64), 40)], PixelSpacing=None)
    (prediction,) = predict(tmp_path / "in", tmp_path / "out").values()
    assert prediction["hounsfield"] and prediction["classification"]["slices"] == 2, "two slices with lung"
    assert prediction["lung"] is None and {row["lung_mm2"] for row in prediction["slices"]} == {None}


def test_real_dicom_keeps_its_size_and_place(real_data, tmp_path):
    path = real_data / "lung_pet_ct_dx/Lung_Dx-A0001_s2_L/030.dcm"
    (prediction,) = predict(path, tmp_path / "out", image_size=256).values()
    rebuilt = nib.load(tmp_path / "out" / prediction["scan"] / "reconstruction.nii.gz")
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
    for name, shape, value in (("nan", (8, 8, 1), np.nan), ("movie", (8, 8, 3, 2), 0)):
        nib.save(nib.Nifti1Image(np.full(shape, value, np.float32), np.eye(4)), source / f"{name}.nii.gz")
    predictions = predict(source, out, batch_size=2)
    assert list(predictions) == ["a/x.png", "b/x.bmp", "b/x.png"]
    reasons = {failure["scan"]: failure["reason"] for failure in table(out / "failures.csv")}
    words = {"truncated.png": "cannot be read", "text.png": "cannot", "nan.nii.gz": "NaN", "movie.nii.gz": "(8, 8, 3, 2)"}
    assert reasons.keys() == words.keys()
    assert all(word in reasons[name] for name, word in words.items())
    skipped = [record.message for record in caplog.records if record.message.startswith("skipped")]
    assert len(skipped) == 4 and not any("\n" in line for line in skipped)
    pictures = ["mask", "probability", "reconstruction", "reconstruction_error"]
    files = [*(f"{name}.png" for name in pictures), "overlays/0000.jpg", "predictions.json", "report.html"]
    expected = [f"{name}/{file}" for name in predictions for file in files]
    expected += [".lock", *(f"{name}.csv" for name in ("failures", "lesions", "scans", "slices"))]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == sorted(expected)


def test_a_file_that_grows_while_it_is_read_gives_no_result(tmp_path):
    def copy(_):
        with (tmp_path / "in/b.png").open("ab") as file:
            file.write(b"more")

    write_pictures(tmp_path / "in", ["a.png", "b.png"])
    assert list(predict(tmp_path / "in", tmp_path / "out", Meanwhile(copy))) == ["a.png"]
    (failure,) = table(tmp_path / "out/failures.csv")
    reason = "changed while it was read, expected whole files; predict it again later"
    assert failure == {"scan": "b.png", "reason": f"{tmp_path}/in/b.png: {reason}", "log": ""}


def test_a_series_that_gets_files_while_it_is_read_gives_no_result(tmp_path, write_ct):
    copying = Meanwhile(lambda _: (tmp_path / "in/late").touch())
    write_ct(tmp_path / "in", [drawn()] * 3)
    with pytest.raises(RuntimeError) as raised:
        predict(tmp_path / "in", tmp_path / "out", copying)
    assert "changed while it was read" in str(raised.value.__cause__)
    assert len(predict(tmp_path / "in", tmp_path / "out", copying)) == 1


def test_the_reconstruction_is_measured_and_kept_only_if_asked_for(tmp_path):
    nib.save(as_nifti(drawn(), "ras"), tmp_path / "x.nii.gz")
    (kept,), (measured,) = (
        predict(tmp_path / "x.nii.gz", tmp_path / str(save), save_reconstruction=save).values() for save in (True, False)
    )
    assert kept["reconstruction"] == measured["reconstruction"] and kept["slices"] == measured["slices"]
    assert {*kept["files"]} - {*measured["files"]} == {"reconstruction", "reconstruction_error"}


@pytest.mark.parametrize("task", ["classification", "segmentation", "reconstruction", "detection"])
def test_only_the_tasks_asked_for_are_answered(tmp_path, task):
    Image.fromarray(drawn().clip(0, 255).astype(np.uint8)).save(tmp_path / "x.png")
    (prediction,) = predict(tmp_path / "x.png", tmp_path / "out", tasks={task: 1.0}).values()
    assert prediction.keys() & {"classification", "segmentation", "reconstruction", "detection"} == {task}
    files = {"segmentation": ["mask", "probability"], "reconstruction": ["reconstruction", "reconstruction_error"]}
    written = {path.stem for path in (tmp_path / "out/x.png").glob("*.png")}
    assert written == set(files.get(task, []))


def test_lesions_of_several_classes(tmp_path):
    class Two(Bright):
        def forward(self, image):
            probabilities = torch.zeros(2, 64, 64)
            probabilities[0, 10:20, 10:20], probabilities[1, 15:20, 10:20], probabilities[1, 30:32, 5] = 0.7, 0.9, 0.6
            return {**super().forward(image), "segmentation": torch.logit(probabilities, 1e-6)[None]}

    nib.save(nib.Nifti1Image(np.zeros((64, 64, 1), np.int16), np.diag([-1, -1, 1, 1])), tmp_path / "x.nii.gz")
    names = ["ground glass/GGO", "consolidation"]
    (prediction,) = predict(tmp_path / "x.nii.gz", tmp_path / "out", Two(), segmentation_classes=names).values()
    pixels = {name: value["pixels"] for name, value in prediction["segmentation"].items()}
    assert pixels == {"ground glass/GGO": 50, "consolidation": 52}
    mask = nib.load(tmp_path / "out/x.nii.gz/mask.nii.gz").get_fdata()
    assert mask[12, 12, 0] == 1 and mask[12, 17, 0] == 2 and mask[5, 31, 0] == 2
    glass = nib.load(tmp_path / "out/x.nii.gz" / prediction["files"]["probability_ground_glass_GGO"]).get_fdata()
    assert glass[12, 12, 0] == pytest.approx(0.7, abs=1 / 255)
    with pytest.raises(RuntimeError) as caught:
        predict(tmp_path / "x.nii.gz", tmp_path / "again", Two(), segmentation_classes=["a b", "a_b"])
    assert "segmentation_classes: found a b, a_b, expected names that differ" in str(caught.value.__cause__)


def write_pictures(folder, names):
    folder.mkdir()
    for grey, name in enumerate(names, start=1):
        Image.fromarray(np.full((64, 64), 10 * grey, np.uint8)).save(folder / name)


@pytest.mark.parametrize("error", [ValueError, KeyError, OSError, RuntimeError])
def test_a_bug_fails_one_scan_and_its_traceback_goes_to_a_log(tmp_path, error):
    def fail(count):
        if count == 2:
            raise error("operands could not\nbe broadcast")

    write_pictures(tmp_path / "in", ["a.png", "b.png", "c.png"])
    assert list(predict(tmp_path / "in", tmp_path / "out", Meanwhile(fail))) == ["a.png", "c.png"]
    (failure,) = table(tmp_path / "out/failures.csv")
    assert failure["scan"] == "b.png" and failure["log"] == "failures.log"
    name = error.__name__
    assert failure["reason"].startswith(f"{tmp_path}/in/b.png: a bug of this program, {name}: ")
    assert "\n" not in failure["reason"]
    log = (tmp_path / "out/failures.log").read_text()
    assert log.startswith("b.png\nTraceback") and "in fail" in log and f"{name}: " in log
    assert [row["scan"] for row in table(tmp_path / "out/scans.csv")] == ["a.png", "c.png"]
    predict(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out/failures.log").exists(), "it is of the last run"


def test_a_disk_that_refuses_a_file_fails_one_scan_in_one_line(tmp_path, monkeypatch):
    def full(report, folder, prediction):
        if report.scan.name == "a.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    write_pictures(tmp_path / "in", ["a.png", "b.png"])
    monkeypatch.setattr("bundle.inference.report.Report.write", full)
    assert list(predict(tmp_path / "in", tmp_path / "out")) == ["b.png"]
    (failure,) = table(tmp_path / "out/failures.csv")
    reason = f"{tmp_path}/out/a.png: cannot be written (No space left on device); check the disk and its permissions"
    assert failure == {"scan": "a.png", "reason": reason, "log": ""}
    assert not list((tmp_path / "out").rglob(".tmp*")) and not (tmp_path / "out/failures.log").exists()


def test_a_name_as_long_as_the_disk_takes_is_predicted(tmp_path):
    names = ["肺" * 83 + ".png", "a.png"]
    write_pictures(tmp_path / "in", names)
    assert sorted(predict(tmp_path / "in", tmp_path / "out")) == sorted(names)


def test_score_threshold_must_be_a_probability():
    with pytest.raises(ValueError, match="score_threshold: found 7"):
        some_tasks("detection", score_threshold=7)


class OfTheSlice(nn.Module):
    """Calls a slice with much air in it class 0 and another one class 1, both for sure, and what is very bright a lesion."""

    def forward(self, image):
        airy = (image < 0.6).float().mean((1, 2, 3), keepdim=True).flatten(1) > 0.58  # half is padding
        nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "masks": torch.zeros(0, 1, *image.shape[2:])}
        return {
            "classification": torch.cat([torch.where(airy, 20.0, 0.0), torch.where(airy, 0.0, 20.0), -20 + 0.0 * airy], 1),
            "segmentation": torch.where(image > 0.96, 9.0, -9.0),
            "reconstruction": image,
            "detection": [nothing] * len(image),
            "embedding": image.mean((2, 3)),
        }


def test_a_scan_is_classified_by_its_slices_with_lung_and_lesions_count_as_lung(tmp_path):
    """One slice of 160 x 320 mm with lungs, half of one a lesion as dense as tissue, and two slices without lung."""
    volume = np.full((80, 160, 3), 40, np.int16)  # 2 mm pixels
    volume[15:65, 20:70, 0] = volume[15:65, 90:140, 0] = -850
    volume[15:65, 90:115, 0] = 120
    nib.save(nib.Nifti1Image(volume.swapaxes(0, 1), np.diag([-2.0, -2.0, 5.0, 1.0])), tmp_path / "a.nii.gz")
    (prediction,) = predict(tmp_path / "a.nii.gz", tmp_path / "out", OfTheSlice(), window=[-1350, 150]).values()
    assert prediction["classification"]["slices"] == 1 and prediction["classification"]["predicted"] == "other"
    assert [round(row["probabilities"]["COVID-19"]) for row in prediction["slices"]] == [0, 1, 1], "of these two have no lung"
    lungs = 2 * 50 * 50 * 4 * 5 / 1000  # mL
    assert prediction["lung"]["slices"] == [0, 0]
    assert prediction["lung"]["volume_ml"] == pytest.approx(lungs, rel=0.04)
    assert prediction["segmentation"]["lesion"]["share_of_lung"] == pytest.approx(0.25, rel=0.04)
