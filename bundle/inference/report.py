"""The pictures of a scan: overlays, and the page, a single HTML file that contains its pictures and loads nothing."""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from PIL import Image

from bundle.data.transforms import move_boxes
from bundle.data.volumes import Scan
from bundle.inference.novelty import UNUSUAL_SHARE
from bundle.inference.overlay import BOX, LESIONS, STRONG, draw_overlay
from bundle.tasks import Task

TEMPLATE = Path(__file__).with_name("report_template.html")
# Hounsfield units in 8 bits, by straight lines between these pairs of (code, HU): steps of 3 HU in soft tissue, 11 in lung,
# 30 in bone and 41 below air. A picture of it can be shown in any window, as no single window of 8 bits could.
COMPANDING = ((0, -1350), (8, -1024), (88, -160), (208, 240), (255, 1650))
CODES = np.interp(np.arange(-1350, 1651), *reversed(list(zip(*COMPANDING)))).round().astype(np.uint8)  # of each HU
WINDOWS = (("Lung", 1500, -600), ("Soft tissue", 400, 40), ("Bone", 1800, 400))  # name, width, level in HU
CONTRASTS = (("All", 100, 50), ("Dark parts", 50, 25), ("Bright parts", 50, 75))  # % of the range the network sees
# The pictures of a page and those of a slice take at most this much, with the finest of these (longest side in pixels, JPEG
# quality) that fits: slices of 256 x 256 have the first, 64 of 512 x 512 the second, 600 noisy ones of these the seventh.
PAGE_BYTES, SLICE_BYTES = 9e6, 80e3
FINENESS = ((1024, 95), (1024, 86), (1024, 72), (1024, 60), (384, 70), (384, 55), (384, 45), (320, 50), (256, 45), (192, 40))
REBUILT = (256, 80)


@dataclass
class SliceView:
    """A slice (1, rows, columns) as it was read, and `shown` as the network sees it, where `low` is 0 and `high` is 1.

    Tasks add `labels`, 0 or 1 + lesion class, and `rebuilt`, in [0, 1], both (rows, columns).
    """

    slice: MetaTensor
    shown: np.ndarray
    low: float
    high: float
    labels: np.ndarray | None = None
    rebuilt: np.ndarray | None = None


