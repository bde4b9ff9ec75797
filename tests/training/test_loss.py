import math

import ignite.distributed as idist
import pytest
import torch
from some_tasks import some_tasks
from torch.nn import functional as F

from bundle.tasks import TASKS
from bundle.tasks.segmentation import SEGMENTATION_LOSSES, LesionAndComplementLoss
from bundle.training.loss import MultiTaskLoss


def batch(size=4, **annotated):
    rows = {task: torch.tensor(annotated.get(task, [False] * size)) for task in TASKS}
    rows["reconstruction"] = torch.ones(size, dtype=torch.bool)
    return {
        "class": torch.eye(3, dtype=torch.bool)[torch.arange(size) % 3],
        "mask": (torch.rand(size, 1, 16, 16) > 0.7).float(),
        "target": torch.rand(size, 1, 16, 16),
        "annotated": rows,
    }


def prediction(size=4):
    return {
        "classification": torch.randn(size, 3, requires_grad=True),
        "segmentation": torch.randn(size, 1, 16, 16, requires_grad=True),
        "reconstruction": torch.rand(size, 1, 16, 16, requires_grad=True),
        "detection": {"loss_mask": torch.tensor(0.5, requires_grad=True), "loss_classifier": torch.tensor(0.25)},
    }


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_an_empty_mask_still_has_a_gradient(name):
    logits = torch.zeros(2, 1, 16, 16, requires_grad=True)
    loss = LesionAndComplementLoss(name)(logits, torch.zeros(2, 1, 16, 16))
    loss.backward()
    assert loss.item() > 0.05
    assert (logits.grad > 0).all(), "falling probability must lower the loss of a slice without lesion"


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_perfect_mask_costs_nearly_nothing(name, channels):
    mask = (torch.rand(2, channels, 16, 16) > 0.5).float()
    loss = LesionAndComplementLoss(name)
    assert loss((mask * 2 - 1) * 20, mask).item() == pytest.approx(0, abs=1e-3)
    assert loss((1 - mask * 2) * 20, mask).item() > 0.5


def test_tversky_punishes_a_missed_lesion_more_than_a_false_one():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    missed, false = mask.clone(), mask.clone()
    missed[..., 4:8], false[..., 8:12] = 0, 1
    tversky, dice = (
        [LesionAndComplementLoss(name)(wrong * 40 - 20, mask).item() for wrong in (missed, false)]
        for name in ("tversky", "dice")
    )
    assert tversky[0] > tversky[1] + 0.02
    assert dice[0] == pytest.approx(dice[1], abs=1e-4)


@pytest.mark.parametrize("name", ["dice", "generalized_dice"])
def test_focal_part_sees_the_probability_of_the_sigmoid(name):
    torch.manual_seed(0)
    logits, mask = torch.randn(2, 1, 16, 16), (torch.rand(2, 1, 16, 16) > 0.6).float()
    probability = torch.where(mask > 0, logits.sigmoid(), 1 - logits.sigmoid())
    # MONAI takes the mean over both channels, one of which is zero.
    focal = (-((1 - probability) ** 2) * probability.log()).mean() / 2
    both, alone = (LesionAndComplementLoss(loss)(logits, mask) for loss in (f"{name}_focal", name))
    assert (both - alone).item() == pytest.approx(focal.item(), rel=1e-4)


def test_unknown_segmentation_loss_is_refused():
    with pytest.raises(ValueError, match="segmentation_loss: found 'jaccard', expected one of generalized_dice"):
        LesionAndComplementLoss("jaccard")


def test_only_annotated_samples_count():
    torch.manual_seed(0)
    pred, label = prediction(), batch(classification=[True, False, False, True], segmentation=[False, True, False, False])
    loss = MultiTaskLoss(some_tasks())
    loss(pred, label).backward()
    assert loss.terms.keys() == {"classification", "segmentation", "reconstruction"}
    assert pred["classification"].grad.abs().sum(1).gt(0).tolist() == [True, False, False, True]
    assert pred["segmentation"].grad.abs().sum((1, 2, 3)).gt(0).tolist() == [False, True, False, False]
    expected = F.cross_entropy(pred["classification"][[0, 3]], label["class"][[0, 3]].int().argmax(1))
    assert loss.terms["classification"] == pytest.approx(expected.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_known_class_costs_the_cross_entropy(smoothing):
    torch.manual_seed(0)
    pred, label = prediction(), batch(classification=[True] * 4)
    loss = MultiTaskLoss(some_tasks("classification", label_smoothing=smoothing))(pred, label)
    expected = F.cross_entropy(pred["classification"], label["class"].int().argmax(1), label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_class_known_in_part_costs_minus_log_of_the_summed_probabilities():
    torch.manual_seed(0)
    pred, label = prediction(1), batch(1, classification=[True])
    label["class"] = torch.tensor([[True, False, True]])
    loss = MultiTaskLoss(some_tasks("classification"))(pred, label)
    loss.backward()
    p = pred["classification"].detach().softmax(1)[0]
    assert loss.item() == pytest.approx(-math.log(p[0] + p[2]), abs=1e-6)
    # Towards the two classes in the proportion that they have, and away from the third: none of the two is preferred.
    expected = torch.stack([p[0] - p[0] / (p[0] + p[2]), p[1], p[2] - p[2] / (p[0] + p[2])])
    torch.testing.assert_close(pred["classification"].grad[0], expected)


def test_weights_and_the_sum_of_detection_losses():
    pred, label = prediction(), batch(detection=[True] * 4)
    weighted = MultiTaskLoss(some_tasks({"detection": 2.0, "reconstruction": 0.5}))
    total = weighted(pred, label)
    assert weighted.terms["detection"] == pytest.approx(0.75)
    assert (weighted.terms["detection_mask"], weighted.terms["detection_classifier"]) == (0.5, 0.25)
    assert total.item() == pytest.approx(2 * 0.75 + 0.5 * weighted.terms["reconstruction"])


def test_a_batch_without_any_annotation_gives_zero_and_no_nan():
    pred = prediction()
    loss = MultiTaskLoss(some_tasks("classification", "segmentation", "detection"))
    total = loss({**pred, "detection": {}}, batch())
    total.backward()
    assert total.item() == 0 and loss.terms == {}
    assert pred["segmentation"].grad is None and pred["classification"].grad is None


def test_where_only_other_processes_have_annotated_samples_backward_works(monkeypatch):
    monkeypatch.setattr(idist, "get_world_size", lambda: 2)
    others = torch.tensor([[3.0], [6.0]])  # of another process: three samples, the sum of their losses
    monkeypatch.setattr(idist, "all_reduce", lambda mine: mine + others)
    total = MultiTaskLoss(some_tasks("classification"))(prediction(), batch())
    total.backward()
    assert total.item() == 2


def test_uncertainty_weights_are_trained_and_follow_the_formula():
    pred, label = prediction(), batch(classification=[True] * 4)
    loss = MultiTaskLoss(some_tasks("classification", "reconstruction"), uncertainty=True)
    with torch.no_grad():
        loss.log_variance["classification"].fill_(1.0)
    total = loss(pred, label)
    total.backward()
    expected = math.exp(-1) * loss.terms["classification"] + 0.5 + loss.terms["reconstruction"]
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.log_variance["classification"].grad.abs() > 0
    assert not list(MultiTaskLoss(some_tasks()).parameters())
