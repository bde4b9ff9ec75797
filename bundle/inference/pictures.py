"""The pictures of a scan's slices, drawn when a slice is read and kept as JPEG until they are written."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from bundle.data.transforms import move_boxes
from bundle.data.volumes import Scan
from bundle.inference.overlay import draw_overlay
from bundle.inference.report import Report


class Pictures:
    """Pictures of a scan's slices, added one by one: `overlays`, JPEG, and `report`, the page with them."""

    def __init__(self, scan: Scan) -> None:
        self.scan, self.report, self.overlays = scan, Report(scan.spacing, len(scan)), []

    def add(self, view, row: Mapping, caption: Sequence[str]) -> None:
        """Add the next slice: its `SliceView`, its row in predictions.json, and what its caption says, in parts."""
        pixels, found = view.slice[0].numpy(), row.get("boxes", [])
        boxes = torch.tensor([box["box"] for box in found], dtype=torch.float32).reshape(-1, 4)
        boxes = move_boxes(boxes, torch.linalg.inv(view.slice.affine)).numpy()
        scores = np.array([box["score"] for box in found], dtype=np.float32)
        ends, hounsfield = (view.low, view.high), self.scan.hounsfield
        self.report.add(row["index"], pixels, hounsfield, view.labels, view.rebuilt, boxes, scores, ends)
        name = f"slice {row['index']}" if len(self.scan) > 1 else Path(self.scan.name).name
        text, probabilities = "   ·   ".join([name, *caption]), row.get("probabilities")
        overlay, jpeg = io.BytesIO(), {"quality": 85, "subsampling": 0}  # thin coloured lines stay sharp
        draw_overlay(view.shown, self.scan.spacing, view.labels, boxes, scores, probabilities, text).save(overlay, "jpeg", **jpeg)
        self.overlays.append(overlay.getvalue())

    def write_overlays(self, folder: Path) -> None:
        """Write NNNN.jpg of every slice to a new folder."""
        folder.mkdir()
        for index, picture in enumerate(self.overlays):
            (folder / f"{index:04d}.jpg").write_bytes(picture)
