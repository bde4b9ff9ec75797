"""Figures over many cases, with bootstrap intervals over groups (patients)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score

from bundle.metrics.cases import COCO
from bundle.tasks import CLASSIFICATION, DETECTION

FALSE_POSITIVE_RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)


def classification_figures(cases: Sequence[dict]) -> dict[str, float]:
    """Accuracy, balanced accuracy and macro F1 (over the classes that occur in the labels) and AUROC.

    The predicted class is the most probable of all classes. AUROC ranks the classes that occur: with two, the higher one
    by its share of their joint probability, with more, the mean of one class against the rest. With one class it
    is left out, and balanced accuracy is the recall of that class.
    """
    labels = np.array([case["label"] for case in cases])
    probabilities = np.stack([case["probabilities"] for case in cases])
    predicted, present = probabilities.argmax(1), np.unique(labels)
    figures = {
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": np.mean([(predicted[labels == c] == c).mean() for c in present]),
        "f1_macro": f1_score(labels, predicted, labels=present, average="macro", zero_division=0),
    }
    if len(present) > 1:
        share = probabilities[:, present] / np.maximum(probabilities[:, present].sum(1, keepdims=True), 1e-12)
        one_vs_rest = [roc_auc_score(labels == c, share[:, i]) for i, c in enumerate(present)]
        figures["auroc"] = one_vs_rest[1] if len(present) == 2 else np.mean(one_vs_rest)
    return {name: float(value) for name, value in figures.items()}


def mean_figures(cases: Sequence[dict]) -> dict[str, float]:
    """Mean over the cases of every figure that is defined (not NaN) in at least one."""
    names = [name for name in cases[0] if name != "lesion_pixels"]
    values = np.array([[case[name] for name in names] for case in cases], dtype=float)
    defined = ~np.isnan(values)
    sums, counts = np.where(defined, values, 0).sum(0), defined.sum(0)
    return {name: float(total / count) for name, total, count in zip(names, sums, counts) if count}


def detection_figures(cases: Sequence[dict]) -> dict[str, float]:
    """AP at IoU 0.1, 0.5 and 0.5:0.95, mask AP, and sensitivity at given false positives per image (FROC, IoU 0.1).

    Left out where there is no annotated lesion.
    """
    figures = _average_precision([case["match"] for case in cases], ("ap10", "ap50", "ap"))
    masks = [case["mask_match"] for case in cases if "mask_match" in case]
    if masks:
        figures |= _average_precision(masks, ("mask_ap10", "mask_ap50", "mask_ap"))
    lesions = sum(case["n_boxes"] for case in cases)
    if lesions:
        curve = froc_curve([case["match"] for case in cases], lesions)
        figures |= {f"froc_{rate:g}": sensitivity_at(curve, rate) for rate in FALSE_POSITIVE_RATES}
        figures["froc_mean"] = float(np.mean([figures[f"froc_{rate:g}"] for rate in FALSE_POSITIVE_RATES]))
    return figures


def _average_precision(matches: Sequence[dict], names: Sequence[str]) -> dict[str, float]:
    if not any(match and match[0]["gtIgnore"].size for match in matches):
        return {}
    result = COCO.compute(matches)[0]
    keys = ("AP_IoU_0.10_MaxDet_100", "AP_IoU_0.50_MaxDet_100", "mAP_IoU_0.50_0.95_0.05_MaxDet_100")
    return {name: float(result[key]) for name, key in zip(names, keys)}


def froc_curve(matches: Sequence[dict], lesions: int) -> tuple[np.ndarray, np.ndarray]:
    """False positives per image and sensitivity at every score threshold, from high to low, at IoU 0.1.

    MONAI's compute_froc_curve_data leaves out the lowest threshold, so that the last detections never count.
    """
    found = [match[0] for match in matches if match]
    scores = np.concatenate([match["dtScores"] for match in found]) if found else np.array([])
    hits = np.concatenate([match["dtMatches"][0] for match in found]) if found else np.array([])
    hits = hits[np.argsort(-scores, kind="stable")] > 0
    return np.cumsum(~hits) / len(matches), np.cumsum(hits) / lesions


def sensitivity_at(curve: tuple[np.ndarray, np.ndarray], rate: float) -> float:
    """Highest sensitivity with at most `rate` false positives per image."""
    return float(max(curve[1][curve[0] <= rate], default=0.0))


def figures_of(task: str) -> Callable[[Sequence[dict]], dict[str, float]]:
    """The function that turns a task's cases into figures."""
    return {CLASSIFICATION: classification_figures, DETECTION: detection_figures}.get(task, mean_figures)


def with_intervals(task: str, cases: Sequence[dict], groups: Sequence[str], bootstrap: int, seed: int) -> dict:
    """Every figure of a task with its 95 % interval.

    Args:
        cases: rows of the task.
        groups: patient of each row; whole groups are drawn with replacement.
        bootstrap: number of draws; 0 gives no interval. Draws in which a figure is undefined are left out.
        seed: of the draws.

    Returns:
        name -> {"value", "ci95": [low, high] or None, "n": number of cases the figure is defined for}.
    """
    compute, rng = figures_of(task), np.random.default_rng(seed)
    values = compute(cases)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    members_list, draws = list(members.values()), {name: [] for name in values}
    for _ in range(bootstrap):
        chosen = rng.integers(len(members_list), size=len(members_list))
        drawn = compute([cases[index] for group in chosen for index in members_list[group]])
        for name, value in drawn.items():
            if name in draws:
                draws[name].append(value)
    return {
        name: {
            "value": value,
            "ci95": [float(edge) for edge in np.percentile(draws[name], (2.5, 97.5))] if draws[name] else None,
            "n": sum(not np.isnan(case.get(name, 0.0)) for case in cases),
        }
        for name, value in values.items()
    }


def confusion(cases: Sequence[dict], num_classes: int) -> list[list[int]]:
    """Counts, rows by annotated and columns by predicted class."""
    labels = [case["label"] for case in cases]
    predicted = [int(case["probabilities"].argmax()) for case in cases]
    return confusion_matrix(labels, predicted, labels=range(num_classes)).tolist()
