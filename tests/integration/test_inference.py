"""The command line of configs/inference.json, as a user types it, and what MONAI asks of the configs."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from PIL import Image

ROOT = Path(__file__).parents[2]
SMOKE = [str(ROOT / "configs/inference.json"), str(ROOT / "configs/preset_smoke.json")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Untrained weights of the smallest network."""
    parser = ConfigParser()
    parser.read_config(SMOKE)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(parser.get_parsed_content("network_def").state_dict(), path)
    return path


def predict(*arguments):
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(SMOKE), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def config(name):
    return json.loads((ROOT / f"configs/{name}.json").read_text())


def test_a_folder_is_predicted(phantom_dir, checkpoint, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for path in sorted((phantom_dir / "images").iterdir())[:3]:
        (source / path.name).write_bytes(path.read_bytes())
    Image.fromarray(np.arange(48 * 80, dtype=np.uint8).reshape(48, 80)).save(source / "picture.jpg")
    (source / "bad.png").write_text("not a picture")
    knobs = ["--checkpoint", checkpoint, "--score_threshold", 0.06, "--batch_size", 2]
    done = predict("--input", source, "--output_dir", out, *knobs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr and done.stdout.count("skipped /") == 1 and "predict" in done.stderr
    report = json.loads((out / "predictions.json").read_text())
    assert [entry["file"] for entry in report["images"]] == sorted(set(path.name for path in source.iterdir()) - {"bad.png"})
    assert [failure["file"] for failure in report["failures"]] == ["bad.png"]
    assert any(entry["detection"] for entry in report["images"]), "an untrained network boxes something"
    for entry in report["images"]:
        for name in (entry["segmentation"]["mask"], entry["reconstruction"]["image"], entry["overlay"]):
            assert (out / name).stat().st_size > 0
        if entry["file"].endswith(".nii.gz"):
            before, after = nib.load(source / entry["file"]), nib.load(out / entry["segmentation"]["mask"])
            assert before.shape == after.shape
            np.testing.assert_allclose(before.affine, after.affine, rtol=1e-6)
        else:
            assert Image.open(out / entry["segmentation"]["mask"]).size == (80, 48)
        for found in entry["detection"]:
            x1, y1, x2, y2 = found["box"]
            assert 0 <= x1 < x2 <= 80 and 0 <= y1 < y2 <= 64 and 0.06 <= found["score"] <= 1


@pytest.mark.parametrize(
    ("knob", "value", "line"),
    [
        ("input", "empty", "error: input: empty: found no image among 0 files"),
        ("checkpoint", "missing.pt", "error: missing.pt: no such checkpoint"),
        ("width", 0.25, "error: model.pt: found encoder."),
    ],
)
def test_wrong_arguments_are_refused_in_one_line_before_any_work(checkpoint, tmp_path, knob, value, line):
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "x.png")
    knobs = {"input": tmp_path / "x.png", "checkpoint": checkpoint, "output_dir": tmp_path / "out"}
    knobs[knob] = tmp_path / value if isinstance(value, str) else value
    done = predict(*(part for name, given in knobs.items() for part in (f"--{name}", given)))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    shown = done.stderr.strip().splitlines()[-1].replace(f"{tmp_path}/", "").replace(f"{checkpoint.parent}/", "")
    assert shown.startswith(line)
    assert not (tmp_path / "out").exists()


def test_inference_and_evaluation_have_every_property_monai_asks_for(phantom_dir):
    evaluation = [str(ROOT / f"configs/{name}.json") for name in ("train", "preset_smoke", "evaluate")]
    for files, folder in ((SMOKE, phantom_dir / "images"), (evaluation, phantom_dir)):
        meta = str(ROOT / "configs/metadata.json")
        workflow = ConfigWorkflow(
            files, workflow_type="inference", meta_file=meta, logging_file=False, dataset_dir=str(folder)
        )
        workflow.initialize()
        assert workflow.check_properties() == []
        assert len(workflow.dataset) == (18 if files == SMOKE else 6)


def test_a_slice_is_prepared_as_in_training_and_the_network_is_the_same():
    train, inference = config("train"), config("inference")
    transforms = [item for item in inference["preprocessing"]["transforms"] if item["_target_"] != "CopyItemsd"]
    assert transforms == train["preprocessing"]["transforms"]
    network = {key: value for key, value in train["network_def"].items() if key != "pretrained"}
    assert inference["network_def"] == network
    own = {"imports", "initialize", "run", "dataset_dir", "output_dir", "preprocessing", "network_def"}
    own |= {"dataset", "dataloader", "inferer", "handlers", "evaluator", "data"}
    for knob in train.keys() & inference.keys() - own:
        assert inference[knob] == train[knob], knob
    assert {"backbone", "tasks", "classes", "image_size", "window", "detection"} <= train.keys() & inference.keys() - own


OVERLAYS = sorted(
    path.stem for kind in ("backbone", "preset", "stage") for path in (ROOT / "configs").glob(f"{kind}_*.json")
)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_of_training_do_inference_no_harm(overlay):
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs/inference.json"), str(ROOT / f"configs/{overlay}.json")])
    network = parser.get_parsed_content("network_def")
    assert set(network.heads) == set(parser["tasks"])
    assert parser.get_parsed_content("postprocessing") is not None
