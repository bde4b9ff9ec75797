import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.bundle import ConfigParser
from monai.transforms import Compose, RandAffined
from PIL import Image

from bundle.data.transforms import FollowImaged, KeepLungd, LoadSlice, LoadSliced, RandKeepLungd, ScaleIntensityd, move_boxes
from bundle.data.transforms import to_file_grid
from bundle.data.volumes import open_slice
from bundle.errors import UserError
from bundle.lungs import CROPS

ROOT = Path(__file__).parents[2]
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


def shipped(id, size=64, file="train.json", **knobs):
    """A component of a shipped configuration, as a list of transforms."""
    parser = ConfigParser(json.loads((ROOT / "configs" / file).read_text()))
    for name, value in {"image_size": size, **knobs}.items():
        parser[name] = value
    return parser.get_parsed_content(id).transforms


def extent(mask):
    rows, columns = np.nonzero(np.asarray(mask))
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], float)


def test_resize_and_padding_keep_the_aspect_and_move_boxes(record):
    record.pop("instances")
    sample = Compose([*shipped("preprocessing"), FollowImaged()])(record)
    top = (64 - round(ROWS * 0.64)) // 2
    expected = np.array([50, 15, 70, 25]) * 0.64 + [0, top, 0, top]
    np.testing.assert_allclose(sample["boxes"][0], expected, atol=0.6)
    np.testing.assert_allclose(sample["boxes"][0], extent(sample["mask"][0]), atol=1)
    assert sample["image"].shape == sample["mask"].shape == (1, 64, 64)
    assert sample["record"] == {"image": record["image"], "group": "p1", "source": "test"}


def test_cropping_to_the_body_leaves_air_and_table_out_and_boxes_follow(tmp_path):
    """A body with a lung and a lesion above a table; the lesion is as far from the edges of the body as it was drawn."""
    image = np.zeros((120, 160), np.uint8)
    image[30:90, 40:120] = 150  # body
    image[40:80, 50:90] = 20  # lung
    image[50:60, 60:70] = 220  # lesion
    image[100:103, 10:150] = 150  # table
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray((image == 220).astype(np.uint8) * 255).save(tmp_path / "mask.png")
    record = {"image": str(tmp_path / "image.png"), "mask": str(tmp_path / "mask.png"), "boxes": [[60.0, 50.0, 70.0, 60.0]]}
    sample = Compose([*shipped("preprocessing", 88, cropping="body"), FollowImaged()])(record)
    # 80 columns and 4 pixels of margin each side make 88; 68 rows are padded by 10 above.
    np.testing.assert_allclose(sample["boxes"][0], [24, 34, 34, 44], atol=0.01)
    np.testing.assert_array_equal(extent(sample["mask"][0]), [24, 34, 34, 44])
    assert sample["image"].shape == (1, 88, 88) and (sample["image"][0, -14:] == 0).all(), "no table"
    whole = Compose([*shipped("preprocessing", 160, cropping=None), FollowImaged()])(record)
    np.testing.assert_allclose(whole["boxes"][0], [60, 70, 70, 80], atol=0.01)


@pytest.mark.parametrize("cropping", ["body", "lungs"])
def test_what_was_cropped_away_comes_back_as_nothing(cropping, tmp_path):
    image = np.zeros((120, 160), np.uint8)
    image[30:90, 40:120] = 150
    image[50:60, 60:70] = 220
    Image.fromarray(image).save(tmp_path / "image.png")
    scale, crop, resize, pad = shipped("preprocessing", 128, "inference.json", cropping=cropping, checkpoint=None)[1:]
    assert crop.cropper.select_fn is CROPS[cropping] is shipped("preprocessing", 128, cropping=cropping)[2].cropper.select_fn
    preprocessing = Compose([scale, crop, resize, pad])
    before = preprocessing({"image": LoadSlice()(str(tmp_path / "image.png"))})
    back = preprocessing.inverse({"image": before["image"]})["image"]
    assert back.shape == (1, 120, 160)
    assert (back[0, :25] == 0).all() and (back[0, :, 125:] == 0).all() and (back[0, 32:88, 42:118] > 0.4).all()


