"""Several networks that answer as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from bundle.errors import UserError
from bundle.networks.multitask import MultiTaskNet


class EnsembleNet(nn.Module):
    """Mean of the answers of several networks, each task by those that have it; for evaluation alone.

    Each task says how its answers are joined (`bundle.tasks.Task.join_members`): probabilities are averaged, as in deep
    ensembles (Lakshminarayanan et al., arXiv 1612.01474), detections pooled.

    Args:
        members: networks, which are set to evaluation mode.

    Raises:
        UserError: if there is no member.
    """

    def __init__(self, members: Sequence[MultiTaskNet]) -> None:
        super().__init__()
        if not members:
            raise UserError("members: found none, expected one or more networks")
        self.members = nn.ModuleList(members).eval()

    def forward(
        self,
        image: torch.Tensor,
        targets: Mapping[str, Sequence] | None = None,
        annotated: Mapping[str, torch.Tensor] | None = None,
    ) -> dict:
        """Answers of `MultiTaskNet.forward` in evaluation mode, without embedding."""
        answers = [member(image, targets, annotated) for member in self.members]
        tasks = {name: task for member in self.members for name, task in member.tasks.items()}
        by_task = {name: [answer[name] for answer in answers if name in answer] for name in tasks}
        return {name: tasks[name].join_members(parts) for name, parts in by_task.items() if parts}
