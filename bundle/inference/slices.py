"""The slices of all scans on their way through the network: read one by one, joined to batches, split again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from monai.data import DataLoader, MetaTensor
from monai.transforms import Invertd, InvertibleTransform, Transform

from bundle.data.volumes import Scan
from bundle.names import IMAGE, SLICE
from bundle.tasks import Task

# Keys of the samples here, beside those of `bundle.names`.
SCAN, INDEX = "scan", "index"
SAMPLES = "samples"  # of a batch


class LoadScanSlice(Transform):
    """Read slice `index` of `scan` as "image" and, to be kept as it is, as "slice": see `Scan.read`."""

    def __call__(self, sample: dict) -> dict:
        image = sample[SCAN].read(sample[INDEX])
        return {INDEX: sample[INDEX], IMAGE: image, SLICE: image.clone()}  # no scan, which a worker would send with each


def slices_of(scans: Iterable[Scan]) -> list[dict]:
    """Every slice of every scan, in order, as `LoadScanSlice` takes it."""
    return [{SCAN: scan, INDEX: index} for scan in scans for index in range(len(scan))]


def collate(samples: Sequence[dict]) -> dict:
    """Join slices to a batch {"image": (B, 1, S, S), "samples": the samples themselves}."""
    # No MetaTensor, whose bookkeeping would take a tenth of the network's time.
    return {IMAGE: torch.stack([sample[IMAGE].as_tensor() for sample in samples]), SAMPLES: list(samples)}


@contextmanager
def helper() -> Iterator[ThreadPoolExecutor]:
    """A thread beside the network, in which torch uses one core."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # of this thread it was never changed, but of threads that are made later


class ReadAhead(DataLoader):
    """MONAI's DataLoader that reads the next batch in a thread while one is used."""

    def __iter__(self) -> Iterator[dict]:
        batches = super().__iter__()
        with helper() as pool:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch


def to_cpu(answer):
    """A task's answer, a tensor or a dictionary of tensors, as float32 on the CPU."""
    if isinstance(answer, dict):
        return {key: to_cpu(value) for key, value in answer.items()}
    return torch.as_tensor(answer).detach().float().cpu()


class AnswersToSlice(Transform):
    """Turn a network's answers into those that are reported, on the grid of the slice as it was read.

    `transform` is the preprocessing, which is inverted for dense tasks.
    """

    def __init__(self, tasks: Sequence[Task], transform: InvertibleTransform) -> None:
        self.tasks, dense = list(tasks), [task.name for task in tasks if task.dense]
        self.invert = Invertd(dense, transform, IMAGE, nearest_interp=False, allow_missing_keys=True) if dense else dict

    def __call__(self, sample: dict) -> dict:
        tasks = [task for task in self.tasks if task.name in sample]
        seen = {task.name: task.activate(sample[task.name]) for task in tasks}
        dense = {task.name: MetaTensor(seen[task.name]) for task in tasks if task.dense}  # what MONAI can invert
        sample = self.invert({**sample, **seen, **dense})
        sample |= {name: sample[name].as_tensor() for name in dense}
        return {**sample, **{task.name: task.to_slice(sample[task.name], sample, seen[task.name]) for task in tasks}}
