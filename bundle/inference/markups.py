"""Lesions as boxes that 3D Slicer shows in the scan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.linalg import polar

SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
SCHEMA += "markups-schema-v1.0.3.json#"


def write_markups(path, lesions: Sequence[Mapping], affine, axial_axis: int) -> None:
    """Write a .mrk.json of 3D Slicer: for each lesion of `link_boxes` a region of interest (ROI) along `lesion_axes`."""
    orientation = lesion_axes(affine, axial_axis).ravel().round(9).tolist()
    markups = [_roi(lesion, orientation) for lesion in lesions]
    Path(path).write_text(json.dumps({"@schema": SCHEMA, "markups": markups}, indent=1) + "\n")


def lesion_axes(affine, axial_axis: int) -> np.ndarray:
    """Axes of lesions' boxes, along the axes of the stored slice and across the slices: columns of a rotation (3, 3) in LPS.

    `affine` (4, 4) leads from voxel index to RAS in mm. For a tilted gantry it is the nearest rotation.
    """
    in_plane = [axis for axis in range(3) if axis != axial_axis]
    axes = np.diag([-1, -1, 1]) @ np.asarray(affine, float)[:3, [*in_plane, axial_axis]]
    axes, _ = polar(axes / np.linalg.norm(axes, axis=0))
    axes[:, 2] *= np.sign(np.linalg.det(axes))  # inverted, it leaves a box unchanged
    return axes


def _roi(lesion: Mapping, orientation: list[float]) -> dict:
    name, (first, last) = f"lesion {lesion['id']} ({lesion['score']:.2f})", lesion["slices"]
    slices = f"slice {first}" if first == last else f"slices {first} to {last}"
    about = f"{slices}, {lesion['volume_ml']:g} mL, score {lesion['score']:.3f}; AI, research use only"
    place = {"position": lesion["center_mm"], "orientation": orientation, "positionStatus": "defined"}
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
        "controlPoints": [{"id": "1", "label": name, "description": about, **place}],
        "display": {"visibility": True, "opacity": 1.0, "propertiesLabelVisibility": True, "pointLabelsVisibility": False},
    }
