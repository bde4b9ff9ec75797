"""The command line of configs/inference.json, as a user types it, and what MONAI asks of the configs."""

import json
from pathlib import Path

import command
import pytest
from some_tasks import open_workflow

ROOT = Path(__file__).parents[2]


def config(name):
    return json.loads((ROOT / f"configs/{name}.json").read_text())


def test_the_bundle_runner_predicts_as_chestct_does(phantom_dir, checkpoint, chestct, tmp_path):
    source = phantom_dir / "images"
    words = command.bundle(configs=["inference"], input=source, output_dir=tmp_path / "a", checkpoint=checkpoint)
    for done in (command.run(*words), chestct(source, tmp_path / "b")):
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "Traceback" not in done.stdout + done.stderr
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "ab"]
    assert files[0] == files[1] and sum(path.name == "report.html" for path in files[0]) == 18
    for name in ("slices.csv", "scans.csv"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


@pytest.mark.parametrize(
    ("kind", "configs", "size"), [("train", ["train"], 6), ("inference", ["train", "evaluate"], 6), ("inference", ["inference"], 18)]
)
def test_workflows_have_every_property_monai_asks_for(kind, configs, size, phantom_dir, checkpoint):
    data = {"dataset_dir": phantom_dir / "images" if configs == ["inference"] else phantom_dir}
    data |= {} if kind == "train" else {"checkpoint": checkpoint}
    workflow = open_workflow(*configs, workflow_type=kind, meta_file=ROOT / "configs/metadata.json", **data)
    assert workflow.check_properties() == []
    assert len(workflow.dataset if kind == "inference" else workflow.train_dataset) == size


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
