import pytest
from PIL import Image
from test_handler import ALL, batch, evaluate

from bundle.names import CLASSIFICATION


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
