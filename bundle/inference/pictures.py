"""The pictures of a scan's slices: drawn once, when a slice is read, and kept compressed until they are written."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bundle.data.transforms import move_boxes
from bundle.data.volumes import Scan
from bundle.inference.overlay import draw_overlay
from bundle.inference.report import Report

QUALITY = 92  # of the JPEG that an overlay is drawn on


class Pictures:
    """Pictures of the slices of a scan, added one by one, and `report`, the page with them."""

    def __init__(self, scan: Scan) -> None:
        self.scan, self.report = scan, Report(scan.spacing, len(scan))
        self.slices: list[tuple[bytes, bytes | None, np.ndarray, np.ndarray]] = []

    def add(self, view, row: Mapping) -> None:
        """Add the next slice: its `bundle.inference.results.SliceView` and its row in predictions.json."""
        pixels, found = view.slice[0].numpy(), row.get("boxes", [])
        boxes = torch.tensor([box["box"] for box in found], dtype=torch.float32).reshape(-1, 4)
        boxes = move_boxes(boxes, torch.linalg.inv(view.slice.affine)).numpy()
        scores = np.array([box["score"] for box in found], dtype=np.float32)
        ends, hounsfield = (view.low, view.high), self.scan.hounsfield
        self.report.add(row["index"], pixels, hounsfield, view.labels, view.rebuilt, boxes, scores, ends)
        shown = io.BytesIO()
        Image.fromarray((view.shown * 255).round().astype(np.uint8)).save(shown, "jpeg", quality=QUALITY)
        labels = None if view.labels is None else zlib.compress(view.labels.tobytes(), 1)
        self.slices.append((shown.getvalue(), labels, boxes, scores))

    def draw_overlays(self, folder: Path, rows: Sequence[Mapping], captions: Sequence[Sequence[str]]) -> None:
        """Draw every slice on all cores, as NNNN.jpg in a new folder; `rows` of predictions.json, `captions` in parts."""
        folder.mkdir()

        def draw(picture: tuple, row: Mapping, caption: Sequence[str]) -> None:
            shown, labels, boxes, scores = picture
            pixels = np.asarray(Image.open(io.BytesIO(shown)))
            if labels is not None:
                labels = np.frombuffer(zlib.decompress(labels), np.uint8).reshape(pixels.shape)
            name = f"slice {row['index']}" if len(self.scan) > 1 else Path(self.scan.name).name
            text, probabilities = "   ·   ".join([name, *caption]), row.get("probabilities")
            path = folder / f"{row['index']:04d}.jpg"
            draw_overlay(path, pixels / 255, self.scan.spacing, labels, boxes, scores, probabilities, text)

        with ThreadPoolExecutor() as pool:
            list(pool.map(draw, self.slices, rows, captions))
