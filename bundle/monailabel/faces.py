"""The folders that MONAI Label's app takes for bundles, made from the one model and its configs."""

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
from bundle.names import CLASSIFICATION, DETECTION, SEGMENTATION
from bundle.networks import load_weights, shipped_checkpoint
from bundle.tasks import TASKS, build_network, read_model

# MONAI Label reads what a bundle does from its name. The values are keys of configs/monailabel/faces.json.
FACES = {f"chest_ct_{task}": task for task in (SEGMENTATION, CLASSIFICATION, DETECTION)}
MODEL = "models/model.pt"  # in the folder of a face, where MONAI Label reads it


def make_faces(output_dir, checkpoint=None, configs: Sequence = ()) -> list[Path]:
    """Make the bundles chest_ct_segmentation, chest_ct_classification and chest_ct_detection in a folder, `model` of the app.

    Each has its configs, models/model.pt and a link to this package. What is there is replaced, but without a `checkpoint` a
    face keeps its weights, which may have been trained on in MONAI Label; a new one gets those of this package.
    """
    faces = []
    for name, task in FACES.items():
        face = Path(output_dir) / name
        source = Path(checkpoint or shipped_checkpoint(face))
        inference = face_config("inference", task, configs)
        described = read_model(source, {knob: inference.get(knob) for knob in inference["network_knobs"]})
        if task not in described["tasks"]:
            raise UserError(f"tasks: found {', '.join(described['tasks'])}, expected {task} among them for {name}")
        load_weights(build_network(described), source, strict=True)
        written = {"inference": inference, "metadata": face_metadata(task, described)}
        if task == SEGMENTATION:
            written["train"] = face_config("train", "train", configs)
        for folder in ("configs", "models"):
            (face / folder).mkdir(parents=True, exist_ok=True)
        for config, content in written.items():
            (face / f"configs/{config}.json").write_text(json.dumps(content, indent=4) + "\n")
        link = face / "bundle"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(bundle.__file__).resolve().parent, target_is_directory=True)
        if source != face / MODEL:
            shutil.copyfile(source, face / MODEL)
        faces.append(face)
    return faces


def face_config(source: str, part: str, configs: Sequence = ()) -> dict:
    """Config of a face: one of the bundle's, overlays, then what configs/monailabel/faces.json changes; no id without use.

    MONAI Label needs under `preprocessing`, `postprocessing` and `inferer` what is done to a volume; what is done to a slice
    is called slice_preprocessing and so on there. `source` is inference or train, `part` of faces.json a task or train.
    """
    config = merge_overlays(ROOT / f"configs/{source}.json", configs)
    changes = json.loads((ROOT / "configs/monailabel/faces.json").read_text())
    own = changes[part]
    if source == "inference":
        text = re.sub(r"@((pre|post)processing|inferer)\b", r"@slice_\1", json.dumps(config))
        config = {re.sub("^((pre|post)processing|inferer)$", r"slice_\1", id): value for id, value in json.loads(text).items()}
        own = {**changes["inference"], **own}
    parser = ConfigParser(config)
    for id, value in own.items():
        parser[id] = value
    config = parser.config
    if source == "inference":  # the app sets `dropout` of network_def for its scoring
        config["network_def"] = {**config["multitask_net"], "dropout": 0.0, "decoder_dropout": "@network_def#dropout"}
    kept, found = set(), {id.split("#")[0] for id in own} | {"bundle_root", "device", "network_def", "network_knobs"}
    while found:
        kept |= found
        found = set(re.findall(r"@(\w+)", json.dumps([config[key] for key in found]))) & config.keys() - kept
    return {key: value for key, value in config.items() if key in kept}


def face_metadata(task: str, model: Mapping) -> dict:
    """metadata.json of a face: configs/metadata.json, with the format of a volume and its answer as MONAI Label reads it."""
    kind = TASKS[task]
    names = ["background"] * kind.dense + list(model[kind.outputs] if kind.outputs else ["lesion"])
    metadata = json.loads((ROOT / "configs/metadata.json").read_text())
    metadata = {key: value for key, value in metadata.items() if not key.endswith("_data_format")}
    image = {"type": "image", "format": "hounsfield", "spatial_shape": ["*"] * 3, "channel_def": {"0": "image"}}
    pred = {"type": task, "channel_def": {str(index): name for index, name in enumerate(names)}}
    metadata["network_data_format"] = {"inputs": {"image": image}, "outputs": {"pred": pred}}
    return metadata | {"task": f"{task.capitalize()} of a chest CT volume, slice by slice"}


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m bundle.monailabel OUTPUT_DIR`: see `make_faces`."""
    parser = argparse.ArgumentParser(prog="python -m bundle.monailabel", description="Make the bundles for MONAI Label.")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="folder `model` of the app monaibundle")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights; those of this package if there are none yet")
    what = "overlay on inference.json and train.json; weights without a description need one that describes their network"
    parser.add_argument("--config", metavar="FILE", action="append", default=[], help=what)
    known = parser.parse_args(arguments)
    with exit_in_one_line():
        for face in make_faces(known.output_dir, known.checkpoint, known.config):
            print(face)
