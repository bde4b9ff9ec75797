"""Volumes that grow plane by plane read back as if they had been written at once."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from bundle.inference.nifti import Volume

AFFINE = np.array([[0.0, -2.0, 0.3, 5], [1.5, 0.0, 0.0, -7], [0.0, 0.2, 3.0, 11], [0, 0, 0, 1]])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "slope"), [(np.uint8, 1 / 255), (np.int16, 1.0)])
def test_planes_along_any_axis_make_the_volume(tmp_path, axis, dtype, slope):
    voxels = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(dtype)
    volume = Volume(voxels.shape, AFFINE, axis, dtype, slope)
    for index in range(voxels.shape[axis]):
        volume.append(voxels.take(index, axis))
    np.testing.assert_array_equal(volume.voxels(), voxels)
    volume.write(tmp_path / "x.nii.gz")
    image = nib.load(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(image.dataobj.get_unscaled(), voxels)
    np.testing.assert_allclose(image.get_fdata(), voxels * slope, rtol=1e-6)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    assert image.get_data_dtype() == dtype and image.header.get_xyzt_units()[0] == "mm"
    if slope == 1.0:  # a reader that is not nibabel
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "x.nii.gz"))).T, voxels)


def test_without_geometry_the_header_claims_none(tmp_path):
    volume = Volume((4, 3, 2), None)
    for value in (0, 1):
        volume.append(np.full((4, 3), value))
    volume.write(tmp_path / "x.nii.gz")
    image = nib.load(tmp_path / "x.nii.gz")
    assert (image.header["sform_code"], image.header["qform_code"]) == (0, 0)
    assert image.get_fdata().sum() == 12 and image.header.get_xyzt_units()[0] == "unknown"


def test_memory_is_that_of_the_file():
    volume = Volume((512, 512, 100), AFFINE)
    for _ in range(100):
        volume.append(np.zeros((512, 512)))
    assert sum(map(len, volume._parts)) < 512 * 512 * 100 / 100
