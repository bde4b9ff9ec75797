import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from PIL import Image

from bundle.monailabel import ClassificationInferer, LoadVolumed
from bundle.monailabel.train import slices_of


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SAR", "PIR"])
def test_answers_follow_the_volume_however_its_axes_lie(faces, ask, write_volume, tmp_path, axes):
    usual, turned = write_volume(tmp_path / "usual.nii.gz")[0], write_volume(tmp_path / "turned.nii.gz", axes)[0]
    before, after = (
        ask(faces["segmentation"], path, {"displayable_configs#lesion_threshold": 0.5}) for path in (usual, turned)
    )
    image = nibabel.load(turned)
    assert after["pred"].shape == (1, *image.shape) and after["pred"].dtype == torch.uint8
    np.testing.assert_allclose(after["pred"].affine, image.affine)
    mask = nibabel.as_closest_canonical(nibabel.Nifti1Image(after["pred"][0].numpy(), image.affine))
    same = nibabel.as_closest_canonical(nibabel.Nifti1Image(before["pred"][0].numpy(), nibabel.load(usual).affine))
    np.testing.assert_array_equal(mask.get_fdata(), same.get_fdata())
    one, other = (found["result"]["classification"]["probabilities"] for found in (before, after))
    assert other == pytest.approx(one, abs=2e-6), "means of the slices in another order"
    boxes, turned_boxes = (ask(faces["detection"], path) for path in (usual, turned))
    assert len(boxes["box"]) > 0
    order = [sorted(map(tuple, item["box"].round(decimals=1).tolist())) for item in (boxes, turned_boxes)]
    np.testing.assert_allclose(order[0], order[1], atol=0.15)


def test_a_volume_that_does_not_tell_how_it_lies_is_that_of_predict_and_of_training(faces, ask, write_volume, tmp_path):
    path, _ = write_volume(tmp_path / "usual.nii.gz")
    image = nibabel.Nifti1Image(nibabel.load(path).get_fdata().astype(np.int16), None)
    image.header.set_zooms((5, 6, 6))
    nibabel.save(image, tmp_path / "silent.nii.gz")
    usual, silent = (ask(faces["segmentation"], file) for file in (path, tmp_path / "silent.nii.gz"))
    np.testing.assert_array_equal(silent["pred"], usual["pred"])
    np.testing.assert_allclose(silent["pred"].affine, np.diag([-5, -6, 6, 1]))
    assert silent["result"]["classification"] == usual["result"]["classification"]
    label = nibabel.Nifti1Image(silent["pred"][0].numpy(), silent["pred"].affine.numpy())
    nibabel.save(label, tmp_path / "answered.nii.gz")
    pair = {"image": str(tmp_path / "silent.nii.gz"), "label": str(tmp_path / "answered.nii.gz")}
    assert slices_of(pair, limit=4), "its own answer is a label to train on"


def test_the_mask_follows_the_threshold(faces, ask, write_volume, tmp_path):
    path, _ = write_volume(tmp_path / "a.nii.gz")
    sizes = []
    for threshold in ("0.0", 0.9):  # a client may send text
        answer = ask(faces["segmentation"], path, {"displayable_configs#lesion_threshold": threshold})
        sizes.append(int(answer["pred"].sum()))
        assert answer["result"]["segmentation"]["lesion"]["pixels"] == sizes[-1]
        assert answer["result"]["segmentation"]["lesion"]["volume_ml"] == pytest.approx(sizes[-1] * 5 * 6 * 6 / 1000)
    assert sizes == [64 * 56 * 6, 0]
    with pytest.raises(Exception) as refused:
        ask(faces["segmentation"], path, {"displayable_configs#lesion_threshold": 2})
    assert "lesion_threshold: found 2.0, expected a number from 0" in str(refused.value.__cause__ or refused.value)


def test_boxes_follow_the_score(faces, ask, write_volume, tmp_path):
    path, _ = write_volume(tmp_path / "a.nii.gz")
    many = ask(faces["detection"], path, {"displayable_configs#score_threshold": 0.5})
    none = ask(faces["detection"], path, {"displayable_configs#score_threshold": 1})
    assert tuple(none["box"].shape) == (0, 6) and many["box"].shape[1] == 6 and len(many["box"]) > 0
    assert len(many["label"]) == len(many["box"]) and many["label"].eq(0).all()
    assert many["description"].startswith("lesion 1: score 0.5") and many["description"].count("score") == len(many["box"])
    assert (many["box"][:, 3:] > 0).all()


