"""How far a slice is from those the network was trained on, and the warnings that a scan is none for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from sklearn.covariance import LedoitWolf
from tqdm import tqdm

from bundle.errors import UserError
from bundle.files import write_checkpoint
from bundle.inference.worklist import file_hash
from bundle.networks import MultiTaskNet
from bundle.names import IMAGE

VALIDATION_SHARE = 0.97  # of the validation slices lie within the threshold
# A scan is unusual with more than this share of its slices beyond the threshold, and no chest CT with less than this share
# with lung: the three chest CTs that were tried have 77 to 96 %, an abdomen CT, with the base of the lung, 5 %.
UNUSUAL_SHARE, LUNG_SHARE = 0.5, 0.25
AIR = -1000  # HU


class Novelty:
    """Mahalanobis distance of a slice's embedding from those of the training slices (arXiv 1807.03888, with one class).

    Args:
        mean: (F,) of the embeddings of the training slices.
        scale: (F,), their standard deviations.
        precision: (F, F), inverse of the shrunk covariance of the embeddings, brought to mean 0 and deviation 1.
        threshold: distance beyond which a slice is unusual.
    """

    def __init__(self, mean: torch.Tensor, scale: torch.Tensor, precision: torch.Tensor, threshold: float = np.inf) -> None:
        self.mean, self.scale, self.precision, self.threshold = mean, scale, precision, float(threshold)

    def distance(self, embedding: torch.Tensor) -> torch.Tensor:
        """(B, F) embeddings, "embedding" of the network's answer, to (B,) distances, at least 0."""
        offset = (torch.as_tensor(embedding).cpu().double() - self.mean) / self.scale
        return ((offset @ self.precision.double()) * offset).sum(1).clamp(min=0).sqrt()


def assess(
    novelty: Novelty | None, distances: Sequence[float | None], bearing: Sequence[bool] | None
) -> tuple[dict[str, float] | None, list[str]]:
    """Judge whether the network knows scans like this one.

    Args:
        novelty: of `read_novelty`.
        distances: of all slices; not read where `novelty` is None.
        bearing: whether each slice shows lung, of `lungs.lung_bearing`; None where the values are not HU.

    Returns:
        ({"distance", the median; "threshold"; "unusual_share", of the slices beyond it} of the slices with lung, or of all
        if that is not known or none has, or None without `novelty`; warnings, one line each).
    """
    summary, warnings = None, []
    if novelty is not None:
        kept = np.array([d for d, lung in zip(distances, bearing) if lung] if bearing and any(bearing) else distances)
        share = float((kept > novelty.threshold).mean())
        numbers = {"distance": np.median(kept), "threshold": novelty.threshold, "unusual_share": share}
        summary = {key: round(float(value), 4) for key, value in numbers.items()}
        if share > UNUSUAL_SHARE:
            warnings.append(
                f"unlike the training data: {share:.0%} of {len(kept)} slices are farther from it than "
                f"{novelty.threshold:.1f} (median {np.median(kept):.1f}); do not trust the results"
            )
    if bearing is not None and sum(bearing) < LUNG_SHARE * len(bearing):
        found = f"lung in {sum(bearing)} of {len(bearing)} slices" if any(bearing) else "no lung found"
        warnings.append(f"{found}: this is no chest CT, or its values are not HU; do not trust the results")
    return summary, warnings


def read_novelty(path, checkpoint) -> Novelty | None:
    """Read the reference that configs/reference.json made for a checkpoint; None if none lies beside the checkpoint.

    Raises:
        UserError: if there is no such file in another place, which somebody has named.
        UserError: in one line, if the file cannot be read, or belongs to other weights.
    """
    if not Path(path).is_file():
        if Path(path) != Path(checkpoint).with_name("reference.pt"):
            raise UserError(f"reference: found no file {path}, expected one made with configs/reference.json")
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        made_for = saved.pop("checkpoint")
        novelty = Novelty(**saved)
    except Exception as error:  # the unpickler raises anything on bytes that are no pickle
        raise UserError(
            f"{path}: cannot be read as a reference ({type(error).__name__}), expected one made with configs/reference.json"
        ) from None
    if made_for != file_hash(checkpoint):
        raise UserError(
            f"{path}: found the reference of other weights than {checkpoint}; make it anew with configs/reference.json"
        )
    return novelty


def make_reference(
    network: MultiTaskNet, training: Iterable, validation: Iterable, window: Sequence[float], checkpoint, path
) -> None:
    """Fit the distance to the training slices, its threshold to the validation slices, and write both as one file.

    The covariance is shrunk by the formula of Ledoit and Wolf. Every slice counts in each of its `views`.

    Args:
        network: with the weights of `checkpoint`.
        training, validation: give lists of samples with a preprocessed "image" (1, S, S).
        window: lowest and highest HU that are shown.
        checkpoint: file of the weights, whose hash is kept.
        path: of the file.
    """
    known, unseen = (embed(network, slices, window) for slices in (training, validation))
    mean, scale = known.mean(0), known.std(0)
    # A feature that (almost) never fires in training must not decide alone when it does.
    scale = scale.clamp(min=max(0.01 * float(scale.median()), 1e-6))
    precision = torch.from_numpy(LedoitWolf(assume_centered=True).fit(((known - mean) / scale).numpy()).precision_).float()
    distances = Novelty(mean, scale, precision).distance(unseen)
    saved = {"mean": mean, "scale": scale, "precision": precision}
    saved["threshold"] = float(np.quantile(distances, VALIDATION_SHARE, method="higher"))
    write_checkpoint({**saved, "checkpoint": file_hash(checkpoint)}, path)


@torch.no_grad()
def embed(network: MultiTaskNet, slices: Iterable, window: Sequence[float]) -> torch.Tensor:
    """Embeddings of all views of all slices: see `make_reference`; (N, F) of float64."""
    network.eval()
    device = next(network.parameters()).device
    embeddings = []
    for samples in tqdm(slices, "embed", disable=None):
        batch = torch.cat([views(sample[IMAGE], window) for sample in samples])
        embeddings.append(network.embed(network.encoder(batch.to(device))).double().cpu())
    return torch.cat(embeddings)


def views(image: MetaTensor, window: Sequence[float]) -> torch.Tensor:
    """A slice and its mirror image; of a picture also both with air in the grey that it has in a scan.

    The darkest value of a picture, its air, becomes black. A scan in HU is shown through the window, from -1350 HU if not
    set otherwise, and has air of -1000 HU in a dark grey. Without these views, a network that was trained on pictures may
    find every slice of a scan unusual.

    Args:
        image: (1, S, S) in [0, 1], with "hounsfield" in its `meta`; zeros around it are padding.
        window: lowest and highest HU that are shown.

    Returns:
        (2 or 4, 1, S, S).
    """
    shown = [image.as_tensor()[None]]
    if not image.meta["hounsfield"]:
        grey = min(max((AIR - window[0]) / (window[1] - window[0]), 0), 1)
        seen = shown[0] > 0
        inside = seen.any(-1, keepdim=True) & seen.any(-2, keepdim=True)
        shown.append(torch.where(inside, grey + (1 - grey) * shown[0], 0))
    return torch.cat([*shown, *(view.flip(-1) for view in shown)])
