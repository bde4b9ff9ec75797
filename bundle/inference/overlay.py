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


def draw_overlay(path, pixels, spacing, labels, boxes, scores, probabilities: Mapping | None, caption: str) -> None:
    """Write a PNG of a slice in radiological orientation with lesions, boxes with scores and class probabilities.

    The rows of all arrays run to posterior, the columns to the patient's left, as in `bundle.data.volumes.Scan.read`.

    Args:
        path: of the PNG.
        pixels: (rows, columns) in [0, 1].
        spacing: (row, column) in mm, for the proportion of the picture; None for square pixels.
        labels: (rows, columns), 0 or 1 + segmentation class; None without segmentation.
        boxes: (N, 4) x1 y1 x2 y2, edges in pixels of the slice, x = column.
        scores: (N,).
        probabilities: class to probability; None for no bars.
        caption: one line below, shortened if it is too long.
    """
    grey = np.asarray(pixels, dtype=np.float32)
    size = _shown_size(grey.shape, spacing)
    image = Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    image = image.convert("RGB")
    if labels is not None:
        _draw_lesions(image, np.asarray(labels))
    rows, columns = grey.shape
    _draw_boxes(image, np.asarray(boxes).reshape(-1, 4) * np.tile([size[0] / columns, size[1] / rows], 2), scores)
    bars = LINE * len(probabilities or ())
    sheet = Image.new("RGB", (max(size[0], SIDES[0]), size[1] + bars + LINE + MARGIN), DARK)
    sheet.paste(image, ((sheet.width - size[0]) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    if probabilities:
        _draw_classes(draw, probabilities, size[1] + MARGIN // 2, sheet.width)
    text = _fit(caption, _font(13), sheet.width - 2 * MARGIN)
    draw.text((sheet.width / 2, sheet.height - LINE / 2 - 3), text, LIGHT, _font(13), anchor="mm")
    sheet.save(path, format="PNG", compress_level=1)  # 5 times as fast as the default, a tenth larger


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' * bold}.ttf", size)


def _shown_size(shape: tuple[int, int], spacing) -> tuple[int, int]:
    """(width, height) of the picture of a slice: square pixels, the longer side within SIDES."""
    row_mm, column_mm = spacing or (1.0, 1.0)
    extent = np.array([shape[1] * column_mm, shape[0] * row_mm])
    scale = np.clip(max(shape), *SIDES) / extent.max()
    return tuple(int(side) for side in (extent * scale).round().clip(1))


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text in one line, with an ellipsis in its middle if it is longer than `width` pixels."""
    text = " ".join(str(text).split())
    if font.getlength(text) <= width:
        return text
    kept = len(text) - 1
    while kept > 1 and font.getlength(f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}") > width:
        kept -= 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def _draw_lesions(image: Image.Image, labels: np.ndarray) -> None:
    """Tint the lesions and draw their outlines, two pixels wide and smooth."""
    scale = np.divide(image.size[::-1], labels.shape)
    for label in np.unique(labels[labels > 0]).tolist():
        # Only the surroundings of the lesion are worked on: four pixels more on every side.
        rows, columns = np.nonzero(labels == label)
        edge = np.ceil(4 / scale).astype(int)
        top, left = np.maximum([rows.min(), columns.min()] - edge, 0)
        bottom, right = np.minimum([rows.max() + 1, columns.max() + 1] + edge, labels.shape)
        box = [round(v) for v in (left * scale[1], top * scale[0], right * scale[1], bottom * scale[0])]
        mask = Image.fromarray(np.where(labels[top:bottom, left:right] == label, 255, 0).astype(np.uint8))
        mask = mask.resize((max(box[2] - box[0], 1), max(box[3] - box[1], 1)), Image.Resampling.BILINEAR)
        soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(1)), dtype=np.float32) / 255
        # Across an edge blurred by one pixel the value rises by 0.4 per pixel: the line lies where it is near 0.5.
        alpha = np.maximum(0.22 * (soft > 0.5), (2 - 5 * np.abs(soft - 0.5)).clip(0, 1))
        color = LESIONS[(label - 1) % len(LESIONS)]
        image.paste(color, tuple(box[:2]), Image.fromarray((alpha * 255).astype(np.uint8)))


def _draw_boxes(image: Image.Image, boxes: np.ndarray, scores) -> None:
    """Draw boxes in pixels of the picture; each score is placed where it covers least of other boxes and scores."""
    draw, font = ImageDraw.Draw(image), _font(13)
    shown = sorted(zip(boxes.tolist(), map(float, scores)), key=lambda pair: pair[1])
    for (x1, y1, x2, y2), _ in shown:
        inset = 1 if min(x2 - x1, y2 - y1) > 8 else 0  # the dark seam shows on both sides of the line
        draw.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=DARK, width=4)
        corners = (x1 + inset, y1 + inset, max(x2 - 1 - inset, x1), max(y2 - 1 - inset, y1))
        draw.rectangle(corners, outline=BOX, width=2)
    taken = []
    for box, score in reversed(shown):
        text = f"{score:.2f}"
        place = _place_label(box, (font.getlength(text) + 8, 18), image.size, [b for b, _ in shown], taken)
        taken.append(place)
        draw.rounded_rectangle(place, 3, fill=BOX)
        draw.text(((place[0] + place[2]) / 2, (place[1] + place[3]) / 2), text, DARK, font, anchor="mm")


def _place_label(box, size, within, boxes, labels) -> tuple[float, float, float, float]:
    """The place, of eight around and inside the corners of a box, that covers least."""
    (x1, y1, x2, y2), (width, height) = box, size
    outside = [(x, y) for y in (y1 - height - 2, y2 + 2) for x in (x1, x2 - width)]
    inside = [(x, y) for y in (y1 + 3, y2 - height - 3) for x in (x1 + 3, x2 - width - 3)]
    best, least = None, np.inf
    for x, y in outside + inside:
        x, y = min(max(x, 0), within[0] - width), min(max(y, 0), within[1] - height)
        place = (x, y, x + width, y + height)
        # A covered score cannot be read; a covered box is only partly hidden.
        cost = sum(_overlap(place, b) for b in boxes) + 10 * sum(_overlap(place, other) for other in labels)
        if cost < least:
            best, least = place, cost
    return best


def _overlap(a, b) -> float:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def _draw_classes(draw: ImageDraw.ImageDraw, probabilities: Mapping, top: float, width: int) -> None:
    """Draw a bar for every class, the likeliest in another colour."""
    predicted = max(probabilities, key=probabilities.get)
    names = {name: _fit(name, _font(14, name == predicted), 0.4 * width) for name in probabilities}
    left = 2 * MARGIN + max(_font(14, name == predicted).getlength(text) for name, text in names.items())
    right = width - MARGIN - _font(14, True).getlength("100 %") - 8
    for line, (name, value) in enumerate(probabilities.items()):
        strong, y = name == predicted, top + LINE * (line + 0.5)
        font, color = _font(14, strong), LIGHT if strong else QUIET
        draw.text((left - MARGIN, y), names[name], color, font, anchor="rm")
        draw.rounded_rectangle((left, y - 6, right, y + 6), 3, fill=FAINT)
        if value * (right - left) >= 1:
            end = left + value * (right - left)
            draw.rounded_rectangle((left, y - 6, end, y + 6), min(3, (end - left) / 2), fill=STRONG if strong else "#7a828c")
        draw.text((width - MARGIN, y), f"{100 * value:.0f} %", color, font, anchor="rm")
