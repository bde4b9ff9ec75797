"""How a batch becomes network arguments, how a run is recorded and resumed, and the curriculum of stages."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import merge_kv
from monai.data.utils import set_rnd
from monai.engines import SupervisedTrainer
from monai.utils import set_determinism
from monai.utils.enums import CommonKeys

from bundle.config import check_ids, running_workflow
from bundle.data.datalist import annotated_tasks
from bundle.errors import UserError
from bundle.files import write_checkpoint, write_json, write_text
from bundle.evaluation import log_artifacts, plot_curves, stage_table
from bundle.networks import fitting_tasks, load_weights, read_weights
from bundle.names import ANNOTATED, DETECTION, IMAGE, RECORD, check_tasks

logger = logging.getLogger(__name__)

# What MONAI adds where an experiment is tracked, and a curriculum hands on to its stages.
TRACKING = {"tracking_uri", "experiment_name", "run_name", "save_execute_config"}
# Entries that say where and how fast a run is computed, not what: they may differ when it is resumed.
CHANGEABLE = {"resume", "device", "num_workers", "cache_rate", "stages", *TRACKING}  # a stage has its entries of stages itself


def prepare_batch(batch: dict, device=None, non_blocking: bool = False, **kwargs):
    """Move a batch of `bundle.data.batch.collate` to the device and split it for a MONAI engine.

    Returns:
        (image (B, 1, S, S), the whole batch as label, no positional and the network's keyword arguments: the detection
        targets, and which images are annotated for which task).
    """
    batch = _to_device(batch, device, non_blocking)
    return batch[IMAGE], batch, (), {"targets": batch[DETECTION], "annotated": batch[ANNOTATED]}


def _to_device(item, device, non_blocking: bool):
    if isinstance(item, torch.Tensor):
        return item.to(device, non_blocking=non_blocking)
    if isinstance(item, Mapping):
        return {key: _to_device(value, device, non_blocking) for key, value in item.items()}
    return [_to_device(value, device, non_blocking) for value in item] if isinstance(item, list) else item


class MultiTaskTrainer(SupervisedTrainer):
    """MONAI's SupervisedTrainer that keeps every loss term, under "loss_terms" of its output, and stops on NaN.

    The output is a list of one dictionary, since the handlers of MONAI that log a loss look for it in a list's first item.

    Raises:
        UserError: naming the images of the batch, if the loss is not finite.
    """

    def _iteration(self, engine, batchdata):
        output = super()._iteration(engine, batchdata)
        terms = {"loss": output[CommonKeys.LOSS].item(), **engine.loss_function.terms}
        if not np.isfinite(terms["loss"]):
            images = ", ".join(record[IMAGE] for record in batchdata[RECORD])
            raise UserError(
                f"loss: found {terms} in iteration {engine.state.iteration} ({images}), expected finite values; "
                "lower learning_rate"
            )
        output["loss_terms"] = terms
        return [output]


def loss_terms(output: list[dict]) -> dict[str, float]:
    """Output transform of MONAI's StatsHandler and TensorBoardStatsHandler: the loss and each of its terms."""
    return output[0]["loss_terms"]


