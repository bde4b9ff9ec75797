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
from bundle.names import DETECTION, SEGMENTATION


class TaskView(nn.Module):
    """One task of a network as a network of its own: from an image to one tensor, as MONAI's bundle commands expect it.

    The parameters are those of the network, under the same names. A state_dict of the whole network fits too: what belongs
    to the other heads is passed over.

    Args:
        network: whose encoder and head are used, not copied.
        task: one of the network's whose answer is a tensor, so not detection.

    Raises:
        UserError: for another task.
    """

    def __init__(self, network: MultiTaskNet, task: str = SEGMENTATION) -> None:
        super().__init__()
        possible = [name for name in network.heads if name != DETECTION]
        if task not in possible:
            raise UserError(f"export_task: found {task!r}, expected one of {', '.join(possible)}")
        self.encoder = network.encoder
        self.heads = nn.ModuleDict({task: network.heads[task]})
        self.register_load_state_dict_pre_hook(_pass_over_other_heads)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Image (B, C, H, W) to logits (B, num_classes), lesion logits or a slice (B, channels, H, W)."""
        answer = image
        for head in self.heads.values():  # of one: TorchScript takes a head out of a dictionary by no other name
            answer = head(self.encoder(image))
        return answer


class TensorView(nn.Module):
    """All tasks of a network, from an image to a list of tensors, for export to TorchScript and ONNX.

    The parameters are those of the network. A state_dict of the network fits, also one with heads it does not have.

    Args:
        network: whose encoder and heads are used, not copied.
    """

    def __init__(self, network: MultiTaskNet) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.heads = nn.ModuleDict({task: head for task, head in network.heads.items() if task != DETECTION})
        self.detection = _DetectionView(network.heads[DETECTION]) if DETECTION in network.heads else None
        self.register_load_state_dict_pre_hook(_rename_detection)
        self.register_load_state_dict_pre_hook(_pass_over_other_heads)

    def forward(self, image: torch.Tensor) -> List[torch.Tensor]:
        """Answer every task, in evaluation mode.

        Args:
            image: (B, C, H, W) in [0, 1]; H and W are multiples of the encoder's deepest stride, which is not checked.

        Returns:
            Of the tasks that the network has, in this order: classification, logits (B, num_classes); segmentation, logits
            (B, channels, H, W); reconstruction, (B, C, H, W); and of detection four tensors for the N detections in the
            batch, image by image and by descending score: rows (N,) int64, the image of each; boxes (N, 4), x1 y1 x2 y2 in
            pixels, x = column; scores (N,); masks (N, 1, H, W), probabilities.
        """
        features = self.encoder(image)
        answers = [head(features) for head in self.heads.values()]
        if self.detection is not None:
            answers += self.detection(image, features)
        return answers


class _DetectionView(nn.Module):
    """`MaskRCNNHead` in evaluation mode, in the words that TorchScript knows."""

    def __init__(self, head: MaskRCNNHead) -> None:
        super().__init__()
        self.levels = list(head.levels)
        self.fpn, self.rpn, self.roi_heads = head.fpn, head.rpn, head.roi_heads

    def forward(self, image: torch.Tensor, features: List[torch.Tensor]) -> List[torch.Tensor]:
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


def _rename_detection(view: TensorView, weights: dict, prefix: str, *_) -> None:
    start = f"{prefix}heads.{DETECTION}."
    if view.detection is not None:
        for key in [key for key in weights if key.startswith(start)]:
            weights[f"{prefix}{DETECTION}.{key.removeprefix(start)}"] = weights.pop(key)


def _pass_over_other_heads(view: TaskView | TensorView, weights: dict, prefix: str, *_) -> None:
    weights.pop(f"{prefix}_extra_state", None)  # the description of the whole network
    for key in [key for key in weights if key.startswith(f"{prefix}heads.")]:
        if key.removeprefix(f"{prefix}heads.").split(".")[0] not in view.heads:
            del weights[key]
