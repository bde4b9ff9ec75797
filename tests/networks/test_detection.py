import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from bundle.errors import UserError
from bundle.networks.detection import MaskRCNNHead

CHANNELS, STRIDES = (8, 8, 8, 8, 8, 8), (1, 2, 4, 8, 16, 32)
SMALL = {"fpn_channels": 16, "box_features": 16, "mask_channels": (8,)}
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}


def features(rows=64, columns=64, batch=2):
    return [torch.rand(batch, c, rows // s, columns // s, requires_grad=True) for c, s in zip(CHANNELS, STRIDES)]


def target(*boxes, masks=False, rows=64, columns=64):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    result = {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}
    if masks:
        result["masks"] = torch.zeros(len(boxes), rows, columns, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(result["masks"], boxes.long().tolist()):
            mask[y1:y2, x1:x2] = 1
    return result


BOX, OTHER = (10, 12, 30, 28), (40, 8, 52, 20)
# [targets of two images, names of the losses, rows that get a gradient]
CASES = {
    "masks": [[target(BOX, masks=True), target(BOX, OTHER, masks=True)], LOSSES | {"loss_mask"}, [True, True]],
    "boxes": [[target(BOX), target(OTHER)], LOSSES, [True, True]],
    "masks and boxes": [[target(BOX, masks=True), target(OTHER)], LOSSES | {"loss_mask"}, [True, True]],
    "a lesion and none": [[target(BOX, masks=True), target(masks=True)], LOSSES | {"loss_mask"}, [True, True]],
    "a lesion and none, no masks": [[target(BOX), target()], LOSSES, [True, True]],
    "negatives only": [[target(), target()], LOSSES, [True, True]],
    "negatives with masks only": [[target(masks=True), target(masks=True)], LOSSES | {"loss_mask"}, [True, True]],
    "one not annotated": [[None, target(BOX, masks=True)], LOSSES | {"loss_mask"}, [False, True]],
    "one not annotated, one negative": [[target(), None], LOSSES, [True, False]],
    "none annotated": [[None, None], set(), [False, False]],
}


@pytest.mark.parametrize(("targets", "names", "rows"), CASES.values(), ids=CASES)
def test_losses_come_from_the_annotated_images_alone(targets, names, rows):
    torch.manual_seed(0)
    head, maps = MaskRCNNHead(CHANNELS, STRIDES, **SMALL), features()
    losses = head(maps, torch.rand(2, 1, 64, 64), targets)
    assert losses.keys() == names
    assert all(torch.isfinite(loss) for loss in losses.values())
    if names:
        sum(losses.values()).backward()
    reached = [any(f.grad is not None and bool(f.grad[row].any()) for f in maps) for row in range(2)]
    assert reached == rows
    assert any(p.grad is not None and p.grad.any() for p in head.parameters()) == bool(names)
    assert (head.roi_heads.mask_head[0][0].weight.grad is not None) == ("loss_mask" in names) and head.roi_heads.with_masks


def test_images_apart_weigh_as_much_as_together():
    """Two images with masks, or one with and one without, give the same mean over images of every loss but the mask's."""
    torch.manual_seed(0)
    head, maps, image = MaskRCNNHead(CHANNELS, STRIDES, **SMALL), features(), torch.rand(2, 1, 64, 64)
    boxes, masks = [target(BOX), target(OTHER)], [target(BOX, masks=True), target(OTHER)]

    def classification(targets):  # enough draws to see through the random choice of proposals
        with torch.no_grad():
            return torch.stack([head(maps, image, targets)["loss_classifier"] for _ in range(8)]).mean()

    torch.testing.assert_close(classification(boxes), classification(masks), rtol=0.1, atol=0.03)


def test_training_without_targets_and_anchors_that_do_not_fit_the_encoder_are_refused():
    with pytest.raises(UserError, match="targets: found None, expected a list with one entry for each image"):
        MaskRCNNHead(CHANNELS, STRIDES, **SMALL)(features(), torch.rand(2, 1, 64, 64))
    with pytest.raises(UserError, match=r"detection.anchor_sizes: found 2 levels, expected 4, .* \(it has \[1, 2, 4, 8, "):
        MaskRCNNHead(CHANNELS, STRIDES, anchor_sizes=((4,), (8,)))


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (32, 128)])
def test_detections(rows, columns):
    torch.manual_seed(0)
    head = MaskRCNNHead(CHANNELS, STRIDES, **SMALL, score_threshold=0.0, detections_per_image=7).eval()
    with torch.no_grad():
        detections = head(features(rows, columns), torch.rand(2, 1, rows, columns))
    assert len(detections) == 2
    for found in detections:
        assert found.keys() == {"boxes", "labels", "scores", "masks"}
        assert 0 < len(found["boxes"]) <= 7
        assert tuple(found["masks"].shape) == (len(found["boxes"]), 1, rows, columns)
        assert (found["labels"] == 1).all() and (found["scores"].diff() <= 0).all()
        assert found["boxes"].min() >= 0 and found["masks"].min() >= 0 and found["masks"].max() <= 1
        assert (found["boxes"] <= torch.tensor([columns, rows, columns, rows])).all()
        assert (found["boxes"][:, 2:] > found["boxes"][:, :2]).all()
    head.roi_heads.score_thresh = 0.9999
    found = head(features(rows, columns), torch.rand(2, 1, rows, columns))[0]
    assert [tuple(found[key].shape) for key in ("boxes", "scores", "masks")] == [(0, 4), (0,), (0, 1, rows, columns)]


def test_a_wide_box_of_a_wide_image_is_learned_as_wide():
    """x is the column: a head overfitted to a wide box at the right of 32 rows and 128 columns finds it there."""
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 32, 128)
    image[..., 10:18, 84:116] = 1
    maps = [torch.nn.functional.avg_pool2d(image, s).repeat(1, 8, 1, 1) for s in STRIDES]
    head = MaskRCNNHead(CHANNELS, STRIDES, **SMALL)
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    for _ in range(60):
        loss = sum(head(maps, image, [target((84, 10, 116, 18), masks=True, rows=32, columns=128)]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = head.eval()(maps, image)[0]
    assert box_iou(found["boxes"][:1], torch.tensor([[84.0, 10, 116, 18]])).item() > 0.6
    mask = found["masks"][0, 0] > 0.5
    rows, columns = mask.nonzero().T
    assert columns.float().std() > rows.float().std() and 84 <= columns.float().mean() <= 116


def anchors_of(head, size=256):
    maps = [torch.zeros(1, 1, size // s, size // s) for s in STRIDES[2:]]
    return head.rpn.anchor_generator(ImageList(torch.zeros(1, 1, size, size), [(size, size)]), maps)[0]


def test_every_square_lesion_of_4_to_128_pixels_has_an_anchor_of_its_size():
    anchors = anchors_of(MaskRCNNHead(CHANNELS, STRIDES, **SMALL))
    sides = torch.arange(4, 128, 0.25)
    centres = anchors.reshape(-1, 2, 2).mean(1)
    nearest = centres[(centres - 128).norm(dim=1).argmin()]  # of an image of 256 pixels; every level has an anchor there
    lesions = torch.cat([nearest - sides[:, None] / 2, nearest + sides[:, None] / 2], 1)
    assert box_iou(lesions, anchors).max(1).values.min() >= 0.5


def test_anchors_have_the_asked_shapes_in_x_y_order():
    head = MaskRCNNHead(CHANNELS, STRIDES, **SMALL, anchor_sizes=((8,), (16,), (32,), (64,)), aspect_ratios=(0.25,))
    sides = (anchors_of(head)[:, 2:] - anchors_of(head)[:, :2]).unique(dim=0)
    expected = [[16, 4], [32, 8], [64, 16], [128, 32]]
    assert sides.tolist() == expected, "height over width of 1/4 is four times as wide as high"
