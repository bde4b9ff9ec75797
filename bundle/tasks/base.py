"""What a task provides to training, evaluation and inference, with the defaults."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from bundle.names import SOURCE

# Figures of cases of which each counts as often as its weight says: by name, without those that are undefined. A draw of the
# bootstrap is a weight for every case, so that what is the same for all draws (sorting by score) is done once.
Figures = Callable[[np.ndarray], dict[str, float]]


class Task:
    """A question about a slice: its annotation, head, loss, metrics, and how answers are joined and summed up.

    A subclass sets the attributes and overrides the methods whose default does not fit it. B is the number of samples of a
    batch; an answer is what the head gives for them in evaluation mode; an entry and a row are what predictions.json says of a
    scan and of a slice. Options are knobs of training and entries of a checkpoint's description; a task takes those it names.
    """

    name: str  # in `heads.NAME` of a state_dict, in metrics.json and in predictions.json
    field: str | None = None  # of a record that makes it count for the task; None where every slice does
    described: Mapping[str, object] = {}  # entries of a checkpoint's description that the head depends on, with defaults
    free: Collection[str] = ()  # those of them that no weight depends on; `ENTRY::KEY` for a key of an entry
    outputs: str | None = None  # the one of them that names the channels of the output layer, if any does
    weight = 1.0  # of the loss
    share = 1.0  # of the samples that are drawn for the task, in any unit
    headline: Sequence[str] = ()  # figures whose mean is the task's part in the validation score
    columns: Mapping[str, str] = {}  # title -> figure, of the tables and curves of a training
    outlined = False  # whether `outlines` show an answer without the image
    dense = False  # whether an answer has the pixels of the image, and goes through the preprocessing backwards

    def __init__(self, **options) -> None:
        pass

    @property
    def path(self) -> str:
        """Its name in a configuration and in a checkpoint; of a task outside the package the dotted path."""
        kind = type(self)
        return self.name if kind.__module__.startswith(__package__ + ".") else f"{kind.__module__}.{kind.__qualname__}"

    # --- data ---

    def complaints(self, value) -> Iterator[str]:
        """What is wrong with a `field` that is none of the datalist's own, each as "found …, expected …"."""
        return iter(())

    def is_annotated(self, record: Mapping) -> bool:
        """Whether a record, or a sample made from it, counts for the task."""
        return self.field is None or self.field in record

    def strata(self, records: Sequence[Mapping]) -> list[tuple | None]:
        """(outer, inner) stratum of each record, None for no share: outer ones have equal shares, in each the inner ones."""
        return [(record.get(SOURCE), None) for record in records]

    def collate(self, samples: Sequence[Mapping], image: torch.Tensor) -> dict:
        """Entries of the batch of these samples; rows that are not annotated hold zeros. `image` is (B, C, S, S)."""
        return {}

    # --- network and training ---

    def head(self, channels: Sequence[int], strides: Sequence[int], in_channels: int) -> nn.Module:
        """Make the head, from the encoder's feature maps, finest first, to the answer. `in_channels`: of the image."""
        raise NotImplementedError(f"{type(self).__name__} has no head")

    def loss(self, answer, batch: Mapping, rows: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Loss over the annotated samples, bool (B,), or a dictionary of parts whose sum it is."""
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    # --- evaluation ---

    def cases(self, answer, batch: Mapping, thorough: bool) -> list[dict]:
        """What is measured of each sample, if `thorough` what is slow, too; {} for one that has no part in the figures."""
        raise NotImplementedError(f"{type(self).__name__} has no cases")

    def comparable(self, cases: Sequence[dict], sources: Sequence[str]) -> Sequence[dict]:
        """The cases, each without what its source does not allow to be measured."""
        return cases

    def figures(self, cases: Sequence[dict]) -> Figures:
        """Figures over cases: the mean of each number of a case that is defined (not NaN) in at least one."""
        return mean_figures(cases)

    def is_defined(self, case: Mapping, figure: str) -> bool:
        """Whether a case takes part in a figure."""
        return not np.isnan(case.get(figure, 0.0))

    def finish(self, report: dict, cases: Sequence[dict]) -> dict:
        """The entry of metrics.json made of the figures with their intervals."""
        return report

    def table_row(self, case: Mapping) -> dict:
        """Cells of a case in per_case.csv."""
        return {name: "" if np.isnan(value) else value for name, value in case.items()}

    def draw(self, report: Mapping, cases: Sequence[dict], sources: Sequence[str]) -> Figure | None:
        """A picture of the figures, or None."""

    def judge(self, case: Mapping) -> tuple[float, str]:
        """How good an answer is, the worst lowest, and the text above its picture: by default its first number."""
        name, value = next(iter(case.items()))
        return float(value), f"{name} {value:.2f}"

    def outlines(self, answer, batch: Mapping, index: int) -> dict:
        """What is drawn over a slice: "masks" or "boxes", annotated and answered; or "error" (rows, columns) in [0, 1]."""
        return {}

    # --- joining answers ---

    def mirror(self, answer, width: int):
        """The answer for the mirror image along the last axis of `width` pixels, as one for the image itself."""
        return answer.flip(-1) if answer.ndim == 4 else answer

    def join_views(self, answers: Sequence):
        """One answer from those of one network for several views of the images."""
        return torch.stack(list(answers)).mean(0)

    def join_members(self, answers: Sequence):
        """One answer from those of several networks."""
        return self.join_views(answers)

    # --- scans ---

    def activate(self, answer):
        """What is reported of a slice, from the head's answer for it: probabilities from logits."""
        return answer

    def to_slice(self, answer, sample: Mapping, seen):
        """The activated answer on the grid of the stored slice, where undoing the preprocessing (`dense`) is not enough.

        `sample` has "image", preprocessed, and "slice", as read; `seen` is the answer as the network sees the slice.
        """
        return answer

    def row(self, answer, view, result) -> dict:
        """Entries of a slice in predictions.json; voxels go to `result.store`. By default the numbers of the answer.

        `answer` comes from `to_slice`; `view` is a `bundle.inference.report.SliceView`, `result` the `Result` so far.
        """
        return {self.name: np.round(np.asarray(answer, dtype=float), 6).tolist()}

    def entry(self, result):
        """The entry of the scan in predictions.json: by default the mean over the slices with lung."""
        rows = [row[self.name] for row in counted(result.slices, result.bearing)]
        return np.mean(rows, axis=0).round(6).tolist()

    def probabilities(self, entry) -> dict[str, float]:
        """Probability of each class of the scan."""
        return {}

    def segments(self, entry) -> dict[str, dict]:
        """Of each lesion class that is marked pixel by pixel "volume_ml" and "share_of_lung"."""
        return {}

    def lesions(self, entry) -> list[dict]:
        """Lesions in the scan that have boxes: see `bundle.tasks.lesions.link_boxes`."""
        return []

    def caption(self, row: Mapping) -> list[str]:
        """What the line below the picture of a slice says."""
        return []

    def line(self, entry) -> str:
        """What the console says of a scan, in a few words."""
        return ""

    def report(self, entry) -> dict[str, str]:
        """Lines of the task's card in report.html, title -> text, beside its probabilities and lesions."""
        return {}

    def scan_columns(self, entry) -> dict:
        """Columns of scans.csv."""
        return {self.name: entry}

    def slice_columns(self, row: Mapping) -> dict:
        """Columns of slices.csv."""
        return {self.name: row[self.name]}


def counted(rows: Sequence, bearing: Sequence[bool]) -> list:
    """Rows of the slices that show lung, of all where none does."""
    return [row for row, has_lung in zip(rows, bearing) if has_lung] or list(rows)


def mean_figures(cases: Sequence[dict]) -> Figures:
    """Mean over the cases of every number that is defined (not NaN) in at least one."""
    values = np.array([[case[name] for name in cases[0]] for case in cases], dtype=float)
    defined = ~np.isnan(values)
    values = np.where(defined, values, 0)

    def figures(weights: np.ndarray) -> dict[str, float]:
        means = zip(cases[0], weights @ values, weights @ defined)
        return {name: float(total / count) for name, total, count in means if count}

    return figures
