"""The task that docs/tasks.md shows, from one file outside the package, is trained, measured and predicted with the others."""

import csv
import json
import re
from textwrap import dedent

import command
import pytest
import torch

TASKS = {"classification": 1.0, "segmentation": 1.0, "reconstruction": 1.0, "detection": 1.0, "severity.Severity": 0.5}


def run(*words) -> None:
    done = command.run(*words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


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


def test_a_fifth_task_from_one_file_outside_the_package(phantom_dir, datalist, tmp_path, monkeypatch):
    code = re.search(r"^    import torch\n.*?(?=^1\. )", (command.ROOT / "docs/tasks.md").read_text(), re.M | re.S)[0]
    (tmp_path / "severity.py").write_text(dedent(code))
    monkeypatch.syspath_prepend(tmp_path)  # also of the processes of `command`
    run_dir, out = tmp_path / "run", tmp_path / "predictions"
    data = {"tasks": TASKS, "dataset_dir": phantom_dir, "datalist": datalist, "output_dir": run_dir, "device": "cpu"}

    run(*command.bundle(**data, max_epochs=1, epoch_size=8, batch_size=4))
    history = json.loads((run_dir / "history.json").read_text())
    assert {"loss_severity", "loss_classification", "loss_detection", "severity_agreement"} <= history[0].keys()
    weights = torch.load(run_dir / "model.pt", weights_only=True)
    assert {"heads.severity.output.weight", "heads.classification.0.weight"} <= weights.keys()

    run(*command.bundle(configs=("train", "evaluate", "preset_smoke"), **data, bootstrap=10))
    report = json.loads((run_dir / "evaluation/metrics.json").read_text())
    assert report.keys() == {*list(TASKS)[:-1], "severity"}
    annotated = sum("severity" in record for record in json.loads(datalist.read_text())["test"])
    assert report["severity"]["agreement"]["n"] == annotated > 0
    rows = list(csv.DictReader((run_dir / "evaluation/per_case.csv").open()))
    assert sum(bool(row["agreement"]) for row in rows) == annotated

    scan = next((phantom_dir / "images").rglob("*.png"), None) or next((phantom_dir / "images").rglob("*.nii.gz"))
    run("chestct", "predict", scan, "-o", out, "--checkpoint", run_dir / "model.pt")  # the weights name their tasks
    (path,) = out.rglob("predictions.json")
    prediction = json.loads(path.read_text())
    assert 0 < prediction["severity"] < 1 and 0 < prediction["slices"][0]["severity"] < 1
    page = (path.parent / "report.html").read_text()
    assert f"<dt>Severity</dt><dd>{prediction['severity']:.2f}</dd>" in page
    assert float(next(csv.DictReader((out / "scans.csv").open()))["severity"]) == pytest.approx(prediction["severity"])
