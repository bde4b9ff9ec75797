"""Boxes of single slices linked to lesions in space, and volumes."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from bundle.data.volumes import Scan
from bundle.errors import UserError


def link_boxes(slices: Sequence[Sequence[Mapping]], scan: Scan, min_iou: float) -> list[dict]:
    """Link the boxes of neighbouring slices to lesions.

    Between a slice and the next, boxes are paired so that the sum of their IoU is highest (Hungarian method), each at least
    `min_iou`. A lesion ends with the first slice in which it has no box.

    Args:
        slices: for every slice of the scan, in order, its boxes {"box": [x1, y1, x2, y2] in pixels of the stored slice,
            x = the first of the two in-plane axes; "score"; "area" of the instance mask, in those pixels}.

    Returns:
        Lesions, highest score first: {"id" from 1; "slices" [first, last]; "box", hull of its boxes; "score", the highest;
        "boxes" [{"slice", "box", "score"}]; and, None where the scan has no geometry, "center_mm" [x, y, z] of the hull in
        LPS, "size_mm" of the hull along the two axes of the stored slice and across the slices, and "volume_ml", area of the
        instance masks times slice thickness}.
    """
    if not 0 < min_iou <= 1:
        raise UserError(f"link_iou: found {min_iou}, expected a number above 0 and up to 1")
    lesions, open_lesions = [], []  # all so far, as lists of boxes, and those with a box in the slice before
    for index, boxes in enumerate(slices):
        boxes = [{"slice": index, **box} for box in boxes]
        iou = box_iou(_corners([lesion[-1] for lesion in open_lesions]), _corners(boxes)).nan_to_num().numpy()  # no area: 0/0
        pairs = [(old, new) for old, new in zip(*linear_sum_assignment(iou, maximize=True)) if iou[old, new] >= min_iou]
        followed = {new: open_lesions[old] for old, new in pairs}
        for new, box in enumerate(boxes):
            if new not in followed:
                followed[new] = []
                lesions.append(followed[new])
            followed[new].append(box)
        open_lesions = list(followed.values())
    found = sorted((_measure(boxes, scan) for boxes in lesions), key=lambda lesion: -lesion["score"])
    return [{"id": number, **lesion} for number, lesion in enumerate(found, start=1)]


def _corners(boxes: Sequence[Mapping]) -> torch.Tensor:
    return torch.tensor([box["box"] for box in boxes], dtype=torch.float64).reshape(-1, 4)


def _measure(boxes: Sequence[Mapping], scan: Scan) -> dict:
    corners, first, last = _corners(boxes).numpy(), boxes[0]["slice"], boxes[-1]["slice"]
    x1, y1, x2, y2 = hull = [*corners[:, :2].min(0), *corners[:, 2:].max(0)]
    lesion = {"slices": [first, last], "box": [round(float(edge), 2) for edge in hull]}
    lesion |= dict.fromkeys(("center_mm", "size_mm", "volume_ml"))
    if scan.affine is not None:
        in_plane = [axis for axis in range(3) if axis != scan.axis]
        columns = scan.affine[:3, :3]
        normal = np.cross(*columns[:, in_plane].T)
        step = abs(columns[:, scan.axis] @ normal) / np.linalg.norm(normal)
        index = np.empty(3)
        index[in_plane] = [(x1 + x2) / 2 - 0.5, (y1 + y2) / 2 - 0.5]  # pixel k reaches from k - 0.5 to k + 0.5
        # Slices may lie at unequal distances: an index by position, not by number.
        index[scan.axis] = abs((scan.positions[first] + scan.positions[last]) / 2 - scan.positions[0]) / step
        center = (columns @ index + scan.affine[:3, 3]) * [-1, -1, 1]  # RAS to LPS
        sides = np.linalg.norm(columns[:, in_plane], axis=0)
        size = [*(sides * [x2 - x1, y2 - y1]), sum(scan.thickness[first : last + 1])]
        volume = sum(box["area"] * scan.thickness[box["slice"]] for box in boxes) * np.linalg.norm(normal) / 1000
        lesion["center_mm"], lesion["size_mm"] = ([round(float(value), 2) for value in values] for values in (center, size))
        lesion["volume_ml"] = round(float(volume), 4)
    lesion["score"] = max(box["score"] for box in boxes)
    lesion["boxes"] = [{key: box[key] for key in ("slice", "box", "score")} for box in boxes]
    return lesion


def volume_ml(areas: Sequence[float], scan: Scan) -> float:
    """mL of areas in mm2, one a slice."""
    return round(float(np.dot(areas, scan.thickness)) / 1000, 4)
