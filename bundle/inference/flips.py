"""Test-time flips: the answers for an image and for its mirror image, joined."""

from __future__ import annotations

import math

import torch
from monai.inferers import Inferer
from torch.nn.functional import one_hot
from torchvision.ops import box_iou, nms

from bundle.errors import UserError
from bundle.names import CLASSIFICATION, DETECTION, EMBEDDING


class FlipInferer(Inferer):
    """Answer of the network for images and their left-right mirror images, at twice the cost.

    A chest mirrored left to right still looks like a chest; one turned upside down does not, hence no other flip.
    Class probabilities, the logits of pixels and the rebuilt images are averaged. Detections that overlap are fused
    (weighted boxes fusion: Solovyev et al., arXiv 1910.13302): boxes and masks are averaged, weighted by the scores, and
    the score is the mean of both answers, 0 where one has no such detection. The embedding is that of the image itself,
    because the reference it is compared with knows no mirror images.

    Args:
        iou_threshold: overlap above which detections are the same lesion.

    Raises:
        UserError: if the threshold is out of range.
    """

    def __init__(self, iou_threshold: float = 0.3) -> None:
        if not 0 < iou_threshold <= 1:
            raise UserError(f"iou_threshold: found {iou_threshold}, expected a number above 0, at most 1")
        self.iou_threshold = iou_threshold

    def __call__(self, inputs: torch.Tensor, network, *args, **kwargs) -> dict:
        """Call the network, in evaluation mode, with `inputs` (B, C, H, W) and with their mirror images along W.

        Returns:
            Dictionary of `MultiTaskNet.forward` in evaluation mode. Its classification is the logarithm of the mean
            probabilities, so that their softmax gives these.
        """
        answer, mirrored = (network(image, *args, **kwargs) for image in (inputs, inputs.flip(-1)))
        return {key: self._join(key, answer[key], mirrored[key], inputs.shape[-1]) for key in answer}

    def _join(self, key: str, answer, mirrored, width: int):
        if key == EMBEDDING:
            return answer
        if key == CLASSIFICATION:
            return torch.logaddexp(answer.log_softmax(1), mirrored.log_softmax(1)) - math.log(2)
        if key == DETECTION:  # None for an image the head was not applied to
            return [None if one is None else self._fuse(one, _mirror(two, width)) for one, two in zip(answer, mirrored)]
        return (answer + mirrored.flip(-1)) / 2

    def _fuse(self, one: dict, two: dict) -> dict:
        both = {key: torch.cat([one[key], two[key]]) for key in one}
        strongest = nms(both["boxes"], both["scores"], self.iou_threshold)
        if not len(strongest):
            return one
        # Every detection belongs to the strongest one that it overlaps most; nms left none without.
        owner = box_iou(both["boxes"][strongest], both["boxes"]).argmax(0)
        shares = one_hot(owner, len(strongest)).T * both["scores"]  # (fused, found)
        split = shares.split([len(one["scores"]), len(two["scores"])], 1)
        scores = sum(part.amax(1) for part in split if part.shape[1]) / 2
        shares = shares / shares.sum(1, keepdim=True)
        order = scores.argsort(descending=True)
        return {
            "boxes": (shares @ both["boxes"])[order],
            "labels": both["labels"][strongest][order],
            "scores": scores[order],
            "masks": torch.einsum("fn,nchw->fchw", shares, both["masks"])[order],
        }


def _mirror(detection: dict, width: int) -> dict:
    x1, y1, x2, y2 = detection["boxes"].unbind(1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], 1)
    return {**detection, "boxes": boxes, "masks": detection["masks"].flip(-1)}
