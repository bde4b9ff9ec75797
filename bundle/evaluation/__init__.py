"""Metrics of the four tasks on partly labelled data, as a handler of MONAI's evaluator."""

from bundle.evaluation.figures import STAGE_COLUMNS, plot_curves, save_figure, stage_table
from bundle.evaluation.gallery import FailureGallery
from bundle.evaluation.handler import MultiTaskMetrics, log_artifacts
from bundle.evaluation.statistics import calibration_error

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
