"""The network: one shared encoder and a head for every task asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from bundle.errors import UserError
from bundle.networks.detection import MaskRCNNHead
from bundle.networks.encoders import build_encoder
from bundle.networks.heads import ClassificationHead, DenseHead
from bundle.names import CLASSIFICATION, DETECTION, EMBEDDING, RECONSTRUCTION, SEGMENTATION, check_tasks


class MultiTaskNet(nn.Module):
    """Shared encoder with heads for classification, segmentation, reconstruction and detection (arXiv 2308.01137).

    Args:
        tasks: names of the active tasks, or a mapping with them as keys. A task that is absent has no parameters.
        backbone: see `bundle.networks.encoders.build_encoder`, as for `width` and `pretrained`.
        num_classes: of the classification.
        segmentation_channels: lesion classes of the segmentation.
        in_channels: of the image.
        image_size: side of the images it is made for, in pixels.
        decoder_channels: of both U-Net decoders, deepest first: see `DenseHead`.
        skips: skip connections of the reconstruction decoder; the segmentation decoder always has them.
        dropout: of the classification head.
        detection: further arguments of `MaskRCNNHead`.
        decoder_dropout: of the segmentation decoder; 0 in the curriculum, more for Monte-Carlo dropout in MONAI Label.

    Raises:
        UserError: for an unknown task, backbone or argument of the detection, or an image size that the encoder's stride
            does not divide.
    """

    def __init__(
        self,
        tasks: Iterable[str],
        backbone: str = "vgg13_bn",
        num_classes: int = 3,
        segmentation_channels: int = 1,
        in_channels: int = 1,
        image_size: int = 256,
        width: float = 1.0,
        pretrained: bool | str = False,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        skips: bool = True,
        dropout: float = 0.2,
        detection: Mapping | None = None,
        decoder_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.encoder = build_encoder(backbone, in_channels, width, pretrained)
        channels, strides = self.encoder.channels, self.encoder.strides
        self.stride = strides[-1]
        known = [name for name in signature(MaskRCNNHead).parameters if name not in ("channels", "strides")]
        if unknown := [name for name in detection or {} if name not in known]:
            raise UserError(f"detection: found {', '.join(unknown)}, expected some of {', '.join(known)}")
        make = {
            CLASSIFICATION: lambda: ClassificationHead(channels[-1], num_classes, dropout=dropout),
            SEGMENTATION: lambda: DenseHead(
                channels, strides, decoder_channels, segmentation_channels, dropout=decoder_dropout
            ),
            RECONSTRUCTION: lambda: DenseHead(channels, strides, decoder_channels, in_channels, skips),
            DETECTION: lambda: MaskRCNNHead(channels, strides, **(detection or {})),
        }
        self.heads = nn.ModuleDict({task: make[task]() for task in check_tasks(tasks)})
        self._check((1, in_channels, image_size, image_size))

    def forward(
        self,
        image: torch.Tensor,
        targets: Sequence[dict | None] | None = None,
        annotated: Mapping[str, torch.Tensor] | None = None,
    ) -> dict:
        """Answer every active task in one pass.

        Args:
            image: (B, in_channels, H, W) in [0, 1]; H and W are multiples of the encoder's deepest stride.
            targets: detection targets, needed in training mode: see `MaskRCNNHead.forward`.
            annotated: task -> bool (B,): the head of a task is applied to these images alone, which saves time and keeps
                its batch statistics to them. The rows of other images hold zeros (detection: None), and a task without
                any image is absent. Without it every head is applied to every image.

        Returns:
            By task: classification, logits (B, num_classes); segmentation, logits (B, channels, H, W); reconstruction,
            (B, in_channels, H, W); detection, losses in training mode, otherwise a list of detections. In evaluation mode
            also embedding, see `embed`.

        Raises:
            UserError: if the channels or the size of the image do not fit, naming the nearest size that does.
        """
        self._check(tuple(image.shape))
        features, output = self.encoder(image), {}
        for task, head in self.heads.items():
            if task == DETECTION and self.training:
                output[task] = head(features, image, targets)
                continue
            rows = slice(None) if annotated is None or annotated[task].all() else annotated[task].nonzero()[:, 0]
            part = [feature[rows] for feature in features]
            if len(part[0]):
                answer = head(part, image[rows]) if task == DETECTION else head(part)
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
        UserError: for what is no `MultiTaskNet`, such as the view of it that inference.json calls network_def.
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


def read_weights(path) -> Mapping[str, torch.Tensor]:
    """State_dict of a network from a file of it, or of a dictionary with one under "network".

    Raises:
        UserError: if there is no such file.
        UserError: if it cannot be read.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train first, or name another one")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on bytes that are no pickle
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}), expected a state_dict saved with torch.save"
        ) from None
    return weights.get("network", weights) if isinstance(weights, Mapping) else {}


def fitting_tasks(network: MultiTaskNet, path) -> list[str]:
    """Tasks of a network whose heads are in a file of weights, of the same shapes."""
    weights = read_weights(path)

    def fits(task: str, head: nn.Module) -> bool:
        return all(
            f"heads.{task}.{key}" in weights and weights[f"heads.{task}.{key}"].shape == value.shape
            for key, value in head.state_dict().items()
        )

    return [task for task, head in network.heads.items() if fits(task, head)]


def load_weights(network: MultiTaskNet, path, strict: bool = False) -> list[str]:
    """Load a state_dict file into the encoder and those heads that both the file and the network have.

    A head that was made for another number of classes is loaded but for its output layer, which stays as it is.

    Args:
        network: the network, changed in place.
        path: of `read_weights`.
        strict: every head of the network must be in the file, for the same classes.

    Returns:
        Names of the parts that were loaded: "encoder" and tasks; "but its output layer" after a task says what was not.

    Raises:
        UserError: if there is no such file.
        UserError: if it is no state_dict, or of another architecture, naming the first parameter that does not fit.
    """
    weights = read_weights(path)
    parts = {"encoder": network.encoder, **network.heads}
    prefixes = {name: "encoder." if name == "encoder" else f"heads.{name}." for name in parts}
    loaded = {}
    for name, module in parts.items():
        prefix = prefixes[name]
        found = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
        if found or name == "encoder" or strict:
            expected = module.state_dict()
            output = {} if strict else _output_of_other_classes(found, expected)
            _check_fit(path, prefix, {**found, **output}, expected)
            loaded[f"{name} but its output layer" if output else name] = module, {**found, **output}
    for module, values in loaded.values():
        module.load_state_dict(values)
    return list(loaded)


def _output_of_other_classes(found: Mapping, expected: Mapping) -> Mapping:
    """Output layer of a head, where the head in a file differs from it in the number of outputs alone; otherwise nothing."""
    weight, bias = output = list(expected)[-2:]
    differ = [key for key in expected if key not in found or found[key].shape != expected[key].shape]
    if differ == output and found.keys() == expected.keys() and found[weight].shape[1:] == expected[weight].shape[1:]:
        return {weight: expected[weight], bias: expected[bias]}
    return {}


def _check_fit(path, prefix: str, found: Mapping, expected: Mapping) -> None:
    for key in [*expected, *found]:
        shapes = [tuple(side[key].shape) if key in side else "absent" for side in (found, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path}: found {prefix}{key} {shapes[0]}, expected {shapes[1]}; it was made with another network: set the "
                "tasks, classes, backbone, width and decoder_channels it was trained with"
            )
