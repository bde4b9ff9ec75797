import pytest
from PIL import Image
from test_handler import ALL, batch, evaluate

from bundle.evaluation import plot_curves, stage_table
from bundle.names import CLASSIFICATION, TASKS


def read(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 200
        return image.convert("L").getextrema()


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
        assert read(tmp_path / name) == (0, 255), "black lines on white"


def test_curves_are_drawn_while_validation_is_still_missing(tmp_path):
    history = [{"epoch": 1, "loss": 2.0, "loss_classification": 1.0, "learning_rate": 1e-3}]
    plot_curves(history, tmp_path / "curves.png")
    first = (tmp_path / "curves.png").read_bytes()
    history.append({"epoch": 2, "loss": 1.0, "loss_classification": 0.5, "score": 0.5, "classification_auroc": 0.6})
    plot_curves(history, tmp_path / "curves.png")
    assert read(tmp_path / "curves.png") == (0, 255)
    assert (tmp_path / "curves.png").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(("loss", "scale"), [(0.5, "log"), (-0.5, "linear")])
def test_a_negative_loss_is_in_the_picture(tmp_path, monkeypatch, loss, scale):
    drawn = []
    monkeypatch.setattr("bundle.evaluation.figures.save_figure", lambda figure, path: drawn.append(figure))
    plot_curves([{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": loss}], tmp_path / "curves.png")
    axis = drawn[0].axes[0]
    assert axis.get_yscale() == scale and axis.get_ylim()[0] < loss


def test_stage_table_has_a_row_for_every_stage_and_a_dash_where_nothing_was_measured():
    metrics, _ = evaluate([batch(ALL)])
    table = stage_table(
        {"stage_classification": {CLASSIFICATION: metrics.report[CLASSIFICATION]}, "stage_joint": metrics.report}
    )
    header, line, first, second = table.strip().split("\n")
    assert header == "| after stage (validation split) | accuracy | AUROC | Dice | IoU | SSIM | AP@0.1 | AP@0.5 |"
    accuracy = f"{metrics.report[CLASSIFICATION]['accuracy']['value']:.3f}"
    assert first.startswith(f"| stage_classification | {accuracy} | ") and first.endswith("| - | - | - | - | - |")
    assert " - " not in second and second.count("|") == header.count("|") == line.count("|") == 9
    assert set(metrics.report) == set(TASKS)
