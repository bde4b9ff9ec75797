import pytest
import torch
from some_tasks import some_network, some_tasks

from bundle.errors import UserError
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS
from bundle.networks import EnsembleNet


@torch.no_grad()
def test_answers_are_means_of_probabilities():
    members, image = [some_network(), some_network()], torch.rand(2, 1, 64, 64)
    found = EnsembleNet(members)(image)
    answers = [member(image) for member in members]
    assert found.keys() == set(TASKS)
    activations = {CLASSIFICATION: lambda x: x.softmax(1), SEGMENTATION: torch.sigmoid, RECONSTRUCTION: lambda x: x}
    for task, activate in activations.items():
        torch.testing.assert_close(activate(found[task]), sum(activate(answer[task]) for answer in answers) / 2)


@torch.no_grad()
def test_every_task_is_answered_by_those_that_have_it():
    networks = [some_network([CLASSIFICATION, DETECTION]), some_network([SEGMENTATION])]
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
        boxes, labels = torch.tensor(boxes, dtype=torch.float32), torch.ones(len(boxes), dtype=torch.int64)
        return {"boxes": boxes, "labels": labels, "scores": torch.tensor(scores), "masks": torch.zeros(len(boxes), 1, 8, 8)}

    (detection,) = some_tasks(DETECTION)
    one, two = found([[0, 0, 4, 4]], [0.6]), found([[0, 0, 4, 5], [5, 5, 8, 8]], [0.7, 0.2])
    pooled, nothing = detection.join_members([[one, None], [two, None]])
    assert nothing is None and pooled["masks"].shape == (2, 1, 8, 8)
    assert pooled["boxes"].tolist() == [[0, 0, 4, 5], [5, 5, 8, 8]]
    assert pooled["scores"].tolist() == pytest.approx([0.7, 0.2])


def test_an_empty_ensemble_is_refused():
    with pytest.raises(UserError, match="members: found none, expected one or more networks"):
        EnsembleNet([])
