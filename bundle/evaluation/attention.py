"""What the classification looks at: Grad-CAM (Selvaraju et al., arXiv 1610.02391), and how much of it lies in the lungs."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.visualize import GradCAM
from torch import nn
from tqdm import tqdm

from bundle.errors import UserError
from bundle.files import write_figure
from bundle.lungs import lung_region
from bundle.networks import MultiTaskNet
from bundle.names import CLASSIFICATION, IMAGE
from bundle.tasks.classification import known_classes

logger = logging.getLogger(__name__)


class _Classifier(nn.Module):
    """Classification alone, with a layer at the deepest features for the hooks of Grad-CAM."""

    def __init__(self, network: MultiTaskNet) -> None:
        super().__init__()
        self.encoder, self.head, self.deepest = network.encoder, network.heads[CLASSIFICATION], nn.Identity()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.encoder(image)[-1]
        # Grad-CAM asks for the gradient of the features, which those of a frozen encoder have not.
        features = features if features.requires_grad else features.detach().requires_grad_()
        return self.head([self.deepest(features)])


def draw_attention(network: MultiTaskNet, batches: Iterable[dict], classes: Sequence[str], path, columns: int = 6) -> dict:
    """Draw Grad-CAM of the predicted class for the first slices of each class, and average it over all slices.

    `path` is that of the PNG, a row of `columns` slices for each class. Beside it, NAME_mean.png shows the mean heat of each
    class, and the outline of where at least half of its slices have lung, without any image.

    Returns:
        class name -> {"slices", "heat_in_lung", "lung"}: number, and the mean shares of the heat and of the picture (which
        evenly spread heat would have) that lie in the lungs. Slices without a lung or without heat do not count.
    """
    if CLASSIFICATION not in network.heads:
        raise UserError(f"tasks: found {', '.join(network.heads)}, expected {CLASSIFICATION} among them for Grad-CAM")
    device = next(network.parameters()).device
    # In evaluation mode itself, since MONAI puts what it explains back into the mode that it came in, after every slice.
    cam = GradCAM(_Classifier(network).eval(), "deepest", postprocessing=lambda heat: heat)
    shares, sums, drawn = {name: [] for name in classes}, dict.fromkeys(classes, 0), {name: [] for name in classes}
    for batch in tqdm(batches, "Grad-CAM", disable=None):
        rows, labels = known_classes(batch)
        for image, label in zip(batch[IMAGE][rows], labels.tolist()):
            heat = cam(image[None].to(device))[0, 0].detach().cpu().numpy()
            lung, name = lung_region(image[0].numpy()), classes[label]
            if heat.sum() > 0 and lung.any():
                shares[name].append((heat[lung].sum() / heat.sum(), lung.mean()))
                sums[name] = sums[name] + np.stack([heat / heat.sum(), lung])
            if len(drawn[name]) < columns:
                with torch.no_grad():
                    scores = network.heads[CLASSIFICATION](network.encoder(image[None].to(device)))
                drawn[name].append((image[0].numpy(), heat, scores.softmax(1)[0].cpu().numpy()))
    if not any(drawn.values()):
        raise UserError("Grad-CAM: found no slice with a class, expected some; choose another split")
    _draw(drawn, classes, Path(path), columns)
    if means := {name: total / len(shares[name]) for name, total in sums.items() if shares[name]}:
        _draw_means(means, Path(path))
    found = {}
    for name in means:
        count, (heat, lung) = len(shares[name]), np.mean(shares[name], axis=0).round(4).tolist()
        found[name] = {"slices": count, "heat_in_lung": heat, "lung": lung}
        share = f"{heat:.0%} of the heat lies in the lungs, which are {lung:.0%} of the picture"
        logger.info(f"{path}: {name}: {share} ({count} slices)")
    return found


def _draw(drawn: dict, classes: Sequence[str], path: Path, columns: int) -> None:
    figure = Figure(figsize=(2 * columns, 2.3 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), columns, squeeze=False)
    for row, (name, pictures) in zip(axes, drawn.items()):
        for axis in row:
            axis.set_axis_off()
        for axis, (image, heat, probabilities) in zip(row, pictures):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.imshow(heat, cmap="jet", alpha=0.45 * heat / max(heat.max(), 1e-12))
            predicted = classes[int(probabilities.argmax())]
            title = f"{name}\n→ {predicted} {probabilities.max():.2f}"
            axis.set_title(title, fontsize=8, color="black" if predicted == name else "firebrick")
    write_figure(figure, path)


def _draw_means(means: dict[str, np.ndarray], path: Path) -> None:
    """Mean heat of each class, in multiples of heat spread evenly, and the outline of the mean lungs."""
    figure = Figure(figsize=(3.2 * len(means) + 0.8, 3.4), layout="constrained")
    axes = figure.subplots(1, len(means), squeeze=False)[0]
    most = max(heat.max() * heat.size for heat, _ in means.values())
    for axis, (name, (heat, lung)) in zip(axes, means.items()):
        picture = axis.imshow(heat * heat.size, cmap="magma", vmin=0, vmax=most)
        axis.contour(lung, [0.5], colors="white", linestyles="dashed", linewidths=1)
        axis.set_title(name)
        axis.set_axis_off()
    figure.colorbar(picture, ax=axes, label="mean heat; 1: spread evenly")
    write_figure(figure, path.with_name(f"{path.stem}_mean.png"))
