import csv
import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image
from some_tasks import CLASSES, some_tasks

from bundle.evaluation import MultiTaskMetrics
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS


def batch(annotated, source="covid_ct", start=0, size=4):
    """Predictions and annotations of `size` images; `annotated` gives for a task which of them are."""
    torch.manual_seed(start)
    rows = {task: torch.tensor(annotated.get(task, [False] * size)) for task in TASKS}
    rows[RECONSTRUCTION] = torch.ones(size, dtype=torch.bool)
    box = torch.tensor([[4.0, 4, 20, 12]])
    masks = torch.zeros(1, 32, 32, dtype=torch.uint8)
    masks[:, 4:12, 4:20] = 1
    found = {"boxes": box + 1, "scores": torch.tensor([0.9]), "labels": torch.ones(1), "masks": masks[:, None].float()}
    label = {
        "class": torch.eye(3, dtype=torch.bool)[torch.arange(size) % 3],
        "mask": (torch.rand(size, 1, 32, 32) > 0.7).float(),
        "target": torch.rand(size, 1, 32, 32),
        "detection": [{"boxes": box, "labels": torch.ones(1), "masks": masks} if row else None for row in rows[DETECTION]],
        "annotated": rows,
        "record": [{"image": f"{source}/{i}.png", "group": f"p{i // 2}", "source": source} for i in range(start, start + size)],
    }
    pred = {
        CLASSIFICATION: torch.randn(size, 3),
        SEGMENTATION: torch.randn(size, 1, 32, 32),
        RECONSTRUCTION: torch.rand(size, 1, 32, 32),
        DETECTION: [found if row else None for row in rows[DETECTION]],
    }
    return {"pred": pred, "label": label}


def evaluate(batches, tasks=TASKS, **arguments):
    engine = Engine(lambda _, output: output)
    metrics = MultiTaskMetrics(some_tasks(*tasks), **arguments)
    metrics.attach(engine)
    engine.run(batches)
    return metrics, engine.state.metrics


ALL = {task: [True] * 4 for task in TASKS}
FIGURES = {
    CLASSIFICATION: {"accuracy", "balanced_accuracy", "f1_macro", "auroc", "ece", "confusion_matrix"},
    SEGMENTATION: {"iou", "dice", "sensitivity", "specificity", "hd95"},
    RECONSTRUCTION: {"mse", "psnr", "ssim"},
    DETECTION: {"ap10", "ap50", "ap", "mask_ap10", "mask_ap50", "mask_ap", "froc"},
}
RATES = {"0.125", "0.25", "0.5", "1", "2", "4", "8", "mean"}


def check_figure(figure, n):
    assert figure.keys() == {"value", "ci95", "n"} and figure["n"] == n
    low, high = figure["ci95"]
    assert low <= high and all(isinstance(number, float) for number in (figure["value"], low, high))


@pytest.mark.parametrize("sources", [["covid_ct"], ["covid_ct", "iqoth"]])
def test_metrics_json_has_the_one_fixed_form(tmp_path, sources):
    batches = [batch(ALL, source, start=4 * i) for i, source in enumerate(sources)]
    evaluate(batches, bootstrap=20, output_dir=tmp_path / "evaluation")
    report = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert report.keys() == set(TASKS)
    for task, names in FIGURES.items():
        assert report[task].keys() == names | {"within_source"}
        assert report[task]["within_source"].keys() == set(sources)
        parts = [(report[task], 4 * len(sources)), *((part, 4) for part in report[task]["within_source"].values())]
        for part, n in parts:
            assert part.keys() >= names
            for name in names - {"confusion_matrix", "froc"}:
                check_figure(part[name], n)
            if task == DETECTION:
                assert part["froc"].keys() == RATES
                for figure in part["froc"].values():
                    check_figure(figure, n)
            if task == CLASSIFICATION:
                assert part["confusion_matrix"]["classes"] == CLASSES
                assert np.array(part["confusion_matrix"]["counts"]).sum() == n


def test_only_annotated_samples_count():
    some = {CLASSIFICATION: [True, False, False, True], SEGMENTATION: [False, True, False, False]}
    some[DETECTION] = [False, False, True, True]
    metrics, _ = evaluate([batch(some), batch(some, start=4)])
    counts = {CLASSIFICATION: 4, SEGMENTATION: 2, RECONSTRUCTION: 8, DETECTION: 4}
    first = {CLASSIFICATION: "accuracy", SEGMENTATION: "dice", RECONSTRUCTION: "mse", DETECTION: "ap50"}
    assert {task: metrics.report[task][first[task]]["n"] for task in TASKS} == counts
    pairs = [(one["pred"][CLASSIFICATION], one["label"]["class"].int()) for one in (batch(some), batch(some, start=4))]
    right = [(pred.argmax(1) == label.argmax(1))[[0, 3]] for pred, label in pairs]
    assert metrics.report[CLASSIFICATION]["accuracy"]["value"] == pytest.approx(torch.cat(right).float().mean().item())


def test_a_class_known_in_part_has_no_part_in_the_figures(tmp_path):
    one = batch(ALL)
    one["label"]["class"][1] = torch.tensor([True, True, False])
    report = evaluate([one], output_dir=tmp_path)[0].report
    assert report[CLASSIFICATION]["accuracy"]["n"] == 3 and np.sum(report[CLASSIFICATION]["confusion_matrix"]["counts"]) == 3
    assert report[SEGMENTATION]["dice"]["n"] == 4
    rows = list(csv.DictReader((tmp_path / "per_case.csv").open()))
    assert [row["class"] for row in rows] == ["0", "", "2", "0"]


