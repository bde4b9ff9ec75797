"""The commands of the README, typed as a user would, on phantom data."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from monai.bundle import ConfigWorkflow

ROOT = Path(__file__).parents[2]


def bundle(*arguments):
    command = [sys.executable, "-m", "monai.bundle", "run", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def configs(*names):
    return str([f"configs/{name}.json" for name in names])


def test_curriculum_resumes_where_it_was_and_is_evaluated(tmp_path):
    data = ["--dataset_dir", "$bundle.data.phantom.make_phantom('" + str(tmp_path / "phantom") + "', size=64)"]
    out = tmp_path / "run"
    train = ["training", "--config_file", configs("train", "preset_smoke"), "--output_dir", out, *data]
    table = bundle(*train)
    assert "| stage_joint |" in table
    stages = ["stage_classification", "stage_segmentation", "stage_detection", "stage_joint"]
    for stage in stages:
        assert {"best.pt", "last.pt", "model.pt", "metrics.json", "curves.png", "config.json", "environment.json"} <= {
            path.name for path in (out / stage).iterdir()
        }
    heads = {key.split(".")[1] for key in torch.load(out / "stage_detection/model.pt", weights_only=True) if "heads" in key}
    assert heads == {"classification", "segmentation", "reconstruction", "detection"}, "earlier heads travel along"

    before = torch.load(out / "model.pt", weights_only=True)
    for file in ("model.pt", "metrics.json", "evaluation/metrics.json"):
        (out / "stage_joint" / file).unlink()  # as if killed before the end of the last stage
    bundle(*train)
    after = torch.load(out / "model.pt", weights_only=True)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    evaluate = ["--config_file", configs("train", "preset_smoke", "evaluate"), "--output_dir", out, "--bootstrap", 20, *data]
    bundle(*evaluate)
    report = json.loads((out / "evaluation/metrics.json").read_text())
    assert report.keys() == {"classification", "segmentation", "reconstruction", "detection"}
    low, high = report["segmentation"]["dice"]["ci95"]
    assert 0 <= low <= report["segmentation"]["dice"]["value"] <= high <= 1
    assert (out / "evaluation/per_case.csv").read_text().count("\n") == 19


def test_train_config_has_every_property_monai_asks_for(tmp_path):
    phantom = "$bundle.data.phantom.make_phantom('" + str(tmp_path / "phantom") + "', size=64)"
    workflow = ConfigWorkflow(
        str(ROOT / "configs/train.json"), workflow_type="train", logging_file=False, dataset_dir=phantom
    )
    workflow.initialize()
    assert workflow.check_properties() == []
