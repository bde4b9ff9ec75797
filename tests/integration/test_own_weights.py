"""Weights of one's own need no overlay: the checkpoint says what its network, names and preprocessing are."""

import json

import command
import numpy as np
import pydicom
import pytest
import torch

from bundle.networks.weights import describe

CLASSES = ["healthy", "bacterial pneumonia", "COVID-19"]
KNOBS = {"classes": CLASSES, "window": [-1000, 300], "image_size": 96, "tasks": {"classification": 1.0, "segmentation": 1.0}}


def run(*configs, **knobs):
    done = command.run(*command.bundle(configs=configs, **knobs))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def data(phantom_dir, tmp_path_factory):
    """The phantom's images under other class names."""
    datalist = json.loads((phantom_dir / "datalist.json").read_text())
    path = tmp_path_factory.mktemp("own") / "datalist.json"
    path.write_text(json.dumps({**datalist, "classes": CLASSES}))
    return {"dataset_dir": phantom_dir, "datalist": path}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Folder of a run with names, window and size of its own, after one epoch."""
    out = tmp_path_factory.mktemp("own") / "run"
    run("train", "preset_smoke", output_dir=out, **data, **KNOBS)
    return out


@pytest.fixture(scope="module")
def series(write_ct, tmp_path_factory):
    """A DICOM series of three slices."""
    hu = np.full((3, 64, 64), -1000)
    hu[:, 8:56, 4:60], hu[:, 16:48, 10:28], hu[:, 16:48, 36:54] = 40, -800, -800
    return write_ct(tmp_path_factory.mktemp("own") / "series", hu, spacing=(5, 5), PatientID="1", SeriesNumber=1)


def test_training_writes_the_description(trained):
    said = describe(torch.load(trained / "model.pt", weights_only=True))
    assert {name: said[name] for name in ("classes", "window", "image_size")} == {k: KNOBS[k] for k in list(KNOBS)[:3]}
    assert said["tasks"] == ["classification", "segmentation"] and said["sources"] == ["phantom"]


def test_prediction_has_the_names_of_the_checkpoint(trained, series, chestct, tmp_path):
    done = chestct(series, tmp_path, "--checkpoint", trained / "model.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.rglob("predictions.json")
    prediction = json.loads(path.read_text())
    assert list(prediction["classification"]["probabilities"]) == CLASSES and "detection" not in prediction
    report = str(pydicom.dcmread(path.with_name("report.dcm")))
    assert "bacterial pneumonia" in report and "840539006" in report, "the code of COVID-19"
    for name in ("report.dcm", "segmentation.dcm"):
        written = str(pydicom.dcmread(path.with_name(name)))
        assert "lung cancer" not in written and "363358000" not in written and "Malignant neoplasm" not in written


def test_evaluation_needs_no_preset(trained, data, tmp_path):
    run("train", "evaluate", checkpoint=trained / "model.pt", output_dir=tmp_path, bootstrap=0, **data)
    report = json.loads((tmp_path / "evaluation/metrics.json").read_text())
    assert report.keys() == {"classification", "segmentation"}


def test_a_knob_that_contradicts_the_checkpoint_is_refused_in_one_line(trained, series, chestct, tmp_path):
    shipped = ["other", "COVID-19", "lung cancer"]
    done = chestct(series, tmp_path / "out", "--checkpoint", trained / "model.pt", "--classes", shipped)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    expected = f"error: classes: found {shipped}, expected {CLASSES}, as {trained}/model.pt was trained with; leave classes out"
    assert done.stderr.splitlines()[-1] == expected
    assert not (tmp_path / "out").exists()


def test_training_goes_on_from_the_network_of_the_checkpoint(trained, data, tmp_path):
    knobs = {"init_checkpoint": trained / "model.pt", "max_epochs": 1, "tasks": {"classification": 1.0}}
    run("train", output_dir=tmp_path, **knobs, **data)
    said = [describe(torch.load(folder / "model.pt", weights_only=True)) for folder in (trained, tmp_path)]
    assert said[0] == said[1]
