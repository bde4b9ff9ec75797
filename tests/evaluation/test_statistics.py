import time

import numpy as np
import pytest
import torch
from ignite.metrics import ObjectDetectionAvgPrecisionRecall
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from some_tasks import some_tasks

from bundle.evaluation.handler import with_intervals
from bundle.tasks.base import mean_figures
from bundle.tasks.classification import auroc, calibration_error
from bundle.tasks.detection import COCO, FALSE_POSITIVE_RATES, Matches

CLASSIFICATION, SEGMENTATION, DETECTION = some_tasks("classification", "segmentation", "detection")


def figures(compute, cases):
    return compute(cases)(np.ones(len(cases)))


def drawn(cases, weights):
    return [case for case, weight in zip(cases, weights) for _ in range(int(weight))]


def classification(labels, probabilities):
    return [{"label": int(label), "probabilities": np.asarray(p, float)} for label, p in zip(labels, probabilities)]


def random_classification(count=80, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    return classification(labels, rng.dirichlet(np.ones(classes), count).round(2) + np.eye(classes)[labels] * 0.2)


def random_detection(count=30, seed=0, instances=True):
    """Predictions, targets and cases of images with no to three lesions: found, missed, found twice and invented."""
    rng, pred, targets = np.random.default_rng(seed), [], []
    for _ in range(count):
        corner = rng.uniform(0, 40, (rng.integers(4), 2))
        truth = np.c_[corner, corner + rng.uniform(8, 20, corner.shape)]
        found = np.concatenate([truth + rng.normal(0, 2, truth.shape), truth[1:], rng.uniform(0, 20, (2, 4)) + [0, 0, 25, 25]])
        masks = torch.zeros(len(found), 1, 64, 64)
        for m, (x1, y1, x2, y2) in zip(masks, found.astype(int)):
            m[:, max(y1, 0) : y2, max(x1, 0) : x2] = 1
        order = np.argsort(-(scores := rng.uniform(0, 1, len(found))))
        pred.append({"boxes": torch.tensor(found[order]).float(), "scores": torch.tensor(scores[order]), "masks": masks[order]})
        instance = torch.zeros(len(truth), 64, 64, dtype=torch.uint8)
        for m, (x1, y1, x2, y2) in zip(instance, truth.astype(int)):
            m[y1:y2, x1:x2] = 1
        targets.append({"boxes": torch.tensor(truth).float().reshape(-1, 4), **({"masks": instance} if instances else {})})
    return pred, targets, DETECTION.cases(pred, {"detection": targets}, False)


@pytest.mark.parametrize("seed", range(3))
def test_classification_figures_are_those_of_sklearn(seed):
    cases = random_classification(seed=seed)
    labels, probabilities = [c["label"] for c in cases], np.stack([c["probabilities"] for c in cases])
    share, predicted = probabilities / probabilities.sum(1, keepdims=True), probabilities.argmax(1)
    assert figures(CLASSIFICATION.figures, cases) == pytest.approx(
        {
            "accuracy": accuracy_score(labels, predicted),
            "balanced_accuracy": balanced_accuracy_score(labels, predicted),
            "f1_macro": f1_score(labels, predicted, average="macro"),
            "auroc": roc_auc_score(labels, share, multi_class="ovr", average="macro"),
            "ece": calibration_error(probabilities.max(1), predicted == labels, np.ones(len(labels))),
        }
    )


def test_auroc_with_ties_and_weights_is_that_of_sklearn():
    rng = np.random.default_rng(0)
    scores, positive, weights = rng.integers(10, size=200) / 10, rng.random(200) > 0.6, rng.integers(4, size=200)
    expected = roc_auc_score(positive, scores, sample_weight=weights)
    assert auroc(np.unique(scores, return_inverse=True)[1], positive, weights) == pytest.approx(expected)


def test_auroc_of_a_source_with_two_of_three_classes_ranks_these_two():
    cases = classification([0, 0, 1, 1], [[0.1, 0.2, 0.7], [0.3, 0.1, 0.6], [0.1, 0.4, 0.5], [0.05, 0.01, 0.94]])
    found = figures(CLASSIFICATION.figures, cases)
    assert found["auroc"] == pytest.approx(roc_auc_score([0, 0, 1, 1], [2 / 3, 1 / 4, 4 / 5, 1 / 6]))
    assert found["accuracy"] == 0.0, "the predicted class is the most probable of all three"
    assert found["balanced_accuracy"] == 0.0 and found["f1_macro"] == 0.0


def test_one_class_alone_has_no_auroc():
    found = figures(CLASSIFICATION.figures, classification([1, 1, 1], [[0.2, 0.8, 0], [0.9, 0.1, 0], [0, 1, 0]]))
    assert found == pytest.approx({"accuracy": 2 / 3, "balanced_accuracy": 2 / 3, "f1_macro": 0.8, "ece": (0.2 + 0.9) / 3})


def test_confusion_has_annotated_rows_and_predicted_columns():
    cases = classification([0, 0, 2, 2], [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])
    assert CLASSIFICATION.finish({}, cases)["confusion_matrix"]["counts"] == [[1, 1, 0], [0, 0, 0], [0, 1, 1]]


def test_means_leave_out_what_is_not_defined():
    nan = float("nan")
    cases = [{"dice": 0.5, "hd95": nan, "sensitivity": nan, "lesion_pixels": 3}, {"dice": 1.0, "hd95": nan, "sensitivity": 0.2}]
    assert figures(SEGMENTATION.figures, cases) == pytest.approx({"dice": 0.75, "sensitivity": 0.2})
    report = with_intervals(SEGMENTATION, cases, ["a", "b"], 0, 0)
    assert report["sensitivity"] == {"value": pytest.approx(0.2), "ci95": None, "n": 1} and report["dice"]["n"] == 2


@pytest.mark.parametrize("seed", range(2))
def test_average_precision_is_that_of_ignite_and_of_monai(seed):
    pred, targets, cases = random_detection(seed=seed)
    found = figures(DETECTION.figures, cases)
    for names, thresholds in ((("ap10",), [0.1]), (("ap50",), [0.5]), (("ap",), np.linspace(0.5, 0.95, 10).tolist())):
        metric = ObjectDetectionAvgPrecisionRecall(iou_thresholds=thresholds, num_classes=1)
        labels = [torch.zeros(len(p["scores"]), dtype=int) for p in pred]
        y_pred = [{"bbox": p["boxes"], "scores": p["scores"], "labels": label} for p, label in zip(pred, labels)]
        y = [{"bbox": t["boxes"], "labels": torch.zeros(len(t["boxes"]), dtype=int)} for t in targets]
        metric.update((y_pred, y))
        assert found[names[0]] == pytest.approx(metric.compute()[0], abs=1e-4)
    for kind, prefix in (("match", ""), ("mask_match", "mask_")):
        theirs = COCO.compute([case[kind] for case in cases])[0]
        ours = [found[prefix + name] for name in ("ap10", "ap50", "ap")]
        keys = ("AP_IoU_0.10_MaxDet_100", "AP_IoU_0.50_MaxDet_100", "mAP_IoU_0.50_0.95_0.05_MaxDet_100")
        assert ours == pytest.approx([theirs[key] for key in keys], abs=1e-6)


@pytest.mark.parametrize(
    ("compute", "cases"),
    [
        (CLASSIFICATION.figures, random_classification(40)),
        (mean_figures, [{"dice": v, "hd95": np.nan if v > 0.7 else v} for v in np.random.default_rng(0).random(40)]),
        (DETECTION.figures, random_detection(40)[2]),
        (DETECTION.figures, random_detection(20)[2] + random_detection(20, seed=1, instances=False)[2]),
    ],
    ids=["classification", "means", "detection", "detection, some with instances"],
)
def test_a_weight_counts_as_so_many_copies(compute, cases):
    weighted = compute(cases)
    for seed in range(5):
        weights = np.random.default_rng(seed).integers(4, size=len(cases))
        assert weighted(weights) == pytest.approx(figures(compute, drawn(cases, weights)))


def test_a_draw_without_a_class_has_no_figure_that_would_be_one_of_the_other_classes():
    cases = random_classification()
    weights = np.array([case["label"] != 1 for case in cases], int)
    expected = figures(CLASSIFICATION.figures, drawn(cases, weights))
    assert CLASSIFICATION.figures(cases)(weights) == pytest.approx({name: expected[name] for name in ("accuracy", "ece")})


def detection_case(hits, scores, lesions):
    pred = [[20 * i, 0, 20 * i + 10, 10] if hit else [20 * i, 50, 20 * i + 10, 60] for i, hit in enumerate(hits)]
    truth = [[20 * i, 0, 20 * i + 10, 10] for i in range(lesions)]
    found = {"boxes": torch.tensor(pred).float().reshape(-1, 4), "scores": torch.tensor(scores)}
    return DETECTION.cases([found], {"detection": [{"boxes": torch.tensor(truth).float().reshape(-1, 4)}]}, False)[0]


def froc_curve(cases):
    return Matches([case["match"] for case in cases]).froc(np.ones(len(cases)))


def test_froc_by_hand():
    # By score: hit 0.9, false 0.8, hit 0.7, false 0.6, false 0.5; 2 images, 3 lesions, one never found
    cases = [detection_case([True, False, False], [0.9, 0.6, 0.5], 2), detection_case([True, False], [0.7, 0.8], 1)]
    rates, sensitivity = froc_curve(cases)
    assert rates.tolist() == [0, 0.5, 0.5, 1, 1.5]
    assert sensitivity.tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 2 / 3])
    found = figures(DETECTION.figures, cases)
    expected = {0.125: 1 / 3, 0.25: 1 / 3, 0.5: 2 / 3, 1: 2 / 3, 2: 2 / 3, 4: 2 / 3, 8: 2 / 3}
    assert {rate: found[f"froc_{rate:g}"] for rate in FALSE_POSITIVE_RATES} == pytest.approx(expected)
    assert found["froc_mean"] == pytest.approx(np.mean(list(expected.values())))
    # Precision 1 up to recall 1/3 (34 of 101 recalls) and 2/3 up to recall 2/3 (33 more)
    assert found["ap10"] == pytest.approx((34 + 33 * 2 / 3) / 101)


