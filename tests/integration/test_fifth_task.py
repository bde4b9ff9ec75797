"""A task from one file outside the package is trained, measured and predicted with the others."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUN = (sys.executable, "-m", "monai.bundle", "run")
CHESTCT = Path(sys.executable).with_name("chestct")
TASKS = {"classification": 1.0, "segmentation": 1.0, "reconstruction": 1.0, "detection": 1.0, "severity_task.Severity": 0.5}


def command(*arguments) -> str:
    """Run a command in the root, with the folder of severity_task.py on the path; what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    line = list(map(str, arguments))
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def datalist(phantom_dir, tmp_path_factory):
    """The phantom with a severity of half of its slices: 1 for COVID-19, 0 for all else."""
    content = json.loads((phantom_dir / "datalist.json").read_text())
    for split in ("training", "validation", "test"):
        for record in content[split][::2]:
            record["severity"] = float(record.get("class") == 1)
    content["fields"] = ["severity"]
    path = tmp_path_factory.mktemp("severity") / "datalist.json"
    path.write_text(json.dumps(content))
    return path


def test_a_fifth_task_from_one_file_outside_the_package(phantom_dir, datalist, tmp_path):
    run, out = tmp_path / "run", tmp_path / "predictions"
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": TASKS}))
    files = ["configs/train.json", "configs/preset_smoke.json", str(tmp_path / "tasks.json")]
    data = ["--dataset_dir", phantom_dir, "--datalist", datalist, "--output_dir", run, "--device", "cpu"]
    training = ["--max_epochs", 1, "--epoch_size", 8, "--batch_size", 4]

    command(*RUN, "--config_file", files, *data, *training)
    history = json.loads((run / "history.json").read_text())
    assert {"loss_severity", "loss_classification", "loss_detection", "severity_agreement"} <= history[0].keys()
    weights = torch.load(run / "model.pt", weights_only=True)
    assert {"heads.severity.output.weight", "heads.classification.0.weight"} <= weights.keys()

    command(*RUN, "--config_file", [files[0], "configs/evaluate.json", *files[1:]], *data, "--bootstrap", 10)
    report = json.loads((run / "evaluation/metrics.json").read_text())
    assert report.keys() == {*list(TASKS)[:-1], "severity"}
    annotated = sum("severity" in record for record in json.loads(datalist.read_text())["test"])
    assert report["severity"]["agreement"]["n"] == annotated > 0
    rows = list(csv.DictReader((run / "evaluation/per_case.csv").open()))
    assert sum(bool(row["agreement"]) for row in rows) == annotated

    scan = next((phantom_dir / "images").rglob("*.png"), None) or next((phantom_dir / "images").rglob("*.nii.gz"))
    command(CHESTCT, "predict", scan, "-o", out, "--checkpoint", run / "model.pt")  # the weights name their tasks
    (path,) = out.rglob("predictions.json")
    prediction = json.loads(path.read_text())
    assert 0 < prediction["severity"] < 1 and 0 < prediction["slices"][0]["severity"] < 1
    page = (path.parent / "report.html").read_text()
    assert f"<dt>Severity</dt><dd>{prediction['severity']:.2f}</dd>" in page
    assert float(next(csv.DictReader((out / "scans.csv").open()))["severity"]) == pytest.approx(prediction["severity"])
