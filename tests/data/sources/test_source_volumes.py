import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from bundle.data.sources.volumes import read_annotated, with_as_many_free
from bundle.errors import UserError

COLUMNS, ROWS, SLICES = 60, 40, 6


def save_ras(path, lps, dtype=np.int16):
    """Write (slices, rows, columns) in LPS as a NIfTI whose first axis runs to the right and second to the front."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ras = np.asarray(lps, dtype).transpose(2, 1, 0)[::-1, ::-1]
    nibabel.save(nibabel.Nifti1Image(ras, np.diag([0.7, 0.9, 2.5, 1])), path)


@pytest.fixture
def chest():
    """HU and mask (slices, rows, columns): a lesion near the left back in slices 2 and 3, dust in slice 4."""
    hu, mask = np.full((SLICES, ROWS, COLUMNS), -800), np.zeros((SLICES, ROWS, COLUMNS), int)
    for index, value in ((2, 1), (3, 2)):
        hu[index, 30:36, 40:55], mask[index, 30:36, 40:55] = 40, value
    mask[3, 4:10, 3:9] = 3
    mask[4, 20, 20:23] = 1
    return hu, mask



@pytest.mark.parametrize(
    "positive, free, expected",
    [([5, 6], [0, 1, 2, 3, 4], [0, 4, 5, 6]), ([5], [], [5]), ([], [1, 2], []), ([2, 3, 4], [0, 1], [0, 1, 2, 3, 4])],
)
def test_as_many_free_slices(positive, free, expected):
    assert with_as_many_free(positive, free) == expected


def test_medseg_nifti(tmp_path, chest, samples):
    hu, mask = chest
    save_ras(tmp_path / "medseg/tr_im.nii.gz", hu)
    save_ras(tmp_path / "medseg/tr_mask.nii.gz", mask, np.uint8)
    infected = [float(sample["mask"].sum()) for sample in samples(tmp_path / "medseg")]
    assert sorted(infected) == [0, 0, 0, 3, 90, 90]  # without the effusion of slice 3
    found = sorted(samples(tmp_path / "medseg", segmentation_classes=2), key=lambda sample: sample["record"]["group"])
    assert len(found) == len({sample["record"]["group"] for sample in found}) == SLICES
    for index, sample in enumerate(found):
        assert sample["image"].meta["hounsfield"]
        np.testing.assert_array_equal(sample["image"][0], hu[index])
        np.testing.assert_array_equal(sample["mask"], np.stack([mask[index] == 1, mask[index] == 2]))
        assert sample["record"]["source"] == "medseg_covid19" and "boxes" not in sample


def test_medseg_nifti_of_two_shapes_or_without_hu_is_refused(tmp_path, chest, merged):
    save_ras(tmp_path / "medseg/tr_im.nii.gz", chest[0])
    with pytest.raises(UserError, match="medseg/tr_mask.nii.gz: no such file, expected a volume"):
        merged(f"medseg_nifti={tmp_path / 'medseg'}")
    save_ras(tmp_path / "medseg/tr_mask.nii.gz", chest[1][:, :, 1:])
    with pytest.raises(UserError, match=r"tr_mask.nii.gz: found shape \(6, 40, 59\), expected \(6, 40, 60\)"):
        merged(tmp_path / "medseg")
    save_ras(tmp_path / "medseg/tr_im.nii.gz", (chest[0] + 1000) / 2000, np.float32)
    with pytest.raises(UserError, match="tr_im.nii.gz: found values from 0.1 to 0.52, none of a lung, expected HU$"):
        merged(tmp_path / "medseg")


def test_a_mask_that_its_header_turns_must_lie_where_the_image_lies(tmp_path, chest):
    hu, mask = chest
    save_ras(tmp_path / "image.nii.gz", hu)
    lps = np.diag([-0.7, -0.9, 2.5, 1])
    lps[:2, 3] = 0.7 * (COLUMNS - 1), 0.9 * (ROWS - 1)
    stored = mask.transpose(2, 1, 0).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(stored, lps), tmp_path / "mask.nii.gz")
    volume, masks = read_annotated(tmp_path / "image.nii.gz", tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(volume.pixels, hu)
    np.testing.assert_array_equal(masks, mask)
    for value in (-1, -1024, 70000):
        nibabel.save(nibabel.Nifti1Image(stored.astype(np.int32) * value, lps), tmp_path / "mask.nii.gz")
        with pytest.raises(UserError, match="mask.nii.gz: found the value .*, expected labels from 0 to 65535"):
            read_annotated(tmp_path / "image.nii.gz", tmp_path / "mask.nii.gz")
    lps[0, 3] -= 2  # by more than a column, and less than the distance of the slices
    nibabel.save(nibabel.Nifti1Image(stored, lps), tmp_path / "mask.nii.gz")
    with pytest.raises(ValueError, match=r"mask.nii.gz: found a header that turns the mask otherwise than .*image.nii.gz and"):
        read_annotated(tmp_path / "image.nii.gz", tmp_path / "mask.nii.gz")


def test_msd_lung(tmp_path, chest, samples, caplog):
    hu, mask = chest
    for number in range(3):
        save_ras(tmp_path / f"Task06_Lung/imagesTr/lung_{number:03d}.nii.gz", hu)
        save_ras(tmp_path / f"Task06_Lung/labelsTr/lung_{number:03d}.nii.gz", mask > 0, np.uint8)
    (tmp_path / "Task06_Lung/labelsTr/._lung_000.nii.gz").write_bytes(b"what macOS leaves")
    affine = np.diag([0.7, 0.9, 2.5, 1])
    affine[0, 1] = 0.3
    sheared = nibabel.Nifti1Image(np.uint8(mask.transpose(2, 1, 0)), affine)
    nibabel.save(sheared, tmp_path / "Task06_Lung/labelsTr/lung_003.nii.gz")
    nibabel.save(sheared, tmp_path / "Task06_Lung/imagesTr/lung_003.nii.gz")
    found = samples(tmp_path / "Task06_Lung")
    assert "lung_003.nii.gz: found a sheared grid" in caplog.text and "this volume is left out" in caplog.text
    # Two slices with a tumour and two without; the one whose tumour is dust is neither.
    names = [sample["image"].meta["filename_or_obj"][-10:-7] for sample in found]
    assert sorted(names) == sorted(3 * ["000", "002", "003", "005"])
    assert {sample["record"]["group"] for sample in found} == {f"msd_lung/lung_{number:03d}" for number in range(3)}
    for sample in found:
        index = int(sample["image"].meta["filename_or_obj"][-10:-7])
        np.testing.assert_array_equal(sample["image"][0], hu[index])
        boxes = {2: [[40, 30, 55, 36]], 3: [[3, 4, 9, 10], [40, 30, 55, 36]]}.get(index, np.zeros((0, 4)))
        np.testing.assert_array_equal(sample["boxes"], boxes)
        if len(boxes):
            np.testing.assert_array_equal(sample["instances"].sum(0), mask[index] > 0)
            assert sample["instances"][-1, 30:36, 40:55].all()
        assert "mask" not in sample


@pytest.fixture
def luna16(tmp_path):
    """A scan of unequal spacing, an offset and reversed axes, with two balls; a scan without nodule; lung masks."""
    folder = tmp_path / "LUNA16"
    size, spacing = (COLUMNS, ROWS, 16), (0.6, 0.8, 2.0)
    nodules = [((-12.3, 31.0, -92.2), 10.0), ((-28.0, 40.5, -84.0), 6.0)]
    reference = sitk.Image(size, sitk.sitkInt16)
    reference.SetSpacing(spacing)
    reference.SetOrigin((-3.0, 55.0, -100.0))
    reference.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    index = np.indices(size).reshape(3, -1).T
    world = np.array(reference.GetOrigin()) + index * np.array(spacing) * (-1, -1, 1)
    hu = np.full(size, -800, np.int16).ravel()
    for centre, diameter in nodules:
        hu[np.linalg.norm(world - centre, axis=1) < diameter / 2] = 30
    scan = sitk.GetImageFromArray(hu.reshape(size).transpose(2, 1, 0))
    scan.CopyInformation(reference)
    for place in ("subset0/1.2.3.mhd", "subset0/9.9.9.mhd", "seg-lungs-LUNA16/1.2.3.mhd"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(scan, str(folder / place))
    rows = [",".join(map(str, ("1.2.3", *centre, diameter))) for centre, diameter in nodules]
    (folder / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n" + "\n".join(rows) + "\n")
    return folder


def test_luna16_boxes_hold_the_balls(luna16, samples):
    found = samples(luna16)
    assert {sample["record"]["group"] for sample in found} == {"luna16/1.2.3"}
    nodule_slices = [sample for sample in found if len(sample["boxes"])]
    assert len(nodule_slices) >= 5 and len(found) == 2 * len(nodule_slices)
    assert max(len(sample["boxes"]) for sample in found) == 1
    errors = []
    for sample in found:
        tissue = sample["image"][0].numpy() > -100
        assert tissue.any() == bool(len(sample["boxes"]))
        for x1, y1, x2, y2 in sample["boxes"].numpy():
            rows, columns = np.nonzero(tissue)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            errors.append(np.subtract([x1, y1, x2, y2], extent))
    # The outermost pixels are those whose centre the ball holds: edges lie within half a pixel, and on average upon theirs.
    assert np.abs(errors).max() <= 0.51 and np.abs(np.mean(errors, axis=0)).max() < 0.2
    widest = max(nodule_slices, key=lambda sample: float(sample["boxes"][0, 2] - sample["boxes"][0, 0]))["boxes"][0]
    np.testing.assert_allclose(widest[2:] - widest[:2], [10 / 0.6, 10 / 0.8], rtol=0.03)


def test_luna16_bad_number_is_refused(luna16, merged):
    (luna16 / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n1.2.3,1,2,x,4\n")
    with pytest.raises(ValueError, match="csv: line 2: could not convert string to float: 'x', expected numbers in coordx"):
        merged(luna16)
