"""The folders that MONAI Label's app takes for bundles, made from the one model and its configs."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from monai.bundle import ConfigParser

import bundle
from bundle.config import merge_overlays
from bundle.errors import UserError, exit_in_one_line
from bundle.files import ROOT
from bundle.networks import load_weights, read_model
from bundle.names import CLASSIFICATION, DETECTION, SEGMENTATION
from bundle.tasks import build_network

# MONAI Label reads what a bundle does from its name. The values are keys of configs/monailabel.
FACES = {f"chest_ct_{task}": task for task in (SEGMENTATION, CLASSIFICATION, DETECTION)}
OVERLAYS = ROOT / "configs/monailabel"


def make_faces(output_dir, checkpoint=None, configs: Sequence = ()) -> list[Path]:
    """Make the bundles chest_ct_segmentation, chest_ct_classification and chest_ct_detection.

    Each has configs/inference.json (the segmentation configs/train.json too), configs/metadata.json, models/model.pt, and a
    link to this package. The configs are configs/inference.json and configs/train.json as they are now, with overlays merged
    in, and last the face's own of configs/monailabel. What is there is replaced, but weights only if `checkpoint` is given:
    they may have been trained on in MONAI Label.

    Args:
        output_dir: folder to make them in: `model` of the app.
        checkpoint: weights of all faces. Without it a face keeps its weights; a new one gets models/model.pt of the bundle.
        configs: overlays.

    Returns:
        The folders.

    Raises:
        UserError: if a file is not there.
        UserError: if the weights are of another network, or lack the head of a face; of `merge_overlays`.
    """
    for file in configs:
        if not Path(file).is_file():
            raise UserError(f"{file}: no such config, expected an overlay, a file in JSON or YAML")
    faces = []
    for name, task in FACES.items():
        face = Path(output_dir) / name
        (face / "configs").mkdir(parents=True, exist_ok=True)
        (face / "models").mkdir(exist_ok=True)
        model = face / "models/model.pt"
        source = model if model.exists() and not checkpoint else Path(checkpoint or ROOT / "models/model.pt")
        inference = face_config("inference", task, configs)
        described = read_model(source, {knob: inference.get(knob) for knob in inference["network_knobs"]})
        if task not in described["tasks"]:
            raise UserError(f"tasks: found {', '.join(described['tasks'])}, expected {task} among them for {name}")
        load_weights(build_network(described), source, strict=True)
        _write(face / "configs/inference.json", inference)
        if task == SEGMENTATION:
            _write(face / "configs/train.json", face_config("train", "train", configs))
        _write(face / "configs/metadata.json", face_metadata(task, described))
        link = face / "bundle"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(bundle.__file__).resolve().parent, target_is_directory=True)
        if source != model:
            shutil.copyfile(source, model)
        faces.append(face)
    return faces


def face_config(source: str, overlay: str, configs: Sequence = ()) -> dict:
    """Config of a face: one of the bundle's, overlays, then its own of configs/monailabel, without what it does not use.

    What the bundle's inference does to a slice is called slice_preprocessing and slice_postprocessing there, since MONAI
    Label wants under `preprocessing` and `postprocessing` what is done to a volume.

    Args:
        source: inference or train.
        overlay: a name in configs/monailabel.
        configs: overlays.
    """
    text = json.dumps(merge_overlays(ROOT / f"configs/{source}.json", configs))
    config = json.loads(re.sub(r"@(pre|post)processing\b", r"@slice_\1processing", text) if source == "inference" else text)
    if source == "inference":
        config = {re.sub("^(pre|post)processing$", r"slice_\1processing", id): value for id, value in config.items()}
    parser = ConfigParser(config)
    own = ConfigParser.load_config_file(OVERLAYS / f"{overlay}.json")
    for id, value in own.items():
        parser[id] = value
    config = parser.config
    if source == "inference":
        # The app sets `dropout` of network_def for its scoring.
        config["network_def"] = {**config["multitask_net"], "dropout": 0.0, "decoder_dropout": "@network_def#dropout"}
    kept, found = set(), {id.split("#")[0] for id in own} | {"bundle_root", "device", "network_def", "network_knobs"}
    while found:
        kept |= found
        found = set(re.findall(r"@(\w+)", json.dumps([config[key] for key in found]))) & config.keys() - kept
    return {key: value for key, value in config.items() if key in kept}


def face_metadata(task: str, model: Mapping) -> dict:
    """metadata.json of a face: configs/metadata.json, with the format of its one answer to a volume, of `read_model`'s model."""
    metadata = json.loads((ROOT / "configs/metadata.json").read_text())
    names = {
        SEGMENTATION: ["background", *model["segmentation_classes"]],
        CLASSIFICATION: model["classes"],
        DETECTION: ["lesion"],
    }[task]
    volume = {"num_channels": 1, "spatial_shape": ["*", "*", "*"], "is_patch_data": False}
    image = {"type": "image", "format": "hounsfield", "modality": "CT", "dtype": "float32", "value_range": []}
    pred = {
        SEGMENTATION: {"type": "image", "format": "segmentation", **volume, "dtype": "uint8"},
        CLASSIFICATION: {"type": "probabilities", "format": "classes", "spatial_shape": [], "dtype": "float32"},
        DETECTION: {"type": "tuples", "format": "points", "spatial_shape": ["n", 6], "dtype": "float32"},
    }[task]
    pred |= {"num_channels": len(names), "value_range": [], "is_patch_data": False}
    metadata = {key: value for key, value in metadata.items() if not key.endswith("_data_format")}
    metadata["task"] = f"{task.capitalize()} of a chest CT volume, slice by slice".replace("Detection", "Lesion detection")
    metadata["network_data_format"] = {
        "inputs": {"image": {**image, **volume, "channel_def": {"0": "image"}}},
        "outputs": {"pred": {**pred, "channel_def": {str(index): name for index, name in enumerate(names)}}},
    }
    return metadata


def _write(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m bundle.monailabel OUTPUT_DIR`: see `make_faces`."""
    parser = argparse.ArgumentParser(prog="python -m bundle.monailabel", description="Make the bundles for MONAI Label.")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder `model` of the app monaibundle")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights; models/model.pt if there are none yet")
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        help="overlay on inference.json and train.json; weights without a description need one that describes their network",
    )
    known = parser.parse_args(arguments)
    with exit_in_one_line():
        for face in make_faces(known.output_dir, known.checkpoint, known.config):
            print(face)