class RunRecorder:
    """Handler that makes a training run repeatable, resumable and readable; attach it last.

    Every epoch is seeded from (seed, epoch) alone, so an epoch depends on nothing but the state it starts from. After every
    epoch the folder holds `last.pt` (network, optimiser, schedule, loss, gradient scaler, history; state_dicts and plain
    numbers), `best.pt` (network of the epoch with the highest validation score), `history.json` and `curves.png`. The
    evaluator's network may be an average of the trained one: then it is what `best.pt` and `model.pt` hold, and `last.pt`
    holds both. A run that finds `last.pt` goes on from there. At the end `model.pt` holds the best network, with the heads of
    `init_checkpoint` that this run did not have, and `metrics.json` the best epoch. All are written under a temporary name,
    then renamed; `best.pt` before `last.pt`, so that a run killed between the two repeats the epoch and writes both. Of
    several processes (see `bundle.training.distributed`) all keep the history and the first one writes.

    Args:
        output_dir: folder of the run.
        state: name -> object with a state_dict, "network" among them.
        dataset: training dataset, whose random transforms are seeded.
        evaluator: engine that is run for the validation; its `state.metrics` then hold the metrics, "score" among them.
        val_interval: epochs between validations; the last epoch is always validated.
        seed: of the run.
        init_checkpoint: weights that the run starts from; None for fresh ones.
        resume: go on from `last.pt`; False leaves it alone until it is written anew.
    """

    def __init__(
        self, output_dir, state: dict, dataset, evaluator, val_interval=1, seed=0, init_checkpoint=None, resume=True
    ) -> None:
        self.folder = Path(output_dir)
        self.state = dict(state)
        self.dataset = dataset
        self.evaluator = evaluator
        self.val_interval = val_interval
        self.seed = seed
        self.init_checkpoint = init_checkpoint
        self.resume = resume
        self.history: list[dict] = []

    def attach(self, trainer) -> None:
        trainer.add_event_handler(Events.STARTED, self.start)
        trainer.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.add_terms)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.save_epoch)
        trainer.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, trainer) -> None:
        if trainer.scaler is not None and trainer.scaler.is_enabled():
            self.state["scaler"] = trainer.scaler
        if self.evaluator.network is not self.state["network"]:
            self.state["average"] = self.evaluator.network
        if self.history:  # federated learning trains on, epoch by epoch, with weights that it sets itself
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        last = self.folder / "last.pt"
        if self.resume and last.exists():
            saved = torch.load(last, map_location=trainer.state.device, weights_only=True)
            for name in self.state.keys() & saved.keys():
                self.state[name].load_state_dict(saved[name])
            self.history = saved["history"]
            trainer.state.epoch = len(self.history)
            trainer.state.iteration = len(self.history) * trainer.state.epoch_length
            logger.info(f"{self.folder}: resumed after epoch {len(self.history)}")
        elif self.init_checkpoint:
            for network in {self.state["network"], self.evaluator.network}:
                loaded = load_weights(network, self.init_checkpoint)
            logger.info(f"{self.folder}: started from {self.init_checkpoint} ({', '.join(loaded)})")

    def start_epoch(self, trainer) -> None:
        seed = int(np.random.SeedSequence([self.seed, trainer.state.epoch]).generate_state(1)[0])
        set_determinism(seed)
        set_rnd(self.dataset, seed=seed + idist.get_rank())
        self.learning_rate = trainer.optimizer.param_groups[0]["lr"]
        self.terms = defaultdict(list)

    def add_terms(self, trainer) -> None:
        for name, value in loss_terms(trainer.state.output).items():
            self.terms[name].append(value)

    def save_epoch(self, trainer) -> None:
        epoch, epochs = trainer.state.epoch, trainer.state.max_epochs
        entry = {"epoch": epoch, "learning_rate": self.learning_rate}
        entry |= {name if name == "loss" else f"loss_{name}": float(np.mean(v)) for name, v in self.terms.items()}
        if epoch % self.val_interval == 0 or epoch == epochs:
            self._share_statistics()
            self.evaluator.run(epoch)
            entry |= {name: float(v) for name, v in self.evaluator.state.metrics.items() if np.isscalar(v)}
        self.history.append(entry)
        trainer.state.metrics = {name: value for name, value in entry.items() if name != "epoch"}  # for those who log them
        if idist.get_rank() == 0:
            self.write_epoch(entry)
            figures = ", ".join(f"{name} {value:.4g}" for name, value in entry.items() if name.startswith(("loss", "score")))
            logger.info(f"{self.folder}: epoch {epoch} of {epochs}: {figures}")

    def _share_statistics(self) -> None:
        """Give all processes the running statistics of the first, whose network is the one that is kept."""
        if idist.get_world_size() > 1:
            for buffer in self.evaluator.network.buffers():
                buffer.copy_(idist.broadcast(buffer))

    def write_epoch(self, entry: dict) -> None:
        """Write the checkpoints, history and curves after the epoch of this entry, the last of the history."""
        if self.best() is entry:
            write_checkpoint(self.evaluator.network.state_dict(), self.folder / "best.pt")
        states = {name: item.state_dict() for name, item in self.state.items()}
        write_checkpoint({**states, "history": self.history}, self.folder / "last.pt")
        write_json(self.history, self.folder / "history.json")
        plot_curves(self.history, self.folder / "curves.png")

    def best(self) -> dict | None:
        """Entry of the epoch with the highest validation score, the earliest of equals; None before a validation."""
        scored = [entry for entry in self.history if np.isfinite(entry.get("score", np.nan))]
        return max(scored, key=lambda entry: entry["score"]) if scored else None

    def finish(self, trainer) -> None:
        if self.best() is None:
            raise UserError(
                f"{self.folder}: found no epoch with a validation score, expected one to choose the weights by; is the "
                "validation split annotated for the tasks?"
            )
        if idist.get_rank() == 0:
            weights = torch.load(self.folder / "best.pt", map_location="cpu", weights_only=True)
            if self.init_checkpoint:
                before = read_weights(self.init_checkpoint)
                weights = {**{k: v for k, v in before.items() if k.startswith("heads.")}, **weights}
            write_json(self.best(), self.folder / "metrics.json")
            write_checkpoint(weights, self.folder / "model.pt")
            log_artifacts(trainer, [self.folder / "config.json", self.folder / "curves.png"])
        idist.barrier()  # what comes next, in any process, finds them written


