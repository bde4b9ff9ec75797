"""Figures over many cases, with bootstrap intervals over groups (patients)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.metrics import confusion_matrix

from bundle.evaluation.cases import COCO
from bundle.names import CLASSIFICATION, DETECTION

FALSE_POSITIVE_RATES = (0.125, 0.25, 0.5, 1, 2, 4, 8)
CONFIDENCE_BINS = 10
RECALLS = np.linspace(0, 1, 101)

# Figures of cases of which each counts as often as its weight says: by name, without those that are undefined. A draw of the
# bootstrap is a weight for every case, so that what is the same for all draws (sorting by score) is done once.
Figures = Callable[[np.ndarray], dict[str, float]]


def classification_figures(cases: Sequence[dict]) -> Figures:
    """Accuracy, balanced accuracy and macro F1 (over the classes that occur in the labels), calibration error and AUROC.

    The predicted class is the most probable of all classes. AUROC ranks the classes that occur: with two, the higher one
    by its share of their joint probability, with more, the mean of one class against the rest. With one class it
    is left out, and balanced accuracy is the recall of that class. A draw that has lost a class has accuracy and calibration
    error alone: the others would be those of another question.
    """
    labels = np.array([case["label"] for case in cases])
    probabilities = np.stack([case["probabilities"] for case in cases])
    classes = probabilities.shape[1]
    cells = labels * classes + probabilities.argmax(1)
    correct = probabilities.argmax(1) == labels
    present = np.unique(labels)
    share = probabilities[:, present] / np.maximum(probabilities[:, present].sum(1, keepdims=True), 1e-12)
    ranks = [np.unique(column, return_inverse=True)[1] for column in share.T]  # equal shares have equal ranks

    def figures(weights: np.ndarray) -> dict[str, float]:
        counts = np.bincount(cells, weights, classes**2).reshape(classes, classes)
        hits, annotated, predicted = np.diag(counts)[present], counts.sum(1)[present], counts.sum(0)[present]
        result = {
            "accuracy": hits.sum() / counts.sum(),
            "ece": calibration_error(probabilities.max(1), correct, weights),
        }
        if annotated.all():
            result["balanced_accuracy"] = (hits / annotated).mean()
            result["f1_macro"] = (2 * hits / (annotated + predicted)).mean()
        if annotated.all() and len(present) > 1:
            one_vs_rest = [auroc(r, labels == c, weights) for c, r in zip(present, ranks)]
            result["auroc"] = one_vs_rest[1] if len(present) == 2 else np.mean(one_vs_rest)
        return {name: float(value) for name, value in result.items()}

    return figures


def calibration_error(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over bins of confidence (arXiv 1706.04599).

    Args:
        confidence: highest probability of each case.
        correct: whether its class is the annotated one.
        weights: how often each case counts.
    """
    bins = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    return float(np.abs(np.bincount(bins, weights * (correct - confidence))).sum() / weights.sum())


