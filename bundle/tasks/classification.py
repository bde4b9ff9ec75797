"""Classification: the class of a slice."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay, confusion_matrix

from bundle.names import CLASS, CLASSIFICATION, SOURCE
from bundle.networks.heads import ClassificationHead
from bundle.tasks.base import Figures, Task, counted

CONFIDENCE_BINS = 10


class Classification(Task):
    """One of several classes, by a softmax. A record may name several classes, of which one, not known which, is right.

    A case is the annotated class, "label", and the "probabilities" (K,); only samples with exactly one class make one.
    """

    name, field = CLASSIFICATION, CLASS
    described = {"classes": ["other", "COVID-19", "lung cancer"], "dropout": 0.2, "temperature": None}
    free = ("dropout", "temperature")
    outputs = "classes"
    headline = ("auroc", "balanced_accuracy")
    columns = {"accuracy": "accuracy", "AUROC": "auroc"}

    def __init__(self, classes: Sequence[str], dropout: float, label_smoothing: float = 0.0, **_) -> None:
        self.classes, self.dropout, self.label_smoothing = list(classes), dropout, label_smoothing

    def strata(self, records: Sequence[Mapping]) -> list[tuple | None]:
        """(source, class); ("known in part", source) where several classes are possible.

        A source that one class could stand for would be learned as that class by its look: its records have no share if
        another source shows that class beside others.
        """
        candidates = defaultdict(list)
        for record in records:
            candidates[record.get(SOURCE)].append(set(np.atleast_1d(record[CLASS]).tolist()))
        one_sided = {source for source, sets in candidates.items() if set.intersection(*sets)}
        sure = [(record.get(SOURCE), record[CLASS]) for record in records if isinstance(record[CLASS], int)]
        shown = {label for source, label in sure if source not in one_sided}

        def stratum(source, label) -> tuple | None:
            if not isinstance(label, int):
                return "known in part", source
            return None if source in one_sided and label in shown else (source, label)

        return [stratum(record.get(SOURCE), record[CLASS]) for record in records]

    def collate(self, samples: Sequence[Mapping], image: torch.Tensor) -> dict:
        """class: bool (B, K), the classes that a sample may have."""
        candidates = torch.zeros(len(samples), len(self.classes), dtype=torch.bool)
        for row, sample in zip(candidates, samples):
            row[sample.get(CLASS, [])] = True
        return {CLASS: candidates}

    def head(self, channels: Sequence[int], strides: Sequence[int], in_channels: int) -> ClassificationHead:
        return ClassificationHead(channels[-1], len(self.classes), dropout=self.dropout)

    def loss(self, answer: torch.Tensor, batch: Mapping, rows: torch.Tensor) -> torch.Tensor:
        """Cross-entropy: -log of the summed probabilities of the classes that a sample may have."""
        log_probability = answer[rows].log_softmax(1)
        likelihood = log_probability.masked_fill(~batch[CLASS][rows], -torch.inf).logsumexp(1)
        return -((1 - self.label_smoothing) * likelihood + self.label_smoothing * log_probability.mean(1)).mean()

    def cases(self, answer: torch.Tensor, batch: Mapping, thorough: bool) -> list[dict]:
        pairs = zip(batch[CLASS].cpu().numpy(), answer.float().softmax(1).cpu().numpy())
        return [{"label": int(row.argmax()), "probabilities": p} if row.sum() == 1 else {} for row, p in pairs]

    def figures(self, cases: Sequence[dict]) -> Figures:
        """Accuracy, balanced accuracy and macro F1 (over the classes that occur in the labels), calibration error and AUROC.

        AUROC ranks the classes that occur: of two, the higher one by its share of their joint probability; of more, the mean
        of one class against the rest; of one, it is left out. A draw that has lost a class has accuracy and calibration error
        alone: the others would be those of another question.
        """
        labels, probabilities = _arrays(cases)
        classes, present = probabilities.shape[1], np.unique(labels)
        cells, correct = labels * classes + probabilities.argmax(1), probabilities.argmax(1) == labels
        share = probabilities[:, present] / np.maximum(probabilities[:, present].sum(1, keepdims=True), 1e-12)
        ranks = [np.unique(column, return_inverse=True)[1] for column in share.T]  # equal shares have equal ranks

        def figures(weights: np.ndarray) -> dict[str, float]:
            counts = np.bincount(cells, weights, classes**2).reshape(classes, classes)
            hits, annotated, predicted = np.diag(counts)[present], counts.sum(1)[present], counts.sum(0)[present]
            result = {"accuracy": hits.sum() / counts.sum(), "ece": calibration_error(probabilities.max(1), correct, weights)}
            if annotated.all():
                result["balanced_accuracy"] = (hits / annotated).mean()
                result["f1_macro"] = (2 * hits / (annotated + predicted)).mean()
            if annotated.all() and len(present) > 1:
                one_vs_rest = [auroc(r, labels == c, weights) for c, r in zip(present, ranks)]
                result["auroc"] = one_vs_rest[1] if len(present) == 2 else np.mean(one_vs_rest)
            return {name: float(value) for name, value in result.items()}

        return figures

    def finish(self, report: dict, cases: Sequence[dict]) -> dict:
        """Adds the confusion matrix, rows by annotated and columns by predicted class."""
        labels, probabilities = _arrays(cases)
        counts = confusion_matrix(labels, probabilities.argmax(1), labels=range(len(self.classes))).tolist()
        return {**report, "confusion_matrix": {"classes": self.classes, "counts": counts}}

    def table_row(self, case: Mapping) -> dict:
        row = {"class": case["label"], "predicted_class": int(case["probabilities"].argmax())}
        return row | {f"probability_{name}": float(p) for name, p in zip(self.classes, case["probabilities"])}

    def draw(self, report: Mapping, cases: Sequence[dict], sources: Sequence[str]) -> Figure:
        """Confusion matrix, ROC curves and reliability."""
        labels, probabilities = _arrays(cases)
        figure = Figure(figsize=(15, 4.5), layout="constrained")
        left, right, last = figure.subplots(1, 3)
        counts = np.array(report["confusion_matrix"]["counts"])
        ConfusionMatrixDisplay(counts, display_labels=self.classes).plot(ax=left, cmap="Blues", colorbar=False)
        left.set(title="confusion matrix", xlabel="predicted", ylabel="annotated")
        for index, name in enumerate(self.classes):
            if 0 < (labels == index).sum() < len(labels):
                RocCurveDisplay.from_predictions(labels == index, probabilities[:, index], name=name, ax=right)
        right.plot([0, 1], [0, 1], ":", color="grey")
        right.set_title("one class against the rest")
        confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
        CalibrationDisplay.from_predictions(correct, confidence, n_bins=CONFIDENCE_BINS, name="most probable class", ax=last)
        last.set(title=f"reliability, ECE {report['ece']['value']:.3f}", xlabel="confidence", ylabel="accuracy")
        counts, edges = np.histogram(confidence, CONFIDENCE_BINS, (0, 1))
        share = {"color": "0.85", "label": "share of cases"}
        last.bar(edges[:-1], counts / len(confidence), 1 / CONFIDENCE_BINS, align="edge", **share)
        last.legend(loc="upper left")
        return figure

    def judge(self, case: Mapping) -> tuple[float, str]:
        probabilities, right = case["probabilities"], case["label"]
        predicted = int(np.argmax(probabilities))
        text = f"{self.classes[right]} → {self.classes[predicted]} {probabilities[predicted]:.2f}"
        return float(probabilities[right]), text

    def join_views(self, answers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logarithm of the mean probabilities, also of deep ensembles (Lakshminarayanan et al., arXiv 1612.01474)."""
        answers = torch.stack(list(answers))
        return answers.log_softmax(2).logsumexp(0) - math.log(len(answers))

    def activate(self, answer: torch.Tensor) -> torch.Tensor:
        return answer.softmax(0)

    def row(self, answer: torch.Tensor, view, result) -> dict:
        return {"probabilities": {name: round(p, 6) for name, p in zip(self.classes, answer.tolist())}}

    def entry(self, result) -> dict:
        """predicted, probabilities (means over the slices with lung), slices (how many), agreeing (how many say the same)."""
        rows = counted([[row["probabilities"][name] for name in self.classes] for row in result.slices], result.bearing)
        mean = dict(zip(self.classes, np.mean(rows, axis=0, dtype=float).round(6).tolist()))
        predicted = max(mean, key=mean.get)
        agreeing = int((np.argmax(rows, axis=1) == self.classes.index(predicted)).sum())
        return {"predicted": predicted, "probabilities": mean, "slices": len(rows), "agreeing": agreeing}

    def probabilities(self, entry: Mapping) -> dict[str, float]:
        return entry["probabilities"]

    def report(self, entry: Mapping) -> dict[str, str]:
        facts = {"slices that agree": f"{entry['agreeing']} of {entry['slices']}"} if entry["slices"] > 1 else {}
        unsure = entry["probabilities"][entry["predicted"]] < 0.5
        return facts | ({"certainty": "low: the other classes together are likelier"} if unsure else {})

    def line(self, entry: Mapping) -> str:
        return f"{entry['predicted']} ({entry['probabilities'][entry['predicted']]:.2f})"

    def scan_columns(self, entry: Mapping) -> dict:
        probabilities = {f"probability {name}": value for name, value in entry["probabilities"].items()}
        return {"predicted": entry["predicted"], **probabilities}

    def slice_columns(self, row: Mapping) -> dict:
        return {f"probability {name}": value for name, value in row["probabilities"].items()}


def known_classes(batch: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples of a batch have exactly one class, bool (B,), and their classes, int64."""
    rows = batch[CLASS].sum(1) == 1
    return rows, batch[CLASS][rows].int().argmax(1)


def _arrays(cases: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and probabilities (N, K)."""
    return np.array([case["label"] for case in cases]), np.stack([case["probabilities"] for case in cases])


def calibration_error(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over bins of confidence (arXiv 1706.04599)."""
    bins = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    return float(np.abs(np.bincount(bins, weights * (correct - confidence))).sum() / weights.sum())


def auroc(ranks: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """Share of the pairs of a positive and a negative case in which the positive ranks higher, ties half (Mann-Whitney)."""
    positives, negatives = np.bincount(ranks, weights * positive), np.bincount(ranks, weights * ~positive)
    below = np.cumsum(negatives) - negatives / 2
    return float((positives * below).sum() / (positives.sum() * negatives.sum()))
