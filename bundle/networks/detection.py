"""Mask R-CNN (He et al., arXiv 1703.06870) on an encoder that other heads share, built from torchvision's parts."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from bundle.errors import UserError


class _RoIHeads(RoIHeads):
    """torchvision's, whose mask branch can be left out for images that have boxes but no instance masks."""

    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.with_masks = True  # of the instance: TorchScript sees no attribute of a class

    def has_mask(self) -> bool:
        return self.with_masks


class MaskRCNNHead(nn.Module):
    """Detection of lesions (label 1 against background 0) from a shared feature pyramid.

    Args:
        channels, strides: of the encoder's feature maps, finest first; those of stride 4 to 32 are used.
        fpn_channels, box_features, mask_channels: of the feature pyramid, the box head, the mask head's convolutions.
        anchor_sizes: sides of the anchors in pixels for each level. The default grows by about 1.6: every square lesion of 4
            to 128 px overlaps an anchor with the same centre by an IoU of at least 0.5.
        aspect_ratios: height over width of the anchors.
        score_threshold, detections_per_image: the lowest score of a detection, and the most that are kept.
        nms_threshold: IoU above which the weaker of two detections is dropped.
    """

    computes_losses = True  # so that it takes image and targets, too

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        fpn_channels: int = 128,
        box_features: int = 512,
        mask_channels: Sequence[int] = (128, 128),
        anchor_sizes: Sequence[Sequence[int]] = ((4, 7), (11, 18), (28, 44), (70, 112)),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        score_threshold: float = 0.05,
        nms_threshold: float = 0.3,
        detections_per_image: int = 50,
    ) -> None:
        super().__init__()
        self.levels = [index for index, stride in enumerate(strides) if 4 <= stride <= 32]
        if len(self.levels) != len(anchor_sizes):
            expected = f"{len(self.levels)}, one for each of the encoder's strides from 4 to 32 (it has {list(strides)})"
            raise UserError(f"detection.anchor_sizes: found {len(anchor_sizes)} levels, expected {expected}")
        self.fpn = FeaturePyramidNetwork([channels[level] for level in self.levels], fpn_channels)
        anchors = AnchorGenerator(tuple(map(tuple, anchor_sizes)), (tuple(aspect_ratios),) * len(anchor_sizes))
        self.rpn = RegionProposalNetwork(
            anchors,
            RPNHead(fpn_channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.5, bg_iou_thresh=0.3, batch_size_per_image=128, positive_fraction=0.5,
            pre_nms_top_n={"training": 1000, "testing": 500},
            post_nms_top_n={"training": 500, "testing": 200},
            nms_thresh=0.7,
        )
        names = [str(level) for level in self.levels]
        self.roi_heads = _RoIHeads(
            MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
            TwoMLPHead(fpn_channels * 7 * 7, box_features),
            FastRCNNPredictor(box_features, num_classes=2),
            fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=64, positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=detections_per_image,
            mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
            mask_head=MaskRCNNHeads(fpn_channels, tuple(mask_channels), dilation=1),
            mask_predictor=MaskRCNNPredictor(mask_channels[-1], mask_channels[-1], num_classes=2),
        )

    def forward(self, features: Sequence[torch.Tensor], image: torch.Tensor, targets: Sequence[dict | None] | None = None):
        """Detect, or in training mode compute the losses.

        Args:
            image: (B, C, H, W), whose size the boxes refer to.
            targets: in training, for each image None (not annotated: it takes no part) or {"boxes" (N, 4) x1 y1 x2 y2 in
                pixels, x = column, "labels" (N,) ones, and where annotated "masks" (N, H, W) uint8}.

        Returns:
            In training the losses of Mask R-CNN: {} if no image is annotated, no "loss_mask" if none has masks. Otherwise, for
            each image, {"boxes" (N, 4), "labels" (N,), "scores" (N,) descending, "masks" (N, 1, H, W) probabilities}.
        """
        if not self.training:
            return self.detect(self.pyramid(features), image)
        if targets is None:
            raise UserError("targets: found None, expected a list with one entry for each image, in training mode")
        total, losses = sum(target is not None for target in targets), {}
        for with_masks in (True, False):  # apart, since torchvision wants masks of all images or of none
            rows = [i for i, target in enumerate(targets) if target is not None and ("masks" in target) == with_masks]
            if rows:
                self.roi_heads.with_masks = with_masks
                pyramid = self.pyramid([feature[rows] for feature in features])
                _, part = self._heads(pyramid, image[rows], [targets[row] for row in rows])
                for name, value in part.items():
                    share = 1.0 if name == "loss_mask" else len(rows) / total
                    losses[name] = losses.get(name, 0.0) + share * value
        self.roi_heads.with_masks = True
        return losses

    def pyramid(self, features: Sequence[torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
        """Feature pyramid, finest first, by the number of the encoder's level: (B, fpn_channels, H / stride, W / stride)."""
        return self.fpn(OrderedDict((str(level), features[level]) for level in self.levels))

    def detect(self, pyramid: OrderedDict[str, torch.Tensor], image: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Detect from the feature pyramid, as `forward` does in evaluation mode."""
        detections, _ = self._heads(pyramid, image, None)
        for detection in detections:
            detection["masks"] = paste_masks_in_image(detection["masks"], detection["boxes"], image.shape[-2:])
        return detections

    def _heads(self, pyramid, image, targets):
        sizes = [tuple(image.shape[-2:])] * len(image)
        proposals, rpn_losses = self.rpn(ImageList(image, sizes), pyramid, targets)
        detections, roi_losses = self.roi_heads(pyramid, proposals, sizes, targets)
        return detections, {**rpn_losses, **roi_losses}
