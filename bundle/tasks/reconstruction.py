"""Reconstruction: the clean slice, from the slice itself; it needs no annotation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from monai.metrics import SSIMMetric
from torch.nn import functional

from bundle.names import RECONSTRUCTION, TARGET
from bundle.networks.heads import DenseHead
from bundle.tasks.base import Task


class Reconstruction(Task):
    """The clean slice, by a U-Net decoder with a linear output; the loss is the mean squared error.

    Args:
        decoder_channels: of the decoder, deepest first: see `DenseHead`.
        skips: skip connections of the decoder.
    """

    name = RECONSTRUCTION
    headline = ("ssim",)
    columns = {"SSIM": "ssim"}

    def __init__(self, decoder_channels: Sequence[int] = (256, 128, 64, 32, 16), skips: bool = True, **_) -> None:
        self.decoder_channels, self.skips = decoder_channels, skips

    def head(self, channels: Sequence[int], strides: Sequence[int], in_channels: int) -> DenseHead:
        return DenseHead(channels, strides, self.decoder_channels, in_channels, self.skips)

    def loss(self, answer: torch.Tensor, batch: Mapping, rows: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(answer, batch[TARGET])

    def cases(self, answer: torch.Tensor, batch: Mapping, thorough: bool) -> list[dict]:
        """MSE, PSNR in dB and SSIM against the clean slice in [0, 1], over the square, its padding included."""
        image, target = answer.float().cpu(), batch[TARGET].cpu()
        mse = ((image - target) ** 2).flatten(1).mean(1)
        psnr = -10 * mse.clamp(min=1e-10).log10()  # 100 dB at most, so that a perfect copy stays finite
        ssim = SSIMMetric(spatial_dims=2, data_range=1.0)(image, target).flatten()
        return [{"mse": m, "psnr": p, "ssim": s} for m, p, s in zip(mse.tolist(), psnr.tolist(), ssim.tolist())]

    def judge(self, case: Mapping) -> tuple[float, str]:
        return case["ssim"], f"SSIM {case['ssim']:.2f}"

    def outlines(self, answer: torch.Tensor, batch: Mapping, index: int) -> dict:
        return {"error": (answer[index, 0].float().cpu() - batch[TARGET][index, 0].cpu()).abs().numpy()}
