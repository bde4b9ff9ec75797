"""Run what an experiment asks for and is not done yet; a run knows itself whether it is done or where to go on."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from datetime import date
from fnmatch import fnmatchcase
from functools import reduce
from itertools import chain, zip_longest
from logging.config import fileConfig
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from monai.bundle import ConfigParser

from bundle.config import check_config, overlay
from bundle.data.datalist import LEFT_OUT
from bundle.errors import UserError
from bundle.files import ROOT, text_hash
from bundle.networks import EnsembleNet
from bundle.study.experiment import ARM, FIGURES, Experiment, add_results, by_arm, read_results
from bundle.tasks import open_network, trained_tasks
from bundle.training.curriculum import run_workflow
from bundle.training.run_folder import environment

logger = logging.getLogger(__name__)

PLACES = {"bundle_root", "dataset_dir", "output_dir"}  # the command line says where things lie
SPEED = {"device", "cache_rate"}  # how fast it is computed, not what the result is
SCALE_IDS = ("budget", "shrink")  # of a scale, for the expressions of experiments
MEMBER_SEED = 1000  # times the number of an ensemble's member is added to the seed
BOOTSTRAP = 1000  # draws of the intervals over patients, of a source that was left out


class _Run(NamedTuple):
    """What is trained and measured for an arm with a seed."""

    arm: tuple[str, ...]  # values of `ARM`
    name: str  # those of the folders of its networks
    workflow: str
    configs: Sequence[Mapping]  # one for each network


class Study:
    """Experiments on one data set at one scale.

    A run is known by all entries on top of train.json and the name of the data set's folder, not by the code and what lies in
    that folder. A run that is in the results is not run again, for whatever experiment it was made.

    Args:
        config_dir: folder of train.json, evaluate.json, scales.json, the experiments and the overlays they name.
        scale: name in scales.json, whose parts (overlay files and entries) give size and budget of every run.
        entries: configuration entries of every run, such as dataset_dir.
        output_dir, results: folder of the runs; CSV file of the figures, written after every run.
    """

    def __init__(self, config_dir, scale, entries: Mapping, output_dir, results) -> None:
        self.config_dir, self.scale = Path(config_dir), scale
        self.entries, self.results = dict(entries), Path(results)
        scales = self._load("scales.json")
        self.data = Path(self.entries.get("dataset_dir", "phantom")).name
        self.output_dir = Path(output_dir) / self.data
        if scale not in scales:
            raise UserError(f"scale: found {scale!r}, expected one of {', '.join(scales)}, the entries of configs/scales.json")
        self.parts = scales[scale]

    def run(self, experiments: Sequence[Experiment], jobs: int = 1, arms: Sequence[str] = ("*",)) -> None:
        """Train and measure every arm that fits one of the patterns `arms`, with every seed, except what the results have.

        Every configuration is checked before the first run begins. The first seed of all experiments comes before the second.
        `jobs` runs are made at a time, each in a process with its share of the threads.
        """
        if jobs < 1:
            raise UserError(f"jobs: found {jobs}, expected at least 1")
        planned = self._plan(experiments)
        plan = [run for run in planned if any(fnmatchcase(run.arm[3], pattern) for pattern in arms)]
        if not plan:
            names = "; ".join(dict.fromkeys(run.arm[3] for run in planned))
            raise UserError(f"arms: found {', '.join(arms)}, expected patterns of {names}")
        done = by_arm(row for row in read_results(self.results) if row["data"] == self.data).values()
        known = {rows[0]["run"]: rows for rows in done}
        missing = {run.name: run for run in plan if run.name not in known}
        for name, rows in chain(known.items(), self._measured(missing.values(), jobs)):
            for arm in (run.arm for run in plan if run.name == name):
                add_results(self.results, [{**row, **dict(zip(ARM, arm))} for row in rows])

    def rows(self, experiment: Experiment) -> list[dict[str, str]]:
        """Results of an experiment as it is planned now; those of earlier forms of its arms are left out, with a warning."""
        plan = {run.arm: run.name for run in self._plan([experiment])}
        place, kept, others = (experiment.name, self.scale, self.data), [], []
        for arm, rows in by_arm(read_results(self.results)).items():
            if plan.get(arm) == rows[0]["run"]:
                kept += rows
            elif arm[:3] == place:
                others.append(f"{arm[3]} with seed {arm[4]}")
        if others:
            logger.warning(f"{self.results}: left out {', '.join(sorted(others))}: not what {experiment.name} would run now")
        return kept

    def _plan(self, experiments: Sequence[Experiment]) -> list[_Run]:
        plan = []
        for seeds in zip_longest(*(experiment.seeds for experiment in experiments)):
            for experiment, seed in zip(experiments, seeds):
                for arm in experiment.arms if seed is not None else ():
                    members = enumerate(experiment.members(arm))
                    configs = [self.config(experiment, parts, seed, member) for member, parts in members]
                    id = (experiment.name, self.scale, self.data, arm, str(seed))
                    name = "+".join(Path(config["output_dir"]).name for config in configs)
                    plan.append(_Run(id, name, experiment.workflow, configs))
        return plan

    def config(self, experiment: Experiment, parts: Sequence, seed: int, member: int = 0) -> dict:
        """Configuration of one network: train.json, scale, settings and arm, merged in this order."""
        parts = [*self.parts, *experiment.settings, *parts]
        changes = [part if isinstance(part, Mapping) else self._load(part) for part in parts]
        changes.append({"seed": seed + MEMBER_SEED * member})
        merged = {"workflow": experiment.workflow}
        for id, value in chain.from_iterable(change.items() for change in changes):
            merged[id] = [*merged.get(id, []), value] if id.startswith("+") else value
            merged.pop(f"+{id}", None)  # what was added before is overwritten
        if found := sorted(PLACES & merged.keys()):
            found = f"found {', '.join(found)} in its arms, settings or scale"
            expected = "expected it from the command line, the same for every run"
            other_data = "to use other data in an arm, set datalist or train::data"
            raise UserError(f"experiment {experiment.name}: {found}, {expected}; {other_data}")
        unused = SPEED if experiment.workflow == "training" else SPEED | {"stages"}
        # Sorted by id alone: within an entry the order may count, as that of the stages does.
        identity = json.dumps(sorted(item for item in merged.items() if item[0] not in unused))
        folder = self.output_dir / text_hash(identity)[:12]
        places = {**self.entries, "output_dir": str(folder)}
        # An id without use is an error, and not every experiment, nor every stage of one, has a use for these.
        places["+initialize"] = [f"$({', '.join(f'@{id}' for id in SCALE_IDS if id in merged)})"]
        if experiment.workflow == "training":
            places["training"] = [f"$bundle.training.curriculum.run_curriculum(@workflow, @output_dir, {str(self.config_dir)!r})"]
        config = overlay(self._load("train.json"), *changes, places)
        check_config(config, "train", [experiment.workflow])
        return config

    def _load(self, name) -> dict | list:
        path = self.config_dir / name  # an absolute name stands for itself
        if not path.is_file():
            raise UserError(f"experiment: found no overlay {path}")
        return ConfigParser.load_config_file(str(path))

    def _measured(self, runs: Iterable[_Run], jobs: int) -> Iterator[tuple[str, list[dict]]]:
        """Name and rows of each run, as they are done."""
        if jobs == 1:
            yield from ((run.name, self._measure(run)) for run in runs)
            return
        with ProcessPoolExecutor(jobs, get_context("spawn"), _start_job, (jobs,)) as pool:
            names = {pool.submit(self._measure, run): run.name for run in runs}
            try:
                yield from ((names[future], future.result()) for future in as_completed(names))
            finally:
                pool.shutdown(cancel_futures=True)

    def _measure(self, run: _Run) -> list[dict]:
        """Rows of a run, trained and measured; waits where another run or command trains a network of it."""
        logger.info(f"experiment {', '.join(run.arm)}: run {run.name}")
        begin, split = time.perf_counter(), LEFT_OUT if run.configs[0].get("leave_out") else "test"
        folders = [Path(config["output_dir"]) for config in run.configs]
        with ExitStack() as locks:
            for folder in sorted(set(folders)):  # in one order: none waits for ever
                folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(FileLock(folder / ".study.lock"))
            for folder, config in zip(folders, run.configs):
                if not (folder / "model.pt").exists():
                    run_workflow(config, folder / "study.json", str(self.config_dir), run.workflow)
            rows = [{"stage": "end", "split": split, **self._evaluated(run, split)}]
        for stage in run.configs[0]["stages"] if run.workflow == "training" else ():
            rows.append({"stage": stage, "split": "validation", **_figures(folders[0] / stage / "validation")})
        machine = environment()
        facts = {
            "steps": sum(map(_steps, chain.from_iterable(folder.glob("**/last.pt") for folder in folders))),
            "seconds": round(time.perf_counter() - begin),
            "date": date.today().isoformat(),
            "machine": f"{machine['gpu'] or machine['cpu']}; PyTorch {machine['torch']}, MONAI {machine['monai']}",
            "run": run.name,
        }
        return [{**row, **facts} for row in rows]

    def _evaluated(self, run: _Run, split: str) -> dict:
        """Figures of the network of a finished run, or of the ensemble of several, on a split."""
        folder = self.output_dir / run.name / split
        entries = {"split": split, "bootstrap": BOOTSTRAP if split == LEFT_OUT else 0, "evaluation_dir": str(folder)}
        if len(run.configs) > 1:
            members = [config["output_dir"] for config in run.configs]
            tasks = {task: 1.0 for member in members for task in trained_tasks(Path(member) / "model.pt")}
            entries["model"] = f"${{**bundle.tasks.read_model(@checkpoint, {{}}), 'tasks': {tasks}}}"
            entries["imports"] = [*run.configs[0]["imports"], "$import bundle.study"]
            entries["network"] = f"$bundle.study.open_ensemble({members}).to(@device)"
            entries["run"] = ["$@evaluator.run()"]
        config = overlay(run.configs[0], self._load("evaluate.json"), entries)
        run_workflow(config, folder / "evaluate.json", str(self.config_dir))
        return _figures(folder)


def _start_job(jobs: int) -> None:
    """Let one of several processes log as the first does, take its share of the threads, and end when the first does."""
    fileConfig(ROOT / "configs/logging.conf", disable_existing_loggers=False)
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A job that outlived a killed study would hold up the next one, which waits for its network."""
    parent_process().join()
    os._exit(1)


def open_ensemble(folders: Iterable[str]) -> EnsembleNet:
    """Ensemble of the networks of finished runs, with their weights."""
    return EnsembleNet([open_network(Path(folder) / "model.pt") for folder in folders])


def _steps(checkpoint: Path) -> int:
    """Steps of the optimiser that a run has made."""
    states = torch.load(checkpoint, map_location="cpu", weights_only=True)["optimizer"]["state"].values()
    return max(int(state["step"]) for state in states)


def _figures(evaluation: Path) -> dict[str, float | str]:
    """Figures of a row of the results, and their intervals as JSON where there are any."""
    report, found, intervals = json.loads((evaluation / "metrics.json").read_text()), {}, {}
    for column, path in FIGURES.items():
        figure = reduce(lambda part, key: part.get(key, {}), path, report)
        if "value" in figure:
            found[column] = round(figure["value"], 5)
        if figure.get("ci95"):
            intervals[column] = [round(edge, 5) for edge in figure["ci95"]]
    return {**found, "intervals": json.dumps(intervals)} if intervals else found
