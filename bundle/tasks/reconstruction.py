"""Reconstruction: the clean slice, from the slice itself; it needs no annotation."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.metrics import SSIMMetric
from torch.nn import functional

from bundle.names import IMAGE, RECONSTRUCTION, TARGET
from bundle.networks.heads import DECODER, DenseHead
from bundle.tasks.base import Task


class Reconstruction(Task):
    """The clean slice, by a U-Net decoder with a linear output (see `DenseHead`); the loss is the mean squared error.

    With `save_reconstruction` a prediction keeps the rebuilt slices.
    """

    name = RECONSTRUCTION
    described = {"decoder_channels": DECODER, "skips": True}
    headline = ("ssim",)
    columns = {"SSIM": "ssim"}

    def __init__(self, decoder_channels: Sequence[int], skips: bool, save_reconstruction: bool = False, **_) -> None:
        self.decoder_channels, self.skips, self.dense = decoder_channels, skips, save_reconstruction

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

    def to_slice(self, answer: torch.Tensor, sample: Mapping, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean error, `answer`)"""
        return (seen.clamp(0, 1) - sample[IMAGE].as_tensor()).abs().mean(), answer

    def row(self, answer: torch.Tensor, view, result) -> dict:
        """Mean of |input - rebuilt| over the square that the network sees, in the unit of the window.

        With `save_reconstruction` the rebuilt slice, in HU or 0 to 255, and the error of its pixels are stored.
        """
        error, rebuilt = answer
        if self.dense:
            view.rebuilt = rebuilt[0].clamp(0, 1).numpy()
            values, dtype = view.low + view.rebuilt * (view.high - view.low), np.int16
            if not result.scan.hounsfield:
                values, dtype = view.rebuilt * 255, np.uint8
            result.store("reconstruction", np.round(values), view.slice, dtype)
            difference = np.abs(view.rebuilt - view.shown)
            result.store("reconstruction_error", np.round(difference * 255), view.slice, slope=1 / 255)
        return {"reconstruction_error": round(float(error), 6)}

    def entry(self, result) -> dict:
        return {"mean_error": round(float(np.mean([row["reconstruction_error"] for row in result.slices])), 6)}

    def report(self, entry: Mapping) -> dict[str, str]:
        return {"mean |input − rebuilt|, 0 to 1": f"{entry['mean_error']:.4f}"}

    def scan_columns(self, entry: Mapping) -> dict:
        return {"reconstruction_error": entry["mean_error"]}

    def slice_columns(self, row: Mapping) -> dict:
        return {"reconstruction_error": row["reconstruction_error"]}
