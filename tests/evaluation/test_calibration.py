"""Calibration finds the temperature that is there, builds it into the weights, and changes no predicted class."""

import json

import numpy as np
import pytest
import torch
from some_tasks import open_workflow, some_network, some_tasks

from bundle.evaluation.calibration import calibrate
from bundle.data.batch import collate
from bundle.files import write_checkpoint
from bundle.networks import load_weights
from bundle.networks.weights import describe
from bundle.names import CLASS, CLASSIFICATION, IMAGE, SEGMENTATION
from bundle.tasks import add_heads
from bundle.tasks.classification import calibration_error

TINY = {"backbone": "test_efficientnet_ln"}  # untrained, it tells images apart in evaluation mode, too


def join(samples):
    return collate(samples, some_tasks(CLASSIFICATION))


def make_batches(network, temperature, count=600):
    """Slices whose classes are drawn from the probabilities of the network at a temperature; two in five have none."""
    torch.manual_seed(0)
    images = torch.rand(count, 1, 32, 32) * torch.rand(count, 1, 1, 1)
    with torch.no_grad():
        probabilities = (network(images)[CLASSIFICATION] / temperature).softmax(1)
    labels = torch.multinomial(probabilities, 1)[:, 0]
    samples = [{IMAGE: image, CLASS: int(label), "record": {}} for image, label in zip(images, labels)]
    for sample in samples[::5]:
        del sample[CLASS]
    for sample in samples[1::5]:
        sample[CLASS] = [0, 1, 2]  # which says nothing
    return [join(samples[start : start + 50]) for start in range(0, count, 50)]


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = some_network([CLASSIFICATION], **TINY).eval()
    last = network.heads[CLASSIFICATION][-1]
    with torch.no_grad():
        last.weight *= 40  # classes that differ from image to image
        last.bias.zero_()
        logits = network(torch.rand(200, 1, 32, 32) * torch.rand(200, 1, 1, 1))[CLASSIFICATION]
        last.bias -= logits.mean(0)
    return network


@pytest.mark.parametrize("temperature", [0.5, 2.5])
def test_the_temperature_is_found_and_built_in(network, temperature, tmp_path):
    batches = make_batches(network, temperature)
    with torch.no_grad():
        before = network(batches[0][IMAGE])[CLASSIFICATION]
    earlier = some_network([CLASSIFICATION, SEGMENTATION], **TINY)  # with a head that this training did not have
    write_checkpoint(earlier.state_dict(), tmp_path / "earlier.pt")
    write_checkpoint(add_heads(network.state_dict(), tmp_path / "earlier.pt"), tmp_path / "model.pt")
    found = calibrate(network, batches, tmp_path / "model.pt", tmp_path / "calibrated.pt")
    assert found == pytest.approx(temperature, rel=0.15)
    loaded = some_network([CLASSIFICATION, SEGMENTATION], **TINY).eval()
    load_weights(loaded, tmp_path / "calibrated.pt", strict=True)
    with torch.no_grad():
        after = loaded(batches[0][IMAGE])[CLASSIFICATION]
    torch.testing.assert_close(after * found, before, rtol=1e-4, atol=1e-3)
    assert torch.equal(after.argmax(1), before.argmax(1))
    for name, value in earlier.heads[SEGMENTATION].state_dict().items():
        assert torch.equal(loaded.heads[SEGMENTATION].state_dict()[name], value)
    assert {path.name for path in tmp_path.iterdir()} == {"calibrated.pt", "earlier.pt", "model.pt"}


def test_what_cannot_be_calibrated_is_refused(network, tmp_path):
    path = tmp_path / "calibrated.pt"
    with pytest.raises(ValueError, match="tasks: found segmentation, expected classification among them"):
        calibrate(some_network([SEGMENTATION], **TINY), [], path, path)
    unlabelled = join([{IMAGE: torch.rand(1, 32, 32), "record": {}}])
    with pytest.raises(ValueError, match="split validation: found no record with a class"):
        calibrate(network, [unlabelled], path, path)
    with pytest.raises(ValueError, match="found no temperature for its 360 slices .*: the network has not learned; train on"):
        calibrate(network, make_batches(network, 1e6), path, path)
    with pytest.raises(ValueError, match="found no temperature .*: none is classified wrong; take more slices"):
        calibrate(network, make_batches(network, 1e-6), path, path)
    assert not path.exists()


def test_calibration_error_is_the_mean_distance_over_bins():
    rng = np.random.default_rng(0)
    confidence, weights = rng.uniform(0.3, 1, 300), rng.integers(0, 3, 300)
    correct = rng.random(300) < confidence**2
    expected = 0.0
    for low in np.arange(0, 1, 0.1):
        rows = (confidence >= low) & (confidence < low + 0.1)
        if weights[rows].sum():
            accuracy, mean = (np.average(values[rows], weights=weights[rows]) for values in (correct, confidence))
            expected += abs(accuracy - mean) * weights[rows].sum() / weights.sum()
    assert calibration_error(confidence, correct, weights) == pytest.approx(expected)
    assert calibration_error(np.ones(4), np.array([True, True, True, False]), np.ones(4)) == pytest.approx(0.25)


def test_a_finished_run_is_calibrated(phantom_dir, save_smoke, tmp_path):
    datalist = json.loads((phantom_dir / "datalist.json").read_text())
    by_class = [[record for record in datalist["validation"] if record.get("class") == label] for label in range(2)]
    datalist["validation"] = by_class[0][:2] + by_class[1][:1]
    (tmp_path / "datalist.json").write_text(json.dumps(datalist))
    entries = {"dataset_dir": phantom_dir, "datalist": tmp_path / "datalist.json", "output_dir": tmp_path}
    workflow = open_workflow("train", "preset_smoke", "evaluate", run_id="calibrate", **entries)
    network = save_smoke(tmp_path / "model.pt")
    with torch.no_grad():  # whatever the slice, class 0 is 4 times as likely as class 1: of the three slices it is 2 times
        network.heads[CLASSIFICATION][-1].weight.zero_()
        network.heads[CLASSIFICATION][-1].bias.copy_(torch.tensor([np.log(4), 0, -100]))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    workflow.run()
    before, after = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("model", "calibrated"))
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert changed == ["_extra_state", "heads.classification.6.bias"] and before.keys() == after.keys()
    assert describe(after) == {**describe(before), "temperature": pytest.approx(2, rel=1e-3)}
    assert (before[changed[1]] / after[changed[1]])[0] == pytest.approx(2, rel=1e-3)
