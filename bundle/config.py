"""The configuration that is being run, and its check against bundle/knobs.json, the schema of the knobs, before work begins.

An id is MONAI's word for the name of anything in a configuration; a knob is a top-level id that a user sets.
"""

import difflib
import functools
import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path

import torch
from jsonschema import Draft202012Validator, ValidationError, validators
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import merge_kv

from bundle.errors import UserError, no_warnings

SCHEMA = json.loads(Path(__file__).with_name("knobs.json").read_text(encoding="utf-8"))
WORKFLOWS = ("train", "evaluate", "inference")  # the config files; evaluate.json lies over train.json
RUN_IDS = {"train": ("run", "training"), "evaluate": ("run", "calibrate", "reference", "grad_cam"), "inference": ("run",)}
# MONAI itself reads these ids, or adds them when an experiment is tracked.
READ_BY_MONAI = {ConfigParser.meta_key, "imports", "initialize", "run", "finalize", "run_name", "save_execute_config"}
TYPES = {"integer": "a whole number", "number": "a number", "boolean": "True or False", "string": "a text"}
TYPES |= {"array": "a list", "object": "names with values", "null": "None"}


def running_workflow() -> ConfigWorkflow:
    """Find the workflow whose expression is being evaluated, for the id `workflow` of a config, among the callers."""
    frame = inspect.currentframe()
    while frame := frame.f_back:
        workflow = frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow):
            return workflow
    raise RuntimeError("found no ConfigWorkflow among the callers, expected an expression of a bundle config to call this")


def overlay(base: Mapping, *changes: Mapping) -> dict:
    """Change or add entries of a configuration, ids (nested ones too) -> values; `+id` adds to a mapping or a list."""
    parser = ConfigParser(deepcopy(dict(base)))
    for id, value in chain.from_iterable(entries.items() for entries in changes):
        merge_kv(parser, id, deepcopy(value))
    return without_metadata(parser.get())


def raw_config(workflow: ConfigWorkflow) -> dict:
    """Return the configuration of a workflow as JSON, overlays and command line merged in, expressions as they are written."""
    return json.loads(json.dumps(without_metadata(workflow.parser.get()), default=str))


def without_metadata(config: Mapping) -> dict:
    return {key: value for key, value in config.items() if key != ConfigParser.meta_key}


def merge_overlays(file, overlays: Sequence) -> dict:
    """Merge overlays into a config file as MONAI's runner does; one that cannot be read or does not fit is a UserError."""
    parser = ConfigParser(ConfigParser.load_config_file(file))
    for overlay in overlays:
        try:
            changes = ConfigParser.load_config_file(overlay)
        except Exception as error:  # of the readers of JSON and YAML
            raise UserError(f"{overlay}: cannot be read ({' '.join(str(error).split())}), expected JSON or YAML") from None
        for id, value in changes.items():
            try:
                with no_warnings():  # the runner will say it
                    merge_kv(parser, id, value)
            except (KeyError, IndexError, TypeError, ValueError):
                expected = "expected overlays that describe the network; leave out those about training"
                raise UserError(f"{overlay}: found {id!r}, which does not fit {Path(file).name}, {expected}") from None
    return without_metadata(parser.get())


def check_running(running: ConfigWorkflow, workflow: str) -> None:
    """Call `check_config` on the running configuration, for the id `initialize`; announce the use of phantom data."""
    config = raw_config(running)
    if running.run_id not in config:
        others = "; calibrate, reference and grad_cam need configs/evaluate.json" if workflow == "train" else ""
        raise UserError(f"run: found {running.run_id!r}, expected {' or '.join(RUN_IDS[workflow])}{others}")
    check_config(config, workflow, (running.run_id, running.init_id, running.final_id))
    knob = "input" if workflow == "inference" else "dataset_dir"
    source = config["dataset_dir"] if config[knob] == "@dataset_dir" else config[knob]
    if "make_phantom(" in source and os.environ.get("RANK", "0") == "0":
        _announce_phantom(knob)


@functools.cache  # once, not for every stage of a curriculum
def _announce_phantom(knob: str) -> None:
    print(f"{knob} is not set: using the phantom data, which are artificial; to use your own, set --{knob} PATH", flush=True)


