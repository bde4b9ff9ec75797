"""A network as MONAI's bundle commands and the exporters take it: from an image to tensors, not to a dictionary."""

from __future__ import annotations

from typing import Dict, List  # noqa: UP035 - the names that TorchScript reads

import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image

from bundle.errors import UserError
from bundle.networks.detection import MaskRCNNHead
from bundle.networks.multitask import MultiTaskNet


class _View(nn.Module):
    """Encoder and some heads of a network, not copied and under the same names; takes a state_dict with further heads, too."""

    def __init__(self, network: MultiTaskNet, heads: Dict[str, nn.Module]) -> None:
        super().__init__()
        self.encoder, self.heads = network.encoder, nn.ModuleDict(heads)
        self.register_load_state_dict_pre_hook(_pass_over_other_heads)


def _pass_over_other_heads(view: _View, weights: dict, prefix: str, *_) -> None:
    weights.pop(f"{prefix}_extra_state", None)  # the description of the whole network
    for key in [key for key in weights if key.startswith(f"{prefix}heads.")]:
        if key.removeprefix(f"{prefix}heads.").split(".")[0] not in view.heads:
            del weights[key]


class TaskView(_View):
    """One task of a network as a network of its own: from an image to one tensor, as MONAI's bundle commands expect it."""

    def __init__(self, network: MultiTaskNet, task: str) -> None:
        possible = [name for name, head in network.heads.items() if not isinstance(head, MaskRCNNHead)]
        if task not in possible:
            raise UserError(f"export_task: found {task!r}, expected one of {', '.join(possible)}")
        super().__init__(network, {task: network.heads[task]})

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        answer = image
        for head in self.heads.values():  # of one: TorchScript takes a head out of a dictionary by no other name
            answer = head(self.encoder(image))
        return answer


class TensorView(_View):
    """All tasks of a network, from an image to a list of tensors, for export to TorchScript and ONNX."""

    def __init__(self, network: MultiTaskNet) -> None:
        boxes = {name: _DetectionView(head) for name, head in network.heads.items() if isinstance(head, MaskRCNNHead)}
        super().__init__(network, {**network.heads, **boxes})

    def forward(self, image: torch.Tensor) -> List[torch.Tensor]:
        """Answer every task, in evaluation mode, for images (B, C, H, W) in [0, 1], whose size is not checked.

        Returns:
            Of the tasks that the network has, in its order, the tensor of the head; of detection four tensors for the N
            detections in the batch, image by image and by descending score: rows (N,) int64, the image of each; boxes
            (N, 4), x1 y1 x2 y2 in pixels, x = column; scores (N,); masks (N, 1, H, W), probabilities.
        """
        features = self.encoder(image)
        answers: List[torch.Tensor] = []
        for head in self.heads.values():
            if hasattr(head, "rpn"):
                answers += head(features, image)
            else:
                answers.append(head(features))
        return answers


class _DetectionView(nn.Module):
    """`MaskRCNNHead` in evaluation mode, in the words that TorchScript knows."""

    def __init__(self, head: MaskRCNNHead) -> None:
        super().__init__()
        self.levels = list(head.levels)
        self.fpn, self.rpn, self.roi_heads = head.fpn, head.rpn, head.roi_heads

    def forward(self, features: List[torch.Tensor], image: torch.Tensor) -> List[torch.Tensor]:
        maps: Dict[str, torch.Tensor] = {}
        for level in self.levels:
            maps[str(level)] = features[level]
        pyramid = self.fpn(maps)
        size = (image.shape[2], image.shape[3])
        sizes = [size for _ in range(image.shape[0])]
        proposals, _ = self.rpn(ImageList(image, sizes), pyramid)
        detections, _ = self.roi_heads(pyramid, proposals, sizes)
        rows = torch.cat([torch.full_like(found["labels"], row) for row, found in enumerate(detections)])
        boxes, scores, masks = [torch.cat([found[name] for found in detections]) for name in ("boxes", "scores", "masks")]
        return [rows, boxes, scores, paste_masks_in_image(masks, boxes, size)]
