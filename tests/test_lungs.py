import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

from bundle.lungs import _close, _spread, body_region, lung_bearing, lung_mask, lung_region, lung_surroundings

SPACING = (2.0, 1.0)  # rows 2 mm apart, columns 1 mm
ROWS, COLUMNS = np.mgrid[:160, :320] * np.reshape(SPACING, (2, 1, 1)) - 160.0


def disk(row, column, height, width):
    """Ellipse around a point, all in mm from the centre."""
    return ((ROWS - row) / height) ** 2 + ((COLUMNS - column) / width) ** 2 <= 1


LEFT, RIGHT = disk(0, -60, 60, 40), disk(0, 60, 60, 40)
LUNGS = LEFT | RIGHT


def chest(lung=-850, air=-1000, noise=15, seed=0):
    """Body with two lungs, a trachea between them, and a table of foam in a thin shell below."""
    hu = np.full(ROWS.shape, float(air))
    hu[disk(0, 0, 90, 130)] = 40
    hu[LUNGS] = lung
    hu[disk(-20, 0, 8, 8)] = -1000
    table = (ROWS > 110) & (ROWS < 140) & (abs(COLUMNS) < 140)
    hu[table] = -200
    hu[table & (ROWS > 113) & (ROWS < 137) & (abs(COLUMNS) < 137)] = -940
    return hu + np.random.default_rng(seed).normal(0, noise, hu.shape)


def overlap(mask, truth):
    return (mask & truth).sum() / (mask | truth).sum()


@pytest.mark.parametrize("lung", [-880, -700, -500, -930], ids=["healthy", "dense", "hazy", "emphysema"])
@pytest.mark.parametrize("air", [-1000, -1024, -2000, -3024], ids=["air", "clipped", "padding", "more padding"])
def test_lungs_are_found_and_nothing_else(lung, air):
    mask = lung_mask(chest(lung, air), SPACING)
    assert mask.shape == ROWS.shape and mask.dtype == bool
    assert overlap(mask, LUNGS) > 0.97
    assert not mask[disk(-20, 0, 6, 6)].any() and not mask[ROWS > 100].any()


def test_spacing_is_that_of_rows_and_columns():
    hu = chest()
    assert np.array_equal(lung_mask(hu.T, SPACING[::-1]), lung_mask(hu, SPACING).T)


def test_lungs_at_the_border_of_a_cropped_volume_are_found():
    inside = (slice(50, 110), slice(60, 260))
    mask = lung_mask(chest()[inside], SPACING)
    assert overlap(mask, LUNGS[inside]) > 0.97


def test_foam_below_a_cropped_body_is_no_lung():
    hu = np.full((100, 200), 40.0)
    hu[70:] = np.random.default_rng(0).normal(-940, 25, (30, 200))
    assert not lung_mask(hu, SPACING).any()


def test_vessels_and_nodules_are_filled_and_a_heart_within_one_component_is_not():
    hu = chest()
    hu[disk(0, -60, 10, 10)] = 50
    hu[disk(30, 60, 3, 3)] = 50
    assert overlap(lung_mask(hu, SPACING), LUNGS) > 0.97
    ring = np.full(ROWS.shape, 40.0)
    ring[disk(0, 0, 70, 110)] = -850
    heart = disk(0, 0, 40, 40)
    ring[heart] = 40
    assert not lung_mask(ring, SPACING)[heart & disk(0, 0, 36, 36)].any()


@pytest.mark.parametrize(
    "hu",
    [*(np.full((64, 64), value) for value in (40.0, -1000.0, -3024.0)), np.linspace(0, 255, 4096).reshape(64, 64)],
    ids=["tissue", "air", "padding", "a picture's values"],
)
def test_no_lung_where_there_is_none(hu):
    assert not lung_mask(hu, (1, 1)).any()


def test_gas_in_the_bowel_is_no_lung():
    hu = np.full(ROWS.shape, -1000.0)
    hu[disk(0, 0, 90, 130)] = 40
    hu[disk(-30, 20, 20, 30)] = -1000
    assert not lung_mask(hu + np.random.default_rng(0).normal(0, 15, hu.shape), SPACING).any()


def test_a_large_slice_is_looked_at_reduced():
    hu, sides = chest(), [side / 3 for side in SPACING]
    large = np.pad(hu.repeat(3, 0).repeat(3, 1), ((0, 1), (0, 2)), mode="edge")
    found = lung_mask(large, sides, longest=320)
    assert found.shape == large.shape
    assert np.array_equal(found[:480:3, :960:3], lung_mask(hu, SPACING)) and overlap(found, lung_mask(large, sides)) > 0.95


