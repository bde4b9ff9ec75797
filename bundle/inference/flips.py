"""Test-time flips: the answers for an image and for its mirror image, joined."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from monai.inferers import Inferer

from bundle.names import EMBEDDING
from bundle.tasks import Task


class FlipInferer(Inferer):
    """Answer of the network for images and their left-right mirror images, at twice the cost.

    A chest turned upside down would look like no chest, hence no other flip. Each task says how its answers are joined. The
    embedding is that of the image itself, because the reference it is compared with knows no mirror images.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.tasks = {task.name: task for task in tasks}

    def __call__(self, inputs: torch.Tensor, network, *args, **kwargs) -> dict:
        """The dictionary of `MultiTaskNet.forward` in evaluation mode for images (B, C, H, W)."""
        answer, mirrored = (network(image, *args, **kwargs) for image in (inputs, inputs.flip(-1)))
        joined = {EMBEDDING: answer[EMBEDDING]} if EMBEDDING in answer else {}
        for name, task in self.tasks.items():
            if name in answer:
                joined[name] = task.join_views([answer[name], task.mirror(mirrored[name], inputs.shape[-1])])
        return joined
