import nibabel
import numpy as np
import pytest
import torch
from some_tasks import some_tasks

from bundle.data.batch import balanced_weights, collate
from bundle.monailabel import LoadVolumeSliced, VolumeDataset, publish
from bundle.monailabel.train import slices_of
from bundle.networks.weights import describe, redescribe
from bundle.tasks import add_heads


@pytest.fixture
def volume(write_volume, tmp_path):
    image, label = write_volume(tmp_path / "a.nii.gz", shape=(64, 56, 12))
    return {"image": str(image), "label": str(label)}


def test_slices_with_and_without_lesion_are_in_balance(volume):
    records = slices_of(volume, limit=64)
    lesion = nibabel.load(volume["label"]).get_fdata().any((0, 1))
    assert [r["image"].index for r in records if r["mask"] != "empty"] == lesion.nonzero()[0].tolist()
    assert [r["image"].index for r in records if r["mask"] == "empty"] == (~lesion).nonzero()[0].tolist()
    few = slices_of(volume, limit=4)
    assert [r["mask"] == "empty" for r in few] == [False, False, True, True]
    assert few[0]["image"].index == lesion.nonzero()[0][0] and few[1]["image"].index == lesion.nonzero()[0][-1]
    assert balanced_weights(records, some_tasks("segmentation"))[: lesion.sum()].sum() == pytest.approx(0.5)


def test_a_label_of_another_size_is_refused(volume, write_volume, tmp_path):
    _, other = write_volume(tmp_path / "b.nii.gz", shape=(64, 56, 6))
    expected = rf"{other}: found a label of size \(64, 56, 6\), expected \(64, 56, 12\) as in {volume['image']}"
    with pytest.raises(ValueError, match=expected):
        slices_of({**volume, "label": str(other)}, 64)


def test_a_label_whose_slices_lie_elsewhere_is_refused(volume, tmp_path):
    label = nibabel.load(volume["label"])
    flipped, affine = np.asanyarray(label.dataobj)[..., ::-1], label.affine.copy()
    affine[:3, 3] += affine[:3, 2] * (label.shape[2] - 1)
    affine[:3, 2] *= -1  # the same places, stored the other way round
    nibabel.save(nibabel.Nifti1Image(flipped, affine), tmp_path / "turned.nii.gz")
    with pytest.raises(ValueError, match=r"turned.nii.gz: found slices from .* mm, expected .* as in .*a.nii.gz; write the"):
        slices_of({**volume, "label": str(tmp_path / "turned.nii.gz")}, 64)


def test_samples_are_image_and_mask_of_the_slice(volume):
    dataset = VolumeDataset([volume], LoadVolumeSliced())
    assert len(dataset) == 12
    label, image = (nibabel.load(volume[key]).get_fdata() for key in ("label", "image"))
    for record, sample in zip(dataset.data, dataset):
        index = record["image"].index
        np.testing.assert_array_equal(sample["mask"][0].numpy(), label[:, :, index].T)
        np.testing.assert_array_equal(sample["image"][0].numpy(), image[:, :, index].T.clip(-1024))  # air is the least
    batch = collate(list(dataset), some_tasks())
    assert batch["record"][0]["image"] == f"{volume['image']}, slice {dataset.data[0]['image'].index}"
    assert batch["annotated"]["segmentation"].all() and not batch["annotated"]["detection"].any()


def test_without_volumes_set_aside_others_stand_in_and_without_any_it_says_so(volume):
    assert len(VolumeDataset([], LoadVolumeSliced(), otherwise=[volume], slices_per_volume=4)) == 4
    with pytest.raises(ValueError, match="training: found no labelled volume, expected at least one; submit a label first"):
        VolumeDataset([], LoadVolumeSliced())


def test_weights_are_published_whole(tmp_path):
    (tmp_path / "new.pt").write_bytes(b"new")
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model.pt").write_bytes(b"old")
    publish(tmp_path / "new.pt", tmp_path)
    assert (tmp_path / "models/model.pt").read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["model.pt"]


def test_the_sources_of_the_weights_it_started_from_stay_named(checkpoint, tmp_path):
    fresh = torch.load(checkpoint, weights_only=True)
    torch.save(redescribe(fresh, sources=["covid_ct", "iqoth_nccd"]), tmp_path / "model.pt")
    trained = add_heads(redescribe(fresh, sources=["monailabel"]), tmp_path / "model.pt")
    assert describe(trained)["sources"] == ["covid_ct", "iqoth_nccd", "monailabel"]
