"""Probabilities that mean what they say: temperature scaling of the classification (Guo et al., arXiv 1706.04599)."""

import logging
from collections.abc import Iterable

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional

from bundle.data.batch import prepare_batch
from bundle.errors import UserError
from bundle.files import write_checkpoint
from bundle.networks import MultiTaskNet
from bundle.names import CLASSIFICATION
from bundle.tasks import add_heads
from bundle.tasks.classification import calibration_error, known_classes

logger = logging.getLogger(__name__)

LIMITS = (0.01, 100.0)  # of the temperature


def calibrate(network: MultiTaskNet, batches: Iterable[dict], checkpoint, path) -> float:
    """Find the temperature that explains the classes of slices best, and write the weights with it built in.

    The logits are divided by it (above 1 if the network was too sure), by the weights of the head's last layer.

    Args:
        network: with its weights; its last layer is changed in place.
        batches: of `bundle.data.batch.collate`, of slices that the network was not trained on.
        checkpoint: file of these weights; heads that the network lacks are taken from it.
        path: of the weights to write.
    """
    if CLASSIFICATION not in network.heads:
        raise UserError(f"tasks: found {', '.join(network.heads)}, expected {CLASSIFICATION} among them to calibrate it")
    logits, labels = _logits(network, batches)

    def loss(log_temperature: float) -> float:
        return float(functional.cross_entropy(logits / np.exp(log_temperature), labels))

    found = minimize_scalar(loss, bounds=np.log(LIMITS), method="bounded")
    temperature = float(np.exp(found.x))
    if not LIMITS[0] * 1.01 < temperature < LIMITS[1] / 1.01:
        why = "none is classified wrong; take more slices" if temperature < 1 else "the network has not learned; train on"
        raise UserError(f"split validation: found no temperature for its {len(labels)} slices with a class: {why}")
    last = network.heads[CLASSIFICATION][-1]
    with torch.no_grad():
        last.weight /= temperature
        last.bias /= temperature
    network.description["temperature"] = temperature * (network.description["temperature"] or 1)
    write_checkpoint(add_heads(network.state_dict(), checkpoint), path)
    errors = []
    for probabilities in (logits.softmax(1), (logits / temperature).softmax(1)):
        confidence, predicted = probabilities.max(1)
        errors.append(calibration_error(confidence.numpy(), (predicted == labels).numpy(), np.ones(len(labels))))
    logger.info(
        f"{path}: temperature {temperature:.3f} from {len(labels)} slices: cross-entropy {loss(0):.3f} before, {found.fun:.3f} "
        f"after; expected calibration error {errors[0]:.3f} before, {errors[1]:.3f} after"
    )
    return temperature


@torch.no_grad()
def _logits(network: MultiTaskNet, batches: Iterable[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    network.eval()
    device, logits, labels = next(network.parameters()).device, [], []
    for batch in batches:
        rows, classes = known_classes(batch)
        if rows.any():
            image, *_ = prepare_batch(batch, device)
            logits.append(network.heads[CLASSIFICATION](network.encoder(image[rows.to(device)])).double().cpu())
            labels.append(classes)
    if not logits:
        raise UserError("split validation: found no record with a class, expected some to calibrate the classification")
    return torch.cat(logits), torch.cat(labels)