class Report:
    """Draw the slices of a scan one by one, compressed at once, and write overlays and page.

    On the page slices in HU are companded to 8 bits (see `COMPANDING`), others go from their lowest to their highest value;
    both become JPEG, so that it shows approximate values.
    """

    def __init__(self, scan: Scan, tasks: Sequence[Task]) -> None:
        self.scan, self.tasks, self.share, self.fineness = scan, tasks, min(PAGE_BYTES / len(scan), SLICE_BYTES), 0
        self.pictures: list[str] = []  # JSON of each slice's pictures
        self.overlays: list[bytes] = []  # JPEG
        self.slices: list[dict] = []

    def add(self, view: SliceView, row: Mapping) -> None:
        """Add the next slice and its row in predictions.json."""
        pixels, ends, hounsfield = view.slice[0].numpy(), (view.low, view.high), self.scan.hounsfield
        self.shape = pixels.shape
        if hounsfield:
            codes, pairs = CODES[(np.rint(pixels).clip(-1350, 1650) + 1350).astype(np.int16)], list(COMPANDING)
        else:
            codes, pairs = _stretched(pixels, ends)
        found, labels = row.get("boxes", []), view.labels
        boxes = torch.tensor([box["box"] for box in found], dtype=torch.float32).reshape(-1, 4)
        boxes = move_boxes(boxes, torch.linalg.inv(view.slice.affine)).numpy()
        scores = np.array([box["score"] for box in found], dtype=np.float32)
        marked = labels is not None and labels.any()
        nearest = Image.Resampling.NEAREST
        pictures = {"labels": _picture(labels, FINENESS[self.fineness][0], nearest, format="png") if marked else None}
        if view.rebuilt is not None:
            rebuilt = (view.rebuilt.clip(0, 1) * 255).round().astype(np.uint8)
            pictures["rebuilt"] = _picture(rebuilt, REBUILT[0], format="jpeg", quality=REBUILT[1])
        left = self.share - sum(len(picture or "") for picture in pictures.values())
        self.pictures.append(json.dumps({"image": self._compressed(codes, left), **pictures}))
        drawn = [{"box": [round(float(v), 1) for v in box], "score": float(score)} for box, score in zip(boxes, scores)]
        network = list(map(float, ends)) if hounsfield else [0.0, 100.0]
        self.slices.append({"index": row["index"], "codes": pairs, "network": network, "boxes": drawn})
        name = f"slice {row['index']}" if len(self.scan) > 1 else Path(self.scan.name).name
        caption = "   ·   ".join([name, *(text for task in self.tasks for text in task.caption(row))])
        overlay = draw_overlay(view.shown, self.scan.spacing, labels, boxes, scores, row.get("probabilities"), caption)
        buffer = io.BytesIO()
        overlay.save(buffer, "jpeg", quality=85, subsampling=0)  # thin coloured lines stay sharp
        self.overlays.append(buffer.getvalue())

    def _compressed(self, codes: np.ndarray, allowed: float) -> str:
        """The finest picture that is allowed; no later one is finer, so that neighbours look alike."""
        while True:
            longest, quality = FINENESS[self.fineness]
            picture = _picture(codes, longest, format="jpeg", quality=quality)
            if len(picture) <= allowed or self.fineness == len(FINENESS) - 1:
                return picture
            self.fineness += 1

    def write(self, folder: Path, prediction: Mapping) -> None:
        """Write overlays/NNNN.jpg and report.html, with a card for each task, of a predictions.json."""
        import jinja2  # beside the network

        (folder / "overlays").mkdir()
        for index, picture in enumerate(self.overlays):
            (folder / f"overlays/{index:04d}.jpg").write_bytes(picture)
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        cards = []
        for task in self.tasks:
            entry, title = prediction[task.name], task.name.replace("_", " ").capitalize()
            bars, lesions, facts = task.probabilities(entry), task.lesions(entry), task.report(entry)
            cards.append({"title": title, "bars": bars, "lesions": lesions, "facts": facts})
        viewer = self._viewer(prediction, cards)
        # A picture is base64: its JSON needs no escaping.
        looks = {"box": BOX, "strong": STRONG, "unusual_from": UNUSUAL_SHARE, "first": _where_to_look(viewer["slices"])}
        stream = template.stream(p=prediction, cards=cards, viewer=viewer, pictures=self.pictures, **looks)
        with open(folder / "report.html", "w", encoding="utf-8", errors="backslashreplace") as file:
            stream.dump(file)

    def _viewer(self, prediction: Mapping, cards: Sequence[Mapping]) -> dict:
        """What the script of the page needs to know, beside the pictures."""
        lesions = [lesion for card in cards for lesion in card["lesions"]]
        lesion_of = {(box["slice"], *box["box"]): lesion["id"] for lesion in lesions for box in lesion["boxes"]}
        keys = ("position_mm", "probabilities", "lesion_pixels", "lesion_mm2", "reconstruction_error", "novelty")
        slices, rows = [], prediction["slices"]
        for added, row in zip(self.slices, rows, strict=True):
            numbers = [lesion_of.get((row["index"], *stored["box"])) for stored in row.get("boxes", [])]
            boxes = [{**box, "lesion": number} for box, number in zip(added["boxes"], numbers, strict=True)]
            slices.append({**added, "boxes": boxes, **{key: row.get(key) for key in keys}})
        hounsfield, bars = self.scan.hounsfield, next((card["bars"] for card in cards if card["bars"]), {})
        predicted = max(bars, key=bars.get, default=None)
        return {
            "rows": self.shape[0],
            "columns": self.shape[1],
            "spacing": self.scan.spacing,
            "unit": "HU" if hounsfield else "%",
            "windows": [{"name": n, "width": w, "level": c} for n, w, c in (WINDOWS if hounsfield else CONTRASTS)],
            "colors": dict(zip(rows[0].get("lesion_pixels", {}), itertools.cycle(LESIONS))),
            "boxColor": BOX,
            "boxes": "boxes" in rows[0],
            "rebuilt": '"rebuilt"' in self.pictures[0],
            "predicted": predicted if predicted in (rows[0].get("probabilities") or ()) else None,
            "threshold": (prediction.get("novelty") or {}).get("threshold"),
            "lung": (prediction.get("lung") or {}).get("slices"),
            "slices": slices,
        }


def _where_to_look(slices: Sequence[Mapping]) -> list[tuple[int, str]]:
    """Positions of the slices to look at first, the most important one first, and why; without a finding, the middle one."""
    area = [sum((row["lesion_mm2"] or row["lesion_pixels"] or {}).values()) for row in slices]
    best = [max(row["boxes"], key=lambda box: box["score"], default=None) for row in slices]
    score = [box["score"] if box else 0.0 for box in best]
    places, (largest, surest) = [], map(int, (np.argmax(area), np.argmax(score)))
    if area[largest]:
        size = f"{area[largest] / 100:.1f} cm²" if slices[largest]["lesion_mm2"] else f"{area[largest]} pixels"
        places.append((largest, f"largest lesion area, {size}"))
    if best[surest]:
        lesion = best[surest]["lesion"]
        places.append((surest, f"highest score, {'' if lesion is None else f'lesion {lesion}, '}{score[surest]:.2f}"))
    return places or [(len(slices) // 2, "no lesion found; the middle of the scan")]


def _stretched(pixels: np.ndarray, intensity_range: tuple[float, float]) -> tuple[np.ndarray, list[tuple[int, float]]]:
    """Codes from the lowest to the highest value, and those two in % of the range that the network sees."""
    low, high = float(pixels.min()), float(pixels.max())
    codes = ((pixels - low) / max(high - low, 1e-6) * 255).round().astype(np.uint8)
    zero, one = intensity_range
    ends = [(value - zero) / max(one - zero, 1e-6) * 100 for value in (low, max(high, low + 1e-6))]
    return codes, [(0, round(ends[0], 3)), (255, round(ends[1], 3))]


def _picture(codes: np.ndarray, longest: int, resample=Image.Resampling.BILINEAR, **options) -> str:
    """uint8 (rows, columns) as the URL of a grey picture whose longer side is at most `longest` pixels."""
    image, buffer = Image.fromarray(np.ascontiguousarray(codes)), io.BytesIO()
    if (scale := longest / max(image.size)) < 1:
        image = image.resize([max(round(side * scale), 1) for side in image.size], resample)
    image.save(buffer, **options)
    return f"data:image/{options['format']};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
