import time

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from bundle.inference.overlay import BOX, LESIONS, STRONG, _overlap, _place_label, draw_overlay

NO_BOXES = (np.zeros((0, 4)), np.zeros(0))


def drawn(tmp_path, pixels, spacing=None, labels=None, boxes=NO_BOXES, probabilities=None, caption="a slice", name="x.png"):
    draw_overlay(pixels, spacing, labels, *boxes, probabilities, caption).save(tmp_path / name, quality=85, subsampling=0)
    return np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int)


def where(picture, color):
    """First and last column and row, in pixels of the picture, at which a colour is found."""
    rows, columns = np.nonzero(np.abs(picture - 255 * np.array(to_rgb(color))).max(-1) < 40)
    return columns.min(), columns.max() + 1, rows.min(), rows.max() + 1


@pytest.mark.parametrize("spacing, height", [(None, 256), ((2.0, 1.0), 512), ((0.5, 1.0), 128)])
def test_boxes_lie_on_the_slice_whose_pixels_keep_their_proportion(tmp_path, spacing, height):
    picture = drawn(tmp_path, np.full((40, 80), 1.0), spacing, boxes=([[10, 20, 30, 36]], [0.8]))
    assert (picture[:, 0] == 255).all(-1).sum() == height
    width = height * 2 / ((spacing or (1, 1))[0] / (spacing or (1, 1))[1])
    left, right, _, bottom = where(picture, BOX)
    edge = (picture.shape[1] - width) / 2
    assert (left, right) == pytest.approx((edge + width / 80 * 10, edge + width / 80 * 30), abs=2)
    assert bottom == pytest.approx(height / 40 * 36, abs=2)


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_each_class_of_lesion_has_its_colour_at_its_place(tmp_path, name):
    labels = np.zeros((64, 64), np.uint8)
    labels[10:20, 30:50], labels[40:60, 5:15] = 1, 2
    picture = drawn(tmp_path, np.zeros((64, 64)), labels=labels, name=name)
    assert where(picture, LESIONS[0]) == pytest.approx((240, 400, 80, 160), abs=3)
    assert where(picture, LESIONS[1]) == pytest.approx((40, 120, 320, 480), abs=3)
    assert picture[300, 300].max() <= 3
    assert picture[120, 320] == pytest.approx(0.22 * 255 * np.array(to_rgb(LESIONS[0])), abs=5)


def test_the_bar_of_a_class_is_as_long_as_it_is_probable(tmp_path):
    lengths = []
    for value in (0.6, 0.9):
        left, right, _, _ = where(drawn(tmp_path, np.zeros((8, 8)), probabilities={"a": value, "b": 1 - value}), STRONG)
        lengths.append(right - left)
    assert lengths[1] == pytest.approx(1.5 * lengths[0], abs=2)


def test_scores_do_not_hide_one_another():
    box, places = (100, 100, 200, 140), []
    for _ in range(4):
        places.append(_place_label(box, (36, 18), (512, 512), [box], places))
    assert not any(_overlap(a, b) for n, a in enumerate(places) for b in places[:n])
    for box in ((0, 0, 20, 20), (500, 500, 512, 512), (0, 0, 512, 512)):
        x1, y1, x2, y2 = _place_label(box, (36, 18), (512, 512), [box], [])
        assert 0 <= x1 and 0 <= y1 and x2 <= 512 and y2 <= 512


@pytest.mark.parametrize("shape", [(3, 3), (1, 9), (9, 1), (1, 1)])
def test_the_smallest_slice_that_is_all_lesion_can_be_drawn(tmp_path, shape):
    picture = drawn(tmp_path, np.zeros(shape), labels=np.ones(shape, np.uint8), boxes=([[0, 0, 1, 1]], [1.0]))
    assert picture.shape[1] >= 512 and where(picture, BOX)


def test_long_names_and_captions_stay_on_the_sheet(tmp_path):
    picture = drawn(tmp_path, np.zeros((64, 64)), probabilities={"x" * 200: 0.5, "b": 0.5}, caption="$y_1\n" * 100)
    text = (picture[512:] > 120).all(-1)
    assert text.any() and not text[:, :8].any() and not text[:, -8:].any()


def test_a_slice_is_drawn_fast_enough_for_volumes_and_takes_little_room(tmp_path):
    rows, columns = np.indices((512, 512)) / 256 - 1
    pixels = np.where((rows / 0.7) ** 2 + (columns / 0.9) ** 2 < 1, 0.8, 0.0)
    pixels = pixels + np.random.default_rng(0).normal(0, 0.02, pixels.shape)
    labels = (rows**2 + columns**2 < 0.16).astype(np.uint8)
    boxes, seconds = ([[100, 100, 200, 200], [150, 150, 250, 250]], [0.9, 0.8]), []
    for _ in range(5):
        start = time.process_time()
        drawn(tmp_path, pixels, (0.7, 0.7), labels, boxes, {"a": 0.9, "b": 0.1}, name="x.jpg")
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1  # matplotlib needs 0.2 s
    assert (tmp_path / "x.jpg").stat().st_size < 120_000
