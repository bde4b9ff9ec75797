"""Several networks that answer as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torchvision.ops import nms

from bundle.errors import UserError
from bundle.networks.multitask import MultiTaskNet
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS


class EnsembleNet(nn.Module):
    """Mean of the answers of several networks, each task by those that have it; for evaluation alone.

    Probabilities of classification and segmentation are averaged, as in deep ensembles (Lakshminarayanan et al., arXiv
    1612.01474), and so are reconstructions. Detections are pooled, and of overlapping ones the surest is kept.

    Args:
        members: networks, which are set to evaluation mode.
        nms_threshold: IoU above which the weaker of two detections is dropped.

    Raises:
        UserError: if there is no member.
    """

    def __init__(self, members: Sequence[MultiTaskNet], nms_threshold: float = 0.3) -> None:
        super().__init__()
        if not members:
            raise UserError("members: found none, expected one or more networks")
        self.members = nn.ModuleList(members).eval()
        self.nms_threshold = nms_threshold

    def forward(
        self,
        image: torch.Tensor,
        targets: Sequence[dict | None] | None = None,
        annotated: Mapping[str, torch.Tensor] | None = None,
    ) -> dict:
        """Answers of `MultiTaskNet.forward` in evaluation mode, without embedding; logits are those of the mean probability."""
        answers = [member(image, targets, annotated) for member in self.members]
        join = {
            CLASSIFICATION: lambda parts: torch.stack(parts).softmax(2).mean(0).log(),
            SEGMENTATION: lambda parts: torch.stack(parts).sigmoid().mean(0).logit(eps=1e-6),
            RECONSTRUCTION: lambda parts: torch.stack(parts).mean(0),
            DETECTION: lambda parts: [self._pool(found) for found in zip(*parts)],
        }
        by_task = {task: [answer[task] for answer in answers if task in answer] for task in TASKS}
        return {task: join[task](parts) for task, parts in by_task.items() if parts}

    def _pool(self, found: Sequence[dict | None]) -> dict | None:
        if found[0] is None:  # not annotated, so not asked
            return None
        pooled = {name: torch.cat([detections[name] for detections in found]) for name in found[0]}
        kept = nms(pooled["boxes"], pooled["scores"], self.nms_threshold)  # descending by score
        return {name: values[kept] for name, values in pooled.items()}
