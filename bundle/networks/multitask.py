"""The network: one shared encoder and a head for every task asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from inspect import signature

import torch
from torch import nn
from torch.nn import functional

import bundle
from bundle.errors import UserError
from bundle.networks.detection import MaskRCNNHead
from bundle.networks.encoders import Encoder
from bundle.names import EMBEDDING


FORMAT = 1  # of the description in a state_dict


class MultiTaskNet(nn.Module):
    """Shared encoder with the heads of several tasks (arXiv 2308.01137); `bundle.tasks.build_network` makes it.

    Its state_dict describes it: `_extra_state` holds the `description` as JSON in UTF-8, as a uint8 tensor.

    Args:
        tasks: `bundle.tasks.Task` that make the heads, of the arguments below. A task that is absent has no parameters.
        backbone: see `bundle.networks.Encoder`, as for `pretrained`.
        classes: names of the classes of the classification.
        segmentation_classes: names of the channels of the segmentation.
        in_channels: of the image.
        image_size: side of the images it is made for, in pixels.
        window: lowest and highest value, in HU, that an image in HU shows it as 0 and 1.
        cropping: what is cut out of a slice before it is resized: None or "body".
        decoder_channels: of both U-Net decoders, deepest first: see `DenseHead`.
        skips: skip connections of the reconstruction decoder; the segmentation decoder always has them.
        dropout: of the classification head.
        detection: further arguments of `MaskRCNNHead`.
        decoder_dropout: of the segmentation decoder; 0 in the curriculum, more for Monte-Carlo dropout in MONAI Label.
        sources: names of the data sources that it was trained on.
        temperature: that its class logits were divided by, if they were.

    Attributes:
        description: the arguments above that do not change from use to use, with `FORMAT` and the version of the package.

    Raises:
        UserError: for an unknown backbone or argument of the detection, or an image size that the encoder's stride
            does not divide.
    """

    def __init__(
        self,
        tasks: Sequence,
        backbone: str = "vgg13_bn",
        classes: Sequence[str] = ("other", "COVID-19", "lung cancer"),
        segmentation_classes: Sequence[str] = ("lesion",),
        in_channels: int = 1,
        image_size: int = 256,
        window: Sequence[float] = (-1350, 150),
        cropping: str | None = None,
        pretrained: bool | str = False,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        skips: bool = True,
        dropout: float = 0.2,
        detection: Mapping | None = None,
        decoder_dropout: float = 0.0,
        sources: Sequence[str] = (),
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        options = {name: value.default for name, value in signature(MaskRCNNHead).parameters.items()}
        known = [name for name in options if name not in ("channels", "strides")]
        if unknown := [name for name in detection or {} if name not in known]:
            raise UserError(f"detection: found {', '.join(unknown)}, expected some of {', '.join(known)}")
        detection = {**{name: options[name] for name in known}, **(detection or {})}
        self.description = {
            "format": FORMAT,
            "version": bundle.__version__,
            "tasks": [task.path for task in tasks],
            "backbone": backbone,
            "classes": classes,
            "segmentation_classes": segmentation_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "window": window,
            "cropping": cropping,
            "decoder_channels": decoder_channels,
            "skips": skips,
            "dropout": dropout,
            "detection": detection,
            "sources": sources,
            "temperature": temperature,
        }
        self.description = json.loads(json.dumps(self.description))  # tuples are lists, as when it is read again
        self.in_channels = in_channels
        self.encoder = Encoder(backbone, in_channels, pretrained)
        channels, strides = self.encoder.channels, self.encoder.strides
        self.stride = strides[-1]
        self.tasks = {task.name: task for task in tasks}
        self.heads = nn.ModuleDict({name: task.head(channels, strides, in_channels) for name, task in self.tasks.items()})
        self._check((1, in_channels, image_size, image_size))
        self.register_load_state_dict_pre_hook(_describe_if_it_does_not)

    def get_extra_state(self) -> torch.Tensor:
        """The description as bytes, for the state_dict."""
        return encode(self.description)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take over from a state_dict what its weights were made of; what the network is stays.

        Raises:
            UserError: if the names of its outputs are others.
        """
        found = decode(state)
        for name in ("classes", "segmentation_classes"):
            if found[name] != self.description[name]:
                raise UserError(f"{name}: found weights for {found[name]}, expected weights for {self.description[name]}")
        self.description |= {name: found[name] for name in ("sources", "temperature")}

    def forward(
        self,
        image: torch.Tensor,
        targets: Mapping[str, Sequence] | None = None,
        annotated: Mapping[str, torch.Tensor] | None = None,
    ) -> dict:
        """Answer every active task in one pass.

        Args:
            image: (B, in_channels, H, W) in [0, 1]; H and W are multiples of the encoder's deepest stride.
            targets: task -> what a head that computes its losses itself needs in training mode: see `MaskRCNNHead.forward`.
            annotated: task -> bool (B,): the head of a task is applied to these images alone, which saves time and keeps
                its batch statistics to them. The rows of other images hold zeros (detection: None), and a task without
                any image is absent. Without it every head is applied to every image.

        Returns:
            By task, what its head gives: classification, logits (B, num_classes); segmentation, logits (B, channels, H, W);
            reconstruction, (B, in_channels, H, W); detection, losses in training mode, otherwise a list of detections. In
            evaluation mode also embedding, see `embed`.

        Raises:
            UserError: if the channels or the size of the image do not fit, naming the nearest size that does.
        """
        self._check(tuple(image.shape))
        features, output = self.encoder(image), {}
        for task, head in self.heads.items():
            own_losses = getattr(head, "computes_losses", False)
            if own_losses and self.training:
                output[task] = head(features, image, targets and targets[task])
                continue
            rows = slice(None) if annotated is None or annotated[task].all() else annotated[task].nonzero()[:, 0]
            part = [feature[rows] for feature in features]
            if len(part[0]):
                answer = head(part, image[rows]) if own_losses else head(part)
                output[task] = answer if len(answer) == len(image) else _spread(answer, rows, len(image))
        return output if self.training else {**output, EMBEDDING: self.embed(features)}

    @staticmethod
    def embed(features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum an image up: its deepest features (B, C, h, w), averaged over each quarter of the image: (B, 4 C)."""
        return functional.adaptive_avg_pool2d(features[-1], 2).flatten(1)

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise UserError(f"image: found shape {shape}, expected (batch, {self.in_channels}, rows, columns)")
        if shape[2] % self.stride or shape[3] % self.stride or not all(shape[2:]):
            fit = tuple(max(1, round(side / self.stride)) * self.stride for side in shape[2:])
            raise UserError(
                f"image: found {shape[2]} x {shape[3]} pixels, expected multiples of {self.stride}; use {fit[0]} x {fit[1]} "
                "(image_size)"
            )


def freeze_encoder(network: MultiTaskNet) -> MultiTaskNet:
    """Keep the encoder as it is in training, batch statistics included, so that heads that are not trained still fit it.

    Args:
        network: changed in place.

    Returns:
        The same.

    Raises:
        UserError: if `network` is not a `MultiTaskNet`; network_def of inference.json is a view of one.
    """
    if not isinstance(network, MultiTaskNet):
        raise UserError(
            f"network: found a {type(network).__name__} to freeze, expected the network of train.json; "
            "frozen_encoder is for training alone, leave it out"
        )
    network.encoder.requires_grad_(False)

    def keep_statistics(network, _) -> None:  # engines set the whole network to training mode in every iteration
        network.encoder.eval()

    network.register_forward_pre_hook(keep_statistics)
    return network


def _spread(answer: torch.Tensor | list, rows: torch.Tensor, size: int) -> torch.Tensor | list:
    """Put the answers for some images of a batch on their rows; the other rows hold zeros, or None in a list."""
    if isinstance(answer, torch.Tensor):
        return answer.new_zeros(size, *answer.shape[1:]).index_copy(0, rows, answer)
    spread = [None] * size
    for row, item in zip(rows.tolist(), answer):
        spread[row] = item
    return spread


def encode(description: Mapping) -> torch.Tensor:
    """A description as JSON in UTF-8: uint8 (bytes,)."""
    return torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)


def decode(state: torch.Tensor) -> dict:
    """The description of `encode`; a mean of equal states, as federated learning makes it, is rounded."""
    return json.loads(bytes(state.cpu().double().round().to(torch.uint8).tolist()))


def _describe_if_it_does_not(network: MultiTaskNet, weights: dict, prefix: str, *_) -> None:
    """Let weights without a description, as version 0.1 wrote them, be loaded by torch itself."""
    weights.setdefault(f"{prefix}_extra_state", network.get_extra_state())
