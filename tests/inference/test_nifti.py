"""Volumes that are written plane by plane read back as if they had been written at once."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from bundle.inference.nifti import NiftiFile

AFFINE = np.array([[0.0, -2.0, 0.3, 5], [1.5, 0.0, 0.0, -7], [0.0, 0.2, 3.0, 11], [0, 0, 0, 1]])


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("dtype", "slope"), [(np.uint8, 1 / 255), (np.int16, 1.0)])
def test_planes_along_any_axis_make_the_volume(tmp_path, axis, dtype, slope):
    voxels = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(dtype)
    file = NiftiFile(tmp_path / "x.nii.gz", voxels.shape, AFFINE, dtype, slope)
    for index in reversed(range(voxels.shape[axis])):
        file.put(voxels.take(index, axis), axis, index)
    np.testing.assert_array_equal(file.voxels(), voxels)
    file.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["x.nii.gz"]
    image = nib.load(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(image.dataobj.get_unscaled(), voxels)
    np.testing.assert_allclose(image.get_fdata(), voxels * slope, rtol=1e-6)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    assert image.get_data_dtype() == dtype and image.header.get_xyzt_units()[0] == "mm"
    if slope == 1.0:  # a reader that is not nibabel
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "x.nii.gz"))).T, voxels)


def test_without_geometry_the_header_claims_none(tmp_path):
    file = NiftiFile(tmp_path / "x.nii.gz", (4, 3, 2), None)
    file.put(np.ones((4, 3), np.uint8), 2, 1)
    file.finish()
    image = nib.load(tmp_path / "x.nii.gz")
    assert (image.header["sform_code"], image.header["qform_code"]) == (0, 0)
    assert image.get_fdata().sum() == 12 and image.header.get_xyzt_units()[0] == "unknown"
