"""Views answer as the network does, can be scripted, and take its weights as they are."""

import pytest
import torch
from some_tasks import some_network

from bundle.errors import UserError
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS
from bundle.networks import TaskView, TensorView


@pytest.mark.parametrize(
    ("task", "backbone"), [(CLASSIFICATION, "vgg13_bn"), (SEGMENTATION, "efficientnet_lite0"), (RECONSTRUCTION, "regnety_002")]
)
def test_a_view_answers_one_task_with_one_tensor_and_can_be_scripted(task, backbone):
    network, image = some_network(backbone=backbone).eval(), torch.rand(2, 1, 64, 64)
    view = TaskView(some_network(backbone=backbone), task).eval()
    view.load_state_dict(network.state_dict())  # strictly, with the heads it does not have
    with torch.no_grad():
        expected = network(image)[task]
        assert torch.equal(view(image), expected)
        assert torch.allclose(torch.jit.script(view)(image), expected, atol=1e-6)
    assert view.state_dict().keys() == {k for k in network.state_dict() if k.startswith(("encoder.", f"heads.{task}."))}


def test_views_refuse_weights_of_another_network():
    network = some_network()
    for view in (TaskView(network, SEGMENTATION), TensorView(network)):
        with pytest.raises(RuntimeError, match="Unexpected key.*decoder"):
            view.load_state_dict({**network.state_dict(), "decoder.weight": torch.zeros(1)})
    weights = {key: value for key, value in network.state_dict().items() if not key.startswith("heads.detection.fpn")}
    with pytest.raises(RuntimeError, match="Missing key.*heads.detection.fpn"):
        TensorView(network).load_state_dict(weights)


@pytest.mark.parametrize("task", [DETECTION, "segmentaton", RECONSTRUCTION])
def test_a_view_of_a_task_without_a_tensor_is_refused(task):
    with pytest.raises(UserError, match=f"export_task: found '{task}', expected one of classification, segmentation"):
        TaskView(some_network([CLASSIFICATION, SEGMENTATION, DETECTION]), task)


@pytest.mark.parametrize(
    ("tasks", "scripted"), [(TASKS, True), (TASKS, False), ([DETECTION], False), ([SEGMENTATION, CLASSIFICATION], True)]
)
def test_all_answers_as_tensors(tasks, scripted):
    torch.manual_seed(0)
    network = some_network().eval()
    view = TensorView(some_network(tasks)).eval()
    view.load_state_dict(network.state_dict())  # strictly, with the heads it does not have
    view = torch.jit.script(view) if scripted else view
    for image in (torch.rand(3, 1, 64, 64), torch.rand(1, 1, 32, 64)):  # any number and size of images
        with torch.no_grad():
            expected, answers = network(image), view(image)
        for task in [task for task in TASKS if task in tasks and task != DETECTION]:
            torch.testing.assert_close(answers.pop(0), expected[task], rtol=0, atol=1e-5)
        if DETECTION not in tasks:
            assert answers == []
            continue
        rows, *found = answers
        assert len(rows) > len(image), "otherwise little was compared"
        assert rows.tolist() == [row for row, d in enumerate(expected[DETECTION]) for _ in d["boxes"]]
        for name, tensor in zip(("boxes", "scores", "masks"), found, strict=True):
            torch.testing.assert_close(tensor, torch.cat([d[name] for d in expected[DETECTION]]), rtol=0, atol=1e-3)


def test_no_detection_is_no_row():
    network = some_network([DETECTION]).eval()
    network.heads[DETECTION].roi_heads.score_thresh = 2.0
    shapes = [tuple(tensor.shape) for tensor in torch.jit.script(TensorView(network).eval())(torch.rand(2, 1, 64, 64))]
    assert shapes == [(0,), (0, 4), (0,), (0, 1, 64, 64)]
