import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from monai.data import MetaTensor
from PIL import Image

from bundle.inference.overlay import BOX, LESIONS, draw_overlay


def drawn(tmp_path, slice_, answer, entry):
    draw_overlay(slice_, answer, entry, tmp_path / "x.png")
    return np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))


def where(picture, color):
    """Share of the width and of the height of the picture, from 0 to 1, at which a colour begins and ends."""
    rows, columns = np.nonzero(np.abs(picture - 255 * np.array(to_rgb(color))).max(-1) < 40)
    return columns.min() / picture.shape[1], columns.max() / picture.shape[1], rows.min(), rows.max()


@pytest.mark.parametrize("flipped", [False, True])
def test_boxes_and_outlines_lie_on_the_slice(tmp_path, flipped):
    affine = torch.eye(3, dtype=torch.float64)
    if flipped:  # the file stores the columns the other way round
        affine[1, 1], affine[1, 2] = -1, 79
    slice_ = MetaTensor(torch.zeros(1, 40, 80), affine=affine, meta={"spacing": None})
    box = [[60.0, 10.0, 70.0, 30.0]] if flipped else [[10.0, 10.0, 20.0, 30.0]]
    answer = {"detection": {"boxes": torch.tensor(box), "scores": torch.tensor([0.8])}}
    picture = drawn(tmp_path, slice_, answer, {"file": "x", "detection": [{"box": box[0], "score": 0.8}]})
    left, right, _, bottom = where(picture, BOX)
    assert left == pytest.approx(10 / 80, abs=0.01) and bottom == pytest.approx(30 / 80 * picture.shape[1], abs=8)
    probabilities = torch.zeros(1, 40, 80)
    probabilities[0, 10:30, 40:60] = 1
    entry = {"file": "x", "segmentation": {"area": {"lesion": {"pixels": 400, "mm2": None}}}}
    picture = drawn(tmp_path, slice_, {"segmentation": probabilities}, entry)
    left, right, top, bottom = where(picture, LESIONS[0])
    assert (left, right) == pytest.approx((40 / 80, 60 / 80), abs=0.02)
    assert (top, bottom) == pytest.approx((10 / 80 * picture.shape[1], 30 / 80 * picture.shape[1]), abs=12)


def test_pixels_of_unequal_sides_are_shown_in_their_proportion(tmp_path):
    entry = {"file": "x" * 80, "classification": {"predicted": "a", "probabilities": {"a": 0.9, "b": 0.1}}}
    wide = MetaTensor(torch.ones(1, 40, 40), affine=torch.eye(3), meta={"spacing": (1.0, 2.0)})
    square = MetaTensor(torch.ones(1, 40, 40), affine=torch.eye(3), meta={"spacing": (1.0, 1.0)})
    heights = [(drawn(tmp_path, slice_, {}, entry) == 255).all(-1).any(1).sum() for slice_ in (wide, square)]
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.05)


def test_an_image_that_is_all_lesion_or_one_pixel_high_can_be_drawn(tmp_path):
    entry = {"file": "$x_1", "segmentation": {"area": {"lesion": {"pixels": 9, "mm2": 9.0}}}}
    for shape in ((3, 3), (1, 9)):
        slice_ = MetaTensor(torch.zeros(1, *shape), affine=torch.eye(3), meta={"spacing": None})
        assert drawn(tmp_path, slice_, {"segmentation": torch.ones(1, *shape)}, entry).size
