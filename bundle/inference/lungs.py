"""The lung of an axial slice in Hounsfield units, by threshold and components; nothing is learnt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

# HU. Lung and air lie below the first. A part of which the median lies below the second is air (-1000; lung has -900 to
# -500, in severe emphysema -950). At the border of the picture the third holds, since a table's foam has -940.
TISSUE, AIR, AIR_AT_BORDER = -400, -950, -900
WALL = 2  # mm, radius: what is thinner than twice this (bronchi, vessels, the shell of a table) separates nothing
# mm2: the smallest part of a lung, the largest hole that is filled, and what makes a slice count as lung-bearing.
SMALLEST_PART, LARGEST_HOLE, BEARING_AREA = 200, 1000, 2000


def lung_mask(hu: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Find the lung in an axial slice.

    Pixels below -400 HU, closed by 2 mm, are split into components. A component whose pixels below -400 HU have a median
    below -950 HU is air, around the body, in the trachea or the bowel, and goes, as does one of less than 2 cm2. Touching
    the border alone says nothing, since a cropped volume has lung there, but such a component needs a median of -900 HU,
    which the foam of a table below a cropped body has not. The shell of a table is thin enough to be closed, so that foam
    else goes with the air around it. Holes up to 10 cm2 (vessels, nodules) are filled. Padding (-2000, -3024) counts as
    air. What is wrongly counted as lung: a trachea behind a thin wall, and bowel gas mixed with faeces.

    Args:
        hu: (rows, columns), in HU.
        spacing: of rows and columns, in mm.

    Returns:
        bool (rows, columns).
    """
    image = sitk.GetImageFromArray(np.clip(hu, -1024, 0).astype(np.int16))
    image.SetSpacing([float(spacing[1]), float(spacing[0])])
    light = image < TISSUE
    closed = sitk.BinaryMorphologicalClosing(light, [max(1, round(WALL / side)) for side in image.GetSpacing()])
    parts = sitk.ConnectedComponent(closed)
    found = sitk.LabelIntensityStatisticsImageFilter()
    found.SetNumberOfBins(1024)  # of the histogram that the median is read from: about 1 HU
    found.Execute(sitk.Mask(parts, light), image)
    air = [k for k in found.GetLabels() if found.GetPhysicalSize(k) < SMALLEST_PART or found.GetMedian(k) < _air(found, k)]
    lung = sitk.ChangeLabel(parts, dict.fromkeys(air, 0)) > 0
    holes = sitk.BinaryFillhole(lung) - lung
    return sitk.GetArrayFromImage(lung + holes - sitk.AreaOpening(holes, LARGEST_HOLE)).astype(bool)


def _air(found: sitk.LabelIntensityStatisticsImageFilter, label: int) -> float:
    return AIR_AT_BORDER if found.GetNumberOfPixelsOnBorder(label) else AIR


def lung_bearing(areas: Sequence[float]) -> list[bool]:
    """Tell for each slice whether it shows enough lung to speak of: 20 cm2.

    Args:
        areas: of the lung in each slice, in mm2.
    """
    return [area >= BEARING_AREA for area in areas]
