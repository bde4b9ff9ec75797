"""A checkpoint: the weights of a network with a description of it, from which the network and its preprocessing are made."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from inspect import signature
from pathlib import Path

import torch
from torch import nn

from bundle.errors import UserError
from bundle.files import ROOT
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS, check_tasks
from bundle.networks.encoders import rename_vgg
from bundle.networks.multitask import FORMAT, MultiTaskNet, decode, encode

logger = logging.getLogger(__name__)

DESCRIPTION = "_extra_state"  # key of a state_dict
DEFAULTS = {
    name: argument.default
    for name, argument in signature(MultiTaskNet).parameters.items()
    if name not in ("tasks", "pretrained", "decoder_dropout")
}
# The network of a file without description is, if nobody says otherwise, the light one of version 0.1.0.
UNDESCRIBED = {
    "backbone": "regnety_002",
    "decoder_channels": [128, 64, 32, 16],
    "detection": {"fpn_channels": 64, "box_features": 256, "mask_channels": [64, 64], "detections_per_image": 20},
}
FREE = ("score_threshold", "nms_threshold", "detections_per_image")  # of detection: no weight depends on them
OUTPUTS = ("classes", "segmentation_classes")
HEADS = {  # what a head depends on, beside the encoder
    CLASSIFICATION: ("classes",),
    SEGMENTATION: ("segmentation_classes", "decoder_channels"),
    RECONSTRUCTION: ("decoder_channels", "skips"),
    DETECTION: ("detection",),
}


def shipped_checkpoint(bundle_root) -> str:
    """Path of models/model.pt in a bundle; of the bundle of this package where `bundle_root` has none."""
    here = Path(bundle_root) / "models/model.pt"
    return str(here if here.exists() or not (ROOT / "models/model.pt").exists() else ROOT / "models/model.pt")


def read_weights(path) -> Mapping[str, torch.Tensor]:
    """State_dict of a network from a file of it, or of a dictionary with one under "network".

    Raises:
        UserError: if there is no such file, or it cannot be read.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train first, or name another one")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on bytes that are no pickle
        raise UserError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}), expected a state_dict saved with torch.save"
        ) from None
    weights = weights.get("network", weights) if isinstance(weights, Mapping) else {}
    rename_vgg(None, weights, "encoder.")
    return weights


def describe(weights: Mapping[str, torch.Tensor]) -> dict | None:
    """What a state_dict says of its network, see `MultiTaskNet`; None if it says nothing.

    Raises:
        UserError: if a later version of this package wrote it, or its network is one that this version lacks.
    """
    if DESCRIPTION not in weights:
        return None
    said = decode(weights[DESCRIPTION])
    if said["format"] > FORMAT:
        raise UserError(
            f"checkpoint: found a description of format {said['format']}, written by version {said['version']}, expected at "
            f"most format {FORMAT}; update this package"
        )
    if (width := said.pop("width", 1.0)) != 1.0:
        raise UserError(
            f"checkpoint: found a {said['backbone']} of width {width}, expected width 1, the only one since version 0.3; use "
            "version 0.2 for it, or train again with a smaller backbone such as efficientnet_lite0"
        )
    return said


