"""A task outside the package: how severe the disease in a slice is, one number from 0 to 1."""

import torch
from torch import nn
from torch.nn import functional

from bundle.tasks import Task


class SeverityHead(nn.Module):
    """A number from 0 to 1, from the pooled deepest features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.output = nn.Linear(channels, 1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Feature maps, finest first, to (B,)."""
        return self.output(features[-1].mean((2, 3)))[:, 0].sigmoid()


class Severity(Task):
    """The field "severity" of a record, a number from 0 to 1; mean squared error."""

    name = field = "severity"
    headline = ("agreement",)

    def complaints(self, value):
        if not (isinstance(value, (int, float)) and 0 <= value <= 1):
            yield f"found {value!r}, expected a number from 0 to 1"

    def collate(self, samples, image):
        return {self.name: torch.tensor([float(sample.get(self.field, 0)) for sample in samples])}

    def head(self, channels, strides, in_channels):
        return SeverityHead(channels[-1])

    def loss(self, answer, batch, rows):
        return functional.mse_loss(answer[rows], batch[self.name][rows])

    def cases(self, answer, batch, thorough):
        pairs = zip(answer.tolist(), batch[self.name].tolist())
        return [{"agreement": 1 - abs(found - annotated), "severity": found} for found, annotated in pairs]

    def report(self, entry):
        return {"Severity": f"{entry:.2f}"}
