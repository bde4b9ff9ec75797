"""One case, one row: what each task's output on one image is worth. Figures over many cases are in statistics.py."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from monai.apps.detection.metrics.coco import COCOMetric
from monai.apps.detection.metrics.matching import matching_batch
from monai.data.box_utils import box_iou
from monai.metrics import SSIMMetric, compute_dice, compute_hausdorff_distance, compute_iou, get_confusion_matrix

from bundle.names import CLASS, CLASSIFICATION, DETECTION, MASK, RECONSTRUCTION, SEGMENTATION, TARGET

# COCO's AP, at IoU 0.1 and 0.5 and averaged over 0.5:0.05:0.95; its lowest threshold, 0.1, comes first.
COCO = COCOMetric(classes=["lesion"], iou_list=(0.1, 0.5), iou_range=(0.5, 0.95, 0.05), max_detection=(100,), verbose=False)

FOUND_SCORE = 0.5  # of detections that are counted as such in per_case.csv and in pictures


def classification_cases(pred: torch.Tensor, label: dict) -> list[dict]:
    """Logits (B, K) to annotated class and probabilities; {} for a sample that has not exactly one class."""
    probabilities, candidates = pred.float().softmax(1).cpu().numpy(), label[CLASS].cpu().numpy()
    return [
        {"label": int(row.argmax()), "probabilities": p} if row.sum() == 1 else {} for row, p in zip(candidates, probabilities)
    ]


def segmentation_cases(pred: torch.Tensor, label: dict, with_distance: bool) -> list[dict]:
    """Logits (B, C, H, W) to overlap, rates and, in pixels of the network's input, the 95th-percentile Hausdorff distance.

    Means over the channels. Two empty masks overlap fully; the distance is NaN where either mask is empty.
    """
    mask, truth = (pred > 0).float().cpu(), label[MASK].cpu()
    counts = get_confusion_matrix(mask, truth)  # (B, C, [tp, fp, tn, fn])
    tp, fp, tn, fn = counts.unbind(-1)
    figures = {
        "dice": compute_dice(mask, truth, ignore_empty=False),
        "iou": compute_iou(mask, truth, ignore_empty=False),
        "sensitivity": tp / (tp + fn),
        "specificity": tn / (tn + fp),
    }
    if with_distance:
        with warnings.catch_warnings():  # of empty masks, which have no distance
            warnings.simplefilter("ignore")
            distance = compute_hausdorff_distance(mask, truth, include_background=True, percentile=95)
        both = mask.flatten(2).any(2) & truth.flatten(2).any(2)
        figures["hd95"] = torch.where(both, distance.float(), torch.nan)
    rows = {name: values.float().nanmean(1).tolist() for name, values in figures.items()}
    rows["lesion_pixels"] = mask.sum((1, 2, 3)).tolist()
    return [dict(zip(rows, values)) for values in zip(*rows.values())]


def reconstruction_cases(pred: torch.Tensor, label: dict) -> list[dict]:
    """Image (B, 1, H, W) against the clean slice in [0, 1]: MSE, PSNR in dB, SSIM, over the square, its padding included."""
    image, target = pred.float().cpu(), label[TARGET].cpu()
    mse = ((image - target) ** 2).flatten(1).mean(1)
    psnr = -10 * mse.clamp(min=1e-10).log10()  # 100 dB at most, so that a perfect copy stays finite
    ssim = SSIMMetric(spatial_dims=2, data_range=1.0)(image, target).flatten()
    return [{"mse": m, "psnr": p, "ssim": s} for m, p, s in zip(mse.tolist(), psnr.tolist(), ssim.tolist())]


def detection_cases(pred: list[dict], label: dict) -> list[dict]:
    """Detections matched once to the annotated boxes, and masks to masks where there are instances.

    `true_positives` and `false_positives` count the detections with a score of `FOUND_SCORE` or more, at IoU 0.1.
    """
    return [_detection_case(detection, target) for detection, target in zip(pred, label[DETECTION])]


def _detection_case(detection: dict, target: dict | None) -> dict:
    if target is None:  # not annotated: the row is left out by the caller
        return {}
    scores = detection["scores"].cpu().numpy()
    boxes, truth = detection["boxes"].cpu().numpy(), target["boxes"].cpu().numpy()
    case = {"match": _match(box_iou, boxes, scores, truth), "n_boxes": len(truth), "n_detections": len(scores)}
    found = case["match"].get(0)
    hits = found["dtMatches"][0][found["dtScores"] >= FOUND_SCORE] if found else np.array([])
    case |= {"true_positives": int((hits > 0).sum()), "false_positives": int((hits == 0).sum())}
    if "masks" in target:
        masks = (detection["masks"][:, 0] > 0.5).flatten(1).cpu().numpy()
        case["mask_match"] = _match(_mask_iou, masks, scores, target["masks"].flatten(1).bool().cpu().numpy())
    return case


def _match(iou, pred: np.ndarray, scores: np.ndarray, truth: np.ndarray) -> dict:
    def as_class(items):
        return np.zeros(len(items), dtype=int)

    return matching_batch(
        iou,
        COCO.get_iou_thresholds(),
        [pred],
        [as_class(pred)],
        [scores],
        [truth],
        [as_class(truth)],
        max_detections=100,
    )[0]


def _mask_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every mask of (N, pixels) with every mask of (M, pixels)."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    both = a @ b.T
    return both / np.maximum(a.sum(1)[:, None] + b.sum(1)[None] - both, 1)


def cases_of(task: str, pred, label: dict, with_distance: bool) -> list[dict]:
    """Rows of a task for every image of the batch; which of them are annotated is for the caller to select; {} is no row."""
    if task == SEGMENTATION:
        return segmentation_cases(pred, label, with_distance)
    return {
        CLASSIFICATION: classification_cases,
        RECONSTRUCTION: reconstruction_cases,
        DETECTION: detection_cases,
    }[
        task
    ](pred, label)
