"""From scans to predictions, files and a report."""

import bundle
from bundle.files import file_hash
from bundle.inference.backends import accelerate
from bundle.inference.flips import FlipInferer
from bundle.inference.predict import Model, predict_scans
from bundle.inference.results import Result
from bundle.inference.slices import AnswersToSlice, LoadScanSlice, ReadAhead, collate, slices_of
from bundle.inference.worklist import Worklist, fingerprint
from bundle.networks import read_novelty

__all__ = ["AnswersToSlice", "FlipInferer", "LoadScanSlice", "Model", "ReadAhead", "Result", "Worklist"]
__all__ += ["accelerate", "collate", "fingerprint", "model_name", "predict_scans", "read_novelty", "slices_of"]


def model_name(checkpoint) -> dict[str, str]:
    """What results say about the network that made them."""
    return {"name": "Chest CT multi-task", "version": bundle.__version__, "checkpoint": file_hash(checkpoint)[:12]}
