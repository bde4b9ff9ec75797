"""Metrics of the four tasks on partly labelled data, as a handler of MONAI's evaluator."""

from bundle.evaluation.gallery import FailureGallery
from bundle.evaluation.handler import MultiTaskMetrics
from bundle.evaluation.statistics import calibration_error

__all__ = [
    "FailureGallery",
    "MultiTaskMetrics",
    "calibration_error",
]
