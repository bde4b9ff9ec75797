"""A picture of one slice with the answers of the network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

DARK, LIGHT, FAINT, STRONG, QUIET = "#15181c", "#e8eaed", "#3a4048", "#ffd166", "#9aa0a6"
LESIONS = ("#ff8c42", "#e63977", "#b388ff", "#7bd389")  # segmentation classes, in turn
BOX = "#4cc9f0"
SIDES = (512, 768)  # least and greatest length of the picture's longer side
LINE, MARGIN = 24, 16


def draw_overlay(pixels, spacing, labels, boxes, scores, probabilities: Mapping | None, caption: str) -> Image.Image:
    """Draw a slice, turned as by `Scan.read`, with lesions, boxes with scores and bars of class probabilities.

    `pixels` (rows, columns) are in [0, 1], `spacing` is (row, column) in mm or None, `labels` holds 0 or 1 + segmentation class,
    `boxes` (N, 4) are x1 y1 x2 y2, edges in pixels of the slice, x = column; a `caption` that is too long is shortened.
    """
    grey = (np.asarray(pixels, np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    rows, columns = grey.shape
    extent = np.array([columns, rows]) * (spacing or (1.0, 1.0))[::-1]
    size = width, height = tuple(map(int, (extent * np.clip(max(grey.shape), *SIDES) / extent.max()).round().clip(1)))
    image = Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    if labels is not None:
        _draw_lesions(image, np.asarray(labels))
    _draw_boxes(image, np.asarray(boxes).reshape(-1, 4) * np.tile([width / columns, height / rows], 2), scores)
    sheet = Image.new("RGB", (max(width, SIDES[0]), height + LINE * len(probabilities or ()) + LINE + MARGIN), DARK)
    sheet.paste(image, ((sheet.width - width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    if probabilities:
        _draw_classes(draw, probabilities, height + MARGIN // 2, sheet.width)
    text = _fit(caption, _font(13), sheet.width - 2 * MARGIN)
    draw.text((sheet.width / 2, sheet.height - LINE / 2 - 3), text, LIGHT, _font(13), anchor="mm")
    return sheet


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' * bold}.ttf", size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """One line of at most `width` pixels, with an ellipsis in its middle if it was longer."""
    shown = text = " ".join(str(text).split())
    kept = len(text)
    while kept > 1 and font.getlength(shown) > width:
        kept -= 1
        shown = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
    return shown


def _draw_lesions(image: Image.Image, labels: np.ndarray) -> None:
    """Tint the lesions and draw their outlines, two pixels wide and smooth."""
    for label in np.unique(labels[labels > 0]).tolist():
        mask = Image.fromarray(np.where(labels == label, 255, 0).astype(np.uint8))
        mask = mask.resize(image.size, Image.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(1))
        # Across an edge blurred by one pixel the value rises by 0.4 per pixel: the line lies where it is near 0.5.
        soft = np.asarray(mask, np.float32) / 255
        alpha = np.maximum(0.22 * (soft > 0.5), (2 - 5 * np.abs(soft - 0.5)).clip(0, 1))
        image.paste(LESIONS[(label - 1) % len(LESIONS)], (0, 0), Image.fromarray((alpha * 255).astype(np.uint8)))


def _draw_boxes(image: Image.Image, boxes: np.ndarray, scores) -> None:
    """Draw boxes in pixels of the picture; each score is placed where it covers least of other boxes and scores."""
    draw, font, taken = ImageDraw.Draw(image), _font(13), []
    shown = sorted(zip(boxes.tolist(), map(float, scores)), key=lambda pair: pair[1])
    for (x1, y1, x2, y2), _ in shown:
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=DARK, width=4)
        inset = 1 if min(x2 - x1, y2 - y1) > 8 else 0  # the dark seam shows on both sides of the line
        corners = (x1 + inset, y1 + inset, max(x2 - 1 - inset, x1), max(y2 - 1 - inset, y1))
        draw.rectangle(corners, outline=BOX, width=2)
    for box, score in reversed(shown):
        text = f"{score:.2f}"
        place = _place_label(box, (font.getlength(text) + 8, 18), image.size, [other for other, _ in shown], taken)
        taken.append(place)
        draw.rounded_rectangle(place, 3, fill=BOX)
        draw.text(((place[0] + place[2]) / 2, (place[1] + place[3]) / 2), text, DARK, font, anchor="mm")


def _place_label(box, size, within, boxes, labels) -> tuple[float, float, float, float]:
    """The place, of eight around and inside the corners of a box, that covers least."""
    (x1, y1, x2, y2), (width, height) = box, size
    corners = [(x, y) for y in (y1 - height - 2, y2 + 2) for x in (x1, x2 - width)]
    corners += [(x, y) for y in (y1 + 3, y2 - height - 3) for x in (x1 + 3, x2 - width - 3)]
    corners = [(min(max(x, 0), within[0] - width), min(max(y, 0), within[1] - height)) for x, y in corners]

    def cost(place) -> float:  # a covered score cannot be read; a covered box is only partly hidden
        return sum(_overlap(place, other) for other in boxes) + 10 * sum(_overlap(place, other) for other in labels)

    return min(((x, y, x + width, y + height) for x, y in corners), key=cost)


def _overlap(a, b) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _draw_classes(draw: ImageDraw.ImageDraw, probabilities: Mapping, top: float, width: int) -> None:
    """Draw a bar for every class, the likeliest in another colour."""
    predicted = max(probabilities, key=probabilities.get)
    fonts = {name: _font(14, name == predicted) for name in probabilities}
    names = {name: _fit(name, font, 0.4 * width) for name, font in fonts.items()}
    left = 2 * MARGIN + max(font.getlength(names[name]) for name, font in fonts.items())
    right = width - MARGIN - _font(14, True).getlength("100 %") - 8
    for line, (name, value) in enumerate(probabilities.items()):
        y, end = top + LINE * (line + 0.5), left + value * (right - left)
        text, bar = (LIGHT, STRONG) if name == predicted else (QUIET, "#7a828c")
        draw.text((left - MARGIN, y), names[name], text, fonts[name], anchor="rm")
        draw.rounded_rectangle((left, y - 6, right, y + 6), 3, fill=FAINT)
        if end - left >= 1:
            draw.rounded_rectangle((left, y - 6, end, y + 6), min(3, (end - left) / 2), fill=bar)
        draw.text((width - MARGIN, y), f"{100 * value:.0f} %", text, fonts[name], anchor="rm")
