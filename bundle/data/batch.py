"""Batches of partially labelled samples, and the draw that keeps tasks, sources and classes in balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import torch

from bundle.errors import UserError
from bundle.names import (
    ANNOTATED,
    ANNOTATION,
    BOXES,
    CLASS,
    CLASSIFICATION,
    DETECTION,
    EMPTY_MASK,
    IMAGE,
    INSTANCES,
    MASK,
    RECONSTRUCTION,
    RECORD,
    SEGMENTATION,
    SOURCE,
    TARGET,
    TASKS,
    check_tasks,
)


def collate(samples: Sequence[dict]) -> dict:
    """Join samples, annotated for different tasks, into one batch.

    Args:
        samples: what the transforms return; `target` defaults to the image, `class`, `mask` and `boxes` may be absent.

    Returns:
        image and target (B, 1, S, S); class (B, K) bool, the classes that a sample may have, K the highest of the batch + 1;
        mask (B, C, S, S); detection, a list of B entries, each None or
        {"boxes" (N, 4) x1 y1 x2 y2 in pixels, "labels" (N,) ones, "masks" (N, S, S) where instances are annotated};
        annotated, task -> bool (B,); record, a list of B dictionaries. Rows that are not annotated hold zeros.
    """
    images = torch.stack([_plain(sample[IMAGE]) for sample in samples])
    channels = next((len(sample[MASK]) for sample in samples if MASK in sample), 1)
    no_mask = images.new_zeros(channels, *images.shape[2:])
    annotated = {task: torch.tensor([key in sample for sample in samples]) for task, key in ANNOTATION.items()}
    annotated[RECONSTRUCTION] = torch.ones(len(samples), dtype=torch.bool)
    return {
        IMAGE: images,
        TARGET: torch.stack([_plain(sample.get(TARGET, sample[IMAGE])) for sample in samples]),
        CLASS: _candidates([sample.get(CLASS, []) for sample in samples]),
        MASK: torch.stack([_plain(sample[MASK]) if MASK in sample else no_mask for sample in samples]),
        DETECTION: [_detection_target(sample) for sample in samples],
        ANNOTATED: annotated,
        RECORD: [sample[RECORD] for sample in samples],
    }


def _candidates(classes: Sequence[int | Sequence[int]]) -> torch.Tensor:
    """Classes that each sample may have, one number or a list of them, as bool (B, highest class + 1)."""
    sets = [[label] if isinstance(label, int) else list(label) for label in classes]
    candidates = torch.zeros(len(sets), max(chain.from_iterable(sets), default=0) + 1, dtype=torch.bool)
    for row, labels in zip(candidates, sets):
        row[labels] = True
    return candidates


def known_classes(batch: Mapping) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the samples of a batch that have exactly one class: which they are, bool (B,), and their classes, int64."""
    rows = batch[CLASS].sum(1) == 1
    return rows, batch[CLASS][rows].int().argmax(1)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


def _detection_target(sample: dict) -> dict | None:
    if BOXES not in sample:
        return None
    target = {"boxes": _plain(sample[BOXES]), "labels": torch.ones(len(sample[BOXES]), dtype=torch.int64)}
    if INSTANCES in sample:
        target["masks"] = _plain(sample[INSTANCES])
    return target


def balanced_weights(
    records: Sequence[dict], tasks: Iterable[str], shares: Mapping[str, float] | None = None
) -> torch.Tensor:
    """Compute weights for `torch.utils.data.WeightedRandomSampler` that divide the draws among tasks, sources and classes.

    Classification: every source has the same share, and within a source every class. Segmentation and detection: half of
    the draws show a lesion, half none, and within a half every source has the same share. Reconstruction learns from every
    draw; it has a share of its own only of the records without an annotation for another of the tasks. The weight of a
    record is the sum of its shares.

    Args:
        records: of `bundle.data.datalist.select`.
        tasks: names of the tasks that are trained.
        shares: task -> its share of the draws, in any unit; 1 for a task that is not named.

    Returns:
        float64 (number of records,), summing to one.

    Raises:
        UserError: for an unknown task, a share below 0, or if no record has a share.
    """
    tasks, shares = check_tasks(tasks), shares or {}
    if wrong := [f"{task}: {share!r}" for task, share in shares.items() if task not in TASKS or not share >= 0]:
        raise UserError(f"draws: found {', '.join(wrong)}, expected {', '.join(TASKS)}, each with a number from 0 up")
    weights = torch.zeros(len(records), dtype=torch.float64)
    for task in tasks:
        cells = [_cell(record, task, tasks) for record in records]
        sizes = Counter(cell for cell in cells if cell is not None)
        parts = Counter(outer for outer, _ in sizes)
        for index, cell in enumerate(cells):
            if cell is not None:
                weights[index] += shares.get(task, 1) / (len(parts) * parts[cell[0]] * sizes[cell])
    if not weights.sum() > 0:
        raise UserError(f"draws: found no record to draw for {', '.join(tasks)}, expected a share above 0 for one of them")
    return weights / weights.sum()


def _cell(record: dict, task: str, tasks: Iterable[str]) -> tuple | None:
    """(outer, inner) stratum of a record for a task; None where it has no share for the task."""
    source = record.get(SOURCE)
    if task == RECONSTRUCTION:
        others = (ANNOTATION[other] for other in tasks if other != RECONSTRUCTION)
        return None if any(field in record for field in others) else (source, None)
    if ANNOTATION[task] not in record:
        return None
    if task == CLASSIFICATION:
        return source, str(record[CLASS])
    return record[MASK] != EMPTY_MASK if task == SEGMENTATION else bool(record[BOXES]), source


def prepare_batch(batch: dict, device=None, non_blocking: bool = False, **kwargs):
    """Move a batch of `collate` to the device and split it for a MONAI engine.

    Returns:
        (image (B, 1, S, S), the whole batch as label, no positional and the network's keyword arguments: the detection
        targets, and which images are annotated for which task).
    """
    batch = _to_device(batch, device, non_blocking)
    return batch[IMAGE], batch, (), {"targets": batch[DETECTION], "annotated": batch[ANNOTATED]}


def _to_device(item, device, non_blocking: bool):
    if isinstance(item, torch.Tensor):
        return item.to(device, non_blocking=non_blocking)
    if isinstance(item, Mapping):
        return {key: _to_device(value, device, non_blocking) for key, value in item.items()}
    return [_to_device(value, device, non_blocking) for value in item] if isinstance(item, list) else item