def redescribe(weights: Mapping[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    """A state_dict with changes to its description."""
    return {**weights, DESCRIPTION: encode({**decode(weights[DESCRIPTION]), **changes})}


def trained_tasks(checkpoint) -> tuple[str, ...]:
    """Tasks that a checkpoint answers."""
    weights = read_weights(checkpoint)
    said = describe(weights)
    return check_tasks(said["tasks"] if said else _heads(weights))


def _heads(weights: Mapping) -> set[str]:
    return {key.split(".")[1] for key in weights if key.startswith("heads.")}


def read_model(checkpoint, knobs: Mapping, training: bool = False) -> dict:
    """Arguments of `MultiTaskNet`: as a checkpoint says, else its defaults, with what a user set.

    Args:
        checkpoint: path of weights; None for fresh ones.
        knobs: name of an argument -> value, or None where the user left it to the checkpoint.
        training: the weights are trained further. Only the knobs of the encoder must agree with the checkpoint.

    Returns:
        Name of an argument -> value, those of the preprocessing (image_size, window, cropping) among them. The tasks are
        a mapping.

    Raises:
        UserError: if a knob contradicts the checkpoint, or of `read_weights` and `describe`.
    """
    knobs = {name: json.loads(json.dumps(value)) for name, value in knobs.items() if value is not None}
    weights = read_weights(checkpoint) if checkpoint else {}
    said = describe(weights)
    if said:
        _check_agreement(checkpoint, said, knobs, training)
    elif checkpoint:
        said = {**DEFAULTS, **UNDESCRIBED, "tasks": sorted(_heads(weights)) or TASKS}
        assumed = {**said, **knobs}
        values = ", ".join(f"{name} {assumed[name]!r}" for name in (*OUTPUTS, "backbone", "image_size", "window"))
        logger.warning(f"{checkpoint}: does not describe its network; assumed {values}; set what it was trained with")
    model = {"tasks": TASKS, **DEFAULTS, **(said or {}), **knobs}
    model["detection"] = {**((said or {}).get("detection") or {}), **knobs.get("detection", {})}
    if not isinstance(model["tasks"], Mapping):
        model["tasks"] = dict.fromkeys(check_tasks(model["tasks"]), 1.0)
    if training:
        model["temperature"] = None
    return {name: model[name] for name in ("tasks", *DEFAULTS)}


def _check_agreement(checkpoint, said: Mapping, knobs: Mapping, training: bool) -> None:
    """Refuse knobs that contradict the description of a checkpoint."""
    for name, value in knobs.items():
        if name == "detection" and not training:
            for key in value.keys() & said[name].keys() - {*FREE}:
                _check_equal(checkpoint, f"{name}::{key}", value[key], said[name][key])
        elif name == "tasks" and not training:
            if missing := [task for task in check_tasks(value) if task not in said[name]]:
                raise UserError(
                    f"tasks: found {', '.join(missing)}, expected some of those that {checkpoint} was trained for: "
                    f"{', '.join(said[name])}"
                )
        elif name == "backbone" or not (training or name in ("tasks", "detection", "dropout")):
            _check_equal(checkpoint, name, value, said[name])


def _check_equal(checkpoint, name: str, value, said) -> None:
    if value != said:
        raise UserError(f"{name}: found {value!r}, expected {said!r}, as {checkpoint} was trained with; leave {name} out")


def add_heads(weights: Mapping[str, torch.Tensor], checkpoint) -> dict[str, torch.Tensor]:
    """Weights with those heads of an earlier checkpoint that they lack, to go on from.

    The description names a head as one of its tasks if it answers here as it did there, and the sources of both.
    """
    before, now = read_weights(checkpoint), describe(weights)
    then = describe(before) or {**now, "tasks": sorted(_heads(before))}
    kept = [
        task
        for task in then["tasks"]
        if task in now["tasks"] or all(then[name] == now[name] for name in HEADS.get(task, ()))
    ]
    heads = {key: value for key, value in before.items() if key.startswith("heads.")}
    temperature = (now if CLASSIFICATION in now["tasks"] else then)["temperature"]
    tasks = check_tasks({*now["tasks"], *kept})
    sources = sorted({*now["sources"], *then["sources"]})
    return redescribe({**heads, **weights}, tasks=tasks, temperature=temperature, sources=sources)


def load_weights(network: MultiTaskNet, path, strict: bool = False) -> list[str]:
    """Load a state_dict file into the encoder and those heads that both the file and the network have.

    If a head was made for other classes, its output layer is not loaded.

    Args:
        network: the network, changed in place.
        path: of `read_weights`.
        strict: every head of the network must be in the file, for the same classes.

    Returns:
        Names of the parts that were loaded: "encoder" and tasks; "but its output layer" after a task says what was not.

    Raises:
        UserError: if there is no such file, or it is no state_dict, or of another architecture, naming the first parameter
            that does not fit.
    """
    weights = read_weights(path)
    said = describe(weights)
    if strict and said:
        network.set_extra_state(weights[DESCRIPTION])
    parts = {"encoder": network.encoder, **network.heads}
    prefixes = {name: "encoder." if name == "encoder" else f"heads.{name}." for name in parts}
    loaded = {}
    for name, module in parts.items():
        prefix = prefixes[name]
        found = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
        if found or name == "encoder" or strict:
            expected = module.state_dict()
            renamed = said and any(said[key] != network.description[key] for key in OUTPUTS if key in HEADS.get(name, ()))
            output = {} if strict else _output_of_other_classes(found, expected, renamed)
            _check_fit(path, prefix, {**found, **output}, expected)
            loaded[f"{name} but its output layer" if output else name] = module, {**found, **output}
    for module, values in loaded.values():
        module.load_state_dict(values)
    return list(loaded)


def _output_of_other_classes(found: Mapping, expected: Mapping, renamed: bool) -> Mapping:
    """Output layer of a head, where the head in a file differs from it in its classes alone; otherwise nothing."""
    weight, bias = output = list(expected)[-2:]
    differ = [key for key in expected if key not in found or found[key].shape != expected[key].shape]
    if differ == output or (renamed and not differ):
        if found.keys() == expected.keys() and found[weight].shape[1:] == expected[weight].shape[1:]:
            return {weight: expected[weight], bias: expected[bias]}
    return {}


def _check_fit(path, prefix: str, found: Mapping, expected: Mapping) -> None:
    for key in [*expected, *found]:
        shapes = [tuple(side[key].shape) if key in side else "absent" for side in (found, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path}: found {prefix}{key} {shapes[0]}, expected {shapes[1]}; it was made with another network: set the "
                "tasks, classes, backbone and decoder_channels it was trained with"
            )
