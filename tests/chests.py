"""Chests in a few strokes, in HU."""

import numpy as np

AFFINE = np.array([[-5.0, 0, 0, 160], [0, -6, 0, 150], [0, 0, 6, -30], [0, 0, 0, 1]])  # of `labelled_chest`, to RAS


def chest(slices, spot=False, size=64):
    """A body with two lungs (slices, size, size), perhaps with a bright spot in one of them on two slices; even HU."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    hu = np.where((x / 0.45) ** 2 + (y / 0.38) ** 2 < 1, 40, -1000)
    for side in (-0.18, 0.18):
        hu[((x - side) / 0.13) ** 2 + (y / 0.25) ** 2 < 1] = -800
    volume = np.repeat(hu[None], slices, 0).astype(np.int16)
    if spot:
        volume[1:3, 28:34, 16:22] = 60
    return volume


def labelled_chest(shape=(64, 56, 6), noise=20.0):
    """A noisy body with lungs and a lesion in one of them (x, y, z) on LPS axes, and its mask."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    hu = np.where((x / 0.95) ** 2 + (y / 0.9) ** 2 < 1, 40.0, -1000.0)
    hu[((np.abs(x) - 0.4) / 0.28) ** 2 + (y / 0.5) ** 2 < 1] = -800
    lesion = ((x - 0.4) / 0.2) ** 2 + ((y - 0.1) / 0.25) ** 2 + (z / 0.7) ** 2 < 1
    hu[lesion] = 0
    return (hu + np.random.default_rng(0).normal(0, noise, shape)).astype(np.int16), lesion.astype(np.uint8)
