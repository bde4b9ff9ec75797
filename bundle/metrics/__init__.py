"""Metrics of the four tasks on partly labelled data, as a handler of MONAI's evaluator."""

from bundle.metrics.figures import plot_curves, stage_table
from bundle.metrics.handler import MultiTaskMetrics, log_artifacts

__all__ = ["MultiTaskMetrics", "log_artifacts", "plot_curves", "stage_table"]
