"""The network: one shared encoder and a head for every task; and several networks that answer as one."""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

import bundle
from bundle.errors import UserError
from bundle.names import EMBEDDING
from bundle.networks.encoders import Encoder

FORMAT = 1  # of the description in a state_dict
# What describes a network, beside what its tasks add, with the defaults of fresh weights.
NETWORK = {
    "backbone": "vgg13_bn",
    "in_channels": 1,
    "image_size": 256,  # side of the square images it is made for
    "window": [-1000, 300],  # HU that an image shows as 0 and 1
    "cropping": None,  # what is cut out of a slice before it is resized: None or "body"
    "sources": [],  # names of the data that it was trained on
}


class MultiTaskNet(nn.Module):
    """Shared encoder with the heads of several tasks (arXiv 2308.01137); `bundle.tasks.build_network` makes it.

    Its state_dict describes it: `_extra_state` holds the `description` as JSON in UTF-8, as a uint8 tensor.

    Args:
        tasks: `bundle.tasks.Task` that make the heads.
        description: values of `NETWORK` and of `described` of the tasks; the attribute adds `FORMAT`, version and tasks.
        pretrained: see `Encoder`.
    """

    def __init__(self, tasks: Sequence, description: Mapping, pretrained: bool | str = False) -> None:
        super().__init__()
        made = {"format": FORMAT, "version": bundle.__version__, "tasks": [task.path for task in tasks], **description}
        self.description = json.loads(json.dumps(made))  # tuples are lists, as when it is read again
        self.in_channels, size = description["in_channels"], description["image_size"]
        self.encoder = Encoder(description["backbone"], self.in_channels, pretrained)
        self.stride = self.encoder.strides[-1]
        self.tasks = {task.name: task for task in tasks}
        shape = self.encoder.channels, self.encoder.strides, self.in_channels
        self.heads = nn.ModuleDict({name: task.head(*shape) for name, task in self.tasks.items()})
        self._check((1, self.in_channels, size, size))
        self.register_load_state_dict_pre_hook(_describe_if_it_does_not)

    def get_extra_state(self) -> torch.Tensor:
        """The description as bytes, for the state_dict."""
        return encode(self.description)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take over from a state_dict what its weights were made of; other names of the outputs are a UserError."""
        found = decode(state)
        for name in (task.outputs for task in self.tasks.values() if task.outputs):
            if found[name] != self.description[name]:
                raise UserError(f"{name}: found weights for {found[name]}, expected weights for {self.description[name]}")
        self.description |= {name: found[name] for name in ("sources", "temperature")}

    def forward(self, image: torch.Tensor, targets: Mapping | None = None, annotated: Mapping | None = None) -> dict:
        """Answer every task in one pass.

        Args:
            image: (B, in_channels, H, W) in [0, 1]; H and W are multiples of the encoder's deepest stride.
            targets: task -> what a head that computes its losses itself needs in training mode: see `MaskRCNNHead`.
            annotated: task -> bool (B,): its head is applied to these images alone, which saves time and keeps its batch
                statistics to them. Rows of other images hold zeros (in a list None); a task without any image is absent.

        Returns:
            By task, what its head gives, and in evaluation mode `EMBEDDING`: see `embed`.
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
        """The deepest features (B, C, h, w), averaged over each quarter of the image: (B, 4 C)."""
        return functional.adaptive_avg_pool2d(features[-1], 2).flatten(1)

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise UserError(f"image: found shape {shape}, expected (batch, {self.in_channels}, rows, columns)")
        if shape[2] % self.stride or shape[3] % self.stride or not all(shape[2:]):
            rows, columns = (max(1, round(side / self.stride)) * self.stride for side in shape[2:])
            expected = f"expected multiples of {self.stride}; use {rows} x {columns} (image_size)"
            raise UserError(f"image: found {shape[2]} x {shape[3]} pixels, {expected}")


class EnsembleNet(nn.Module):
    """Mean of the answers of several networks, each task by those that have it (`Task.join_members`); for evaluation alone."""

    def __init__(self, members: Sequence[MultiTaskNet]) -> None:
        super().__init__()
        if not members:
            raise UserError("members: found none, expected one or more networks")
        self.members = nn.ModuleList(members).eval()

    def forward(self, image: torch.Tensor, targets: Mapping | None = None, annotated: Mapping | None = None) -> dict:
        """Answers of `MultiTaskNet.forward` in evaluation mode, without embedding."""
        answers = [member(image, targets, annotated) for member in self.members]
        tasks = {name: task for member in self.members for name, task in member.tasks.items()}
        by_task = {name: [answer[name] for answer in answers if name in answer] for name in tasks}
        return {name: tasks[name].join_members(parts) for name, parts in by_task.items() if parts}


def freeze_encoder(network: MultiTaskNet) -> MultiTaskNet:
    """Keep the encoder of a network as it is in training, batch statistics included; return the network, changed in place."""
    network.encoder.requires_grad_(False)

    def keep_statistics(network, _) -> None:  # engines set the whole network to training mode in every iteration
        network.encoder.eval()

    network.register_forward_pre_hook(keep_statistics)
    return network


def _spread(answer: torch.Tensor | list, rows: torch.Tensor, size: int) -> torch.Tensor | list:
    if isinstance(answer, torch.Tensor):
        return answer.new_zeros(size, *answer.shape[1:]).index_copy(0, rows, answer)
    by_row = dict(zip(rows.tolist(), answer))
    return [by_row.get(row) for row in range(size)]


def encode(description: Mapping) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)


def decode(state: torch.Tensor) -> dict:
    """Decode a description; a mean of equal states, as federated learning makes it, is rounded."""
    return json.loads(bytes(state.cpu().double().round().to(torch.uint8).tolist()))


def _describe_if_it_does_not(network: MultiTaskNet, weights: dict, prefix: str, *_) -> None:
    """Let torch itself load weights without a description, as version 0.1 wrote them."""
    weights.setdefault(f"{prefix}_extra_state", network.get_extra_state())
