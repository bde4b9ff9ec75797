"""Test-time flips: what is mirrored comes back mirrored, and the joined answer is the mean."""

import pytest
import torch
from some_tasks import some_network, some_tasks

from bundle.inference.flips import FlipInferer
from bundle.names import CLASSIFICATION, DETECTION, EMBEDDING, RECONSTRUCTION, SEGMENTATION, TASKS

WIDTH = 40


def detection(*rows):
    """Detections of (x1, y1, x2, y2, score), each with a mask that fills the left half of its box."""
    boxes = torch.tensor([row[:4] for row in rows], dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(rows), 1, 20, WIDTH)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist()):
        mask[:, y1:y2, x1 : (x1 + x2) // 2] = 1
    scores = torch.tensor([row[4] for row in rows])
    return {"boxes": boxes, "labels": torch.ones(len(rows), dtype=torch.int64), "scores": scores, "masks": masks}


def mirror(found):
    boxes = found["boxes"]
    boxes = torch.stack([WIDTH - boxes[:, 2], boxes[:, 1], WIDTH - boxes[:, 0], boxes[:, 3]], 1)
    return {**found, "boxes": boxes, "masks": found["masks"].flip(-1)}


def fuse(straight, of_mirror_image):
    """Joined detections where the network finds these, both given as they lie in the image itself."""
    answers = iter([{DETECTION: [straight]}, {DETECTION: [of_mirror_image and mirror(of_mirror_image)]}])
    return FlipInferer(some_tasks())(torch.zeros(1, 1, 20, WIDTH), lambda image: next(answers))[DETECTION][0]


def test_maps_come_back_where_they_were():
    image = torch.rand(2, 1, 20, WIDTH)
    offset = torch.linspace(0, 1, WIDTH)  # of a network that is not symmetric
    answer = FlipInferer(some_tasks())(image, lambda x: {SEGMENTATION: 3 * x + offset, RECONSTRUCTION: x})
    torch.testing.assert_close(answer[RECONSTRUCTION], image)
    torch.testing.assert_close(answer[SEGMENTATION], 3 * image + 0.5)


def test_class_probabilities_are_averaged_and_the_embedding_is_that_of_the_image():
    logits = [torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[5.0, -2.0, 0.0]])]
    answers = iter([{CLASSIFICATION: row, EMBEDDING: row} for row in logits])
    answer = FlipInferer(some_tasks())(torch.zeros(1, 1, 8, 8), lambda image: next(answers))
    mean = (logits[0].softmax(1) + logits[1].softmax(1)) / 2
    torch.testing.assert_close(answer[CLASSIFICATION].softmax(1), mean)
    torch.testing.assert_close(answer[CLASSIFICATION].exp(), mean)
    assert answer[EMBEDDING] is logits[0]


def test_a_lesion_that_both_find_is_one_with_the_weighted_mean_of_boxes_and_masks():
    found = fuse(detection((4, 2, 12, 10, 0.9)), detection((6, 2, 14, 10, 0.3)))
    torch.testing.assert_close(found["boxes"], torch.tensor([[4.5, 2.0, 12.5, 10.0]]))
    torch.testing.assert_close(found["scores"], torch.tensor([0.6]))
    # Columns 4 to 7 are in the stronger mask, 6 to 9 in the weaker one.
    row = found["masks"][0, 0, 5]
    torch.testing.assert_close(row[3:11], torch.tensor([0, 0.75, 0.75, 1, 1, 0.25, 0.25, 0]))
    assert found["labels"].tolist() == [1]


def test_a_lesion_that_one_finds_has_half_its_score_and_the_order_is_by_score():
    found = fuse(detection((0, 0, 8, 8, 0.9)), detection((20, 4, 30, 14, 0.95), (1, 0, 9, 8, 0.5)))
    torch.testing.assert_close(found["scores"], torch.tensor([0.7, 0.475]))
    torch.testing.assert_close(found["boxes"][1], torch.tensor([20.0, 4.0, 30.0, 14.0]))
    assert found["masks"][1, 0, 6, 20:30].tolist() == [1] * 5 + [0] * 5


@pytest.mark.parametrize("sides", [(0, 0), (0, 1), (1, 0)])
def test_nothing_found_on_one_side_or_both(sides):
    straight, mirrored = (detection(*[(4, 2, 12, 10, 0.8)] * side) for side in sides)
    found = fuse(straight, mirrored)
    assert len(found["boxes"]) == max(sides) and found["masks"].shape == (max(sides), 1, 20, WIDTH)
    torch.testing.assert_close(found["scores"], torch.full([max(sides)], 0.4))


def test_an_image_that_is_not_asked_about_stays_without_answer():
    assert fuse(None, None) is None


def test_a_mirrored_image_gets_the_mirrored_answer_of_a_real_network():
    torch.manual_seed(0)
    small = {"fpn_channels": 8, "box_features": 16, "mask_channels": (8,), "detections_per_image": 5}
    network = some_network(TASKS, image_size=64, decoder_channels=(16, 8), detection=small).eval()
    network.heads[DETECTION].roi_heads.box_predictor.cls_score.weight.data *= 30
    image = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        answer, mirrored = FlipInferer(some_tasks())(image, network), FlipInferer(some_tasks())(image.flip(-1), network)
    torch.testing.assert_close(answer[CLASSIFICATION], mirrored[CLASSIFICATION])
    torch.testing.assert_close(answer[SEGMENTATION], mirrored[SEGMENTATION].flip(-1))
    for one, two in zip(answer[DETECTION], mirrored[DETECTION]):
        assert len(one["boxes"]) > 0
        torch.testing.assert_close(one["scores"], two["scores"])
        torch.testing.assert_close(one["boxes"][:, [1, 3]], two["boxes"][:, [1, 3]], rtol=0, atol=1e-3)
        torch.testing.assert_close(one["boxes"][:, 0], 64 - two["boxes"][:, 2], rtol=0, atol=1e-3)
        torch.testing.assert_close(one["masks"], two["masks"].flip(-1), rtol=0, atol=1e-3)
