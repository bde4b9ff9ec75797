"""The page of one scan: a single HTML file that contains its pictures and loads nothing from the network."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from bundle.errors import UserError
from bundle.inference.novelty import UNUSUAL_SHARE
from bundle.inference.overlay import BOX, LESIONS, STRONG

TEMPLATE = Path(__file__).with_name("report_template.html")
# Hounsfield units in 8 bits, by straight lines between these pairs of (code, HU): steps of 3 HU in soft tissue, 11 in lung,
# 30 in bone and 41 below air. A picture of it can be shown in any window, as no single window of 8 bits could.
COMPANDING = ((0, -1350.0), (8, -1024.0), (88, -160.0), (208, 240.0), (255, 1650.0))
WINDOWS = (("Lung", 1500, -600), ("Soft tissue", 400, 40), ("Bone", 1800, 400))  # name, width, level in HU
CONTRASTS = (("All", 100, 50), ("Dark parts", 50, 25), ("Bright parts", 50, 75))  # % of the range the network sees
# JPEG quality: 600 slices of 512 x 512 stay below 60 MB; slices of at most 256 x 256 are small anyway.
QUALITY, SMALL_QUALITY, REBUILT_QUALITY = 86, 95, 80
LONGEST, LONGEST_REBUILT = 1024, 256  # longer sides are reduced to these, in pixels


class Report:
    """Collect the slices of a scan one by one, compressed at once, and write the page.

    The rows of all arrays run to posterior, the columns to the patient's left, as in `bundle.data.volumes.Scan.read`. Slices
    in HU are companded to 8 bits (see `COMPANDING`), others go from their lowest to their highest value; both are stored as
    JPEG, so that the page shows approximate values.

    Args:
        spacing: mm between rows and between columns; None where that is not known.
    """

    def __init__(self, spacing: tuple[float, float] | None) -> None:
        self.spacing = spacing
        self.pictures: list[str] = []  # JSON of each slice's pictures
        self.slices: list[dict] = []
        self.shape: tuple[int, int] | None = None

    def add(
        self,
        index: int,
        pixels: np.ndarray,
        hounsfield: bool,
        labels: np.ndarray | None,
        reconstruction: np.ndarray | None,
        boxes: np.ndarray,
        scores: np.ndarray,
        intensity_range: tuple[float, float],
    ) -> None:
        """Add the next slice.

        Args:
            index: of the slice in the scan.
            pixels: (rows, columns), HU or any other unit.
            hounsfield: whether they are HU.
            labels: (rows, columns), 0 or 1 + segmentation class; None where nothing is segmented.
            reconstruction: (rows, columns) in [0, 1]; None without that task.
            boxes: (N, 4) x1 y1 x2 y2, edges in pixels of the slice, x = column.
            scores: (N,).
            intensity_range: values of `pixels` that are 0 and 1 of the reconstruction.
        """
        codes, ends = _companded(pixels) if hounsfield else _stretched(pixels, intensity_range)
        found = labels is not None and labels.any()
        rebuilt = None if reconstruction is None else (reconstruction.clip(0, 1) * 255).round().astype(np.uint8)
        pictures = {
            "image": _picture(codes, LONGEST, "jpeg", quality=QUALITY if codes.size > 256**2 else SMALL_QUALITY),
            "labels": _picture(labels, LONGEST, "png", Image.Resampling.NEAREST) if found else None,
            "rebuilt": None if rebuilt is None else _picture(rebuilt, LONGEST_REBUILT, "jpeg", quality=REBUILT_QUALITY),
        }
        self.pictures.append(json.dumps(pictures))
        drawn = [{"box": [round(float(v), 1) for v in box], "score": float(score)} for box, score in zip(boxes, scores)]
        network = list(map(float, intensity_range)) if hounsfield else [0.0, 100.0]
        self.slices.append({"index": index, "codes": ends, "network": network, "drawn": drawn})
        self.shape = pixels.shape

    def write(self, path, prediction: Mapping, lines: Mapping[str, str] | None = None) -> None:
        """Write the page.

        Args:
            path: of the HTML file.
            prediction: content of the scan's predictions.json, its slices in the order in which they were added.
            lines: title -> text, further results.

        Raises:
            UserError: if the slices are not those that were added.
        """
        added, told = [row["index"] for row in self.slices], [row["index"] for row in prediction["slices"]]
        if added != told or not added:
            raise UserError(f"{path}: found slices {told} in the prediction, expected those added, at least one: {added}")
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        colors = dict(zip(prediction.get("segmentation", {}), itertools.cycle(LESIONS)))
        viewer = self._viewer(prediction, colors)
        # What a picture says is base64: its JSON needs no escaping.
        looks = {"colors": colors, "box": BOX, "strong": STRONG, "unusual_from": UNUSUAL_SHARE}
        stream = template.stream(p=prediction, lines=lines or {}, viewer=viewer, pictures=self.pictures, **looks)
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            stream.dump(file)

    def _viewer(self, prediction: Mapping, colors: Mapping[str, str]) -> dict:
        """What the script of the page needs to know, beside the pictures."""
        lesions = prediction.get("detection", [])
        lesion_of = {(box["slice"], *box["box"]): lesion["id"] for lesion in lesions for box in lesion["boxes"]}
        keys = ("position_mm", "probabilities", "lesion_pixels", "lesion_mm2", "reconstruction_error", "novelty")
        slices = []
        for row, told in zip(self.slices, prediction["slices"]):
            row = dict(row, boxes=[])
            for drawn, stored in zip(row.pop("drawn"), told.get("boxes", []), strict=True):
                row["boxes"].append({**drawn, "lesion": lesion_of.get((told["index"], *stored["box"]))})
            slices.append({**row, **{key: told.get(key) for key in keys}})
        hounsfield = prediction["hounsfield"]
        return {
            "rows": self.shape[0],
            "columns": self.shape[1],
            "spacing": self.spacing,
            "unit": "HU" if hounsfield else "%",
            "windows": [{"name": n, "width": w, "level": c} for n, w, c in (WINDOWS if hounsfield else CONTRASTS)],
            "colors": dict(colors),
            "boxColor": BOX,
            "predicted": prediction.get("classification", {}).get("predicted"),
            "threshold": (prediction.get("novelty") or {}).get("threshold"),
            "lung": (prediction.get("lung") or {}).get("slices"),
            "start": _first_shown(slices),
            "slices": slices,
        }


def _first_shown(slices: Sequence[Mapping]) -> int:
    """Position of the slice with most lesion; without any, of the surest box; without any, the middle."""
    lesion = [sum((row["lesion_pixels"] or {}).values()) for row in slices]
    score = [max((box["score"] for box in row["boxes"]), default=0.0) for row in slices]
    for values in (lesion, score):
        if max(values) > 0:
            return int(np.argmax(values))
    return len(slices) // 2


def _companded(pixels: np.ndarray) -> tuple[np.ndarray, list[list[float]]]:
    codes, values = zip(*COMPANDING)
    return np.interp(pixels, values, codes).round().astype(np.uint8), [list(pair) for pair in COMPANDING]


def _stretched(pixels: np.ndarray, intensity_range: tuple[float, float]) -> tuple[np.ndarray, list[list[float]]]:
    """Codes from the lowest to the highest value, and what those are in % of the range that the network sees."""
    low, high = float(pixels.min()), float(pixels.max())
    codes = ((pixels - low) / max(high - low, 1e-6) * 255).round().astype(np.uint8)
    zero, one = intensity_range
    ends = [(value - zero) / max(one - zero, 1e-6) * 100 for value in (low, max(high, low + 1e-6))]
    return codes, [[0, round(ends[0], 3)], [255, round(ends[1], 3)]]


def _picture(codes: np.ndarray, longest: int, kind: str, resample=Image.Resampling.BILINEAR, **options) -> str:
    """uint8 (rows, columns) as the URL of a grey picture whose longer side is at most `longest` pixels."""
    image, buffer = Image.fromarray(np.ascontiguousarray(codes)), io.BytesIO()
    if (scale := longest / max(image.size)) < 1:
        image = image.resize([max(round(side * scale), 1) for side in image.size], resample)
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