def running_config() -> dict:
    """The raw configuration whose expression is being evaluated, overlays and command line merged in, as JSON holds it."""
    return json.loads(json.dumps(_without_metadata(running_workflow().parser.get()), default=str))


def _without_metadata(config: Mapping) -> dict:
    return {key: value for key, value in config.items() if key != ConfigParser.meta_key}


def environment() -> dict:
    """Versions of Python and of the packages that decide a result, and the machine, without its name."""
    names = ("monai", "torch", "torchvision", "pytorch-ignite", "timm", "numpy", "nibabel", "itk")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "system": platform.platform(),
        "cpu": f"{os.cpu_count()} x {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def start_run(output_dir: str, resume: bool = True, init_checkpoint=None) -> None:
    """Open the folder of a run: keep its configuration, versions and machine, and decide whether it is resumed.

    Args:
        output_dir: folder of the run, made if missing.
        resume: go on from the folder's last checkpoint if there is one; False starts anew.
        init_checkpoint: weights that the run starts from.

    Raises:
        UserError: if there is a checkpoint made with another configuration, naming the first key that differs, or if to
            start anew would remove `init_checkpoint`.
    """
    folder, config = Path(output_dir), running_config()
    if idist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            check_resumable(folder, config)
        else:
            check_kept(init_checkpoint, [folder])
            remove_run(folder)
        write_json(config, folder / "config.json")
        write_json(environment(), folder / "environment.json")
    idist.barrier()


def check_annotated(records: Iterable[Mapping], tasks: Iterable[str], init_checkpoint=None) -> None:
    """Refuse a training after which a head would still be as it was drawn at random.

    Args:
        records: of the training, see `bundle.data.datalist.select`.
        tasks: of the network.
        init_checkpoint: weights that the run starts from; a head that they hold needs no record.

    Raises:
        UserError: naming the tasks.
    """
    weights = read_weights(init_checkpoint) if init_checkpoint else ()
    known = {key.split(".")[1] for key in weights if key.startswith("heads.")}.union(*map(annotated_tasks, records))
    if missing := [task for task in check_tasks(tasks) if task not in known]:
        raise UserError(
            f"split training: found no record annotated for {', '.join(missing)}, expected one for each of tasks; leave it out "
            "of them, or set init_checkpoint to weights that have its head"
        )


