"""The study: experiments that compare arms under one budget, and their tables and figures. docs/experiments.md describes it."""

from bundle.study.experiment import FIGURES, Experiment, experiment_names, read_results
from bundle.study.report import write_report
from bundle.study.study import Study, open_ensemble

__all__ = ["FIGURES", "Experiment", "Study", "experiment_names", "open_ensemble", "read_results", "write_report"]
