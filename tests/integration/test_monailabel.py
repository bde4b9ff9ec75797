"""A real MONAI Label server on 127.0.0.1 with its unmodified app, asked over REST."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from chests import AFFINE, labelled_chest

from bundle.networks.weights import describe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/monailabel.sh"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment variables of the script; skips where MONAI Label is not installed and cannot be."""
    folder = tmp_path_factory.mktemp("monailabel")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    installed = os.environ.get("MONAILABEL_ENV") or str(ROOT / ".monailabel/env")
    variables = {"MONAILABEL_DIR": str(folder), "MONAILABEL_ENV": installed, "MONAILABEL_PORT": str(port)}
    variables = {**os.environ, "VIRTUAL_ENV": sys.prefix, **variables}
    done = subprocess.run(["bash", SCRIPT, "install"], env=variables, capture_output=True, text=True, timeout=580)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        pytest.skip(f"MONAI Label cannot be installed: {lines[-1]}")
    return variables


@pytest.fixture(scope="module")
def weights(checkpoint, tmp_path_factory):
    """Weights whose segmentation is sure of something: those of a fresh network say 0.5 everywhere."""
    state = torch.load(checkpoint, weights_only=True)
    for name in ("weight", "bias"):
        state[f"heads.segmentation.output.0.{name}"] *= 40
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A folder with two volumes, of a body with lungs and a lesion and of nearly nothing, and the label of the first."""
    folder, (hu, lesion) = tmp_path_factory.mktemp("data"), labelled_chest(noise=60)
    (folder / "studies").mkdir()
    for name, values in (("body", hu), ("air", np.full_like(hu, -1000))):
        nibabel.save(nibabel.Nifti1Image(values, AFFINE), folder / f"studies/{name}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(lesion, AFFINE), folder / "label.nii.gz")
    return folder / "studies"


class Server:
    """The server's REST interface."""

    def __init__(self, port: str) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ask(self, path, body=None, form=None, method=None) -> bytes:
        headers, data = {}, None
        if body is not None:
            headers, data = {"Content-Type": "application/json"}, json.dumps(body).encode()
        if form is not None:
            boundary = uuid.uuid4().hex
            headers, data = {"Content-Type": f"multipart/form-data; boundary={boundary}"}, b""
            for name, value in form.items():
                data += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'.encode()
                data += (
                    b'; filename="label.nii.gz"\r\n\r\n' + value if isinstance(value, bytes) else b"\r\n\r\n" + value.encode()
                )
                data += b"\r\n"
            data += f"--{boundary}--\r\n".encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method or ("POST" if data else "GET"))
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read()

    def json(self, *arguments, **options):
        return json.loads(self.ask(*arguments, **options))

    def infer(self, face, image, **params):
        return self.json(f"/infer/chest_ct_{face}?image={image}&output=json", form={"params": json.dumps(params)})

    def mask(self, image, path):
        path.write_bytes(self.ask(f"/infer/chest_ct_segmentation?image={image}&output=image", form={"params": "{}"}))
        return nibabel.load(path)

    def finished(self, task):
        """Wait for the last training or scoring, and return its status."""
        for _ in range(240):
            status = self.json(f"/{task}/")
            if status["status"] in ("DONE", "ERROR"):
                assert status["status"] == "DONE", "\n".join(status["details"])
                return status
            time.sleep(0.5)
        raise AssertionError(f"{task} has not ended in 120 s")

    def score(self):
        """Score what is not labelled."""
        self.json("/scoring/chest_ct_segmentation", body={"simulation_size": 2, "max_workers": 1})
        self.finished("scoring")

    def scores(self):
        objects = self.json("/datastore/?output=all")["objects"]
        return {name: item["image"]["info"].get("epistemic_entropy") for name, item in objects.items()}


@pytest.fixture(scope="module")
def server(environment, weights, studies):
    command = ["bash", SCRIPT, "start", studies, "--checkpoint", weights]
    started = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    log = Path(environment["MONAILABEL_DIR"]) / "server.log"
    assert started.returncode == 0, started.stderr + (log.read_text()[-3000:] if log.exists() else "")
    port = environment["MONAILABEL_PORT"]
    assert started.stdout.strip().endswith(f"http://127.0.0.1:{port}")
    yield Server(port)
    stopped = subprocess.run(["bash", SCRIPT, "stop"], env=environment, capture_output=True, text=True, timeout=60)
    assert stopped.returncode == 0, stopped.stderr
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port))) != 0


def model(environment):
    return Path(environment["MONAILABEL_DIR"]) / "apps/monaibundle/model/chest_ct_segmentation/models/model.pt"


