"""Test-time flips: the answers for an image and for its mirror image, joined."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from monai.inferers import Inferer

from bundle.names import EMBEDDING
from bundle.tasks import Task


class FlipInferer(Inferer):
    """The network's answers for images and their left-right mirror images, joined as each task says, at twice the cost.

    A chest turned upside down would look like no chest, hence no other flip. The embedding is that of the image itself, since
    the reference that it is compared with has no mirror images.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.tasks = {task.name: task for task in tasks}

    def __call__(self, inputs: torch.Tensor, network, *args, **kwargs) -> dict:
        answer, mirrored = (network(image, *args, **kwargs) for image in (inputs, inputs.flip(-1)))
        for name, task in self.tasks.items():
            if name in answer:
                answer[name] = task.join_views([answer[name], task.mirror(mirrored[name], inputs.shape[-1])])
        return {name: value for name, value in answer.items() if name in self.tasks or name == EMBEDDING}
