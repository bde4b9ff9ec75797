import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandAffined, RandFlipd, Resized, SpatialPadd
from PIL import Image

from bundle.data.transforms import FollowImaged, LoadSlice, LoadSliced, ScaleIntensityd

ROWS, COLUMNS = 60, 100
BOX = [50.0, 15.0, 70.0, 25.0]
KEYS = ["image", "mask", "instances"]


@pytest.fixture
def record(tmp_path):
    """A slice that is wider than high, with one bright rectangle as lesion, instance and box."""
    image = np.full((ROWS, COLUMNS), 20, np.uint8)
    image[15:25, 50:70] = 200
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray((image == 200).astype(np.uint8) * 255).save(tmp_path / "mask.png")
    Image.fromarray((image == 200).astype(np.uint8)).save(tmp_path / "instances.png")
    files = {key: str(tmp_path / f"{key}.png") for key in KEYS}
    return {**files, "boxes": [BOX], "class": 1, "group": "p1", "source": "test"}


def preprocessing(size=64):
    return [
        LoadSliced(),
        ScaleIntensityd("image"),
        Resized(KEYS, size, size_mode="longest", mode=["bilinear", "nearest", "nearest"], allow_missing_keys=True),
        SpatialPadd(KEYS, [size, size], allow_missing_keys=True),
    ]


def extent(mask):
    rows, columns = np.nonzero(np.asarray(mask))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)


def test_resize_and_padding_keep_the_aspect_and_move_boxes(record):
    record.pop("instances")
    sample = Compose([*preprocessing(), FollowImaged()])(record)
    top = (64 - round(ROWS * 0.64)) // 2
    expected = np.array([50, 15, 70, 25]) * 0.64 + [0, top, 0, top]
    np.testing.assert_allclose(sample["boxes"][0], expected, atol=0.6)
    np.testing.assert_allclose(sample["boxes"][0], extent(sample["mask"][0]), atol=1)
    assert sample["image"].shape == sample["mask"].shape == (1, 64, 64)
    assert sample["record"] == {"image": record["image"], "group": "p1", "source": "test"}


@pytest.mark.parametrize("with_instances", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_augmentation_moves_image_mask_boxes_and_instances_together(record, seed, with_instances):
    if not with_instances:
        record.pop("instances")
    augmentation = [
        RandFlipd(KEYS, prob=0.5, spatial_axis=1, allow_missing_keys=True),
        RandFlipd(KEYS, prob=0.5, spatial_axis=0, allow_missing_keys=True),
        RandAffined(
            KEYS,
            prob=1.0,
            scale_range=(0.2, 0.2),
            translate_range=(5, 5),
            mode=["bilinear", "nearest", "nearest"],
            padding_mode="zeros",
            allow_missing_keys=True,
        ),
    ]
    sample = Compose([*preprocessing(), *augmentation, FollowImaged()]).set_random_state(seed)(record)
    np.testing.assert_allclose(sample["boxes"][0], extent(sample["mask"][0]), atol=1.5)
    np.testing.assert_allclose(sample["boxes"][0], extent(sample["image"][0] > 0.6), atol=1.5)
    assert ("instances" in sample) == with_instances
    if with_instances:
        np.testing.assert_array_equal(sample["boxes"][0], extent(sample["instances"][0]))


def test_rotated_box_without_instance_is_the_hull_of_its_corners(record):
    record.pop("instances")
    rotate = RandAffined(KEYS, prob=1.0, rotate_range=0.3, mode=["bilinear", "nearest", "nearest"], allow_missing_keys=True)
    sample = Compose([*preprocessing(), rotate, FollowImaged()]).set_random_state(0)(record)
    inside = extent(sample["mask"][0])
    x1, y1, x2, y2 = sample["boxes"][0]
    assert x1 <= inside[0] + 1 and y1 <= inside[1] + 1 and x2 >= inside[2] - 1 and y2 >= inside[3] - 1


def test_a_box_moved_out_of_the_image_is_dropped_with_its_instance(record):
    out = RandAffined(KEYS, prob=1.0, translate_range=((60, 61), (60, 61)), padding_mode="zeros", allow_missing_keys=True)
    sample = Compose([*preprocessing(), out, FollowImaged()]).set_random_state(0)(record)
    assert sample["boxes"].shape == (0, 4) and sample["instances"].shape == (0, 64, 64)


def test_no_boxes_means_annotated_and_nothing_there(record):
    record.update(boxes=[])
    record.pop("instances")
    sample = Compose([*preprocessing(), FollowImaged()])(record)
    assert sample["boxes"].shape == (0, 4) and sample["instances"].shape == (0, 64, 64)


def test_an_absent_annotation_stays_absent(record):
    sample = Compose([*preprocessing(), FollowImaged()])({"image": record["image"]})
    assert not {"mask", "boxes", "instances", "class"} & sample.keys()


def test_empty_mask_and_mask_of_several_classes(record, tmp_path):
    sample = LoadSliced(2)({"image": record["image"], "mask": "empty"})
    assert sample["mask"].shape == (2, ROWS, COLUMNS) and sample["mask"].sum() == 0
    labels = np.zeros((ROWS, COLUMNS), np.uint8)
    labels[:10], labels[10:30] = 1, 2
    Image.fromarray(labels).save(tmp_path / "labels.png")
    sample = LoadSliced(2)({"image": record["image"], "mask": str(tmp_path / "labels.png")})
    assert sample["mask"].sum((1, 2)).tolist() == [10 * COLUMNS, 20 * COLUMNS]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "I;16"])
