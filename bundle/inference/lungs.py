"""The lung of an axial slice in Hounsfield units, by threshold and components; nothing is learnt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

# HU: lung and air lie below the first; of a part that is air, the median lies below the second. Air is -1000, lung -900 to
# -500, of severe emphysema down to -950.
TISSUE, AIR = -400, -950
WALL = 2  # mm, radius: what is thinner than twice this (bronchi, vessels, the shell of a table) separates nothing
# mm2: the smallest part of a lung, the largest hole that is filled, and what makes a slice count as lung-bearing.
SMALLEST_PART, LARGEST_HOLE, BEARING_AREA = 200, 1000, 2000


def lung_mask(hu: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Find the lung in an axial slice.

    Pixels below -400 HU, closed by 2 mm, are split into components. A component whose pixels below -400 HU have a median
    below -950 HU is air, around the body, in the trachea or the bowel, and goes, as does one of less than 2 cm2. Touching
    the border says nothing: a cropped volume has lung there. The shell of a table is thin enough to be closed, so that its
    foam goes with the air around it. Holes up to 10 cm2 (vessels, nodules) are filled. Padding (-2000, -3024) counts as
    air. A trachea or bronchus with lung right behind its thin wall is counted as lung.

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
    air = [k for k in found.GetLabels() if found.GetMedian(k) < AIR or found.GetPhysicalSize(k) < SMALLEST_PART]
    lung = sitk.ChangeLabel(parts, dict.fromkeys(air, 0)) > 0
    holes = sitk.BinaryFillhole(lung) - lung
    return sitk.GetArrayFromImage(lung + holes - sitk.AreaOpening(holes, LARGEST_HOLE)).astype(bool)


def lung_bearing(areas: Sequence[float]) -> list[bool]:
    """Tell for each slice whether it shows enough lung to speak of: 20 cm2.

    Args:
        areas: of the lung in each slice, in mm2.
    """
    return [area >= BEARING_AREA for area in areas]