def auroc(ranks: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """Share of the pairs of a positive and a negative case in which the positive ranks higher, ties half (Mann-Whitney)."""
    positives, negatives = np.bincount(ranks, weights * positive), np.bincount(ranks, weights * ~positive)
    below = np.cumsum(negatives) - negatives / 2
    return float((positives * below).sum() / (positives.sum() * negatives.sum()))


def mean_figures(cases: Sequence[dict]) -> Figures:
    """Mean over the cases of every figure that is defined (not NaN) in at least one."""
    names = [name for name in cases[0] if name != "lesion_pixels"]
    values = np.array([[case[name] for name in names] for case in cases], dtype=float)
    defined = ~np.isnan(values)
    values = np.where(defined, values, 0)

    def figures(weights: np.ndarray) -> dict[str, float]:
        sums, counts = weights @ values, weights @ defined
        return {name: float(total / count) for name, total, count in zip(names, sums, counts) if count}

    return figures


def detection_figures(cases: Sequence[dict]) -> Figures:
    """AP at IoU 0.1, 0.5 and 0.5:0.95, mask AP, and sensitivity at given false positives per image (FROC, IoU 0.1).

    Left out where there is no annotated lesion. The detections were matched by MONAI; from its matches its COCOMetric
    computes the same AP but for its rounding, some fifty times slower than the bootstrap can wait for.
    """
    boxes = _Matches([case["match"] for case in cases])
    masks = _Matches([case.get("mask_match", {}) for case in cases])

    def figures(weights: np.ndarray) -> dict[str, float]:
        result = dict(zip(("ap10", "ap50", "ap"), boxes.average_precision(weights)))
        result |= dict(zip(("mask_ap10", "mask_ap50", "mask_ap"), masks.average_precision(weights)))
        if weights @ boxes.lesions:
            curve = boxes.froc(weights)
            result |= {f"froc_{rate:g}": sensitivity_at(curve, rate) for rate in FALSE_POSITIVE_RATES}
            result["froc_mean"] = float(np.mean([result[f"froc_{rate:g}"] for rate in FALSE_POSITIVE_RATES]))
        return result

    return figures


class _Matches:
    """Detections of many images in the order of their scores, from high to low, and which of them are hits.

    Args:
        matches: for each image what `monai.apps.detection.metrics.matching.matching_batch` returns; {} for no image.
    """

    def __init__(self, matches: Sequence[dict]) -> None:
        found = [(image, match[0]) for image, match in enumerate(matches) if match]
        scores = np.concatenate([np.zeros(0), *(match["dtScores"] for _, match in found)])
        order = np.argsort(-scores, kind="stable")
        self.images = np.concatenate([np.zeros(0, int), *(np.full(len(m["dtScores"]), image) for image, m in found)])[order]
        thresholds = range(len(COCO.get_iou_thresholds()))
        hits = [np.concatenate([np.zeros(0), *(m["dtMatches"][t] for _, m in found)])[order] > 0 for t in thresholds]
        self.loosest = hits[0]
        self.hits = [np.flatnonzero(hit) for hit in hits]
        self.lesions = np.zeros(len(matches))
        self.lesions[[image for image, _ in found]] = [match["gtIgnore"].size for _, match in found]

    def average_precision(self, weights: np.ndarray) -> tuple[float, ...]:
        """COCO's AP (precision at 101 recalls) at the first and second threshold and averaged from the second on.

        Precision is taken at the hits alone: between two of them it only falls.
        """
        lesions, drawn = weights @ self.lesions, weights[self.images]
        if not lesions:
            return ()
        so_far, at = np.cumsum(drawn), []
        for hits in self.hits:
            true = np.cumsum(drawn[hits])
            precision = np.append(true / np.maximum(so_far[hits], 1), 0)  # 0 at recalls that are never reached
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            at.append(precision[np.searchsorted(true / lesions, RECALLS)].mean())
        return float(at[0]), float(at[1]), float(np.mean(at[1:]))

    def froc(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """False positives per image and sensitivity at every score threshold, from high to low, at the first threshold."""
        drawn = weights[self.images]
        return np.cumsum(drawn * ~self.loosest) / weights.sum(), np.cumsum(drawn * self.loosest) / (weights @ self.lesions)


def froc_curve(cases: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """False positives per image and sensitivity at every score threshold, from high to low, at IoU 0.1.

    MONAI's compute_froc_curve_data leaves out the lowest threshold, so that the last detections never count.
    """
    return _Matches([case["match"] for case in cases]).froc(np.ones(len(cases)))


def sensitivity_at(curve: tuple[np.ndarray, np.ndarray], rate: float) -> float:
    """Highest sensitivity with at most `rate` false positives per image."""
    return float(curve[1][curve[0] <= rate].max(initial=0.0))


FIGURES = {CLASSIFICATION: classification_figures, DETECTION: detection_figures}


def with_intervals(task: str, cases: Sequence[dict], groups: Sequence[str], bootstrap: int, seed: int) -> dict:
    """Every figure of a task with its 95 % interval.

    Args:
        cases: rows of the task.
        groups: patient of each row; whole groups are drawn with replacement.
        bootstrap: number of draws; 0 gives no interval. Draws in which a figure is undefined are left out.
        seed: of the draws.

    Returns:
        name -> {"value", "ci95": [low, high], "n": number of cases the figure is defined for}. The interval is None without
        draws, and where there are no two groups: every draw would be the same.
    """
    figures, rng = FIGURES.get(task, mean_figures)(cases), np.random.default_rng(seed)
    values = figures(np.ones(len(cases)))
    members = np.unique(groups, return_inverse=True)[1]
    draws = {name: [] for name in values}
    for _ in range(bootstrap if members.max() else 0):
        chosen = rng.integers(members.max() + 1, size=members.max() + 1)
        for name, value in figures(np.bincount(chosen, minlength=members.max() + 1)[members]).items():
            draws[name].append(value)
    return {
        name: {
            "value": value,
            "ci95": [float(edge) for edge in np.percentile(draws[name], (2.5, 97.5))] if draws[name] else None,
            "n": sum(_defined(case, name) for case in cases),
        }
        for name, value in values.items()
    }


def _defined(case: dict, name: str) -> bool:
    """Whether a case takes part in a figure: it has instance masks for mask AP, and its own value is not NaN."""
    return "mask_match" in case if name.startswith("mask_") else not np.isnan(case.get(name, 0.0))


def confusion(cases: Sequence[dict], num_classes: int) -> list[list[int]]:
    """Counts, rows by annotated and columns by predicted class."""
    labels = [case["label"] for case in cases]
    predicted = [int(case["probabilities"].argmax()) for case in cases]
    return confusion_matrix(labels, predicted, labels=range(num_classes)).tolist()
