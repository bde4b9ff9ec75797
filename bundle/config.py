"""The configuration that is being run, and the refusal of ids that mean nothing in it."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import merge_kv

from bundle.errors import UserError

WORKFLOWS = ("train.json", "evaluate.json", "inference.json")
# Lowest values that make sense, and shares that end at 1.
LEAST = {
    **dict.fromkeys(("batch_size", "max_epochs", "val_interval"), 1),
    **dict.fromkeys(("epoch_size", "num_workers", "learning_rate", "weight_decay", "dropout", "label_smoothing"), 0),
}
SHARES = {"dropout", "label_smoothing"}
# What is expected where the default is of a type. A text counts as true, has the length of its letters, or fails far from here.
NO_TEXT = ((bool, "True or False"), ((int, float), "a number"), (list, "a list"))
OR_A_PATH = {"pretrained"}
# Ids that MONAI itself reads, or adds when an experiment is tracked.
READ_BY_MONAI = {ConfigParser.meta_key, "imports", "initialize", "run", "finalize", "run_name", "save_execute_config"}


def running_workflow() -> ConfigWorkflow:
    """The workflow whose expression is being evaluated.

    MONAI gives an expression no handle on the workflow that evaluates it, so it is looked up among the callers.

    Raises:
        RuntimeError: if no `monai.bundle.ConfigWorkflow` is among the callers.
    """
    frame = inspect.currentframe()
    while frame := frame.f_back:
        workflow = frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow):
            return workflow
    raise RuntimeError("found no ConfigWorkflow among the callers, expected an expression of a bundle config to call this")


def overlay(base: Mapping, *changes: Mapping) -> dict:
    """A configuration with entries (ids, nested ones too, to values) changed or added, later ones over earlier ones.

    As in a list of configuration files, `+id` adds to the mapping or the list of that id.
    """
    parser = ConfigParser(deepcopy(dict(base)))
    for id, value in chain.from_iterable(entries.items() for entries in changes):
        merge_kv(parser, id, deepcopy(value))
    return without_metadata(parser.get())


def running_config() -> dict:
    """The raw configuration whose expression is being evaluated, overlays and command line merged in, as JSON holds it."""
    return json.loads(json.dumps(without_metadata(running_workflow().parser.get()), default=str))


def without_metadata(config: Mapping) -> dict:
    return {key: value for key, value in config.items() if key != ConfigParser.meta_key}


def merge_overlays(file, overlays: Sequence) -> dict:
    """A config file with overlays merged in, as MONAI's runner does it.

    Raises:
        UserError: naming the overlay, if it cannot be read, or changes a part of something that the file does not have, as
            those do that tell how a network is trained where the file is inference.json.
    """
    parser = ConfigParser(ConfigParser.load_config_file(file))
    for overlay in overlays:
        try:
            changes = ConfigParser.load_config_file(overlay)
        except Exception as error:  # of the readers of JSON and YAML
            raise UserError(f"{overlay}: cannot be read ({' '.join(str(error).split())}), expected JSON or YAML") from None
        for id, value in changes.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the runner will say it
                    merge_kv(parser, id, value)
            except (KeyError, IndexError, TypeError, ValueError):
                raise UserError(
                    f"{overlay}: found {id!r}, which does not fit {Path(file).name}, expected overlays that describe the "
                    "network, such as configs/preset_cpu.json; leave those out that tell how it was trained"
                ) from None
    return {id: value for id, value in parser.get().items() if id != ConfigParser.meta_key}


def refuse_unknown_ids() -> None:
    """`check_ids` on the running configuration; made for the id `initialize` of a config, so that no work has begun.

    Raises:
        UserError: see `check_ids`.
    """
    workflow = running_workflow()
    check_ids(workflow.parser.get(), workflow.config_root_path, (workflow.run_id, workflow.init_id, workflow.final_id))


def check_ids(config: Mapping, config_dir, also: Iterable[str] = ()) -> None:
    """Refuse a top-level id that no workflow has and nothing refers to, which MONAI would ignore.

    Args:
        config: the raw configuration, overlays and command line merged in.
        config_dir: folder of the bundle's train.json, evaluate.json and inference.json, whose ids are the known ones.
        also: further ids that are known, such as the one to run.

    Raises:
        UserError: naming the id and the known ids nearest to it; for a text "true", "false" or "null", which the command
            line makes of these words and which would count as true; for another text where the default is a switch, a number
            or a list, a number below `LEAST` or a share above 1, or a device that is not there.
    """
    files = [file for name in WORKFLOWS if (file := Path(config_dir) / name).is_file()]
    defaults = {id: value for file in files for id, value in json.loads(file.read_text()).items()}
    known = defaults.keys()
    referred = set(re.findall(r"[@%](\w+)", json.dumps(config, default=str)))
    for id, value in config.items():
        if not (isinstance(value, str) and isinstance(defaults.get(id), str)):
            _refuse_words(value, id)
        if not (isinstance(value, str) and value.startswith(("$", "@", "%"))):
            _refuse_value(value, id, defaults.get(id))
    for id in config if known else ():  # a folder without any of the three holds a workflow of its own
        if id not in known | referred | READ_BY_MONAI | set(also):
            near = difflib.get_close_matches(id, known, n=3)
            hint = f"; near matches: {', '.join(near)}" if near else ""
            raise UserError(
                f"configuration: found {id!r}, which no workflow has and nothing refers to as @{id}, expected an id of "
                f"docs/configuration.md{hint}"
            )


def _refuse_value(value, id: str, default) -> None:
    expected = next((words for kind, words in NO_TEXT if isinstance(default, kind)), None)
    if expected and isinstance(value, str) and id not in OR_A_PATH:
        raise UserError(f"{id}: found the text {value!r}, expected {expected}")
    if id in LEAST and isinstance(value, (int, float)) and not value >= LEAST[id]:
        raise UserError(f"{id}: found {value}, expected at least {LEAST[id]}")
    if id in SHARES and isinstance(value, (int, float)) and value > 1:
        raise UserError(f"{id}: found {value}, expected at most 1")
    if id == "device" and isinstance(value, str):
        try:
            torch.empty(0, device=value)
        except (RuntimeError, AssertionError) as error:  # the second where PyTorch was built without CUDA
            reason = str(error).splitlines()[0]
            raise UserError(
                f"device: found {value!r}, which PyTorch cannot use here ({reason}), expected one such as cpu"
            ) from None


def _refuse_words(value, id: str) -> None:
    """Refuse the texts "true", "false" and "null" in a value, however deep."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            _refuse_words(part, f"{id}::{key}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _refuse_words(part, f"{id}::{index}")
    elif isinstance(value, str) and value.lower() in ("true", "false", "null"):
        raise UserError(f"{id}: found the text {value!r}, expected True, False or None, as Python writes them")
