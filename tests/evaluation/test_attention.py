"""Grad-CAM of the classification: of the network itself, measured against the lungs, drawn for every class."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from some_tasks import CLASSES, open_workflow, some_network, some_tasks

from bundle.evaluation.attention import _Classifier, draw_attention
from bundle.data.batch import collate
from bundle.networks import freeze_encoder
from bundle.names import CLASS, CLASSIFICATION, IMAGE


def join(samples):
    return collate(samples, some_tasks(CLASSIFICATION))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return some_network([CLASSIFICATION], image_size=64).eval()


def make_slice():
    """A bright body with two dark lungs, which are 1024 of 64 x 64 pixels, nothing black."""
    image = np.full((1, 64, 64), 0.9, np.float32)
    image[:, 16:48, 8:24] = image[:, 16:48, 40:56] = 0.2
    return torch.from_numpy(image)


def test_the_classifier_is_the_network(network):
    image = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(_Classifier(network)(image), network(image)[CLASSIFICATION])


def test_heat_is_measured_against_the_lungs_and_drawn(network, tmp_path):
    samples = [{IMAGE: make_slice() + 0.05 * torch.rand(1, 64, 64), CLASS: label, "record": {}} for label in (0, 1, 1)]
    samples += [{IMAGE: make_slice(), "record": {}}, {IMAGE: make_slice(), CLASS: [1, 2], "record": {}}]  # of no known class
    found = draw_attention(network, [join(samples[:2]), join(samples[2:])], CLASSES, tmp_path / "cam.png", columns=2)
    assert found and all(values["slices"] <= {"other": 1, "COVID-19": 2}[name] for name, values in found.items())
    for values in found.values():
        assert values["lung"] == pytest.approx(1024 / 4096, abs=0.03) and 0 <= values["heat_in_lung"] <= 1
    with Image.open(tmp_path / "cam.png") as picture:
        assert picture.size[1] > picture.size[0], "three rows of two slices"
    with Image.open(tmp_path / "cam_mean.png") as means:
        assert means.size[0] > means.size[1], "a picture for each class that was measured"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "cam.png", tmp_path / "cam_mean.png"]


def test_a_frozen_encoder_has_the_heat_of_a_free_one(network, tmp_path):
    batches = [join([{IMAGE: make_slice() + 0.05 * torch.rand(1, 64, 64), CLASS: label, "record": {}} for label in (0, 1)])]
    weights = deepcopy(network.state_dict())
    free = draw_attention(network, batches, CLASSES, tmp_path / "free.png", columns=1)
    assert not network.training and not any(module.training for module in network.modules())
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name]), "batch statistics included"
    assert free == draw_attention(freeze_encoder(network), batches, CLASSES, tmp_path / "new/frozen.png", columns=1)
    assert (tmp_path / "new/frozen.png").is_file(), "its folder is made"


def test_heat_that_is_even_lies_in_the_lungs_by_their_share(network, tmp_path, monkeypatch):
    monkeypatch.setattr("bundle.evaluation.attention.GradCAM", lambda *_, **__: torch.ones_like)
    found = draw_attention(network, [join([{IMAGE: make_slice(), CLASS: 0, "record": {}}])], CLASSES, tmp_path / "cam.png")
    assert found["other"]["heat_in_lung"] == found["other"]["lung"] > 0.2


def test_without_a_class_there_is_nothing_to_draw(network, tmp_path):
    with pytest.raises(ValueError, match="Grad-CAM: found no slice with a class"):
        draw_attention(network, [join([{IMAGE: make_slice(), "record": {}}])], CLASSES, tmp_path / "cam.png")
    with pytest.raises(ValueError, match="tasks: found segmentation, expected classification among them for Grad-CAM"):
        draw_attention(some_network(["segmentation"], image_size=64), [], CLASSES, tmp_path / "cam.png")
    assert not list(tmp_path.iterdir())


def test_evaluation_looks_and_blackens(phantom_dir, save_smoke, tmp_path):
    save_smoke(tmp_path / "model.pt")
    configs, entries = ("train", "preset_smoke", "evaluate"), {"dataset_dir": phantom_dir, "output_dir": tmp_path, "bootstrap": 0}
    open_workflow(*configs, run_id="grad_cam", **entries).run()
    assert (tmp_path / "evaluation/grad_cam.png").exists() and (tmp_path / "evaluation/grad_cam_mean.png").exists()
    seen = {}
    for regions in ("lung", "rest"):
        workflow = open_workflow(*configs, regions=regions, **entries)
        seen[regions] = next(iter(workflow.parser.get_parsed_content("dataloader")))[IMAGE]
        workflow.run()
        assert (tmp_path / f"evaluation_{regions}/metrics.json").exists()
    assert not (tmp_path / "evaluation/metrics.json").exists()
    assert ((seen["lung"] > 0) & (seen["rest"] > 0)).sum() == 0
    assert min((image > 0).float().mean() for image in seen.values()) > 0.05