@pytest.mark.parametrize("side", [100, 300, 630])
def test_resized_mask_lies_on_its_image(record, tmp_path, side):
    """torch's "nearest" would move the mask by half a pixel against the image."""
    rows, columns = np.ogrid[:side, :side]
    disc = ((rows - (side - 1) / 2) ** 2 + (columns - (side - 1) / 2) ** 2 < (0.3 * side) ** 2).astype(np.uint8) * 255
    Image.fromarray(disc).save(tmp_path / "image.png")
    Image.fromarray(disc).save(tmp_path / "mask.png")
    sample = Compose(shipped("preprocessing"))({"image": record["image"], "mask": record["mask"]})
    for key in ("image", "mask"):
        weights = sample[key][0].numpy()
        centre = [(weights.sum(axis) * np.arange(64)).sum() / weights.sum() for axis in (1, 0)]
        np.testing.assert_allclose(centre, 31.5, atol=0.26)


@pytest.mark.parametrize("with_instances", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_augmentation_moves_image_mask_boxes_and_instances_together(record, seed, with_instances):
    if not with_instances:
        record.pop("instances")
    steps = [*shipped("preprocessing"), *shipped("augmentation"), FollowImaged()]
    sample = Compose(steps).set_random_state(seed)(record)
    inside = extent(sample["mask"][0])
    # Whatever is done to its grey values, the rectangle is brighter than 0.5 and the rest is darker.
    np.testing.assert_allclose(extent(sample["image"][0] > 0.5), inside, atol=1.5)
    assert ("instances" in sample) == with_instances
    if with_instances:
        np.testing.assert_array_equal(sample["boxes"][0], extent(sample["instances"][0]))
        np.testing.assert_allclose(sample["boxes"][0], inside, atol=1)
    else:  # the hull of the turned box
        (x1, y1, x2, y2), (width, height) = sample["boxes"][0].tolist(), inside[2:] - inside[:2]
        assert x1 <= inside[0] + 1 and y1 <= inside[1] + 1 and x2 >= inside[2] - 1 and y2 >= inside[3] - 1
        assert x2 - x1 < width + 0.6 * height + 3 and y2 - y1 < height + 0.6 * width + 3


def test_the_shipped_augmentation_flips_turns_scales_and_shifts(record):
    """Over 40 draws the rectangle, right of the middle, is seen on both sides, in several sizes and heights."""
    preprocess, augment = Compose(shipped("preprocessing")), Compose(shipped("augmentation"))
    sample, extents = preprocess(record), []
    for seed in range(40):
        extents.append(extent(augment.set_random_state(seed)(sample)["mask"][0]))
    left, top, right, bottom = np.transpose(extents)
    assert (left + right < 60).any() and (left + right > 68).any()
    assert np.ptp(right - left) > 4 and np.ptp(top + bottom) > 8


def test_a_box_moved_out_of_the_image_is_dropped_with_its_instance(record):
    out = RandAffined(KEYS, prob=1.0, translate_range=((60, 61), (60, 61)), padding_mode="zeros", allow_missing_keys=True)
    sample = Compose([*shipped("preprocessing"), out, FollowImaged()]).set_random_state(0)(record)
    assert sample["boxes"].shape == (0, 4) and sample["instances"].shape == (0, 64, 64)


def test_an_absent_annotation_stays_absent_and_an_empty_one_empty(record):
    steps = Compose([*shipped("preprocessing"), FollowImaged()])
    assert not {"mask", "boxes", "instances", "class"} & steps({"image": record["image"]}).keys()
    sample = steps({"image": record["image"], "boxes": []})
    assert sample["boxes"].shape == (0, 4) and sample["instances"].shape == (0, 64, 64)


def test_empty_mask_and_mask_of_several_classes(record, tmp_path):
    sample = LoadSliced(2)({"image": record["image"], "mask": "empty"})
    assert sample["mask"].shape == (2, ROWS, COLUMNS) and sample["mask"].sum() == 0
    labels = np.zeros((ROWS, COLUMNS), np.uint8)
    labels[:10], labels[10:30] = 1, 2
    Image.fromarray(labels).save(tmp_path / "labels.png")
    sample = LoadSliced(2)({"image": record["image"], "mask": str(tmp_path / "labels.png")})
    assert sample["mask"].sum((1, 2)).tolist() == [10 * COLUMNS, 20 * COLUMNS]
    with pytest.raises(ValueError, match=r"mask.png: found the values \[0.0, 255.0\], expected 0 and 1, 2"):
        LoadSliced(2)({"image": record["image"], "mask": record["mask"]})


def test_values_of_a_mask_next_to_whole_numbers_are_those(record, tmp_path):
    labels = np.zeros((COLUMNS, ROWS, 1), np.float32)
    labels[:10], labels[10:30], labels[30:] = 0.9999999, 2.0000002, np.nan
    nib.save(nib.Nifti1Image(labels, np.diag([-1, -1, 1, 1])), tmp_path / "labels.nii")
    sample = LoadSliced(2)({"image": record["image"], "mask": str(tmp_path / "labels.nii")})
    assert sample["mask"].sum((1, 2)).tolist() == [10 * ROWS, 20 * ROWS]


@pytest.mark.parametrize("axis", [2, 1])
def test_a_mask_that_its_header_turns_must_lie_where_the_image_lies(tmp_path, axis):
    """The image in LPS, stacked along an axis; its mask in RAS at the same place, and then with a header of no meaning."""
    pixels = np.zeros((COLUMNS, ROWS), np.int16)
    pixels[5:20, 3:9] = 1
    lps = np.array([[-0.7, 0, 0, 30], [0, -0.8, 0, 20], [0, 0, 5, 10], [0, 0, 0, 1]])
    turned = np.diag([-1.0, -1, 1, 1])
    turned[:2, 3] = COLUMNS - 1, ROWS - 1

    def save(name: str, stored, affine) -> str:
        affine = affine if axis == 2 else affine[:, [0, 2, 1, 3]]
        nib.save(nib.Nifti1Image(np.expand_dims(stored, axis), affine), tmp_path / name)
        return str(tmp_path / name)

    record = {"image": save("image.nii.gz", pixels, lps), "mask": save("ras.nii.gz", pixels[::-1, ::-1], lps @ turned)}
    sample = LoadSliced()(record)
    np.testing.assert_array_equal(sample["mask"], sample["image"])
    np.testing.assert_array_equal(sample["image"][0], pixels.T)
    moved = lps + 500 * np.eye(4, k=3)  # the same array is no less the same for another origin
    np.testing.assert_array_equal(LoadSliced()({**record, "mask": save("moved.nii.gz", pixels, moved)})["mask"][0], pixels.T)
    with pytest.raises(ValueError, match=r"none.nii.gz: found a header that turns the mask otherwise than .*image.nii.gz and"):
        LoadSliced()({**record, "mask": save("none.nii.gz", pixels, np.eye(4))})


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "I;16"])
def test_pictures_of_any_mode_become_one_channel(tmp_path, mode):
    pixels = np.zeros((8, 12), np.uint16 if mode == "I;16" else np.uint8)
    pixels[2, 9] = 255
    image = Image.fromarray(pixels) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "x.png")
    loaded = ScaleIntensityd("image", window=(-1000, 300))({"image": LoadSlice()(tmp_path / "x.png")})["image"]
    assert loaded.shape == (1, 8, 12)
    assert np.unravel_index(int(loaded.argmax()), (8, 12)) == (2, 9)


