"""Metrics of the tasks on partly labelled data, as a handler of MONAI's evaluator."""

from bundle.evaluation.gallery import FailureGallery
from bundle.evaluation.handler import MultiTaskMetrics

__all__ = ["FailureGallery", "MultiTaskMetrics"]
