import json
from itertools import product

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bundle.inference.markups import lesion_axes, write_markups

SPACING = np.array([0.8, 1.3, 4.0])
TURN = Rotation.from_euler("xyz", [8, -12, 20], degrees=True).as_matrix()
# Array axes that run to left or right, to posterior or anterior, up or down, and in another order: affines to RAS.
GRIDS = {
    "plain": (np.diag(SPACING), 2),
    "DICOM": (np.diag(SPACING * [-1, -1, 1]), 2),
    "oblique": (TURN @ np.diag(SPACING * [-1, 1, 1]), 2),
    "oblique, left-handed": (TURN @ np.diag(SPACING * [1, -1, -1]) @ np.diag([-1, 1, 1]), 2),
    "sagittal order": (TURN @ np.diag(SPACING)[:, [1, 2, 0]], 1),
}


def write(path, affine, axis, **lesion) -> list[dict]:
    """The ROIs in a file of one lesion."""
    lesion = {
        "id": 1,
        "slices": [4, 6],
        "center_mm": [1.0, 2.0, 3.0],
        "size_mm": [4.0, 2.6, 12.0],
        "volume_ml": 0.0625,
        "score": 0.8765,
        **lesion,
    }
    write_markups(path, [lesion], affine, axis)
    content = json.loads(path.read_text())
    assert content["@schema"].endswith("markups-schema-v1.0.3.json#")
    return content["markups"]


def to_affine(directions) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions, [10, -20, 30]
    return affine


@pytest.mark.parametrize("name", GRIDS)
def test_a_roi_covers_the_voxels_of_its_lesion(tmp_path, name):
    directions, axis = GRIDS[name]
    affine = to_affine(directions)
    in_plane = [a for a in range(3) if a != axis]
    low, high = np.empty(3), np.empty(3)
    low[in_plane], high[in_plane], low[axis], high[axis] = [2, 3], [7, 5], 4, 7  # edges of voxels, 0 is that of the first
    to_lps = np.diag([-1, -1, 1])

    def place(edges):
        return to_lps @ (affine @ [*(edges - 0.5), 1])[:3]

    sides = np.linalg.norm(directions, axis=0)
    size = (sides * (high - low))[[*in_plane, axis]]
    where = {"center_mm": place((low + high) / 2).tolist(), "size_mm": size.tolist()}
    (roi,) = write(tmp_path / "markups.mrk.json", affine, axis, **where)
    orientation = np.reshape(roi["orientation"], (3, 3))  # its columns are the axes of the box
    assert np.linalg.det(orientation) == pytest.approx(1)
    signs = np.array(list(product([-0.5, 0.5], repeat=3)))
    corners = np.array(roi["center"]) + (signs * roi["size"]) @ orientation.T
    expected = [place(np.where(sign > 0, high, low)) for sign in signs]
    np.testing.assert_allclose(sorted(corners.round(4).tolist()), sorted(np.round(expected, 4).tolist()), atol=2e-4)


def test_the_file_is_what_slicer_reads(tmp_path):
    (roi,) = write(tmp_path / "markups.mrk.json", to_affine(np.diag(SPACING)), 2)
    assert (roi["type"], roi["roiType"], roi["coordinateSystem"], roi["coordinateUnits"]) == ("ROI", "Box", "LPS", "mm")
    assert roi["name"] == "lesion 1 (0.88)"
    assert [len(roi[key]) for key in ("center", "size", "orientation")] == [3, 3, 9]
    (point,) = roi["controlPoints"]
    assert point["position"] == roi["center"] and point["positionStatus"] == "defined"
    assert point["description"] == "slices 4 to 6, 0.0625 mL, score 0.876; AI, research use only"


def test_a_sheared_grid_has_the_nearest_rotation():
    sheared = np.eye(4)
    sheared[1, 2] = 0.2  # slices of a tilted gantry
    axes = lesion_axes(sheared, 2)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert np.diag(np.diag([-1, -1, 1]) @ axes).min() > 0.99