def check_resumable(folder: Path, config: Mapping) -> None:
    """Refuse to go on with a run under another configuration; `CHANGEABLE` may differ.

    Raises:
        UserError: naming the first key that differs.
    """
    kept = folder / "config.json"
    if not (folder / "last.pt").exists() or not kept.exists():
        return
    before, now = dict(_leaves(json.loads(kept.read_text()))), dict(_leaves(config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key.split("::")[0] not in CHANGEABLE:
            raise UserError(
                f"{folder}: holds a run with {key} {before.get(key)!r}, found {now.get(key)!r}; set another output_dir "
                f"(with init_checkpoint {folder / 'model.pt'} to train on from its weights), or resume false to start anew"
            )


def _leaves(config, id: str = ""):
    """(id, value) of everything in a configuration that is neither a dictionary nor a list, and of the empty ones."""
    if not isinstance(config, (dict, list)) or not config:
        yield id, config
        return
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        yield from _leaves(value, f"{id}::{key}" if id else key)


def check_kept(init_checkpoint, folders: Iterable[Path]) -> None:
    """Refuse to start anew, in these folders, from weights that lie in one of them.

    Raises:
        UserError: naming them.
    """
    if init_checkpoint and Path(init_checkpoint).resolve().parent in {folder.resolve() for folder in folders}:
        raise UserError(
            f"init_checkpoint: found {init_checkpoint} in a folder that resume false would clear, expected it elsewhere; "
            "set another output_dir"
        )


def remove_run(folder: Path) -> None:
    """Remove what a run left in its folder, so that nothing old passes for a result of the next one."""
    results = ("last.pt", "best.pt", "model.pt", "history.json", "metrics.json", "curves.png")
    made_of_model = ("calibrated.pt", "reference.pt")  # by configs/calibrate.json and configs/reference.json
    for path in [*(folder / name for name in (*results, *made_of_model)), *folder.glob("events.out.tfevents.*")]:
        path.unlink(missing_ok=True)
    for evaluation in ("evaluation", "validation", "lungs_only", "lungs_removed"):
        shutil.rmtree(folder / evaluation, ignore_errors=True)


def run_curriculum(output_dir: str, config_dir: str) -> None:
    """Train the `stages` of the running configuration in order, each from the weights before it, and measure all after each.

    Stage NAME is the running configuration, overlaid with `config_dir`/NAME.json and then with its own entries of `stages`,
    in the folder `output_dir`/NAME. With `transfer` false it starts from `init_checkpoint` instead of the stage before. A
    finished stage is skipped, an unfinished one resumed; with `resume` false a stage and those that build on it start anew.
    Writes `stage_table.md` after every stage and, from the last one, `model.pt`.

    Args:
        output_dir: folder of the curriculum.
        config_dir: folder of the overlays, with `evaluate.json`, `metadata.json` and `logging.conf`.

    Raises:
        UserError: if a stage has no overlay.
        UserError: if there is no stage, `tasks` was changed, a stage has an unknown id (see
            `bundle.config.check_ids`), or it was begun with another configuration.
    """
    folder, configs = Path(output_dir), _stage_configs(output_dir, config_dir)
    if idist.get_rank() == 0:
        _open_curriculum(folder, configs.values(), running_config()["resume"])
    idist.barrier()
    reports = {}
    for name, config in configs.items():
        stage = folder / name
        report = stage / "validation" / "metrics.json"  # not in "evaluation", where a user measures a stage on any split
        if report.exists():
            logger.info(f"{stage}: finished before")
        else:
            logger.info(f"{stage}: {', '.join(config['tasks'])}")
            run_workflow(config, stage / "train.json", config_dir)
            tasks = dict.fromkeys(_answered_tasks(stage / "model.pt", config), 1.0)
            entries = {"tasks": tasks, "split": "validation", "bootstrap": 0, "evaluation_dir": str(report.parent)}
            evaluate = ConfigParser.load_config_file(str(Path(config_dir) / "evaluate.json"))
            run_workflow(overlay(config, evaluate, entries), stage / "evaluate.json", config_dir)
        idist.barrier()
        if idist.get_rank() == 0:
            reports[name] = json.loads(report.read_text())
            write_text(stage_table(reports), folder / "stage_table.md")
    if idist.get_rank() == 0:
        write_checkpoint(torch.load(stage / "model.pt", map_location="cpu", weights_only=True), folder / "model.pt")
        print(stage_table(reports))


def _open_curriculum(folder: Path, configs: Collection[Mapping], resume: bool) -> None:
    """Refuse stages that were begun with another configuration, and remove those that are not resumed."""
    anew = [Path(config["output_dir"]) for config in configs if not config["resume"]] + [folder] * (not resume)
    first, *others = configs
    for config in (first, *(config for config in others if not config["transfer"])):
        check_kept(config["init_checkpoint"], anew)
    for config in reversed(configs):  # last first: killed here, no stage is left whose origin is gone
        if config["resume"]:
            check_resumable(Path(config["output_dir"]), config)
        else:
            remove_run(Path(config["output_dir"]))
    if not resume:
        remove_run(folder)  # what an earlier curriculum left at its end


def _stage_configs(output_dir: str, config_dir: str) -> dict[str, dict]:
    """Configuration of every stage by name, in order."""
    base, configs, before = running_config(), {}, None
    tasks = ConfigParser.load_config_file(str(Path(config_dir) / "train.json"))["tasks"]
    if base["tasks"] != tasks:  # the overlays of the stages would silently undo it
        raise UserError(
            f"tasks: found {base['tasks']}, expected {tasks}, since every stage has tasks of its own; set "
            "stages::NAME::tasks instead"
        )
    for name, entries in base["stages"].items():  # as written: an expression in it is the stage's own
        file = Path(config_dir) / f"{name}.json"
        if not file.is_file():
            raise UserError(f"stages: found {name!r}, expected {file}")
        folder = Path(output_dir) / name
        own = {**entries, "output_dir": str(folder), **_tracking(base, folder)}
        config = overlay(base, ConfigParser.load_config_file(str(file)), own)
        check_ids(config, config_dir)
        if before and config["transfer"]:
            config["init_checkpoint"] = str(Path(before["output_dir"]) / "model.pt")
            config["resume"] = config["resume"] and before["resume"]
        configs[name] = before = config
    if not configs:
        raise UserError("stages: found none, expected one or more")
    return configs


def _tracking(base: Mapping, folder: Path) -> dict:
    """Entries that track a stage as a run of its own, in the store of the curriculum, if that is tracked."""
    if "tracking_uri" not in base:
        return {}
    return {"tracking_uri": running_workflow().parser.get_parsed_content("tracking_uri"), "run_name": folder.name}


def overlay(base: Mapping, *changes: Mapping) -> dict:
    """A configuration with entries (ids, nested ones too, to values) changed or added, later ones over earlier ones.

    As in a list of configuration files, `+id` adds to the mapping or the list of that id.
    """
    parser = ConfigParser(deepcopy(dict(base)))
    for id, value in chain.from_iterable(entries.items() for entries in changes):
        merge_kv(parser, id, deepcopy(value))
    return _without_metadata(parser.get())


def trained_tasks(checkpoint) -> tuple[str, ...]:
    """Tasks whose heads a checkpoint of weights holds."""
    weights = read_weights(checkpoint)
    return check_tasks({key.split(".")[1] for key in weights if key.startswith("heads.")})


def _answered_tasks(checkpoint, config: Mapping) -> list[str]:
    """Tasks that the network of a configuration answers with a checkpoint; a head for other classes waits for its stage."""
    tasks = trained_tasks(checkpoint)
    parser = ConfigParser(overlay(config, {"tasks": dict.fromkeys(tasks, 1.0), "pretrained": False}))
    answered = fitting_tasks(parser.get_parsed_content("network_def"), checkpoint)
    if others := [task for task in tasks if task not in answered]:
        logger.warning(f"{checkpoint}: not measured for {', '.join(others)}, whose head is one for other classes")
    return answered


def run_workflow(config: Mapping, path: Path, config_dir: str, run_id: str = "run") -> None:
    """Run an id of a configuration as an ordinary MONAI workflow, from a file that is kept beside its results.

    Args:
        config: the raw configuration.
        path: the file to write it to.
        config_dir: folder of metadata.json and logging.conf.
        run_id: `run`, or `training` for the curriculum.
    """
    if idist.get_rank() == 0:
        write_json(config, path)
    idist.barrier()
    meta_file, logging_file = (str(Path(config_dir) / name) for name in ("metadata.json", "logging.conf"))
    workflow = ConfigWorkflow(str(path), meta_file=meta_file, logging_file=logging_file, run_id=run_id)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
