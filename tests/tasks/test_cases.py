import math

import numpy as np
import pytest
import torch
from some_tasks import some_tasks

from bundle.tasks.detection import COCO

CLASSIFICATION, SEGMENTATION, RECONSTRUCTION, DETECTION = some_tasks()


def mask(*rows):
    return torch.tensor(rows, dtype=torch.float32)[None, None]


def logits(mask):
    return mask * 20 - 10


def segmentation(pred, truth, with_distance=True):
    batch = {"mask": truth, "target": torch.zeros_like(pred), "annotated": {"segmentation": torch.ones(1, dtype=bool)}}
    return SEGMENTATION.cases(logits(pred), batch, with_distance)[0]


EMPTY, TRUTH = mask([0, 0, 0, 0], [0, 0, 0, 0]), mask([1, 1, 0, 0], [0, 0, 0, 0])
# [predicted, annotated, dice, iou, sensitivity, specificity, hd95]
CASES = {
    "equal": [TRUTH, TRUTH, 1, 1, 1, 1, 0],
    "half found": [mask([1, 0, 0, 0], [0, 0, 0, 0]), TRUTH, 2 / 3, 1 / 2, 1 / 2, 1, 0.95],
    "twice too large": [mask([1, 1, 1, 1], [0, 0, 0, 0]), TRUTH, 2 / 3, 1 / 2, 1, 4 / 6, 1.85],
    "elsewhere": [mask([0, 0, 0, 0], [0, 0, 0, 1]), TRUTH, 0, 0, 0, 5 / 6, 3.1],
    "missed": [EMPTY, TRUTH, 0, 0, 0, 1, math.nan],
    "invented": [TRUTH, EMPTY, 0, 0, math.nan, 6 / 8, math.nan],
    "rightly nothing": [EMPTY, EMPTY, 1, 1, math.nan, 1, math.nan],
    "everything": [torch.ones_like(TRUTH), torch.ones_like(TRUTH), 1, 1, 1, math.nan, 0],
}


@pytest.mark.parametrize(("pred", "truth", "dice", "iou", "sensitivity", "specificity", "hd95"), CASES.values(), ids=CASES)
def test_segmentation_by_hand(pred, truth, dice, iou, sensitivity, specificity, hd95):
    case = segmentation(pred, truth)
    expected = {"dice": dice, "iou": iou, "sensitivity": sensitivity, "specificity": specificity}
    assert {name: case[name] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert case["hd95"] == pytest.approx(hd95, nan_ok=True, abs=0.1)
    assert case["lesion_pixels"] == pred.sum()


def test_hausdorff_distance_is_in_pixels_and_robust_to_a_single_one():
    truth, pred = torch.zeros(2, 1, 1, 64, 64)
    truth[..., 20:40, 20:40], pred[..., 20:40, 23:43] = 1, 1  # moved by three columns
    assert segmentation(pred, truth)["hd95"] == 3
    pred[..., 60, 60] = 1  # one pixel far away: the largest distance, not the 95th percentile of them
    assert segmentation(pred, truth)["hd95"] == pytest.approx(3, abs=0.5)
    assert "hd95" not in segmentation(pred, truth, with_distance=False)


def test_marks_in_a_healthy_lung_count_from_a_hundredth_of_it(chest_slice):
    image, lungs = (torch.from_numpy(array)[None, None].float() for array in chest_slice)
    none, some, many = (torch.zeros_like(lungs) for _ in range(3))
    some[..., 60, 100:120], many[..., 50:60, 100:120] = 1, 1  # 20 and 200 of about 4,400 pixels
    batch = {"mask": none, "target": image, "annotated": {"segmentation": torch.tensor([True])}}
    marked = [SEGMENTATION.cases(logits(mask), batch, True)[0]["falsely_marked"] for mask in (none, some, many)]
    assert marked == [0, 0, 1]
    assert math.isnan(SEGMENTATION.cases(logits(many), {**batch, "mask": some}, True)[0]["falsely_marked"]), "a lesion"
    assert math.isnan(SEGMENTATION.cases(logits(many), {**batch, "target": none}, True)[0]["falsely_marked"]), "no lung"
    batch["annotated"] = {"segmentation": torch.tensor([False])}
    assert math.isnan(SEGMENTATION.cases(logits(many), batch, True)[0]["falsely_marked"]), "not annotated"


def test_channels_of_the_segmentation_are_averaged():
    pred, truth = torch.cat([TRUTH, EMPTY], 1), torch.cat([TRUTH, TRUTH], 1)
    case = segmentation(pred, truth)
    assert case["dice"] == pytest.approx(0.5) and case["sensitivity"] == pytest.approx(0.5)


def test_reconstruction_by_hand():
    torch.manual_seed(0)
    target = torch.rand(2, 1, 32, 32)
    image = target.clone()
    image[1] += 0.1
    same, brighter = RECONSTRUCTION.cases(image, {"target": target}, False)
    assert same == pytest.approx({"mse": 0.0, "psnr": 100.0, "ssim": 1.0}, abs=1e-5)
    assert brighter["mse"] == pytest.approx(0.01, rel=1e-4) and brighter["psnr"] == pytest.approx(20.0, rel=1e-4)
    assert 0.5 < brighter["ssim"] < 1


def test_classification_gives_probabilities_of_the_annotated_and_other_classes():
    scores = torch.tensor([[0.0, math.log(3.0), 0.0]])
    (case,) = CLASSIFICATION.cases(scores, {"class": torch.tensor([[False, False, True]])}, False)
    assert case["label"] == 2
    np.testing.assert_allclose(case["probabilities"], [0.2, 0.6, 0.2], rtol=1e-6)


def detection(boxes, scores, masks=None, size=16):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), 1, size, size) if masks is None else masks
    return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.ones(len(boxes)), "masks": masks}