def test_images_without_lesion_or_detection():
    rates, sensitivity = froc_curve([detection_case([False], [0.9], 1), *[detection_case([], [], 0)] * 3])
    assert rates.tolist() == [0.25] and sensitivity.tolist() == [0], "they count as images without false positives"
    cases = [detection_case([False], [0.9], 0), detection_case([], [], 0)]
    assert figures(DETECTION.figures, cases) == with_intervals(DETECTION, cases, ["a", "b"], 10, 0) == {}, "no lesion, no figure"
    missed = figures(DETECTION.figures, [detection_case([], [], 2)])
    assert missed["ap50"] == 0 and missed["froc_8"] == 0


def slices_of_patients(patients=20, slices=10, seed=0):
    """Dice values that differ between patients and hardly within one."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(0.2, 0.8, patients)
    cases = [{"dice": level[p] + rng.normal(0, 0.01)} for p in range(patients) for _ in range(slices)]
    return cases, [f"patient{p}" for p in range(patients) for _ in range(slices)]


def width(figure):
    return figure["ci95"][1] - figure["ci95"][0]


def test_the_interval_is_over_patients_not_slices():
    cases, patients = slices_of_patients()
    by_patient = with_intervals(SEGMENTATION, cases, patients, 500, 0)["dice"]
    by_slice = with_intervals(SEGMENTATION, cases, [str(i) for i in range(len(cases))], 500, 0)["dice"]
    assert by_patient["value"] == by_slice["value"] and by_patient["n"] == by_slice["n"] == 200
    assert 2 < width(by_patient) / width(by_slice) < 4.5, "ten slices of a patient tell hardly more than one: sqrt(10) wider"
    means = np.array([case["dice"] for case in cases]).reshape(20, 10).mean(1)
    assert width(by_patient) == pytest.approx(2 * 1.96 * means.std(ddof=0) / np.sqrt(20), rel=0.15)
    assert by_patient["ci95"][0] < by_patient["value"] < by_patient["ci95"][1]


def test_an_interval_repeats_and_needs_two_patients():
    cases, patients = slices_of_patients()
    first, again, other = (with_intervals(SEGMENTATION, cases, patients, 50, seed) for seed in (3, 3, 4))
    assert first == again != other
    figure = with_intervals(SEGMENTATION, cases, ["one"] * 200, 50, 0)["dice"]
    assert figure["ci95"] is None and 0 < figure["value"] < 1 and figure["n"] == 200


def test_intervals_of_every_task_hold_their_value():
    groups = [str(i // 2) for i in range(40)]
    for task, cases in ((CLASSIFICATION, random_classification(40)), (DETECTION, random_detection(40)[2])):
        for name, figure in with_intervals(task, cases, groups, 200, 0).items():
            low, high = figure["ci95"]
            assert 0 <= low <= figure["value"] <= high <= 1, name


def test_mask_ap_counts_the_images_with_instances():
    cases = random_detection(6)[2] + random_detection(4, instances=False)[2]
    report = with_intervals(DETECTION, cases, [str(i) for i in range(10)], 0, 0)
    assert (report["ap50"]["n"], report["mask_ap50"]["n"]) == (10, 6)


def test_a_thousand_draws_of_250_images_take_seconds():
    cases = random_detection(250)[2]
    begin = time.process_time()
    with_intervals(DETECTION, cases, [str(i // 3) for i in range(250)], 1000, 0)
    assert time.process_time() - begin < 20
