"""Batches of partially labelled samples, and the draw that keeps tasks, sources and classes in balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

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
    check_tasks,
)


def collate(samples: Sequence[dict]) -> dict:
    """Join samples, annotated for different tasks, into one batch.

    Args:
        samples: what the transforms return; `target` defaults to the image, `class`, `mask` and `boxes` may be absent.

    Returns:
        image and target (B, 1, S, S); class (B,) int64; mask (B, C, S, S); detection, a list of B entries, each None or
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
        CLASS: torch.tensor([int(sample.get(CLASS, 0)) for sample in samples]),
        MASK: torch.stack([_plain(sample[MASK]) if MASK in sample else no_mask for sample in samples]),
        DETECTION: [_detection_target(sample) for sample in samples],
        ANNOTATED: annotated,
        RECORD: [sample[RECORD] for sample in samples],
    }


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


def _detection_target(sample: dict) -> dict | None:
    if BOXES not in sample:
        return None
    target = {"boxes": _plain(sample[BOXES]), "labels": torch.ones(len(sample[BOXES]), dtype=torch.int64)}
    if INSTANCES in sample:
        target["masks"] = _plain(sample[INSTANCES])
    return target


def balanced_weights(records: Sequence[dict], tasks: Sequence[str]) -> torch.Tensor:
    """Weights for `torch.utils.data.WeightedRandomSampler` that give each task the same share of the draws.

    Within a task every source has the same share, and within a source every class (classification) or the positive and the
    negative records (segmentation, detection). Reconstruction, which needs no annotation, draws from all records evenly
    by source. The weight of a record is the sum of its shares.

    Returns:
        float64 (number of records,), summing to one.
    """
    weights = torch.zeros(len(records), dtype=torch.float64)
    for task in check_tasks(tasks):
        cells = [_cell(record, task) for record in records]
        sizes = Counter(cell for cell in cells if cell is not None)
        parts = Counter(source for source, _ in sizes)
        for index, cell in enumerate(cells):
            if cell is not None:
                weights[index] += 1 / (len(parts) * parts[cell[0]] * sizes[cell])
    return weights / weights.sum()


def _cell(record: dict, task: str) -> tuple | None:
    """(source, stratum) of a record for a task; None where it is not annotated."""
    if task != RECONSTRUCTION and ANNOTATION[task] not in record:
        return None
    stratum = {
        CLASSIFICATION: lambda: record[CLASS],
        SEGMENTATION: lambda: record[MASK] == EMPTY_MASK,
        DETECTION: lambda: not record[BOXES],
        RECONSTRUCTION: lambda: None,
    }[task]()
    return record.get(SOURCE), stratum


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