def test_each_lesion_is_matched_once_by_the_surest_detection():
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10], [50, 0, 60, 20]])}
    # IoU 1; IoU 0.5 with a lesion that is taken; IoU 0.25; none
    found = detection([[0, 0, 10, 10], [0, 0, 10, 5], [50, 0, 60, 5], [100, 100, 110, 110]], [0.9, 0.8, 0.7, 0.6])
    case = DETECTION.cases([found], {"detection": [truth]}, False)[0]
    assert (case["n_boxes"], case["n_detections"]) == (2, 4)
    hits = (case["match"][0]["dtMatches"] > 0).astype(int)
    thresholds = COCO.get_iou_thresholds()
    assert list(thresholds[:2]) == pytest.approx([0.1, 0.5]) and len(thresholds) == 11
    assert hits[0].tolist() == [1, 0, 1, 0]
    assert hits[1].tolist() == [1, 0, 0, 0]


def test_boxes_of_an_image_that_is_wider_than_high_are_matched_as_x_y():
    truth = {"boxes": torch.tensor([[40.0, 2, 60, 10]])}
    found = [detection([[40, 2, 60, 10]], [0.9]), detection([[2, 40, 10, 60]], [0.9])]
    cases = DETECTION.cases(found, {"detection": [truth, truth]}, False)
    assert [bool(case["match"][0]["dtMatches"][0, 0]) for case in cases] == [True, False]


def test_masks_are_matched_where_there_are_instances():
    instance = torch.zeros(1, 16, 16, dtype=torch.uint8)
    instance[:, 2:10, 2:10] = 1
    probability = torch.zeros(1, 1, 16, 16)
    probability[..., 2:10, 2:7] = 0.9  # IoU 5/8
    found, box = detection([[2, 2, 10, 10]], [0.9], probability), torch.tensor([[2.0, 2, 10, 10]])
    targets = [{"boxes": box, "masks": instance}, {"boxes": box}, None]
    with_masks, without, missing = DETECTION.cases([found] * 3, {"detection": targets}, False)
    hits = with_masks["mask_match"][0]["dtMatches"][:, 0] > 0
    thresholds = np.array(COCO.get_iou_thresholds())
    assert hits.tolist() == (thresholds <= 0.625).tolist()
    assert "mask_match" not in without and missing == {}


def test_an_image_without_lesion_and_detection_has_no_match():
    nothing = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 16, 16)}
    case = DETECTION.cases([detection([], [])], {"detection": [nothing]}, False)[0]
    assert case["n_boxes"] == case["n_detections"] == 0 and not case["match"]
