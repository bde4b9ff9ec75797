import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from bundle.data.volumes import open_slice
from bundle.data.transforms import LoadSlice

ROWS, COLUMNS = 40, 60


def nifti(path, axes=(0, 1, 2), flips=(-1, -1, 1), shape=(COLUMNS, ROWS, 1)):
    """A slice whose array axis k runs along the patient's axis axes[k], in RAS."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for array_axis, world in enumerate(axes):
        affine[world, array_axis] = flips[world] * (0.7, 0.9, 5)[world]
    nibabel.save(nibabel.Nifti1Image(np.zeros([shape[world] for world in axes], np.int16), affine), path)


def itk(path, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1), size=(COLUMNS, ROWS, 1)):
    image = sitk.Image(size, sitk.sitkInt16)
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path))


FLAT = nibabel.Nifti1Image(np.zeros((COLUMNS, ROWS), np.int16), np.eye(4))


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.png", lambda path: Image.new("L", (COLUMNS, ROWS)).save(path)),
        ("rgb.jpg", lambda path: Image.new("RGB", (COLUMNS, ROWS)).save(path)),
        ("sixteen.tif", lambda path: Image.new("I;16", (COLUMNS, ROWS)).save(path)),
        ("lps.nii.gz", nifti),
        ("ras.nii", lambda path: nifti(path, flips=(1, 1, 1))),
        ("rows_first.nii.gz", lambda path: nifti(path, axes=(1, 0, 2))),
        ("slice_first.nii.gz", lambda path: nifti(path, axes=(2, 0, 1), flips=(1, -1, -1))),
        ("flat.nii.gz", lambda path: nibabel.save(FLAT, path)),
        ("a.mhd", itk),
        ("reversed.mha", lambda path: itk(path, (-1, 0, 0, 0, -1, 0, 0, 0, 1))),
        ("rows_first.mha", lambda path: itk(path, (0, 1, 0, 1, 0, 0, 0, 0, -1), (ROWS, COLUMNS, 1))),
        ("a.nrrd", itk),
        ("a.dcm", itk),
    ],
)
def test_size_is_that_of_the_slice_as_it_is_read(tmp_path, name, write):
    write(tmp_path / name)
    size, loaded = open_slice(tmp_path / name), LoadSlice()(tmp_path / name)
    assert size.size == (COLUMNS, ROWS) and loaded.shape == (1, ROWS, COLUMNS)
    # The slice's affine leads to the grid of the file: its last pixel to the file's.
    corners = loaded.affine.numpy() @ np.array([[0, 0, 1], [ROWS - 1, COLUMNS - 1, 1]]).T
    assert size.stored_size == tuple(corners.max(1)[1::-1] + 1) == ((ROWS, COLUMNS) if "rows_first" in name else (COLUMNS, ROWS))


@pytest.mark.parametrize("name, write", [("v.nii.gz", nifti), ("v.mha", itk)])
def test_more_than_one_slice_is_refused(tmp_path, name, write):
    write(tmp_path / name, **{"shape" if write is nifti else "size": (COLUMNS, ROWS, 3)})
    with pytest.raises(ValueError, match=f"{name}: found 3 slices, expected a single one$"):
        open_slice(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.nii.gz", "a.nii", "a.dcm", "a.mhd"])
@pytest.mark.parametrize("content", [b"", b"this is no image"])
def test_what_is_no_image_is_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^.*{name}: (cannot be read \\(.+\\)|found no DICOM header), expected") as error:
        open_slice(tmp_path / name)
    assert "\n" not in str(error.value)


def test_real_dicom(real_data):
    path = next(iter(sorted((real_data / "lung_pet_ct_dx").glob("*/*.dcm"))))
    assert open_slice(path).size == open_slice(path).stored_size == (512, 512)
