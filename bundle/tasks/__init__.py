"""The tasks, one file each (see `Task` in base.py, and docs/tasks.md), and the networks that answer them."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pydoc import ErrorDuringImport, locate

import torch

from bundle import names
from bundle.errors import UserError
from bundle.networks import MultiTaskNet, load_weights, read_weights
from bundle.networks.multitask import NETWORK
from bundle.networks.weights import describe, heads_in, redescribe
from bundle.tasks.base import Task

logger = logging.getLogger(__name__)

TASKS: dict[str, type[Task]] = {name: getattr(import_module(f"bundle.tasks.{name}"), name.title()) for name in names.TASKS}
# Whatever describes a network, with the defaults of fresh weights.
DEFAULTS = {**NETWORK, **{name: default for task in TASKS.values() for name, default in task.described.items()}}
FREE = {name for task in TASKS.values() for name in task.free}
# The network of a file without description is, if nobody says otherwise, the light one of version 0.1.0.
UNDESCRIBED = {
    "backbone": "regnety_002",
    "window": [-1350, 150],
    "decoder_channels": [128, 64, 32, 16],
    "detection": {"fpn_channels": 64, "box_features": 256, "mask_channels": [64, 64], "detections_per_image": 20},
}


def make_tasks(tasks: Mapping[str, float] | Iterable[str], draws: Mapping | None = None, **options) -> list[Task]:
    """Make tasks from their names or dotted paths, or a mapping of them to their weights in the loss; see `Task` for options.

    `draws` is name -> share of the samples that are drawn for the task, in any unit; 1 for a task that is not named.
    """
    kinds = {name: TASKS.get(name) or _outside(name) for name in names.check_tasks(tasks)}
    made, options, draws = [], _complete(options), draws or {}
    if unknown := draws.keys() - TASKS.keys() - kinds.keys():
        raise UserError(f"draws: found {', '.join(sorted(unknown))}, expected names of tasks: {', '.join({**TASKS, **kinds})}")
    for name, kind in kinds.items():
        made.append(kind(**options))
        made[-1].weight = float(tasks[name]) if isinstance(tasks, Mapping) else 1.0
        made[-1].share = draws.get(name, 1.0)
    return made


def _outside(path: str) -> type[Task]:
    try:
        found = locate(path)
    except ErrorDuringImport as error:
        raise UserError(f"tasks: found {path!r}, which cannot be imported ({error.value})") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"tasks: found {path!r}, expected the dotted path of a subclass of bundle.tasks.Task")
    return found


def _complete(*parts: Mapping) -> dict:
    """`DEFAULTS` with what the parts say instead, the last one first; so is a mapping as an entry."""
    whole = dict(DEFAULTS)
    for name, value in (item for part in parts for item in part.items()):
        whole[name] = {**whole[name], **(value or {})} if isinstance(DEFAULTS.get(name), Mapping) else value
    return whole


def build_network(model: Mapping, pretrained: bool | str = False, **changes) -> MultiTaskNet:
    """Build the network of a description with changes to it: see `read_model` and, for `pretrained`, `Encoder`."""
    model = _complete(model, changes)
    return MultiTaskNet(make_tasks(**model), {name: model[name] for name in DEFAULTS}, pretrained)


def open_network(checkpoint, **knobs) -> MultiTaskNet:
    """Build the network of a checkpoint with its weights, in evaluation mode; `knobs` as in `read_model`."""
    network = build_network(read_model(checkpoint, knobs)).eval()
    load_weights(network, checkpoint, strict=True)
    return network


def trained_tasks(checkpoint) -> tuple[str, ...]:
    weights = read_weights(checkpoint)
    return names.check_tasks((describe(weights) or {"tasks": heads_in(weights)})["tasks"])


def read_model(checkpoint, knobs: Mapping, training: bool = False) -> dict:
    """Describe a network as its checkpoint does, else by `DEFAULTS`, with what a user set.

    Gives the entries of `DEFAULTS`, and "tasks", name -> weight.

    Args:
        checkpoint: path of weights; None for fresh ones.
        knobs: name of an entry -> value, or None where the user left it to the checkpoint. A contradiction is a UserError.
        training: the weights are trained further. Only the encoder must agree with the checkpoint.
    """
    knobs = {name: json.loads(json.dumps(value)) for name, value in knobs.items() if value is not None}
    weights = read_weights(checkpoint) if checkpoint else {}
    said = describe(weights) or ({**UNDESCRIBED, "tasks": heads_in(weights) or list(TASKS)} if checkpoint else {})
    model = _complete({"tasks": list(TASKS)}, said, knobs)
    if describe(weights):
        _check_agreement(checkpoint, said, knobs, training)
    elif checkpoint:
        shown = ("classes", "segmentation_classes", "backbone", "image_size", "window")
        values = ", ".join(f"{name} {model[name]!r}" for name in shown)
        logger.warning(f"{checkpoint}: does not describe its network; assumed {values}; set what it was trained with")
    if not isinstance(model["tasks"], Mapping):
        model["tasks"] = dict.fromkeys(names.check_tasks(model["tasks"]), 1.0)
    if training:
        model["temperature"] = None
    return {name: model[name] for name in ("tasks", *DEFAULTS)}


def _check_agreement(checkpoint, said: Mapping, knobs: Mapping, training: bool) -> None:
    """Refuse knobs that contradict the description of a checkpoint."""
    for name, value in knobs.items():
        if training and name != "backbone":
            continue
        if name == "tasks":
            if missing := [task for task in names.check_tasks(value) if task not in said[name]]:
                of = f"those that {checkpoint} was trained for: {', '.join(said[name])}"
                raise UserError(f"tasks: found {', '.join(missing)}, expected some of {of}")
            continue
        for key, found, expected in _differences(name, value, said[name]):
            raise UserError(f"{key}: found {found!r}, expected {expected!r}, as {checkpoint} was trained with; leave {key} out")


def _differences(name: str, value, said) -> Iterator[tuple]:
    """Yield (name, value, said) of an entry, or of its own entries, where two descriptions differ and weights depend on it."""
    if isinstance(value, Mapping) and isinstance(said, Mapping):
        for key in value.keys() & said.keys():
            yield from _differences(f"{name}::{key}", value[key], said[key])
    elif name not in FREE and value != said:
        yield name, value, said


def add_heads(weights: Mapping[str, torch.Tensor], checkpoint) -> dict[str, torch.Tensor]:
    """Add those heads of an earlier checkpoint that weights lack; a head that answers as it did there counts as a task."""
    before, now = read_weights(checkpoint), describe(weights)
    then = describe(before) or {**now, "tasks": heads_in(before)}
    tasks, changes = list(now["tasks"]), {"sources": sorted({*now["sources"], *then["sources"]})}
    for task in (task for task in then["tasks"] if task not in now["tasks"]):
        uses = TASKS[task].described if task in TASKS else ()
        if not any(difference for name in uses for difference in _differences(name, then[name], now[name])):
            tasks.append(task)
            changes |= {name: then[name] for name in uses}
    heads = {key: value for key, value in before.items() if key.startswith("heads.")}
    return redescribe({**heads, **weights}, tasks=names.check_tasks(tasks), **changes)
