import pytest
from PIL import Image

from bundle.training.history import plot_curves, stage_table


def test_curves_are_drawn_while_validation_is_still_missing(tmp_path):
    history = [{"epoch": 1, "loss": 2.0, "loss_classification": 1.0, "learning_rate": 1e-3}]
    plot_curves(history, tmp_path / "curves.png")
    first = (tmp_path / "curves.png").read_bytes()
    history.append({"epoch": 2, "loss": 1.0, "loss_classification": 0.5, "score": 0.5, "classification_auroc": 0.6})
    plot_curves(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.convert("L").getextrema() == (0, 255)
    assert (tmp_path / "curves.png").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(("loss", "scale"), [(0.5, "log"), (-0.5, "linear")])
def test_a_negative_loss_is_in_the_picture(tmp_path, monkeypatch, loss, scale):
    drawn = []
    monkeypatch.setattr("bundle.training.history.write_figure", lambda figure, path: drawn.append(figure))
    plot_curves([{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": loss}], tmp_path / "curves.png")
    axis = drawn[0].axes[0]
    assert axis.get_yscale() == scale and axis.get_ylim()[0] < loss


def test_stage_table_has_a_row_for_every_stage_and_a_dash_where_nothing_was_measured():
    first, second = {"classification": {"accuracy": {"value": 0.5}}}, {"segmentation": {"dice": {"value": 0.25}}}
    assert stage_table({"stage_classification": first, "stage_joint": first | second}).splitlines() == [
        "| after stage (validation split) | accuracy | AUROC | Dice | IoU | SSIM | AP@0.1 | AP@0.5 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| stage_classification | 0.500 | - | - | - | - | - | - |",
        "| stage_joint | 0.500 | - | 0.250 | - | - | - | - |",
    ]
