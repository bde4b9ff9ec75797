"""Segmentation: the lesion mask of a slice."""

import re
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from monai.losses import DiceCELoss, DiceLoss, FocalLoss, GeneralizedDiceLoss, TverskyLoss
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, get_confusion_matrix
from torch import nn

from bundle.data.batch import plain
from bundle.errors import UserError, no_warnings
from bundle.lungs import lung_region
from bundle.names import ANNOTATED, EMPTY_MASK, MASK, SEGMENTATION, SOURCE, TARGET
from bundle.networks.heads import DECODER, DenseHead
from bundle.tasks.base import Figures, Task, mean_figures
from bundle.tasks.lesions import volume_ml

FALSE_SHARE = 0.01  # of the lung: what is marked in a slice without lesion counts as false from here


class Segmentation(Task):
    """A probability of lesion for every pixel and lesion class, by a U-Net decoder (`DenseHead`) and a sigmoid.

    Above `lesion_threshold` a pixel is lesion in a prediction; `segmentation_loss` is a key of `SEGMENTATION_LOSSES`.
    """

    name, field = SEGMENTATION, MASK
    outlined = dense = True
    described = {"segmentation_classes": ["lesion"], "decoder_channels": DECODER}
    outputs = "segmentation_classes"
    headline = ("dice",)
    columns = {"Dice": "dice", "IoU": "iou"}

    def __init__(
        self,
        segmentation_classes: Sequence[str],
        decoder_channels: Sequence[int],
        decoder_dropout: float = 0.0,
        segmentation_loss: str = "generalized_dice",
        lesion_threshold: float = 0.5,
        **_,
    ) -> None:
        if not 0 <= lesion_threshold < 1:
            raise UserError(f"lesion_threshold: found {lesion_threshold}, expected a number from 0 and below 1")
        self.classes, self.threshold = list(segmentation_classes), lesion_threshold
        if len(set(map(file_part, self.classes))) < len(self.classes):
            found = ", ".join(self.classes)
            raise UserError(f"segmentation_classes: found {found}, expected names that differ in letters or digits")
        self.decoder_channels, self.decoder_dropout = decoder_channels, decoder_dropout
        self.criterion = LesionAndComplementLoss(segmentation_loss)

    def strata(self, records: Sequence[Mapping]) -> list[tuple]:
        return [(record[MASK] != EMPTY_MASK, record.get(SOURCE)) for record in records]

    def collate(self, samples: Sequence[Mapping], image: torch.Tensor) -> dict:
        """mask: (B, C, S, S) in {0, 1}."""
        no_mask = image.new_zeros(len(self.classes), *image.shape[2:])
        return {MASK: torch.stack([plain(sample.get(MASK, no_mask)) for sample in samples])}

    def head(self, channels: Sequence[int], strides: Sequence[int], in_channels: int) -> DenseHead:
        return DenseHead(channels, strides, self.decoder_channels, len(self.classes), dropout=self.decoder_dropout)

    def loss(self, answer: torch.Tensor, batch: Mapping, rows: torch.Tensor) -> torch.Tensor:
        return self.criterion(answer[rows], batch[MASK][rows])

    def cases(self, answer: torch.Tensor, batch: Mapping, thorough: bool) -> list[dict]:
        """Overlap and rates, as means over the classes. Two empty masks overlap fully.

        Only if `thorough`: the 95th-percentile Hausdorff distance in pixels of the network's input, NaN where either mask is
        empty; and whether more than 1 % of the lung is marked in a slice without lesion, NaN elsewhere.
        """
        mask, truth = (answer > 0).float().cpu(), batch[MASK].cpu()
        counts = get_confusion_matrix(mask, truth)  # (B, C, [tp, fp, tn, fn])
        tp, fp, tn, fn = counts.unbind(-1)
        figures = {
            "dice": compute_dice(mask, truth, ignore_empty=False),
            "iou": compute_iou(mask, truth, ignore_empty=False),
            "sensitivity": tp / (tp + fn),
            "specificity": tn / (tn + fp),
        }
        if thorough:
            with no_warnings():  # of empty masks, which have no distance
                distance = compute_hausdorff_distance(mask, truth, include_background=True, percentile=95)
            both = mask.flatten(2).any(2) & truth.flatten(2).any(2)
            figures["hd95"] = torch.where(both, distance.float(), torch.nan)
            figures["falsely_marked"] = _falsely_marked(mask, truth, batch)
        rows = {name: values.float().nanmean(1).tolist() for name, values in figures.items()}
        rows["lesion_pixels"] = mask.sum((1, 2, 3)).tolist()
        return [dict(zip(rows, values)) for values in zip(*rows.values())]

    def figures(self, cases: Sequence[dict]) -> Figures:
        return mean_figures([{name: value for name, value in case.items() if name != "lesion_pixels"} for case in cases])

    def draw(self, report: Mapping, cases: Sequence[dict], sources: Sequence[str]) -> Figure:
        """Dice by source."""
        names = sorted(set(sources))
        dice = [[case["dice"] for case, source in zip(cases, sources) if source == name] for name in names]
        figure = Figure(figsize=(2 + 2 * len(names), 4), layout="constrained")
        axis = figure.subplots()
        axis.boxplot(dice, tick_labels=[f"{name}\nn = {len(values)}" for name, values in zip(names, dice)])
        axis.set(title="Dice of each case", ylim=(-0.02, 1.02))
        return figure

    def judge(self, case: Mapping) -> tuple[float, str]:
        return case["dice"], f"Dice {case['dice']:.2f}"

    def outlines(self, answer: torch.Tensor, batch: Mapping, index: int) -> dict:
        return {"masks": (batch[MASK][index].cpu().numpy() > 0, (answer[index] > 0).cpu().numpy())}

    def join_members(self, answers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits of the mean probability."""
        return torch.stack(list(answers)).sigmoid().mean(0).logit(eps=1e-6)

    def activate(self, answer: torch.Tensor) -> torch.Tensor:
        return answer.sigmoid()

    def row(self, answer: torch.Tensor, view, result) -> dict:
        """Mask and probabilities, and the area of each lesion class.

        The probabilities are cut at the threshold on the grid of the slice: enlarging a mask would give rougher outlines.
        """
        highest, channel = torch.as_tensor(answer).max(0)
        labels = torch.where(highest > self.threshold, channel + 1, 0).numpy().astype(np.uint8)  # 1 + the likeliest class
        one, spacing, view.labels = len(self.classes) == 1, result.scan.spacing, labels
        result.store("mask", labels, view.slice, picture_scale=255 if one else 1)
        for name, values in zip(self.classes, torch.as_tensor(answer).numpy()):
            kind = "probability" if one else f"probability_{file_part(name)}"
            result.store(kind, np.round(values * 255), view.slice, slope=1 / 255)
        pixels = {name: int((labels == value).sum()) for value, name in enumerate(self.classes, start=1)}
        mm2 = spacing and {name: round(count * spacing[0] * spacing[1], 2) for name, count in pixels.items()}
        return {"lesion_pixels": pixels, "lesion_mm2": mm2}

    def entry(self, result) -> dict:
        found = {}
        for name in self.classes:
            volume, share, pixels = None, None, sum(row["lesion_pixels"][name] for row in result.slices)
            if result.scan.thickness is not None:
                volume = volume_ml([row["lesion_mm2"][name] for row in result.slices], result.scan)
                if lung := result.entries["lung"]:
                    share = round(volume / lung["volume_ml"], 6)
            found[name] = {"volume_ml": volume, "share_of_lung": share, "pixels": pixels}
        return found

    def segments(self, entry: Mapping) -> dict[str, dict]:
        return dict(entry)

    def caption(self, row: Mapping) -> list[str]:
        sizes = {name: f"{pixels} px" for name, pixels in row["lesion_pixels"].items()}
        sizes |= {name: f"{area / 100:.1f} cm²" for name, area in (row["lesion_mm2"] or {}).items()}
        return [f"{name} {sizes[name]}" if pixels else f"no {name}" for name, pixels in row["lesion_pixels"].items()]

    def report(self, entry: Mapping) -> dict[str, str]:
        sizes = {name: f"{found['pixels']} pixels" for name, found in entry.items()}
        sizes |= {name: f"{found['volume_ml']:.1f} mL" for name, found in entry.items() if found["volume_ml"] is not None}
        shares = {name: found["share_of_lung"] for name, found in entry.items() if found["share_of_lung"] is not None}
        return sizes | {name: f"{sizes[name]} · {100 * share:.1f} % of lung" for name, share in shares.items()}

    def line(self, entry: Mapping) -> str:
        extents = {name: f"{found['pixels']} pixels" for name, found in entry.items()}
        shares = {name: found["share_of_lung"] for name, found in entry.items() if found["share_of_lung"] is not None}
        extents |= {name: f"{share:.1%} of the lung" for name, share in shares.items()}
        return ", ".join(f"{name} {extent}" for name, extent in extents.items())

    def scan_columns(self, entry: Mapping) -> dict:
        keys = ("volume_ml", "share_of_lung", "pixels")
        return {f"{name} {key}": found[key] for name, found in entry.items() for key in keys}

    def slice_columns(self, row: Mapping) -> dict:
        columns = {}
        for name, pixels in row["lesion_pixels"].items():
            columns |= {f"{name} pixels": pixels, f"{name} mm2": row["lesion_mm2"] and row["lesion_mm2"][name]}
        return columns


def _falsely_marked(mask: torch.Tensor, truth: torch.Tensor, batch: Mapping) -> torch.Tensor:
    """(B, 1): 1 where more than `FALSE_SHARE` of the lung is marked, NaN where there is a lesion, no lung or no annotation."""
    found = torch.full((len(mask), 1), torch.nan)
    free = batch[ANNOTATED][SEGMENTATION].cpu() & ~truth.flatten(1).any(1)
    for index in free.nonzero().flatten().tolist():
        if lung := lung_region(batch[TARGET][index, 0].cpu().numpy()).sum():
            found[index] = float(mask[index].any(0).sum() > FALSE_SHARE * lung)
    return found


def file_part(name: str) -> str:
    """Name of a class as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name)


