"""How far an image is from those a network was trained on."""

from pathlib import Path

import numpy as np
import torch

from bundle.errors import UserError
from bundle.files import file_hash


class Novelty:
    """Mahalanobis distance of a slice's embedding from those of the training slices (arXiv 1807.03888, with one class).

    `mean` and `scale` (F,) are those of the training slices' embeddings, `precision` (F, F) is the inverse of the shrunk
    covariance of the standardised embeddings; a slice beyond `threshold` is unusual.
    """

    def __init__(self, mean: torch.Tensor, scale: torch.Tensor, precision: torch.Tensor, threshold: float = np.inf) -> None:
        self.mean, self.scale, self.precision, self.threshold = mean, scale, precision, float(threshold)

    def distance(self, embedding: torch.Tensor) -> torch.Tensor:
        """(B, F) embeddings of the network to (B,) distances, at least 0."""
        offset = (torch.as_tensor(embedding).cpu().double() - self.mean) / self.scale
        return ((offset @ self.precision.double()) * offset).sum(1).clamp(min=0).sqrt()


def read_novelty(path, checkpoint) -> Novelty | None:
    """Read the reference that `run reference` made for a checkpoint; None if none lies beside the checkpoint."""
    if not Path(path).is_file():
        if Path(path) != Path(checkpoint).with_name("reference.pt"):
            raise UserError(f"reference: found no file {path}, expected one made by run reference")
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        made_for, novelty = saved.pop("checkpoint"), Novelty(**saved)
    except Exception as error:  # the unpickler raises anything on bytes that are no pickle
        unreadable = f"cannot be read as a reference ({type(error).__name__})"
        raise UserError(f"{path}: {unreadable}, expected one made by run reference") from None
    if made_for != file_hash(checkpoint):
        raise UserError(f"{path}: found the reference of other weights than {checkpoint}; make it anew by run reference")
    return novelty
