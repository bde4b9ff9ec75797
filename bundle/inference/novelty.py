"""How far a slice is from those the network was trained on, and the warning that it is too far."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.covariance import LedoitWolf

# A scan is called unusual when more of its slices than this lie beyond the threshold, which few chest slices do.
UNUSUAL_SHARE = 0.5


class Novelty:
    """Mahalanobis distance of embeddings from those of the training slices (Lee et al., arXiv 1807.03888, one class).

    Args:
        mean: (F,), of the training slices.
        precision: (F, F), inverse of their covariance.
        threshold: distance from which a slice is unusual.
    """

    def __init__(self, mean: torch.Tensor, precision: torch.Tensor, threshold: float) -> None:
        self.mean, self.precision, self.threshold = mean.double(), precision.double(), float(threshold)

    def distance(self, embedding: torch.Tensor) -> torch.Tensor:
        """(B, F) embeddings, "embedding" of the network's answer, to (B,) distances, at least 0."""
        offset = torch.as_tensor(embedding).double().cpu() - self.mean
        return ((offset @ self.precision) * offset).sum(1).clamp(min=0).sqrt()

    def sum_up(self, distances: Sequence[float]) -> dict[str, float]:
        """What is said of a scan: median distance of its slices, threshold, share of the slices beyond it."""
        distances = np.asarray(distances)
        return {
            "distance": round(float(np.median(distances)), 4),
            "threshold": round(self.threshold, 4),
            "unusual_share": round(float((distances > self.threshold).mean()), 4),
        }


def novelty_warnings(summary: dict[str, float] | None, bearing: Sequence[bool] | None) -> list[str]:
    """Warnings that a scan is none that the network knows.

    Args:
        summary: of `Novelty.sum_up`; None where there is no reference.
        bearing: whether each slice shows lung; None where the values are not HU.
    """
    warnings = []
    if summary and summary["unusual_share"] > UNUSUAL_SHARE:
        share, distance, threshold = (summary[key] for key in ("unusual_share", "distance", "threshold"))
        warnings.append(
            f"unlike the training data: {share:.0%} of the slices are farther from it than {threshold:.1f} (median "
            f"{distance:.1f}); results may mean nothing"
        )
    if bearing is not None and not any(bearing):
        warnings.append("no lung found: no slice shows 20 cm² of it; is this a chest CT in HU?")
    return warnings


def read_novelty(path, checkpoint) -> Novelty | None:
    """Read the reference that configs/reference.json made for a checkpoint; None if there is no such file.

    Raises:
        ValueError: in one line, if the file cannot be read, or belongs to other weights.
    """
    if not Path(path).is_file():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        novelty, made_for = Novelty(saved["mean"], saved["precision"], saved["threshold"]), saved["checkpoint"]
    except Exception as error:  # the unpickler raises anything on bytes that are no pickle
        raise ValueError(
            f"{path}: cannot be read as a reference ({type(error).__name__}), expected one made with configs/reference.json"
        ) from None
    if made_for != _sha256(checkpoint):
        raise ValueError(f"{path}: found the reference of other weights than {checkpoint}; make it anew with configs/reference.json")
    return novelty


def _sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
