"""An ensemble answers with the mean of its members, each task by those that have it."""

import pytest
import torch
from some_tasks import some_network, some_tasks

from bundle.networks import EnsembleNet
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS

TINY = {
    "image_size": 64,
    "decoder_channels": (16, 8, 8, 8, 8),
    "detection": {"fpn_channels": 8, "box_features": 16, "mask_channels": (8,), "score_threshold": 0.0},
}


def make(tasks=TASKS, seed=0):
    torch.manual_seed(seed)
    return some_network(tasks, **TINY)


@torch.no_grad()
def test_answers_are_means_of_probabilities():
    members, image = [make(seed=0), make(seed=1)], torch.rand(2, 1, 64, 64)
    ensemble = EnsembleNet(members).eval()
    found, (one, two) = ensemble(image), (member(image) for member in members)
    assert found.keys() == set(TASKS)
    probabilities = (one[CLASSIFICATION].softmax(1) + two[CLASSIFICATION].softmax(1)) / 2
    torch.testing.assert_close(found[CLASSIFICATION].softmax(1), probabilities)
    torch.testing.assert_close(
        found[SEGMENTATION].sigmoid(), (one[SEGMENTATION].sigmoid() + two[SEGMENTATION].sigmoid()) / 2
    )
    torch.testing.assert_close(found[RECONSTRUCTION], (one[RECONSTRUCTION] + two[RECONSTRUCTION]) / 2)


@torch.no_grad()
def test_every_task_is_answered_by_those_that_have_it():
    networks = [make([CLASSIFICATION, DETECTION]), make([SEGMENTATION], seed=1)]
    image, annotated = torch.rand(2, 1, 64, 64), {task: torch.tensor([True, False]) for task in TASKS}
    found = EnsembleNet(networks)(image, annotated=annotated)
    assert found.keys() == {CLASSIFICATION, SEGMENTATION, DETECTION}
    expected = networks[0](image, annotated=annotated)
    torch.testing.assert_close(found[CLASSIFICATION][:1], expected[CLASSIFICATION][:1].log_softmax(1))
    assert found[DETECTION][1] is None and expected[DETECTION][1] is None
    for name, values in found[DETECTION][0].items():
        assert torch.equal(values, expected[DETECTION][0][name]), "one detector alone is not changed"


def test_of_overlapping_detections_the_surest_is_kept():
    def found(boxes, scores):
        count = len(boxes)
        boxes, labels = torch.tensor(boxes, dtype=torch.float32), torch.ones(count, dtype=torch.int64)
        return {"boxes": boxes, "labels": labels, "scores": torch.tensor(scores), "masks": torch.zeros(count, 1, 8, 8)}

    (detection,) = some_tasks(DETECTION)
    one, two = found([[0, 0, 4, 4]], [0.6]), found([[0, 0, 4, 5], [5, 5, 8, 8]], [0.7, 0.2])
    pooled, nothing = detection.join_members([[one, None], [two, None]])
    assert nothing is None
    assert pooled["boxes"].tolist() == [[0, 0, 4, 5], [5, 5, 8, 8]] and pooled["scores"].tolist() == pytest.approx(
        [0.7, 0.2]
    )
    assert pooled["masks"].shape == (2, 1, 8, 8)


def test_an_empty_ensemble_is_refused():
    with pytest.raises(ValueError, match="members: found none, expected one or more networks"):
        EnsembleNet([])