def test_pictures_of_any_mode_become_one_channel(tmp_path, mode):
    pixels = np.zeros((8, 12), np.uint16 if mode == "I;16" else np.uint8)
    pixels[2, 9] = 255
    image = Image.fromarray(pixels) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "x.png")
    loaded = ScaleIntensityd("image")({"image": LoadSlice()(tmp_path / "x.png")})["image"]
    assert loaded.shape == (1, 8, 12)
    assert np.unravel_index(int(loaded.argmax()), (8, 12)) == (2, 9)


@pytest.mark.parametrize("flip", [(1, 1), (-1, -1), (-1, 1), (1, -1)])
def test_nifti_is_turned_to_lps_and_windowed_in_hu(tmp_path, flip):
    slice_ = np.full((8, 12), -1000, np.int16)
    slice_[2, 9] = 100  # row 2, column 9: anterior, patient's left
    affine = np.diag([-1.0 * flip[0], -1.0 * flip[1], 1.0, 1.0])
    nib.save(nib.Nifti1Image(slice_.T[:: flip[0], :: flip[1], None], affine), tmp_path / "x.nii.gz")
    loaded = LoadSlice()(tmp_path / "x.nii.gz")
    assert loaded.meta["hounsfield"] and loaded.shape == (1, 8, 12)
    assert np.unravel_index(int(loaded.argmax()), (8, 12)) == (2, 9)
    scaled = ScaleIntensityd("image", window=(-1000, 100))({"image": loaded})["image"]
    assert scaled.max() == 1 and scaled.min() == 0


def test_bad_files_are_refused_in_one_line(record, tmp_path):
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes((tmp_path / "image.png").read_bytes()[:60])
    nan = tmp_path / "nan.nii.gz"
    nib.save(nib.Nifti1Image(np.full((8, 8, 1), np.nan, np.float32), np.eye(4)), nan)
    volume = tmp_path / "volume.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 3), np.int16), np.eye(4)), volume)
    cases = {truncated: "cannot be read", nan: "NaN", volume: "single grey slice"}
    for path, words in cases.items():
        with pytest.raises(ValueError, match=words) as error:
            LoadSlice()(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="missing.png: no such file"):
        LoadSlice()(tmp_path / "missing.png")


def test_a_mask_of_another_size_is_refused_naming_both_files(record, tmp_path):
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small.png: found mask of \(10, 10\) .* expected \(60, 100\) as in .*image.png"):
        LoadSliced()({**record, "mask": str(tmp_path / "small.png")})


def test_window_must_be_ordered():
    with pytest.raises(ValueError, match="window"):
        ScaleIntensityd("image", window=(100, -100))


def test_box_through_affine_keeps_pixel_edges(record):
    sample = FollowImaged()(LoadSliced()({"image": record["image"], "boxes": [BOX]}))
    torch.testing.assert_close(sample["boxes"], torch.tensor([BOX]))
