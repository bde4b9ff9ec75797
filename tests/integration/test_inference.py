"""The command line of configs/inference.json, as a user types it, and what MONAI asks of the configs."""

import json
from pathlib import Path

import numpy as np
import pytest
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image

import command

ROOT = Path(__file__).parents[2]
INFERENCE = ROOT / "configs/inference.json"


def predict(*arguments):
    return command.run("monai.bundle", "run", "--config_file", INFERENCE, *arguments)


def config(name):
    return json.loads((ROOT / f"configs/{name}.json").read_text())


def test_the_bundle_runner_predicts_as_chestct_does(phantom_dir, checkpoint, chestct, tmp_path):
    source = phantom_dir / "images"
    for done in (
        predict("--input", source, "--output_dir", tmp_path / "a", "--checkpoint", checkpoint),
        chestct(source, tmp_path / "b"),
    ):
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "Traceback" not in done.stdout + done.stderr
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "ab"]
    assert files[0] == files[1] and sum(path.name == "report.html" for path in files[0]) == 18
    for name in ("slices.csv", "scans.csv"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


@pytest.mark.parametrize(
    ("knob", "value", "line"),
    [
        ("input", "empty", "error: input: empty: found no "),
        ("checkpoint", "missing.pt", "error: missing.pt: no such checkpoint"),
        ("backbone", "resnet18", "error: backbone: found 'resnet18', expected "),
    ],
)
def test_wrong_arguments_are_refused_in_one_line_before_any_work(checkpoint, tmp_path, knob, value, line):
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "x.png")
    knobs = {"input": tmp_path / "x.png", "checkpoint": checkpoint, "output_dir": tmp_path / "out"}
    knobs[knob] = value if knob == "backbone" else tmp_path / value
    done = predict(*(part for name, given in knobs.items() for part in (f"--{name}", given)))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    shown = done.stderr.strip().splitlines()[-1].replace(f"{tmp_path}/", "").replace(f"{checkpoint.parent}/", "")
    assert shown.startswith(line)
    assert not (tmp_path / "out").exists()


def test_inference_and_evaluation_have_every_property_monai_asks_for(phantom_dir, checkpoint):
    evaluation = [str(ROOT / f"configs/{name}.json") for name in ("train", "evaluate")]
    for files, folder in ((str(INFERENCE), phantom_dir / "images"), (evaluation, phantom_dir)):
        meta = str(ROOT / "configs/metadata.json")
        workflow = ConfigWorkflow(
            files, workflow_type="inference", meta_file=meta, logging_file=False, dataset_dir=str(folder), checkpoint=str(checkpoint)
        )
        workflow.initialize()
        assert workflow.check_properties() == []
        assert len(workflow.dataset) == (18 if files == str(INFERENCE) else 6)


def test_a_slice_is_prepared_as_in_training_and_the_network_is_the_same():
    train, inference = config("train"), config("inference")
    # Training reads records, with masks; inference reads slices of scans. What is done to the image is the same.
    known = {"keys": "image", "mode": "bilinear"}
    trained = [
        {key: known.get(key, value) for key, value in item.items() if key != "allow_missing_keys"}
        for item in train["preprocessing"]["transforms"]
    ]
    assert inference["preprocessing"]["transforms"][1:] == trained[1:]
    assert inference["multitask_net"] == {k: v for k, v in train["network_def"].items() if k != "pretrained"}
    own = {"model", "network_knobs", "tasks", "checkpoint"} | {"imports", "initialize", "run", "dataset_dir", "output_dir", "preprocessing", "network_def", "network"}
    own |= {"dataset", "dataloader", "inferer", "handlers", "evaluator", "data", "task_list"}
    for knob in train.keys() & inference.keys() - own:
        assert inference[knob] == train[knob], knob
    assert {"backbone", "classes", "image_size", "window", "detection"} <= train.keys() & inference.keys() - own