@pytest.mark.parametrize("radii", [(1, 1), (2, 2), (3, 1), (8, 8), (2, 5)])
@pytest.mark.parametrize("density", [0.02, 0.5, 0.9, 0.97])
def test_masks_are_opened_and_closed_by_an_ellipse(density, radii):
    mask = np.random.default_rng(0).random((40, 50)) < density
    rows, columns = radii
    y, x = np.mgrid[-rows : rows + 1, -columns : columns + 1]
    ellipse = (y / (rows + 0.5)) ** 2 + (x / (columns + 0.5)) ** 2 < 1
    opened = _spread(_spread(mask, radii, np.logical_and), radii, np.logical_or)
    assert np.array_equal(opened, ndimage.binary_opening(mask, ellipse))
    closed = ndimage.binary_closing(np.pad(mask, 20), ellipse)[20:-20, 20:-20]
    assert np.array_equal(_close(mask, radii), closed)


def test_a_slice_bears_lung_from_20_cm2():
    assert lung_bearing([0, 1999, 2000, 30000]) == [False, False, True, True]


def test_a_speck_that_closing_makes_between_dark_pixels_is_no_lung():
    hu = np.full((24, 24), 40.0)
    hu[[15, 12, 10, 8], [13, 10, 8, 8]] = -800
    assert not lung_mask(hu, (1, 1)).any()


def test_lungs_are_found_in_a_picture_and_in_one_cropped_to_them(chest_slice):
    image, lungs = chest_slice
    assert overlap(lung_region(image), lungs) > 0.95
    assert lung_region(image)[60, 50], "a vessel belongs to the lung"
    assert overlap(lung_region(0.1 + 0.5 * image), lungs) > 0.95, "whatever the grey scale"
    cropped, part = image[30:90, 35:125], lungs[30:90, 35:125]
    assert part[:, 0].any() and part[:, -1].any()
    assert overlap(lung_region(cropped), part) > 0.9
    padded = np.pad(cropped, ((20, 20), (0, 0)))
    assert overlap(lung_region(padded)[20:-20], part) > 0.9 and not lung_region(padded)[:20].any()
    assert not lung_region(np.zeros((64, 64))).any()


def test_the_body_is_found_without_its_table(chest_slice):
    image, lungs = chest_slice
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    body = ((x - 80) / 70) ** 2 + ((y - 60) / 50) ** 2 < 1
    found = body_region(torch.tensor(image[None]))
    assert found.shape == (1, *image.shape) and found.dtype == torch.bool
    assert overlap(found[0].numpy(), body) > 0.97 and found[0].numpy()[lungs].all()
    assert body_region(torch.zeros(1, 32, 32)).all(), "all of a slice in which nothing stands out"


def framed(image):
    """(top, bottom, left, right) of the rectangle that `lung_surroundings` finds."""
    found = lung_surroundings(torch.tensor(image[None], dtype=torch.float32))
    assert found.shape == (1, *image.shape) and found.dtype == torch.bool
    rows, columns = np.nonzero(found[0].numpy())
    frame = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    assert found.sum() == (frame[1] - frame[0]) * (frame[3] - frame[2])
    return np.array(frame)


def test_a_square_around_the_lungs_is_found(chest_slice):
    image, lungs = chest_slice
    top, bottom, left, right = framed(image)
    y, x = np.nonzero(lungs)
    assert top <= y.min() and bottom > y.max() and left < x.min() and right > x.max()
    assert right - left == pytest.approx(1.12 * np.ptp(x), abs=4) and bottom - top <= right - left
    y, x = np.nonzero(image[:115] > 0.05)
    whole = [y.min(), y.max() + 1, x.min(), x.max() + 1]
    large = np.kron(image, np.ones((4, 4)))
    np.testing.assert_allclose(framed(large), 4 * framed(image), atol=12, err_msg="whatever the resolution")
    opaque = image.copy()
    opaque[lungs & (np.arange(image.shape[1]) < 80)] = image.max()
    np.testing.assert_allclose(framed(opaque), framed(image), atol=3, err_msg="one lung stands for the other")
    opaque[lungs] = image.max()
    np.testing.assert_allclose(framed(opaque), whole, atol=3, err_msg="the body where no lung is seen")


def test_lungs_of_a_real_scan(real_data):
    image = nibabel.load(real_data / "volumes/lungdx_A0001_64sl_256.nii.gz")  # voxel axes to left, posterior and superior
    hu, sides = image.get_fdata(), image.header.get_zooms()
    areas = np.array([lung_mask(plane.T, sides[1::-1]).sum() for plane in np.moveaxis(hu, 2, 0)]) * sides[0] * sides[1]
    bearing = np.flatnonzero(lung_bearing(areas))
    assert np.array_equal(bearing, np.arange(bearing[0], bearing[-1] + 1))  # one stretch of slices
    # Read off pictures of the masks: from the apex to where the sinuses end, the largest areas just above the diaphragm.
    assert 44 <= len(bearing) <= 52 and 30_000 < areas.max() < 36_000
    assert 5000 < areas.sum() * sides[2] / 1000 < 6000  # mL