def check_config(config: Mapping, workflow: str, also: Iterable[str] = ()) -> None:
    """Refuse a knob with a value that makes no sense, and a top-level id that means nothing, which MONAI would ignore.

    An id is known if it is a knob or a component of the workflow in bundle/knobs.json, if something refers to it as @id, or
    if it is in `also`. Expressions pass unchecked.
    """
    config = json.loads(json.dumps(config, default=str))
    for id, value in leaves(config):
        if isinstance(value, str) and value.lower() in ("true", "false", "null"):  # all of which would count as true
            raise UserError(f"{id}: found the text {value!r}, expected True, False or None, as Python writes them")
    known = knobs(workflow)
    given = {id: value for id, value in config.items() if value is not None or not known.get(id, {}).get("nullable")}
    check_schema(given, {**SCHEMA, "properties": known})
    known = {*components(workflow), *re.findall(r"[@%](\w+)", json.dumps(config)), *READ_BY_MONAI, *also}
    _check_ids(config, workflow, known, "configuration")
    stages = config.get("stages")
    for name, entries in stages.items() if isinstance(stages, dict) else ():
        _check_ids(entries, workflow, known, f"stages::{name}")


def check_schema(value, schema: Mapping, place: str = "") -> None:
    """Refuse a value that does not fit a JSON schema; `place` stands before the complaint, which is the first."""
    for error in _Validator(schema).iter_errors(value):
        raise UserError(place + _describe(error))


def knobs(workflow: str) -> dict[str, dict]:
    """Schemas of the knobs of a workflow; evaluation has those of training too."""
    inherited = knobs("train") if workflow == "evaluate" else {}
    return {**inherited, **SCHEMA["$defs"][workflow]["properties"]}


def components(workflow: str) -> list[str]:
    """Ids of a workflow that are no knobs."""
    return [*(components("train") if workflow == "evaluate" else ()), *SCHEMA["$defs"][workflow]["components"]]


def leaves(config, id: str = "") -> Iterator[tuple[str, object]]:
    """Yield (id, value) of everything in a configuration that is neither a dictionary nor a list, and of empty ones."""
    if not isinstance(config, (dict, list)) or not config:
        yield id, config
        return
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        yield from leaves(value, f"{id}::{key}" if id else str(key))


def _check_ids(ids: Iterable[str], workflow: str, known: set[str], place: str) -> None:
    own = knobs(workflow)
    parts = (f"{id}::{part}" for id, schema in own.items() for part in schema.get("properties", ()))
    names = dict.fromkeys([*own, *known, *parts])
    for id in ids:
        if (top := re.split("#|::", id.lstrip("+"))[0]) in names:
            continue
        others = " and ".join(other for other in WORKFLOWS if top in knobs(other))
        why = f"a knob of {others} that {workflow} does not use" if others else "which no workflow has and nothing refers to"
        near = difflib.get_close_matches(top, names, n=3, cutoff=0.65)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise UserError(f"{place}: found {top!r}, {why}, expected an id of docs/configuration.md{hint}")


def _describe(error: ValidationError) -> str:
    id, found, expected = "::".join(map(str, error.absolute_path)), repr(error.instance), _expected(error.schema)
    if error.validator == "additionalProperties":
        allowed = error.schema["properties"]
        found = ", ".join(repr(name) for name in error.instance if name not in allowed)
        expected = f"one or more of {', '.join(allowed)}"
    reason = f" ({error.message})" if error.validator == "device" else ""
    return f"{id}: found {found}, expected {expected}{reason}"


def _expected(schema: Mapping) -> str:
    """Describe the values that a schema allows."""
    if "expected" in schema:
        return schema["expected"]
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    words = " or ".join(TYPES[kind] for kind in kinds)
    if "maximum" in schema:
        words += f" from {schema['minimum']} to {schema['maximum']}"
    elif "minimum" in schema:
        words += f" of at least {schema['minimum']}"
    elif "exclusiveMinimum" in schema:
        words += f" above {schema['exclusiveMinimum']}"
    return words + (f", a multiple of {schema['multipleOf']}" if "multipleOf" in schema else "")


def _check_increasing(validator, _, value, schema) -> Iterator[ValidationError]:
    """Keyword `increasing`: every number of the list is above the one before."""
    if validator.is_type(value, "array") and any(not low < high for low, high in zip(value, value[1:])):
        yield ValidationError("not increasing")


def _check_device(validator, _, value, schema) -> Iterator[ValidationError]:
    """Keyword `device`: PyTorch can use it here."""
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:  # the second where PyTorch was built without CUDA
        yield ValidationError(str(error).splitlines()[0])


def _unless_expression(check):
    """The check of a keyword for values that are known before the configuration is evaluated."""

    def checked(validator, keyword, value, schema):
        if not (isinstance(value, str) and value.startswith(("$", "@", "%"))):
            yield from check(validator, keyword, value, schema) or ()

    return checked


_KEYWORDS = {**Draft202012Validator.VALIDATORS, "increasing": _check_increasing, "device": _check_device}
_Validator = validators.extend(
    Draft202012Validator,
    {keyword: _unless_expression(check) for keyword, check in _KEYWORDS.items()},
    # JSON Schema counts 2.0 as a whole number; PyTorch does not.
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int),
)
