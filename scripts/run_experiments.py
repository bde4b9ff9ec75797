"""Run experiments of the study and write their tables and figures: python scripts/run_experiments.py NAME… (docs/experiments.md)"""

import argparse
import os
from logging.config import fileConfig
from pathlib import Path

from bundle.errors import one_line_errors
from bundle.study import Experiment, Study, experiment_names, write_report

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = experiment_names(CONFIGS)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one or more of {', '.join(names)}, or all; or files NAME.json")
    parser.add_argument("--dataset_dir", help="folder with a datalist.json; phantom data without it")
    parser.add_argument("--scale", default="reduced", help="of configs/scales.json: reduced (default), full, screening or smoke")
    parser.add_argument("--output_dir", default=str(ROOT / "runs"), help="folder of the runs; default: runs")
    parser.add_argument("--results_dir", default=str(ROOT / "docs/results"), help="of results.csv, tables and figures")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the threads; default: 1")
    parser.add_argument("--arms", nargs="+", default=["*"], metavar="PATTERN", help="run only these arms, such as 'covid_ct*'")
    parser.add_argument("--report", action="store_true", help="write tables and figures of what there is, and run nothing")
    arguments = parser.parse_args()
    fileConfig(CONFIGS / "logging.conf", disable_existing_loggers=False)
    one_line_errors()
    results = Path(arguments.results_dir) / "results.csv"
    entries = {"bundle_root": str(ROOT)}
    if arguments.dataset_dir:
        entries["dataset_dir"] = os.path.abspath(arguments.dataset_dir)
    study = Study(CONFIGS, arguments.scale, entries, Path(arguments.output_dir).resolve(), results)
    experiments = [Experiment.read(name, CONFIGS) for name in (names if arguments.names == ["all"] else arguments.names)]
    if not arguments.report:
        study.run(experiments, arguments.jobs, arguments.arms)
    for experiment in experiments:
        print(write_report(experiment, study.rows(experiment), arguments.results_dir))


if __name__ == "__main__":
    main()
