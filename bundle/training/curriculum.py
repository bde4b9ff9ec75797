"""The curriculum: stages that are trained in order, each from the weights before it, and measured after each."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import ignite.distributed as idist
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from bundle.config import check_config, overlay, raw_config
from bundle.errors import UserError
from bundle.files import list_files, listed_files, remove_listed_files, write_checkpoint, write_json, write_text
from bundle.training.history import stage_table
from bundle.training import run_folder

logger = logging.getLogger(__name__)

REPORT = "validation/metrics.json"  # not in "evaluation", where a user measures a stage on any split


def run_curriculum(workflow: ConfigWorkflow, output_dir, config_dir=None) -> None:
    """Train the `stages` of a configuration in order, each from the weights before it, and measure all tasks after each.

    Stage NAME is the configuration with the entries of that stage in train.json and then its own entries of `stages`, in the
    folder `output_dir`/NAME. With `transfer` false it starts from `init_checkpoint`. A finished stage is skipped, an
    unfinished one resumed; with `resume` false a stage and those that build on it start anew. Writes `stage_table.md` after
    every stage and, from the last one, `model.pt`. `config_dir` is that of train.json, by default of the workflow.
    """
    folder, config_dir = Path(output_dir), Path(config_dir or workflow.config_root_path)
    configs = _stage_configs(workflow, folder, config_dir)
    first = idist.get_rank() == 0
    try:
        if first:
            _open_curriculum(folder, configs, raw_config(workflow)["resume"])
        idist.barrier()
        reports = {}
        for name, config in configs.items():
            if REPORT in listed_files(folder / name) and (folder / name / REPORT).exists():
                logger.info(f"{folder / name}: finished before")
            else:
                logger.info(f"{folder / name}: {', '.join(config['tasks'])}")
                run_workflow(config, folder / name / "train.json", config_dir)
                entries = {"split": "validation", "bootstrap": 0, "evaluation_dir": str((folder / name / REPORT).parent)}
                evaluate = ConfigParser.load_config_file(str(config_dir / "evaluate.json"))
                run_workflow(overlay(config, evaluate, entries), folder / name / "evaluate.json", config_dir)
            idist.barrier()
            if first:
                reports[name] = json.loads((folder / name / REPORT).read_text())
                write_text(stage_table(reports), folder / "stage_table.md")
        if first:
            weights = torch.load(folder / name / "model.pt", map_location="cpu", weights_only=True)
            write_checkpoint(weights, folder / "model.pt")
            print(stage_table(reports))
    finally:
        if first:
            run_folder.close_run(folder)


def _open_curriculum(folder: Path, configs: Mapping[str, Mapping], resume: bool) -> None:
    """Lock the folder, refuse stages that were begun with another configuration, and remove those that are not resumed."""
    run_folder.lock_folder(folder)
    anew = [folder / name for name, config in configs.items() if not config["resume"]]
    first, *others = configs.values()
    for config in (first, *(config for config in others if not config["transfer"])):
        run_folder.check_kept(config["init_checkpoint"], [*anew, *[folder] * (not resume)])
    for name, config in configs.items():
        run_folder.check_own_files(folder / name, run_folder.RESULTS)
        if config["resume"] and (folder / name / "last.pt").exists():
            parser = ConfigParser(dict(config))
            parser.get_parsed_content("imports")
            inputs = run_folder.hash_inputs(parser.get_parsed_content("datalist"), config["init_checkpoint"])
            run_folder.check_resumable(folder / name, config, inputs)
    run_folder.check_own_files(folder, ["model.pt", "stage_table.md", *(f"{name}/{REPORT}" for name in configs)])
    for stage in reversed(anew):  # last first: killed here, no stage is left whose origin is gone
        run_folder.lock_folder(stage)
        remove_listed_files(stage)
        run_folder.close_run(stage)
    if not resume:
        remove_listed_files(folder)  # what an earlier curriculum left at its end
    list_files(folder)


def _stage_configs(workflow: ConfigWorkflow, folder: Path, config_dir: Path) -> dict[str, dict]:
    """Configuration of every stage by name, in order."""
    base, configs, before = raw_config(workflow), {}, None
    shipped = ConfigParser.load_config_file(str(config_dir / "train.json"))
    if base["tasks"] != shipped["tasks"]:  # those of the stages would silently undo it
        why = "since every stage has tasks of its own; set stages::NAME::tasks instead"
        raise UserError(f"tasks: found {base['tasks']}, expected {shipped['tasks']}, {why}")
    # A stage is tracked as a run of its own, in the store of the curriculum.
    tracked = {"tracking_uri": workflow.parser.get_parsed_content("tracking_uri")} if "tracking_uri" in base else {}
    for name, entries in base["stages"].items():  # as written: an expression in it is the stage's own
        entries = {**shipped["stages"].get(name, {}), **entries}
        if "tasks" not in entries:
            expected = f"some, such as {{'segmentation': 1.0}}, or a stage of train.json: {', '.join(shipped['stages'])}"
            raise UserError(f"stages::{name}: found no tasks, expected {expected}")
        own = {"output_dir": str(folder / name), **tracked, **({"run_name": name} if tracked else {})}
        config = overlay(base, entries, own)
        check_config(config, "train")
        if before and config["transfer"]:
            config["init_checkpoint"] = str(Path(before["output_dir"]) / "model.pt")
            config["resume"] = config["resume"] and before["resume"]
        configs[name] = before = config
    return configs


def run_workflow(config: Mapping, path: Path, config_dir, run_id: str = "run") -> None:
    """Run an id of a raw configuration as an ordinary MONAI workflow, from the file `path`, which is written for it."""
    if idist.get_rank() == 0:
        write_json(config, path)
    idist.barrier()
    meta_file = str(Path(config_dir) / "metadata.json")
    workflow = ConfigWorkflow(str(path), meta_file=meta_file, logging_file=False, run_id=run_id)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
