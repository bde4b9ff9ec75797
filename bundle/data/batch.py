"""Batches of partially labelled samples, and the draw that keeps tasks, sources and classes in balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_map_only

from bundle.errors import UserError
from bundle.names import ANNOTATED, IMAGE, RECORD, TARGET


def collate(samples: Sequence[dict], tasks: Sequence) -> dict:
    """Join samples, annotated for different tasks, into one batch.

    Gives image and target (B, 1, S, S), annotated (task -> bool (B,)), records, and what `Task.collate` of each task returns.
    """
    image = torch.stack([plain(sample[IMAGE]) for sample in samples])
    batch = {
        IMAGE: image,
        TARGET: torch.stack([plain(sample.get(TARGET, sample[IMAGE])) for sample in samples]),
        ANNOTATED: {task.name: torch.tensor([task.is_annotated(sample) for sample in samples]) for task in tasks},
        RECORD: [sample[RECORD] for sample in samples],
    }
    for task in tasks:
        batch |= task.collate(samples, image)
    return batch


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without what MONAI keeps beside it."""
    return tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor


def balanced_weights(records: Sequence[dict], tasks: Sequence) -> torch.Tensor:
    """Compute weights (float64, of sum 1) for torch's WeightedRandomSampler that divide the draws among tasks and strata.

    A task divides its `share` as its `strata` say: see `bundle.tasks.Task`. One that needs no annotation learns from every
    draw; it has a share of its own only of the records that are not annotated for another of the tasks.
    """
    weights = torch.zeros(len(records), dtype=torch.float64)
    for task in tasks:
        others = [other for other in tasks if other.field is not None] if task.field is None else []
        counts = [task.is_annotated(r) and not any(other.is_annotated(r) for other in others) for r in records]
        own = iter(task.strata([record for record, counted in zip(records, counts) if counted]))
        strata = [next(own) if counted else None for counted in counts]
        sizes = Counter(stratum for stratum in strata if stratum is not None)
        parts = Counter(outer for outer, _ in sizes)
        for index, stratum in enumerate(strata):
            if stratum is not None:
                weights[index] += task.share / (len(parts) * parts[stratum[0]] * sizes[stratum])
    if not weights.sum() > 0:
        names = ", ".join(task.name for task in tasks)
        raise UserError(f"draws: found no record to draw for {names}, expected a share above 0 for one of them")
    return weights / weights.sum()


def prepare_batch(batch: dict, device=None, non_blocking: bool = False, **kwargs):
    """Move a batch of `collate` to the device, for a MONAI engine: image, label (the batch), the network's arguments."""
    batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=non_blocking), batch)
    return batch[IMAGE], batch, (), {"targets": batch, "annotated": batch[ANNOTATED]}
