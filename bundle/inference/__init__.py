"""From scans to predictions, files and a report."""

import bundle
from bundle.files import file_hash
from bundle.inference.backends import accelerate
from bundle.inference.flips import FlipInferer
from bundle.inference.results import ScanWriter
from bundle.inference.slices import BoxesToFiled, LoadScanSlice, SliceDataset, SplitBatch, collate
from bundle.inference.worklist import Worklist, fingerprint
from bundle.networks import read_novelty

__all__ = [
    "BoxesToFiled",
    "FlipInferer",
    "LoadScanSlice",
    "ScanWriter",
    "SliceDataset",
    "SplitBatch",
    "Worklist",
    "accelerate",
    "collate",
    "fingerprint",
    "model_name",
    "read_novelty",
]


def model_name(checkpoint) -> dict[str, str]:
    """What results say about the network that made them."""
    return {"name": "Chest CT multi-task", "version": bundle.__version__, "checkpoint": file_hash(checkpoint)[:12]}
