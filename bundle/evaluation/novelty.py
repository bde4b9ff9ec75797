"""The reference of a network: what the slices that it was trained on look like to it."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from sklearn.covariance import LedoitWolf
from tqdm import tqdm

from bundle.files import file_hash, write_checkpoint
from bundle.names import IMAGE
from bundle.networks import MultiTaskNet, Novelty

VALIDATION_SHARE = 0.97  # of the validation slices lie within the threshold
AIR = -1000  # HU


def make_reference(
    network: MultiTaskNet, training: Iterable, validation: Iterable, window: Sequence[float], checkpoint, path
) -> None:
    """Fit the distance to the training slices, its threshold to the validation slices, and write both as one file.

    The covariance is shrunk by the formula of Ledoit and Wolf. Every slice counts in each of its `views`. The network has the
    weights of `checkpoint`, whose hash is kept; slices come as lists of samples with a preprocessed "image" (1, S, S).
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
    """Embeddings (N, F) of all views of all slices, float64."""
    network.eval()
    device = next(network.parameters()).device
    embeddings = []
    for samples in tqdm(slices, "embed", disable=None):
        batch = torch.cat([views(sample[IMAGE], window) for sample in samples])
        embeddings.append(network.embed(network.encoder(batch.to(device))).double().cpu())
    return torch.cat(embeddings)


def views(image: MetaTensor, window: Sequence[float]) -> torch.Tensor:
    """A slice (1, S, S) and its mirror image; of a picture also both with air in the grey that it has in a scan.

    Air is black in a picture, and grey in a scan whose window begins below -1000 HU: without these views, a network trained
    on pictures may find every slice of a scan unusual. Zeros around a slice are padding. Gives (2 or 4, 1, S, S).
    """
    shown = [image.as_tensor()[None]]
    if not image.meta["hounsfield"]:
        grey = min(max((AIR - window[0]) / (window[1] - window[0]), 0), 1)
        seen = shown[0] > 0
        inside = seen.any(-1, keepdim=True) & seen.any(-2, keepdim=True)
        shown.append(torch.where(inside, grey + (1 - grey) * shown[0], 0))
    return torch.cat([*shown, *(view.flip(-1) for view in shown)])
