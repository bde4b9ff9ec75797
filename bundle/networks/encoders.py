"""Encoders by name: every backbone becomes a pyramid of feature maps, finest first."""

from __future__ import annotations

import difflib
from pathlib import Path

import timm
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.vgg import cfgs, make_layers


class VGGEncoder(nn.Module):
    """VGG-13 without its classifier (Simonyan and Zisserman, arXiv 1409.1556), with torchvision's parameter names.

    The pyramid holds the feature maps before each of the five poolings (strides 1 to 16) and after the last (32).

    Args:
        batch_norm: batch normalisation after every convolution.
        in_channels: channels of the image.
        width: share of the channels of VGG-13, each rounded to at least 8.
    """

    strides = (1, 2, 4, 8, 16, 32)

    def __init__(self, batch_norm: bool = True, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        layers = [c if c == "M" else max(8, round(c * width)) for c in cfgs["B"]]
        self.features = make_layers(layers, batch_norm=batch_norm)
        if in_channels != 3:
            self.features[0] = nn.Conv2d(in_channels, layers[0], kernel_size=3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        before_pool = [layers[i - 1] for i, layer in enumerate(layers) if layer == "M"]
        self.channels = (*before_pool, before_pool[-1])

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        pyramid, x = [], image
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                pyramid.append(x)
            x = layer(x)
        return [*pyramid, x]

    def load_rgb(self, weights: dict[str, torch.Tensor], source: str) -> None:
        """Load torchvision's weights of the same VGG; its RGB filters are summed for a grey image."""
        weights = {key: value for key, value in weights.items() if key.startswith("features.")}
        first, own = weights.get("features.0.weight"), self.features[0].weight
        if first is not None and first.shape[1] == 3 and own.shape[1] == 1:
            weights["features.0.weight"] = first.sum(1, keepdim=True)
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"pretrained: {source} does not fit this VGG: {reason}") from None


class TimmEncoder(nn.Module):
    """Any convolutional model of timm that offers a feature pyramid.

    Args:
        name: of the model in timm.
        in_channels: channels of the image; timm folds pretrained RGB filters itself.
        pretrained: False, True (downloads) or a file of weights for the whole model.
    """

    def __init__(self, name: str, in_channels: int = 1, pretrained: bool | str = False) -> None:
        super().__init__()
        overlay = {"pretrained_cfg_overlay": {"file": pretrained}} if isinstance(pretrained, str) else {}
        self.model = timm.create_model(
            name, features_only=True, in_chans=in_channels, pretrained=bool(pretrained), **overlay
        )
        self.channels = tuple(self.model.feature_info.channels())
        self.strides = tuple(self.model.feature_info.reduction())

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return self.model(image)


def build_encoder(
    backbone: str = "vgg13_bn", in_channels: int = 1, width: float = 1.0, pretrained: bool | str = False
) -> nn.Module:
    """Make the encoder of a name.

    Args:
        backbone: vgg13, vgg13_bn, or a timm name with a feature pyramid (resnet50, densenet121, efficientnet_b0 …).
        in_channels: channels of the image.
        width: share of the channels, VGG only.
        pretrained: False for fresh weights, True to download ImageNet weights, or a file of RGB weights.

    Returns:
        Module from (B, in_channels, H, W) to a list of feature maps, finest first, with `channels` and `strides`.

    Raises:
        ValueError: for an unknown backbone, one without a pyramid, or a width it does not take.
        FileNotFoundError: if `pretrained` names no file.
    """
    if isinstance(pretrained, str) and not Path(pretrained).is_file():
        raise FileNotFoundError(f"pretrained: {pretrained}: no such file")
    if backbone in ("vgg13", "vgg13_bn"):
        encoder = VGGEncoder(backbone == "vgg13_bn", in_channels, width)
        if pretrained:
            if isinstance(pretrained, str):
                weights = torch.load(pretrained, map_location="cpu", weights_only=True)
            else:
                weights = get_model(backbone, weights="DEFAULT").state_dict()
            encoder.load_rgb(weights, str(pretrained))
        return encoder
    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, ["vgg13", "vgg13_bn", *timm.list_models()], n=3)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise ValueError(f"backbone: found {backbone!r}, expected vgg13, vgg13_bn or a model name of timm{hint}")
    if width != 1.0:
        raise ValueError(f"width: found {width} with backbone {backbone}, expected 1.0; only vgg13 and vgg13_bn take a width")
    try:
        return TimmEncoder(backbone, in_channels, pretrained)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"backbone: {backbone} gives no feature pyramid or takes no such weights ({reason})") from None
