"""Test-time flips: the answers for an image and for its mirror image, joined."""

from __future__ import annotations

import torch
from monai.inferers import Inferer
from torchvision.ops import nms

from bundle.tasks import CLASSIFICATION, DETECTION, EMBEDDING


class FlipInferer(Inferer):
    """Answer of the network for images and their left-right mirror images, which costs twice the time.

    A chest mirrored left to right still looks like a chest; one turned upside down does not, hence no other flip.
    Class probabilities, the logits of pixels, the rebuilt image and the embedding are averaged. Detections are united and
    the weaker of two that overlap is dropped.

    Args:
        nms_threshold: IoU above which the weaker of two detections is dropped: that of the detection head.
    """

    def __init__(self, nms_threshold: float = 0.3) -> None:
        self.nms_threshold = nms_threshold

    def __call__(self, inputs: torch.Tensor, network, *args, **kwargs) -> dict:
        """Call the network with `inputs` (B, C, H, W) and with their mirror images along W.

        Returns:
            Dictionary of `MultiTaskNet.forward` in evaluation mode. Its classification is the logarithm of the mean
            probabilities, so that their softmax gives these.
        """
        answers, mirrored = (network(image, *args, **kwargs) for image in (inputs, inputs.flip(-1)))
        return {key: self._join(key, answers[key], mirrored[key], inputs.shape[-1]) for key in answers}

    def _join(self, key: str, answer, mirrored, width: int):
        if key == DETECTION:
            return [None if one is None else self._unite(one, other, width) for one, other in zip(answer, mirrored)]
        if key == CLASSIFICATION:
            return torch.logaddexp(answer.log_softmax(1), mirrored.log_softmax(1)) - torch.log(torch.tensor(2.0))
        return (answer + (mirrored if key == EMBEDDING else mirrored.flip(-1))) / 2

    def _unite(self, detection: dict, mirrored: dict, width: int) -> dict:
        boxes = mirrored["boxes"]
        back = {**mirrored, "boxes": torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)}
        back["masks"] = mirrored["masks"].flip(-1)
        united = {key: torch.cat([detection[key], back[key]]) for key in detection}
        kept = nms(united["boxes"], united["scores"], self.nms_threshold)  # strongest first
        return {key: value[kept] for key, value in united.items()}
