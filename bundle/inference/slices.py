"""The slices of all scans on their way through the network: read one by one, joined to batches, split again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from monai.config import KeysCollection
from monai.engines.utils import IterationEvents
from monai.transforms import MapTransform, Transform
from monai.utils.enums import CommonKeys
from torchvision.ops import clip_boxes_to_image

from bundle.data.volumes import Scan
from bundle.data.transforms import move_boxes
from bundle.errors import UserError
from bundle.names import IMAGE

# Keys of the samples here, beside those of `bundle.names`.
SCAN, INDEX = "scan", "index"
SLICE = "slice"  # the slice as it was read, before its values and its size are changed
SAMPLES = "samples"  # of a batch


class LoadScanSlice(Transform):
    """Read slice `index` of `scan` as "image", and keep a copy of it as "slice": see `Scan.read`."""

    def __call__(self, sample: dict) -> dict:
        image = sample[SCAN].read(sample[INDEX])
        return {**sample, IMAGE: image, SLICE: image.clone()}


def slices_of(scans: Iterable[Scan]) -> list[dict]:
    """Every slice of every scan, in order, as `LoadScanSlice` takes it."""
    return [{SCAN: scan, INDEX: index} for scan in scans for index in range(len(scan))]


def collate(samples: Sequence[dict]) -> dict:
    """Join slices to a batch {"image": (B, 1, S, S), "samples": the samples themselves, which know the way back}."""
    return {IMAGE: torch.stack([torch.as_tensor(sample[IMAGE]) for sample in samples]), SAMPLES: list(samples)}


class SplitBatch:
    """Handler that splits batch and predictions into single slices, so that the engine's postprocessing gets each alone.

    MONAI's own decollation would mix up detections, which are a list with an entry for each image.
    """

    def attach(self, engine) -> None:
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)

    def __call__(self, engine) -> None:
        samples, pred = engine.state.batch[SAMPLES], engine.state.output[CommonKeys.PRED]
        engine.state.batch = samples
        engine.state.output = [
            {key: to_cpu(answer[index]) for key, answer in pred.items()} for index in range(len(samples))
        ]


def to_cpu(answer):
    """A task's answer, a tensor or a dictionary of tensors, as float32 on the CPU."""
    if isinstance(answer, dict):
        return {key: to_cpu(value) for key, value in answer.items()}
    return torch.as_tensor(answer).detach().float().cpu()


class BoxesToFiled(MapTransform):
    """Bring detections to pixels of the stored slice, x = column as stored, clipped to its edges; weak and vanished ones go.

    Replaces {"boxes", "scores", "masks" …} of the network by {"boxes" (N, 4) x1 y1 x2 y2, "scores" (N,), "areas" (N,)},
    areas of the instance masks (more than 0.5) in pixels of the stored slice.

    Args:
        score_threshold: lowest score that is kept, from 0 to 1.

    Raises:
        UserError: if the threshold is out of range.
    """

    def __init__(self, keys: KeysCollection, score_threshold: float = 0.5, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0 <= score_threshold <= 1:
            raise UserError(f"score_threshold: found {score_threshold}, expected a number from 0 to 1")
        self.score_threshold = score_threshold

    def __call__(self, data):
        data = dict(data)
        for key in self.key_iterator(data):
            boxes, scores, masks = (data[key][name] for name in ("boxes", "scores", "masks"))
            areas = (masks > 0.5).sum((1, 2, 3)) * torch.linalg.det(data[IMAGE].affine[:2, :2]).abs().float()
            boxes = move_boxes(boxes, data[IMAGE].affine)
            rows, columns = data[SLICE].shape[-2:]
            if data[SLICE].affine[0, 1]:  # stored with rows and columns exchanged
                rows, columns = columns, rows
            boxes = clip_boxes_to_image(boxes, (rows, columns))
            kept = (scores >= self.score_threshold) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            data[key] = {"boxes": boxes[kept], "scores": scores[kept], "areas": areas[kept]}
        return data