def test_nifti_is_windowed_in_hu(tmp_path):
    pixels = np.array([[-2000, -1000], [-450, 100]], np.int16)
    nib.save(nib.Nifti1Image(pixels.T[..., None], np.diag([-1, -1, 1, 1])), tmp_path / "x.nii.gz")
    scaled = ScaleIntensityd("image", window=(-1000, 100))({"image": LoadSlice()(tmp_path / "x.nii.gz")})["image"]
    assert scaled[0].tolist() == [[0, 0], [0.5, 1]] and scaled.meta["intensity_range"] == (-1000, 100)
    for window in ((100, -100), (1,)):
        with pytest.raises(ValueError, match="window: found"):
            ScaleIntensityd("image", window=window)


# Axes of the file as (axis of the patient's L P S, direction), as nibabel's orientations.
ORIENTATIONS = [[[a, f], [1 - a, g], [2, h]] for a in (0, 1) for f in (1, -1) for g in (1, -1) for h in (1, -1)]
ORIENTATIONS += [[[1, 1], [2, -1], [0, 1]], [[2, 1], [0, -1], [1, 1]]]


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_a_turned_slice_finds_back_to_its_file(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(-1000, 500, (8, 12)).astype(np.int16)
    affine = np.diag([-1.5, -0.75, 5.0, 1.0])
    affine[:3, 3] = [9, 8, 7]
    stored = nib.Nifti1Image(pixels.T[..., None], affine).as_reoriented(np.array(orientation))
    nib.save(stored, tmp_path / "x.nii.gz")
    loaded = LoadSlice()(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(loaded[0], pixels)
    scan = open_slice(tmp_path / "x.nii.gz")
    assert scan.size == (12, 8) and scan.stored_size == tuple(size for size in stored.shape if size > 1)
    np.testing.assert_array_equal(to_file_grid(pixels, loaded), stored.get_fdata())
    np.testing.assert_allclose(scan.affine, stored.affine)
    assert loaded.meta["spacing"] == (0.75, 1.5)
    # A box around one pixel of the file encloses the same pixel of the slice, and the other way round.
    row, column = 2, 9
    x, y = np.argwhere(np.squeeze(stored.get_fdata()) == pixels[row, column])[0]
    box = torch.tensor([[x, y, x + 1, y + 1]]).float()
    sample = FollowImaged()({"image": loaded, "boxes": box})
    torch.testing.assert_close(sample["boxes"], torch.tensor([[9.0, 2.0, 10.0, 3.0]]))
    torch.testing.assert_close(move_boxes(sample["boxes"], loaded.affine), box)


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (-1, 0, 0, 0, 1, 0), (0, 1, 0, 1, 0, 0), (0, -1, 0, 1, 0, 0)])
@pytest.mark.parametrize("name", ["x.dcm", "x", "1.2.840.113619"])
def test_dicom_is_in_hu_and_finds_back_to_its_file(tmp_path, write_dicom, orientation, name):
    hu = np.full((8, 12), -1000)
    hu[2, 9] = 100
    path = write_dicom(tmp_path / name, hu, orientation=orientation)
    loaded = LoadSlice()(path)
    assert loaded.meta["hounsfield"] and loaded.min() == -1000 and loaded.max() == 100
    across, down = np.array(orientation[:3]), np.array(orientation[3:])
    turned = hu if across[0] else hu.T  # columns of the file run along the patient's left and right, or front and back
    turned = turned[:, ::-1] if (across + down)[0] < 0 else turned
    turned = turned[::-1] if (across + down)[1] < 0 else turned
    np.testing.assert_array_equal(loaded[0], turned)
    assert open_slice(path).size == turned.shape[::-1] and open_slice(path).stored_size == (12, 8)
    np.testing.assert_array_equal(to_file_grid(turned, loaded)[..., 0].T, hu)
    assert loaded.meta["spacing"] == ((0.75, 1.5) if across[0] else (1.5, 0.75))


