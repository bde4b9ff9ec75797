import numpy as np
import pytest
import torch
from ignite.engine import Engine
from PIL import Image
from some_tasks import some_tasks
from test_handler import ALL, batch

from bundle.evaluation import FailureGallery
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS


def draw(path, batches, tasks=TASKS, **arguments):
    engine = Engine(lambda _, output: output)
    gallery = FailureGallery(some_tasks(*tasks), path, **arguments)
    gallery.attach(engine)
    engine.run(batches)
    return gallery


def texts(gallery, task):
    return [item["text"].split("\n") for item in gallery.worst[task]]


def graded():
    """Two batches of four cases whose answers are the better the higher their number."""
    batches = [batch(ALL), batch(ALL, start=4)]
    for number, (case, index) in enumerate((one, index) for one in batches for index in range(4)):
        label, pred = case["label"], case["pred"]
        truth = label["class"][index].int().argmax()
        pred[CLASSIFICATION][index] = torch.eye(3)[truth] * number
        mask = torch.zeros(1, 32, 32)
        mask[:, : number + 1] = 1
        label["mask"][index], pred[SEGMENTATION][index] = 1, mask - 0.5
        pred[RECONSTRUCTION][index] = label["target"][index] + (8 - number) / 20
    return batches


def test_the_worst_cases_of_all_batches_come_first(tmp_path):
    gallery = draw(tmp_path / "new/failures.png", graded(), columns=3)
    for task in (CLASSIFICATION, SEGMENTATION, RECONSTRUCTION):
        assert [name for name, _ in texts(gallery, task)] == ["0.png", "1.png", "2.png"], task
    assert texts(gallery, SEGMENTATION)[1] == ["1.png", "Dice 0.12"]
    assert texts(gallery, CLASSIFICATION)[2] == ["2.png", "lung cancer → lung cancer 0.79"]
    assert texts(gallery, RECONSTRUCTION)[0][1].startswith("SSIM 0.")
    with Image.open(tmp_path / "new/failures.png") as picture:
        assert picture.size == (660, 1040), "four rows of three cases"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["failures.png"]


def test_lesions_missed_and_invented_are_counted_where_they_are_found(tmp_path):
    one = batch(ALL)
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "masks": torch.zeros(0, 1, 32, 32)}
    found = one["pred"][DETECTION][0]
    doubtful = {**found, "scores": torch.tensor([0.4])}
    elsewhere = {**found, "boxes": torch.tensor([[21.0, 20, 31, 30]])}
    one["pred"][DETECTION] = [found, nothing, doubtful, elsewhere]
    gallery = draw(tmp_path / "failures.png", [one])
    assert texts(gallery, DETECTION) == [
        ["3.png", "1 of 1 missed, 1 invented"],
        ["1.png", "1 of 1 missed, 0 invented"],
        ["2.png", "1 of 1 missed, 0 invented"],
        ["0.png", "0 of 1 missed, 0 invented"],
    ]


def test_cases_that_are_not_annotated_are_left_out(tmp_path):
    gallery = draw(
        tmp_path / "failures.png", [batch({SEGMENTATION: [False, True, False, False]})], [CLASSIFICATION, SEGMENTATION]
    )
    assert [name for name, _ in texts(gallery, SEGMENTATION)] == ["1.png"] and texts(gallery, CLASSIFICATION) == []
    with pytest.raises(ValueError, match="gallery: found no case annotated for classification, expected some"):
        draw(tmp_path / "none.png", [batch({})], [CLASSIFICATION])
    assert not (tmp_path / "none.png").exists()
    in_part = batch(ALL)
    in_part["label"]["class"][1] = torch.tensor([True, True, False])
    gallery = draw(tmp_path / "failures.png", [in_part], [CLASSIFICATION])
    assert sorted(name for name, _ in texts(gallery, CLASSIFICATION)) == ["0.png", "2.png", "3.png"]


def test_without_images_nothing_of_them_is_drawn(tmp_path):
    pictures = []
    for brightness in (0.0, 1.0):
        batches = graded()
        for one in batches:
            one["label"]["target"][:] = brightness
        gallery = draw(tmp_path / f"{brightness}.png", batches, with_images=False)
        assert set(gallery.worst) == {SEGMENTATION, DETECTION}
        with Image.open(tmp_path / f"{brightness}.png") as picture:
            pictures.append(np.asarray(picture))
    assert np.array_equal(*pictures)
    with pytest.raises(ValueError, match="with_images: found false for classification, reconstruction, expected true"):
        FailureGallery(some_tasks(CLASSIFICATION, RECONSTRUCTION), "x.png", with_images=False)
