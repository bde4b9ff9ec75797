"""Lesions as boxes that 3D Slicer shows in the scan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.linalg import polar

from bundle.errors import UserError

SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
SCHEMA += "markups-schema-v1.0.3.json#"


def write_markups(path, prediction: Mapping) -> None:
    """Write a markups file of 3D Slicer (.mrk.json): one region of interest (ROI) for each lesion.

    A ROI lies along the axes of the scan, which may be oblique: two in the plane of the stored slice, the third across the
    slices. Coordinates are LPS in mm. Its name has number and score of the lesion; the description of its control point has
    the slices, the volume, and that this is for research only.

    Args:
        path: of the file.
        prediction: content of predictions.json.

    Raises:
        UserError: if the scan has no geometry.
    """
    grid = prediction["grid"]
    if grid["affine"] is None:
        raise UserError(f"{prediction['scan']}: found no geometry, expected an affine: lesions have no place in space")
    orientation = lesion_axes(grid["affine"], grid["axial_axis"]).ravel().round(9).tolist()
    markups = [_roi(lesion, orientation) for lesion in prediction["detection"]]
    Path(path).write_text(json.dumps({"@schema": SCHEMA, "markups": markups}, indent=1) + "\n")


def lesion_axes(affine, axial_axis: int) -> np.ndarray:
    """Axes of the boxes of a scan's lesions: columns of a right-handed rotation (3, 3) in LPS.

    They run along the first and second axis in the plane of the stored slice and across the slices. If these are not at right
    angles (a tilted gantry), the nearest rotation is taken; if they are left-handed, the third is inverted, which leaves a box
    unchanged.

    Args:
        affine: (4, 4) from voxel index to RAS in mm.
        axial_axis: the array axis across the slices.
    """
    in_plane = [axis for axis in range(3) if axis != axial_axis]
    axes = np.diag([-1, -1, 1]) @ np.asarray(affine, float)[:3, [*in_plane, axial_axis]]
    axes, _ = polar(axes / np.linalg.norm(axes, axis=0))
    axes[:, 2] *= np.sign(np.linalg.det(axes))
    return axes


def _roi(lesion: Mapping, orientation: list[float]) -> dict:
    name = f"lesion {lesion['id']} ({lesion['score']:.2f})"
    first, last = lesion["slices"]
    slices = f"slice {first}" if first == last else f"slices {first} to {last}"
    point = {
        "id": "1",
        "label": name,
        "description": f"{slices}, {lesion['volume_ml']:g} mL, score {lesion['score']:.3f}; AI, research use only",
        "position": lesion["center_mm"],
        "orientation": orientation,
        "positionStatus": "defined",
    }
    return {
        "type": "ROI",
        "name": name,
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "locked": True,
        "labelFormat": "%N",
        "roiType": "Box",
        "center": lesion["center_mm"],
        "orientation": orientation,
        "size": lesion["size_mm"],
        "controlPoints": [point],
        "display": {"visibility": True, "opacity": 1.0, "propertiesLabelVisibility": True, "pointLabelsVisibility": False},
    }
