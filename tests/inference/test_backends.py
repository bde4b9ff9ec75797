"""The other backends answer as torch does, from the weights of the moment, and say in one line what they cannot do."""

import importlib.util
import os
import signal

import pytest
import torch
from torch import nn
from some_tasks import some_network

from bundle.inference import backends
from bundle.inference.backends import Exported, ExportedNet, accelerate, one_by_one
from bundle.networks import MultiTaskNet
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS

TINY = {
    "tasks": TASKS,
    "image_size": 64,
    "decoder_channels": (16, 8, 8, 8, 8),
    "detection": {"fpn_channels": 8, "box_features": 16, "mask_channels": (8,), "score_threshold": 0},
}
OTHER = {"backbone": "regnety_002", "in_channels": 3, "segmentation_classes": ["a", "b"], "skips": False}
OTHER["decoder_channels"] = (16, 8)  # the rest by sub-pixel convolution
# [backend, arguments of the network, shape of the images]
CASES = [
    ["onnxruntime", {}, (3, 1, 64, 64)],
    ["openvino", {}, (3, 1, 64, 64)],
    ["openvino", OTHER, (2, 3, 64, 96)],
    ["onnxruntime", {"tasks": [CLASSIFICATION, RECONSTRUCTION]}, (1, 1, 64, 64)],
    ["openvino", {"tasks": [DETECTION]}, (1, 1, 64, 64)],
]


def make_network(**arguments) -> MultiTaskNet:
    """Random network whose batch statistics are no identity, and whose detections have scores far apart."""
    torch.manual_seed(0)
    network = some_network(**{**TINY, **arguments}).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    if DETECTION in network.heads:
        network.heads[DETECTION].roi_heads.box_predictor.cls_score.weight.data *= 30
    return network


def check_equal(answer: dict, expected: dict) -> None:
    assert answer.keys() == expected.keys()
    for key in expected.keys() - {DETECTION}:
        torch.testing.assert_close(answer[key], expected[key], rtol=0, atol=1e-4)
    if DETECTION in expected:
        assert len(answer[DETECTION]) == len(expected[DETECTION])
        for found, wanted in zip(answer[DETECTION], expected[DETECTION]):
            for name in ("boxes", "labels", "scores", "masks"):
                torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize(("backend", "arguments", "shape"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_answers_are_those_of_torch(backend, arguments, shape):
    network = make_network(**arguments)
    exported = accelerate(network, backend)
    # As a config does it: the weights come after the network was made, before its first answer.
    network.load_state_dict({k: v * 1.01 if v.is_floating_point() else v for k, v in network.state_dict().items()})
    image = torch.rand(shape)
    with torch.no_grad():
        expected = network(image)
    check_equal(exported(image), expected)
    if DETECTION in expected:
        assert sum(len(detection["boxes"]) for detection in expected[DETECTION]) > 0, "otherwise nothing was compared"
        exported.detectors[DETECTION].roi_heads.score_thresh = 2.0
        assert [len(detection["boxes"]) for detection in exported(image)[DETECTION]] == [0] * len(image)


def test_images_of_another_size_are_exported_anew_and_wrong_ones_refused():
    network = make_network(tasks=[SEGMENTATION])
    exported = ExportedNet(network, "onnxruntime")
    for size in (64, 32):
        image = torch.rand(2, 1, size, size)
        with torch.no_grad():
            check_equal(exported(image), network(image))
    with pytest.raises(ValueError, match="image: found 60 x 64 pixels, expected multiples of 32"):
        exported(torch.rand(1, 1, 60, 64))


def test_openvino_keeps_float32():
    layer = nn.Conv2d(64, 64, 3, padding=1)
    image = torch.rand(2, 64, 32, 32)
    with torch.no_grad():
        exact, bf16 = layer(image), layer.to(torch.bfloat16)(image.to(torch.bfloat16)).float()
        rounding = (bf16 - exact).abs().max()
        layer.float()
        found = Exported(layer, image, "openvino")(image)
        exact = layer(image)  # its weights went through bf16
    assert (found - exact).abs().max() < rounding / 100


def test_signals_arrive_after_openvino_models_were_freed():
    """A child, as the fault is a SIGSEGV: OpenVINO's stack for signals had been freed, and Python's handlers run on it."""
    models = [Exported(nn.Linear(3, 2), torch.zeros(2, 3), "openvino") for _ in range(2)]
    while models:
        models.pop(0)
    if not (child := os.fork()):
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.raise_signal(signal.SIGUSR1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_number_of_rows_is_free():
    layer = nn.Linear(3, 2)
    exported = Exported(layer, torch.zeros(2, 3), "onnxruntime")
    for rows in (0, 1, 5):
        x = torch.rand(rows, 3)
        torch.testing.assert_close(exported(x), layer(x).detach())


def test_one_by_one_joins_the_answers_of_a_batch():
    network, image = make_network(), torch.rand(3, 1, 64, 64)
    with torch.no_grad():
        check_equal(one_by_one(network, image), network(image))


def test_torch_is_the_network_itself():
    network = make_network(tasks=[CLASSIFICATION])
    assert accelerate(network, "torch", amp=True) is network


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_refusals_are_one_line(backend, monkeypatch):
    network = make_network(tasks=[CLASSIFICATION])
    with pytest.raises(ValueError, match=f"amp: found true with backend {backend}, expected false"):
        accelerate(network, backend, amp=True)
    with pytest.raises(ValueError, match=f"backend: found {backend} with device meta, expected device cpu"):
        accelerate(make_network(tasks=[CLASSIFICATION]).to("meta"), backend)
    with pytest.raises(ValueError, match="backend: found 'tensorrt', expected one of torch, onnxruntime, openvino"):
        accelerate(network, "tensorrt")
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == backend else importlib.util.find_spec(name))
    with pytest.raises(ValueError, match=rf"{backend} needs {backend}, not .*pip install 'chest-ct-multitask\[export\]'"):
        accelerate(network, backend)