class _Tversky(nn.Module):
    """Tversky loss (Salehi et al., arXiv 1706.05721): a missed lesion pixel weighs 0.7, a false one 0.3."""

    def __init__(self) -> None:
        super().__init__()
        # A pixel missed in the lesion is a false one of the complement, whose weights are therefore exchanged.
        self.complement, self.lesion = TverskyLoss(alpha=0.7, beta=0.3), TverskyLoss(alpha=0.3, beta=0.7)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        probability = logits.softmax(1)
        return (self.complement(probability[:, :1], target[:, :1]) + self.lesion(probability[:, 1:], target[:, 1:])) / 2


DICE, GENERALIZED_DICE = partial(DiceLoss, softmax=True), partial(GeneralizedDiceLoss, softmax=True)
FOCAL = partial(FocalLoss, use_softmax=True)  # MONAI's DiceFocalLoss gives its focal part a sigmoid
# By name, losses of logits and target (B, 2, H, W), complement and lesion, that are added.
SEGMENTATION_LOSSES = {
    "generalized_dice": (GENERALIZED_DICE,),
    "generalized_dice_focal": (GENERALIZED_DICE, FOCAL),
    "dice": (DICE,),
    "dice_ce": (partial(DiceCELoss, softmax=True),),
    "dice_focal": (DICE, FOCAL),
    "tversky": (_Tversky,),
}


class LesionAndComplementLoss(nn.Module):
    """A Dice-like loss of `SEGMENTATION_LOSSES` on the lesion and its complement, as two channels of a softmax.

    On one sigmoid channel and an empty mask the Generalized Dice loss and its gradient are exactly zero, so slices without
    lesion would never punish false positives. The softmax of (-z/2, z/2) is (1 - sigmoid(z), sigmoid(z)): the same
    probability, with the complement present in every slice.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in SEGMENTATION_LOSSES:
            raise UserError(f"segmentation_loss: found {name!r}, expected one of {', '.join(SEGMENTATION_LOSSES)}")
        self.losses = nn.ModuleList(make() for make in SEGMENTATION_LOSSES[name])

    def forward(self, logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: logits (B, C, H, W) and mask in {0, 1} of the same shape; every channel is a lesion class of its own."""
        logits, mask = logits.flatten(0, 1)[:, None], mask.flatten(0, 1)[:, None]
        both, target = torch.cat([-logits / 2, logits / 2], 1), torch.cat([1 - mask, mask], 1)
        return sum(loss(both, target) for loss in self.losses)