def test_classification_is_of_the_slices_with_lung(faces, ask, write_volume, tmp_path):
    path, _ = write_volume(tmp_path / "a.nii.gz")
    image = nibabel.load(path)
    hu = image.get_fdata()
    hu[:, :, 3:] = 40  # no lung there
    nibabel.save(nibabel.Nifti1Image(hu.astype(np.int16), image.affine), tmp_path / "half.nii.gz")
    nibabel.save(nibabel.Nifti1Image(hu[:, :, :3].astype(np.int16), image.affine), tmp_path / "lung.nii.gz")
    half, lung = (ask(faces["classification"], tmp_path / name) for name in ("half.nii.gz", "lung.nii.gz"))
    assert isinstance(half, MetaTensor) and half.shape == (3,)
    assert float(half.sum()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(half, lung)
    result = ask(faces["segmentation"], tmp_path / "half.nii.gz")["result"]
    assert result["classification"]["slices"] == 3
    assert list(result["classification"]["probabilities"].values()) == pytest.approx(half.tolist(), abs=1e-5)
    json.dumps(result)
    hu[:], hu[:2] = 40, -1000
    nibabel.save(nibabel.Nifti1Image(hu.astype(np.int16), image.affine), tmp_path / "none.nii.gz")
    warnings = ask(faces["segmentation"], tmp_path / "none.nii.gz")["result"]["warnings"]
    assert result["warnings"] == [] and warnings[0].startswith("no lung found: this is no chest CT")


def test_monte_carlo_varies_and_leaves_the_batch_statistics_alone(faces, ask, write_volume, tmp_path):
    path, _ = write_volume(tmp_path / "a.nii.gz")
    first, second = (ask(faces["segmentation"], path, dropout=0.2, sureness=40)["pred"] for _ in range(2))
    assert first.dtype == torch.float32 and tuple(first.shape) == (1, 64, 56, 6)
    assert 0 <= first.min() and first.max() <= 1
    assert (first - second).abs().max() > 1e-3
    assert np.sum(first) > 0  # as the scoring of MONAI Label says it; a plain tensor raises there


def test_a_flat_volume_and_one_of_several_channels(faces, ask, write_volume, tmp_path):
    path, _ = write_volume(tmp_path / "a.nii.gz")
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata()[:, :, 0].astype(np.int16), image.affine), tmp_path / "flat.nii.gz")
    assert ask(faces["segmentation"], tmp_path / "flat.nii.gz")["pred"].shape == (1, 64, 56, 1)
    with pytest.raises(
        ValueError, match=r"volume: found a batch of shape \(1, 2, 4, 4, 4\), expected one volume of one channel"
    ):
        ClassificationInferer(None).predict(MetaTensor(torch.zeros(1, 2, 4, 4, 4)), None)


def test_values_that_are_no_numbers_are_air_and_infinite_ones_refused(faces, ask, write_volume, tmp_path):
    path, _ = write_volume(tmp_path / "a.nii.gz")
    image = nibabel.load(path)
    answers = []
    for value in (-1024, np.nan, np.inf):
        hu = image.get_fdata().astype(np.float32)
        hu[3, 3, 3] = value
        nibabel.save(nibabel.Nifti1Image(hu, image.affine), tmp_path / "x.nii.gz")
        if not np.isinf(value):
            answers.append(ask(faces["segmentation"], tmp_path / "x.nii.gz")["pred"])
    np.testing.assert_array_equal(*answers)
    with pytest.raises(Exception) as refused:
        ask(faces["segmentation"], tmp_path / "x.nii.gz")
    error = refused.value
    while error.__cause__:
        error = error.__cause__
    assert "x.nii.gz: found NaN or infinite pixels" in str(error)


def test_what_the_reader_says_of_a_volume_reaches_log_and_answer(write_dicom, tmp_path, caplog):
    write_dicom(tmp_path / "x.dcm", np.zeros((6, 8)))
    dataset = pydicom.dcmread(tmp_path / "x.dcm")
    dataset.Modality = "MR"
    dataset.save_as(tmp_path / "x.dcm")
    Image.new("L", (8, 6)).save(tmp_path / "x.png")
    model = SimpleNamespace(tasks=[], evaluator=SimpleNamespace(), run=lambda scan: SimpleNamespace(classes={}, scan=scan))
    inferer = ClassificationInferer(model)
    for name, words in (("x.dcm", "the modality is MR, not CT"), ("x.png", "the file has no geometry")):
        (batch,) = DataLoader([LoadVolumed("image")({"image": tmp_path / name})["image"]])
        scan = inferer.predict(batch, torch.nn.Identity()).scan
        assert not scan.hounsfield and not scan.read(0).meta["hounsfield"] and words in scan.warnings[0]
        assert f"{name}: {scan.warnings[0]}" in caplog.text and np.array_equal(scan.turn[:, 1], [1, 1, 1])
