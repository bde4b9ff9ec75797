"""Heads for whole images and for every pixel."""

from collections.abc import Sequence

import torch
from monai.networks.nets.basic_unet import UpCat
from monai.networks.utils import icnr_init
from torch import nn

from bundle.errors import UserError

DECODER = [256, 128, 64, 32, 16]  # channels of the paper's decoder


class ClassificationHead(nn.Sequential):
    """Fully connected layers on the globally averaged deepest features; `dropout` after each of the `hidden` ones."""

    def __init__(self, in_channels: int, num_classes: int, hidden: Sequence[int] = (256, 64), dropout: float = 0.2) -> None:
        layers = []
        for size in hidden:
            layers += [nn.Linear(in_channels, size), nn.ReLU(inplace=True), nn.Dropout(dropout)]
            in_channels = size
        super().__init__(*layers, nn.Linear(in_channels, num_classes))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Feature maps, finest first, to logits (B, num_classes)."""
        x = features[-1].mean((2, 3))
        for layer in self:
            x = layer(x)
        return x


class DenseHead(nn.Module):
    """U-Net decoder (Ronneberger et al., arXiv 1505.04597) from a feature pyramid to one value per pixel and channel.

    Each step doubles the resolution. If `skips`, a step whose resolution the encoder has takes that feature map in. Where the
    steps end before stride 1, a sub-pixel convolution (Shi et al., arXiv 1609.05158) makes the rest of the way: a step at
    full resolution costs as much as all others together. It starts as nearest-neighbour upsampling, free of checkerboards
    (Aitken et al., arXiv 1707.02937). The output is linear.

    Args:
        channels, strides: of the encoder's feature maps, finest first.
        decoder_channels: of the steps, deepest first: at most one for every halving from the deepest stride to 1.
        dropout: after every convolution of the steps.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], decoder_channels: Sequence[int], out_channels: int = 1,
        skips: bool = True, dropout: float = 0.0,
    ) -> None:
        super().__init__()
        steps = strides[-1].bit_length() - 1
        if not 1 <= len(decoder_channels) <= steps or min(decoder_channels) < 1:
            expected = f"expected 1 to {steps} for an encoder of stride {strides[-1]}, each above 0"
            raise UserError(f"decoder_channels: found {len(decoder_channels)} ({list(decoder_channels)}), {expected}")
        level = {stride: index for index, stride in enumerate(strides[:-1])} if skips else {}
        # Index of the feature map that each step takes in, -1 for none: TorchScript knows lists of numbers alone.
        self.skips = [level.get(strides[-1] >> step, -1) for step in range(1, len(decoder_channels) + 1)]
        relu = "relu", {"inplace": True}
        how = {"upsample": "nontrainable", "pre_conv": None, "interp_mode": "nearest", "align_corners": None, "halves": False}
        self.blocks = nn.ModuleList(
            UpCat(2, ins, 0 if skip < 0 else channels[skip], out, relu, "batch", False, dropout, is_pad=False, **how)
            for ins, skip, out in zip([channels[-1], *decoder_channels], self.skips, decoder_channels)
        )
        factor = strides[-1] >> len(decoder_channels)
        last = nn.Conv2d(decoder_channels[-1], out_channels * factor**2, kernel_size=1)
        self.output = nn.Sequential(last, nn.PixelShuffle(factor))
        icnr_init(last, factor)
        nn.init.zeros_(last.bias)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Feature maps, finest first, to (B, out_channels, H, W) at stride 1."""
        x = features[-1]
        for step, block in enumerate(self.blocks):
            skip = self.skips[step]
            x = block(x, features[skip] if skip >= 0 else None)
        return self.output(x)