def test_a_real_tumour_that_was_boxed_is_tissue(real_data):
    with (real_data / "lung_pet_ct_dx/labels.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if int(row["n_boxes"]))
    path = real_data / "lung_pet_ct_dx" / row["file"]
    x1, y1, x2, y2 = map(int, json.loads(row["boxes_xyxy"])[0])
    assert np.median(LoadSlice()(path)[0, y1:y2, x1:x2]) > -300, "pixels of boxes mean what they mean to the annotators"


def test_bad_files_are_refused_in_one_line(record, tmp_path):
    (tmp_path / "cut.png").write_bytes((tmp_path / "image.png").read_bytes()[:60])
    for name in (f"{word}.{suffix}" for word in ("text", "none") for suffix in ("png", "nii.gz", "nii", "mhd", "dcm")):
        (tmp_path / name).write_bytes(b"this is no image" * name.startswith("text"))
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 3), np.int16), np.eye(4)), tmp_path / "volume.nii.gz")
    Image.new("L", (8, 8)).save(tmp_path / "pages.tif", save_all=True, append_images=[Image.new("L", (8, 8))])
    cases = {path.name: r"(cannot be read \(.+\)|found no DICOM header), expected" for path in tmp_path.glob("[tn]*.*")}
    cases |= {"cut.png": "cannot be read", "text.png": "cannot be read .cannot identify image file", "no.png": "no such file"}
    cases |= {"volume.nii.gz": "found 3 slices, expected a single one", "pages.tif": "found 2 pictures, expected one"}
    for name, words in cases.items():
        with pytest.raises(UserError, match=f"{tmp_path}/{name}: .*{words}") as error:
            LoadSlice()(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "boxes", "message"),
    [
        (0, [BOX, [0.0, 0.0, 5.0, 5.0]], r"found no pixel of value \[2\], expected n \+ 1 on the object"),
        (3, [BOX], r"found the value 3 beside 1 boxes, expected n \+ 1 on the object of boxes\[n\]"),
        (2, [[0.0, 0.0, 5.0, 5.0], BOX], r"found the value 1 outside of boxes\[0\], expected"),
    ],
)
def test_masks_and_instances_that_do_not_fit_are_refused(record, tmp_path, value, boxes, message):
    labels = np.zeros((ROWS, COLUMNS), np.uint8)
    labels[15:25, 50:70], labels[0:5, 0:5] = 1, value
    Image.fromarray(labels).save(tmp_path / "instances.png")
    with pytest.raises(ValueError, match=f"instances.png: {message}"):
        LoadSliced()({**record, "boxes": boxes})
    Image.new("L", (10, 10)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask.png: found mask of \(10, 10\) .* expected \(60, 100\) as in .*image.png"):
        LoadSliced()(record)


def test_lungs_are_kept_or_removed(chest_slice):
    image = torch.from_numpy(chest_slice[0][None])
    lung, rest = (KeepLungd("image", keep)({"image": image, "class": 1}) for keep in ("lung", "rest"))
    assert torch.equal(lung["image"] + rest["image"], image) and lung["class"] == 1
    assert 0.1 < (lung["image"] > 0).float().mean() < 0.4
    with pytest.raises(ValueError, match="keep: found 'lungs', expected lung or rest"):
        KeepLungd("image", "lungs")


def test_lungs_are_kept_at_random_where_nothing_can_be_cut_off(chest_slice):
    image = MetaTensor(torch.from_numpy(chest_slice[0][None]))
    always, never = RandKeepLungd("image", 1.0), RandKeepLungd("image", 0.0)
    assert torch.equal(always({"image": image})["image"], KeepLungd("image", "lung")({"image": image})["image"])
    for annotation in ({"mask": image > 2}, {"boxes": torch.zeros(0, 4)}):
        assert torch.equal(always({"image": image, **annotation})["image"], always({"image": image})["image"])
    lung = always({"image": image})["image"] > 0
    lesion = lung.clone()
    lesion[:, 60, 76:80] = True  # between the lungs
    for annotation in ({"mask": lesion}, {"boxes": torch.tensor([[40.0, 50.0, 68.0, 60.0]])}):
        kept = always({"image": image, **annotation})["image"]
        assert torch.equal(kept, image * (lung | lesion if "mask" in annotation else lung)), annotation.keys()
    lesion[:, 10:30, 70:90] = True
    for annotation in ({"mask": lesion}, {"boxes": torch.tensor([[40.0, 50.0, 68.0, 60.0], [76.0, 50.0, 84.0, 60.0]])}):
        assert torch.equal(always({"image": image, **annotation})["image"], image), "its shape would give it away"
    assert torch.equal(never({"image": image})["image"], image)
    assert torch.equal(always({"image": torch.ones(1, 64, 64)})["image"], torch.ones(1, 64, 64)), "there is no lung"
    some = RandKeepLungd("image", 0.5)
    some.set_random_state(0)
    changed = [not torch.equal(some({"image": image})["image"], image) for _ in range(40)]
    assert 10 < sum(changed) < 30
