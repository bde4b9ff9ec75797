"""Run what an experiment asks for and is not done yet.

A loop is enough of a scheduler: a run knows itself whether it is done or where to go on (`bundle.engines.RunRecorder`), all
runs share one machine, and a tool for pipelines such as Snakemake or DVC would start Python and its libraries anew for each of
some hundred short runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import reduce
from pathlib import Path

import torch
from monai.bundle import ConfigParser

from bundle.configuration import check_ids
from bundle.engines import environment, overlay, run_workflow, trained_tasks
from bundle.experiments.experiment import ARM, FIGURES, Experiment, add_results, read_results
from bundle.networks import EnsembleNet, MultiTaskNet, load_weights

logger = logging.getLogger(__name__)

# What says where things lie and how fast it is computed, not what the result is.
PLACES = {"bundle_root", "dataset_dir", "datalist", "output_dir", "device", "num_workers", "cache_rate"}
SCALE_IDS = ("budget", "shrink")  # of scale_NAME.json, for the expressions of experiments
MEMBER_SEED = 1000  # times the number of an ensemble's member is added to the seed


class Study:
    """Experiments on one data set at one scale.

    Args:
        config_dir: folder of train.json, evaluate.json, the experiments and the overlays they name.
        scale: overlay file with the size and the budget of every run, scale_NAME.json.
        entries: configuration entries of every run, such as dataset_dir.
        output_dir: folder of the runs.
        results: CSV file of the figures. A run that is in it is not run again, for whatever experiment it was made; a
            run is known by all entries on top of train.json, not by the code and the data.

    Raises:
        FileNotFoundError: if there is no such scale.
    """

    def __init__(self, config_dir, scale, entries: Mapping, output_dir, results) -> None:
        self.config_dir, self.scale = Path(config_dir), Path(scale)
        self.entries, self.output_dir, self.results = dict(entries), Path(output_dir), Path(results)
        if not self.scale.is_file():
            raise FileNotFoundError(f"scale: found no {scale}, expected an overlay such as configs/scale_reduced.json")

    def run(self, experiment: Experiment) -> None:
        """Train and measure every arm with every seed, seed by seed, except what the results have already.

        Every configuration is checked before the first run begins.

        Raises:
            FileNotFoundError: for an overlay that is not there.
            ValueError: for an unknown id: see `bundle.configuration.check_ids`.
        """
        plan = [
            (seed, arm, [self.config(experiment, parts, seed, i) for i, parts in enumerate(experiment.members(arm))])
            for seed in experiment.seeds
            for arm in experiment.arms
        ]
        for seed, arm, configs in plan:
            run = "+".join(Path(config["output_dir"]).name for config in configs)
            rows = [row for row in read_results(self.results) if row["run"] == run]
            if rows:
                rows = [row for row in rows if all(row[name] == rows[0][name] for name in ARM)]  # as one experiment has it
            else:
                logger.info(f"experiment {experiment.name}: {arm}, seed {seed}: run {run}")
                rows = self._measure(experiment, configs, run)
            place = dict(zip(ARM, (experiment.name, self.scale.stem.removeprefix("scale_"), arm, seed)))
            add_results(self.results, [{**row, **place} for row in rows])

    def config(self, experiment: Experiment, parts: Sequence, seed: int, member: int = 0) -> dict:
        """Configuration of one network: train.json, scale, settings and arm, merged in this order."""
        parts = [self.scale, *experiment.settings, *parts, {"seed": seed + MEMBER_SEED * member}]
        changes = [part if isinstance(part, Mapping) else self._load(part) for part in parts]
        merged = reduce(lambda before, change: {**before, **change}, changes, {"workflow": experiment.workflow})
        # Sorted by id alone: within an entry the order may count, as that of the stages does.
        identity = json.dumps(sorted(item for item in merged.items() if item[0] not in PLACES))
        folder = self.output_dir / hashlib.sha256(identity.encode()).hexdigest()[:12]
        places = {**self.entries, "output_dir": str(folder)}
        if experiment.workflow == "training":
            places["training"] = [f"$bundle.engines.run_curriculum(@output_dir, {str(self.config_dir)!r})"]
        config = overlay(self._load("train.json"), *changes, places)
        for id in SCALE_IDS:
            if not re.search(rf"@{id}\b", json.dumps(config)):
                config.pop(id, None)  # this experiment has no use for it, and an id without use is refused
        check_ids(config, self.config_dir, [experiment.workflow])
        return config

    def _load(self, name) -> dict:
        path = self.config_dir / name  # an absolute name stands for itself
        if not path.is_file():
            raise FileNotFoundError(f"experiment: found no overlay {path}")
        return ConfigParser.load_config_file(str(path))

    def _measure(self, experiment: Experiment, configs: Sequence[Mapping], run: str) -> list[dict]:
        begin, steps = time.perf_counter(), 0
        for config in configs:
            folder = Path(config["output_dir"])
            if not (folder / "model.pt").exists():
                run_workflow(config, folder / "study.json", str(self.config_dir), experiment.workflow)
            steps += sum(_steps(file) for file in folder.glob("**/last.pt"))
        evaluation = self.output_dir / run / "test"
        self._evaluate(configs, evaluation)
        rows = [{"stage": "end", "split": "test", **_figures(evaluation)}]
        for stage in configs[0]["stages"] if experiment.workflow == "training" else ():
            rows.append({"stage": stage, "split": "validation", **_figures(self.output_dir / run / stage / "evaluation")})
        machine = environment()
        facts = {
            "steps": steps,
            "seconds": round(time.perf_counter() - begin),
            "date": date.today().isoformat(),
            "data": Path(self.entries.get("dataset_dir", "phantom")).name,
            "machine": f"{machine['gpu'] or machine['cpu']}; PyTorch {machine['torch']}, MONAI {machine['monai']}",
            "run": run,
        }
        return [{**row, **facts} for row in rows]

    def _evaluate(self, configs: Sequence[Mapping], evaluation: Path) -> None:
        """Measure the network of a finished run, or the ensemble of those of several, on the test split."""
        folders = [config["output_dir"] for config in configs]
        tasks = {task: 1.0 for folder in folders for task in trained_tasks(Path(folder) / "model.pt")}
        entries = {"tasks": tasks, "bootstrap": 0, "evaluation_dir": str(evaluation)}
        if len(configs) > 1:
            entries["imports"] = [*configs[0]["imports"], "$import bundle.experiments"]
            entries["network"] = f"$bundle.experiments.open_ensemble({folders}).to(@device)"
            entries["run"] = ["$@evaluator.run()"]
        config = overlay(configs[0], self._load("evaluate.json"), entries)
        run_workflow(config, evaluation / "evaluate.json", str(self.config_dir))


def open_ensemble(folders: Iterable[str]) -> EnsembleNet:
    """Ensemble of the networks of finished runs, with their weights."""
    return EnsembleNet([_open_network(Path(folder)) for folder in folders])


def _open_network(folder: Path) -> MultiTaskNet:
    parser = ConfigParser(json.loads((folder / "config.json").read_text()))
    network = parser.get_parsed_content("network_def")
    load_weights(network, folder / "model.pt", strict=True)
    return network


def _steps(checkpoint: Path) -> int:
    """Steps of the optimiser that a run has made."""
    states = torch.load(checkpoint, map_location="cpu", weights_only=True)["optimizer"]["state"].values()
    return max(int(state["step"]) for state in states)


def _figures(evaluation: Path) -> dict[str, float]:
    report, found = json.loads((evaluation / "metrics.json").read_text()), {}
    for column, path in FIGURES.items():
        figure = reduce(lambda part, key: part.get(key, {}), path, report)
        if "value" in figure:
            found[column] = round(figure["value"], 5)
    return found