@pytest.mark.timeout(1500)  # with an installation
def test_info_names_the_faces_and_their_limits(server):
    info = server.json("/info/")
    kinds = {name: (item["type"], item["labels"]) for name, item in info["models"].items()}
    assert kinds == {
        "chest_ct_segmentation": ("segmentation", {"lesion": 1}),
        "chest_ct_classification": ("classification", {"other": 0, "covid-19": 1, "lung cancer": 2}),
        "chest_ct_detection": ("detection", {"lesion": 0}),
    }
    assert {"lesion_threshold", "score_threshold"} <= info["models"]["chest_ct_segmentation"]["config"].keys()
    assert list(info["trainers"]) == list(info["scoring"]) == ["chest_ct_segmentation"]


def test_all_faces_say_what_chestct_predict_says(server, studies, weights, chestct, tmp_path):
    path = studies / "body.nii.gz"
    done = chestct(path, tmp_path / "out", "--checkpoint", weights, "--flips", "False")
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "out").rglob("predictions.json")
    expected, mask = json.loads(found.read_text()), nibabel.load(found.with_name("mask.nii.gz"))

    answer = server.infer("segmentation", "body")
    labels = server.mask("body", tmp_path / "mask.nii.gz")
    assert labels.shape == (64, 56, 6)
    np.testing.assert_allclose(labels.affine, AFFINE, atol=1e-4)
    differing = (labels.get_fdata() != mask.get_fdata()).mean()
    assert differing < 1e-3 and 0 < labels.get_fdata().mean() < 1
    assert answer["segmentation"]["lesion"]["volume_ml"] == pytest.approx(
        expected["segmentation"]["lesion"]["volume_ml"], rel=1e-3
    )
    probabilities = answer["classification"]["probabilities"]
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-4)
    assert probabilities == pytest.approx(expected["classification"]["probabilities"], abs=1e-3)
    assert answer["classification"]["slices"] == expected["classification"]["slices"]
    assert len(answer["detection"]) == len(expected["detection"]) > 0
    for lesion, other in zip(answer["detection"], expected["detection"]):
        assert lesion["slices"] == other["slices"]
        assert lesion["center_mm"] == pytest.approx(other["center_mm"], abs=0.1)
        assert lesion["score"] == pytest.approx(other["score"], abs=1e-3)

    scores = {entry["label"]: entry["score"] for entry in server.infer("classification", "body")["prediction"]}
    assert scores == pytest.approx({name.lower(): value for name, value in probabilities.items()}, abs=1e-5)

    boxes = server.infer("detection", "body")
    assert len(boxes["box"]) == len(expected["detection"]) and "score 0." in boxes["description"]
    markups = json.loads(
        server.ask("/infer/chest_ct_detection?image=body&output=image", form={"params": json.dumps({"score_threshold": 0.5})})
    )["markups"]
    assert len(markups) == len(expected["detection"])
    for roi, lesion in zip(markups, expected["detection"]):
        assert (roi["type"], roi["coordinateSystem"]) == ("ROI", "LPS")
        assert roi["center"] == pytest.approx(lesion["center_mm"], abs=0.1)
        assert roi["size"] == pytest.approx(lesion["size_mm"], abs=0.1)


def test_limits_of_the_request_count(server):
    assert server.infer("detection", "body", score_threshold=1.0)["box"] == []
    assert server.infer("segmentation", "body", lesion_threshold=0.999999)["segmentation"]["lesion"]["pixels"] == 0


def test_a_label_trains_the_segmentation_head_and_nothing_else(server, environment, studies, tmp_path):
    server.score()
    first = server.scores()
    assert first["body"] != pytest.approx(first["air"], rel=1e-3) and min(first.values()) > 0
    assert server.json("/activelearning/first", body={})["id"] in ("air", "body")
    label = (studies.parent / "label.nii.gz").read_bytes()
    assert server.json("/datastore/label?image=body", form={"label": label, "params": "{}"}, method="PUT")["label"] == "body"
    assert server.json("/activelearning/first", body={})["id"] == "air"

    before, mask = torch.load(model(environment), weights_only=True), server.mask("body", tmp_path / "a.nii.gz")
    server.json("/train/chest_ct_segmentation", body={"max_epochs": 1})
    server.finished("train")
    after = torch.load(model(environment), weights_only=True)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    changed.discard("_extra_state")  # the description, which names the new source beside the old ones
    assert set(describe(after)["sources"]) == {*describe(before)["sources"], "monailabel"}
    assert changed and all(name.startswith("heads.segmentation.") for name in changed)
    trained = server.mask("body", tmp_path / "b.nii.gz")
    assert (trained.get_fdata() != mask.get_fdata()).any()

    server.score()
    second = server.scores()
    assert second["body"] == first["body"]  # labelled, so not asked again
    assert second["air"] > 0 and second["air"] != first["air"]
