"""A checkpoint: the state_dict of a network, with a description of the network in it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from bundle.errors import UserError
from bundle.files import ROOT
from bundle.networks.encoders import rename_vgg
from bundle.networks.multitask import FORMAT, MultiTaskNet, decode, encode

DESCRIPTION = "_extra_state"  # key of a state_dict


def shipped_checkpoint(bundle_root) -> str:
    """Path of models/model.pt in a bundle; of the bundle of this package where `bundle_root` has none."""
    here = Path(bundle_root) / "models/model.pt"
    return str(here if here.exists() or not (ROOT / "models/model.pt").exists() else ROOT / "models/model.pt")


def read_weights(path) -> Mapping[str, torch.Tensor]:
    """Read the state_dict of a network from a file of it, or of a dictionary with one under "network"."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train first, or name another one")
    expected = "expected a state_dict saved with torch.save"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on bytes that are no pickle
        raise UserError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}), {expected}") from None
    weights = weights.get("network", weights) if isinstance(weights, Mapping) else None
    if weights is None or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()):
        raise UserError(f"{path}: found something else than tensors with names, {expected}")
    rename_vgg(None, weights, "encoder.")
    return weights


def describe(weights: Mapping[str, torch.Tensor]) -> dict | None:
    """What a state_dict says of its network, see `MultiTaskNet`; None if it says nothing."""
    if DESCRIPTION not in weights:
        return None
    said = decode(weights[DESCRIPTION])
    if said["format"] > FORMAT:
        found = f"found a description of format {said['format']}, written by version {said['version']}"
        raise UserError(f"checkpoint: {found}, expected at most format {FORMAT}; update this package")
    if (width := said.pop("width", 1.0)) != 1.0:
        found = f"found a {said['backbone']} of width {width}, expected width 1, the only one since version 0.3"
        raise UserError(f"checkpoint: {found}; use version 0.2 for it, or train again with a smaller backbone")
    return said


def redescribe(weights: Mapping[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    """Return a state_dict with changes to its description."""
    return {**weights, DESCRIPTION: encode({**decode(weights[DESCRIPTION]), **changes})}


def heads_in(weights: Mapping[str, torch.Tensor]) -> list[str]:
    return sorted({key.split(".")[1] for key in weights if key.startswith("heads.")})


def load_weights(network: MultiTaskNet, path, strict: bool = False) -> list[str]:
    """Load a state_dict file into the encoder and those heads that both the file and the network have.

    The output layer of a head that was made for other classes is left out. If `strict`, every head of the network must be in
    the file, for the same classes. Weights of another architecture are a UserError, and then nothing is changed.

    Returns:
        Names of the parts that were loaded: "encoder" and tasks; "but its output layer" after a task says what was not.
    """
    weights = read_weights(path)
    said = describe(weights)
    if strict and said:
        network.set_extra_state(weights[DESCRIPTION])
    loaded = {}
    for name, module in {"encoder": network.encoder, **network.heads}.items():
        prefix = "encoder." if name == "encoder" else f"heads.{name}."
        found = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
        if found or name == "encoder" or strict:
            expected, output = module.state_dict(), {}
            names = None if strict or name == "encoder" else network.tasks[name].outputs
            if names:
                renamed = said is not None and said[names] != network.description[names]
                output = _output_of_other_classes(found, expected, renamed)
            _check_fit(path, prefix, {**found, **output}, expected)
            loaded[f"{name} but its output layer" if output else name] = module, {**found, **output}
    for module, values in loaded.values():
        module.load_state_dict(values)
    return list(loaded)


def _output_of_other_classes(found: Mapping, expected: Mapping, renamed: bool) -> Mapping:
    """Output layer of a head, where the head in a file differs from it in its classes alone; otherwise nothing."""
    weight, bias = output = list(expected)[-2:]
    differ = [key for key in expected if key not in found or found[key].shape != expected[key].shape]
    others = differ == output or (renamed and not differ)
    if others and found.keys() == expected.keys() and found[weight].shape[1:] == expected[weight].shape[1:]:
        return {weight: expected[weight], bias: expected[bias]}
    return {}


def _check_fit(path, prefix: str, found: Mapping, expected: Mapping) -> None:
    for key in [*expected, *found]:
        shapes = [tuple(side[key].shape) if key in side else "absent" for side in (found, expected)]
        if shapes[0] != shapes[1]:
            why = "it was made with another network: set the tasks, classes, backbone and decoder_channels it was trained with"
            raise UserError(f"{path}: found {prefix}{key} {shapes[0]}, expected {shapes[1]}; {why}")
