from types import SimpleNamespace

import numpy as np
import pytest

from bundle.tasks.lesions import link_boxes


def scan(affine=None, axis=2, shape=(64, 64, 8), positions=None, thickness=None):
    """Geometry as `Scan` gives it."""
    geometry = {"positions": None, "thickness": None}
    if affine is not None:
        affine = np.asarray(affine, float)
        in_plane = [a for a in range(3) if a != axis]
        normal = np.cross(*affine[:3, in_plane].T)
        normal *= np.sign(normal[2]) / np.linalg.norm(normal)
        step = affine[:3, axis] @ normal
        positions = positions or [affine[:3, 3] @ normal + step * k for k in range(shape[axis])]
        geometry = {"positions": positions, "thickness": thickness or [abs(step)] * shape[axis]}
    return SimpleNamespace(affine=affine, axis=axis, shape=shape, **geometry)


def box(x1, y1, x2, y2, score=0.9, area=100.0):
    return {"box": [x1, y1, x2, y2], "score": score, "area": area}


DIAGONAL = np.diag([2.0, 3.0, 4.0, 1.0])


def test_overlapping_boxes_of_neighbouring_slices_are_one_lesion():
    slices = [[], [box(10, 20, 20, 30, 0.5)], [box(11, 20, 21, 30, 0.8), box(40, 40, 50, 50, 0.6)]]
    slices += [[box(12, 21, 22, 31, 0.7)], []]
    first, second = link_boxes(slices, scan(), 0.2)
    assert (first["id"], first["slices"], first["box"], first["score"]) == (1, [1, 3], [10, 20, 22, 31], 0.8)
    assert first["boxes"][0] == {"slice": 1, "box": [10, 20, 20, 30], "score": 0.5}
    assert [found["slice"] for found in first["boxes"]] == [1, 2, 3]
    assert (second["id"], second["slices"], second["score"]) == (2, [2, 2], 0.6)
    assert first["center_mm"] is first["size_mm"] is first["volume_ml"] is None


THIRD = [[box(0, 0, 10, 10)], [box(5, 0, 15, 10)]]  # boxes of IoU 1/3
# [slices, lowest IoU, hulls of the lesions]
LINKS = {
    "a missing slice ends a lesion": [[[box(1, 1, 9, 9)], [], [box(1, 1, 9, 9)]], 0.2, [[1, 1, 9, 9]] * 2],
    "above the IoU": [THIRD, 0.33, [[0, 0, 15, 10]]],
    "below the IoU": [THIRD, 0.34, [[0, 0, 10, 10], [5, 0, 15, 10]]],
    "boxes without area": [[[box(64, 10, 64, 20)], [box(64, 10, 64, 20)]], 0.2, [[64, 10, 64, 20]] * 2],
    # Greedily, the wide box would take its best match and leave its neighbour without any.
    "paired for the highest sum of IoU": [
        [[box(0, 0, 10, 10), box(4, 0, 14, 10)], [box(3, 0, 13, 10), box(8, 0, 18, 10)]],
        0.2,
        [[0, 0, 13, 10], [4, 0, 18, 10]],
    ],
    "two boxes of a slice never share a lesion": [
        [[box(0, 0, 10, 10)], [box(0, 0, 10, 10, 0.7), box(1, 0, 11, 10, 0.6)]],
        0.2,
        [[0, 0, 10, 10], [1, 0, 11, 10]],
    ],
    "no box": [[[]], 0.2, []],
    "no slice": [[], 0.2, []],
}


@pytest.mark.parametrize(("slices", "iou", "hulls"), LINKS.values(), ids=LINKS)
def test_which_boxes_are_one_lesion(slices, iou, hulls):
    assert [found["box"] for found in link_boxes(slices, scan(), iou)] == hulls


def test_measures_in_mm_and_ml():
    slices = [[], [box(10, 20, 20, 30, area=50)], [box(10, 20, 20, 30, area=70)]]
    (lesion,) = link_boxes(slices, scan(DIAGONAL), 0.2)
    # Pixel centres have integer indices, so the centre of 10 to 20 is at 14.5; RAS to LPS turns x and y round.
    assert lesion["center_mm"] == [-14.5 * 2, -24.5 * 3, 1.5 * 4]
    assert lesion["size_mm"] == [20, 30, 8]
    assert lesion["volume_ml"] == pytest.approx((50 + 70) * 2 * 3 * 4 / 1000)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_x_is_the_first_of_the_two_axes_in_the_plane(axis):
    order = [a for a in range(3) if a != axis] + [axis]
    affine = np.zeros((4, 4))
    for world, array_axis in enumerate(order):
        affine[world, array_axis] = (2, 3, 4)[world]
    affine[3, 3] = 1
    (lesion,) = link_boxes([[box(10, 20, 20, 30)]], scan(affine, axis, (8, 8, 8)), 0.2)
    assert lesion["center_mm"] == [-29, -73.5, 0] and lesion["size_mm"] == [20, 30, 4]


def test_an_oblique_flipped_and_anisotropic_grid():
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)) * 0.3 + np.eye(3))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.7, 0.9, 5.0])
    affine[:3, 3] = 12, -40, 300
    (lesion,) = link_boxes([[], [box(10, 20, 20, 24)], [box(12, 20, 22, 24)]], scan(affine), 0.2)
    ras = affine @ [(10 + 22) / 2 - 0.5, (20 + 24) / 2 - 0.5, 1.5, 1]
    assert lesion["center_mm"] == pytest.approx(ras[:3] * [-1, -1, 1], abs=0.01)
    assert lesion["size_mm"] == pytest.approx([12 * 0.7, 4 * 0.9, 10], abs=0.01)
    assert lesion["volume_ml"] == pytest.approx(200 * 0.7 * 0.9 * 5 / 1000, abs=1e-4)


def test_unequal_distances_of_slices_count():
    affine = np.diag([1.0, 1, 5, 1])  # from the first slice to the last, as for a DICOM series
    unequal = scan(affine, shape=(8, 8, 3), positions=[0.0, 2.0, 10.0], thickness=[2.0, 5.0, 8.0])
    (lesion,) = link_boxes([[box(0, 0, 4, 4)], [box(0, 0, 4, 4)], []], unequal, 0.2)
    assert lesion["center_mm"][2] == 1 and lesion["size_mm"][2] == 7
    assert lesion["volume_ml"] == pytest.approx(0.1 * (2 + 5))


def test_a_single_slice():
    (lesion,) = link_boxes([[box(1, 2, 3, 4)]], scan(DIAGONAL, shape=(64, 64, 1)), 0.2)
    assert lesion["slices"] == [0, 0] and lesion["size_mm"] == [4, 6, 4]


@pytest.mark.parametrize("iou", [0, -0.1, 1.5])
def test_an_iou_out_of_range_is_refused(iou):
    with pytest.raises(ValueError, match="link_iou: found .*, expected a number above 0 and up to 1"):
        link_boxes([], scan(), iou)
