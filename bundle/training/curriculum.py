"""The curriculum: stages that are trained in order, each from the weights before it, and measured after each."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import ignite.distributed as idist
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from bundle.config import check_config, overlay, running_config, running_workflow
from bundle.errors import UserError
from bundle.files import write_checkpoint, write_json, write_text
from bundle.names import check_tasks
from bundle.networks import fitting_tasks, read_weights
from bundle.training.history import stage_table
from bundle.training.run_folder import check_kept, check_resumable, remove_run

logger = logging.getLogger(__name__)


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
            `bundle.config.check_config`), or it was begun with another configuration.
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
        check_config(config, "train")
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