def test_a_task_without_annotated_sample_has_no_figure_and_no_part_in_the_score():
    metrics, flat = evaluate([batch({CLASSIFICATION: [True] * 4})])
    assert metrics.report.keys() == {CLASSIFICATION, RECONSTRUCTION}
    assert not any(name.startswith((SEGMENTATION, DETECTION)) for name in flat)
    expected = np.mean([flat["classification_auroc"], flat["classification_balanced_accuracy"]])
    assert flat["score"] == pytest.approx(expected)


def test_reconstruction_makes_the_score_where_it_is_alone():
    _, flat = evaluate([batch({})])
    assert flat.keys() == {"reconstruction_mse", "reconstruction_psnr", "reconstruction_ssim", "score"}
    assert flat["score"] == flat["reconstruction_ssim"]


def test_the_score_is_the_mean_over_tasks():
    _, flat = evaluate([batch(ALL)])
    parts = [
        (flat["classification_auroc"] + flat["classification_balanced_accuracy"]) / 2,
        flat["segmentation_dice"],
        (flat["detection_ap10"] + flat["detection_ap50"]) / 2,
    ]
    assert flat["score"] == pytest.approx(np.mean(parts))
    assert "detection_ap" in flat and all(isinstance(value, float) for value in flat.values())


def test_negatives_only_give_no_score_of_detection():
    one = batch({DETECTION: [True] * 4})
    for target in one["label"]["detection"]:
        target["boxes"], target["masks"] = torch.zeros(0, 4), torch.zeros(0, 32, 32)
    metrics, flat = evaluate([one], tasks=(DETECTION,))
    assert "score" not in flat and metrics.report[DETECTION] == {"within_source": {"covid_ct": {}}}


def test_a_source_with_boxes_alone_has_no_part_in_mask_ap():
    masked, boxes = batch(ALL, "lungs"), batch(ALL, "boxes", start=4)
    for target in boxes["label"]["detection"]:
        del target["masks"]
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.ones(0), "masks": torch.zeros(0, 32, 32)}  # as FollowImaged has it
    boxes["label"]["detection"][0] = empty
    metrics, _ = evaluate([masked, boxes], tasks=(DETECTION,))
    report, alone = metrics.report[DETECTION], evaluate([masked], tasks=(DETECTION,))[0].report[DETECTION]
    assert report["mask_ap10"] == alone["mask_ap10"] and report["mask_ap10"]["n"] == 4
    assert report["ap10"]["n"] == 8 and report["within_source"]["boxes"].keys() == {"ap10", "ap50", "ap", "froc"}
    masked["label"]["detection"][0] = empty
    with_false_positive = evaluate([masked], tasks=(DETECTION,))[0].report[DETECTION]
    assert with_false_positive["mask_ap10"]["value"] < alone["mask_ap10"]["value"]


def test_an_epoch_starts_without_the_rows_of_the_one_before():
    engine = Engine(lambda _, output: output)
    metrics = MultiTaskMetrics(some_tasks())
    metrics.attach(engine)
    engine.run([batch(ALL)], max_epochs=2)
    assert len(metrics.rows) == 4


def test_per_case_csv_has_a_row_for_every_image_and_empty_cells_where_there_is_nothing_to_say(tmp_path):
    some = {CLASSIFICATION: [True, False, False, False], SEGMENTATION: [False, True, False, False]}
    some[DETECTION] = [False, False, True, False]
    one = batch(some)
    one["label"]["mask"][1], one["pred"][SEGMENTATION][1] = 0, -1  # no lesion, none found: no distance, no sensitivity
    evaluate([one], output_dir=tmp_path)
    rows = list(csv.DictReader((tmp_path / "per_case.csv").open()))
    assert [row["image"] for row in rows] == [f"covid_ct/{i}.png" for i in range(4)]
    assert [bool(row["predicted_class"]) for row in rows] == [True, False, False, False]
    assert (rows[1]["dice"], rows[1]["hd95"], rows[1]["sensitivity"], rows[1]["specificity"]) == ("1.0", "", "", "1.0")
    assert [row["true_positives"] for row in rows] == ["", "", "1", ""]
    assert [(row["n_boxes"], row["false_positives"]) for row in rows][2] == ("1", "0")
    assert all(row["ssim"] for row in rows)
    assert sum(float(rows[0][f"probability_{name}"]) for name in CLASSES) == pytest.approx(1)


@pytest.mark.parametrize(
    ("annotated", "names"),
    [
        (ALL, {"classification.png", "segmentation.png", "detection.png"}),
        ({CLASSIFICATION: [True] * 4}, {"classification.png"}),
        ({CLASSIFICATION: [True, False, False, False]}, {"classification.png"}),
        ({}, set()),
    ],
    ids=["all", "classification", "one class", "none"],
)
def test_the_measured_tasks_are_drawn(tmp_path, annotated, names):
    evaluate([batch(annotated), batch(annotated, "iqoth", start=4)], output_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names | {"metrics.json", "per_case.csv"}
    for name in names:
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and min(image.size) > 200
            assert image.convert("L").getextrema() == (0, 255), "black lines on white"
