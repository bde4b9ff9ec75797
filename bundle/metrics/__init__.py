"""Metrics of the four tasks on partly labelled data, as a handler of MONAI's evaluator."""

from bundle.metrics.figures import STAGE_COLUMNS, plot_curves, save_figure, stage_table
from bundle.metrics.gallery import FailureGallery
from bundle.metrics.handler import MultiTaskMetrics, log_artifacts
from bundle.metrics.statistics import calibration_error

__all__ = [
    "STAGE_COLUMNS",
    "FailureGallery",
    "MultiTaskMetrics",
    "calibration_error",
    "log_artifacts",
    "plot_curves",
    "save_figure",
    "stage_table",
]
