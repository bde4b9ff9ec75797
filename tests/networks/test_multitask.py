from itertools import chain, combinations

import pytest
import torch

import bundle
from some_tasks import some_network

from bundle.errors import UserError
from bundle.networks import freeze_encoder
from bundle.networks.multitask import FORMAT, decode
from bundle.names import CLASSIFICATION, DETECTION, EMBEDDING, RECONSTRUCTION, SEGMENTATION, TASKS

TINY = {
    "backbone": "test_efficientnet",
    "image_size": 64,
    "decoder_channels": (16, 8, 8, 8, 8),
    "detection": {
        "fpn_channels": 8,
        "box_features": 16,
        "mask_channels": (8,),
        "score_threshold": 0.0,
        "detections_per_image": 5,
    },
}
SUBSETS = list(chain.from_iterable(combinations(TASKS, count) for count in range(1, 5)))
BACKBONES = ["vgg13", "vgg13_bn", "resnet50", "densenet121", "efficientnet_b0", "regnety_002", "mobilenetv3_small_100"]

SHAPES = {CLASSIFICATION: (2, 3), SEGMENTATION: (2, 1, 64, 64), RECONSTRUCTION: (2, 1, 64, 64)}
# [arguments, input shape, expected shapes without detection]
CASES = [[{**TINY, "tasks": tasks}, (2, 1, 64, 64), SHAPES] for tasks in SUBSETS]
CASES += [
    [{**TINY, "tasks": TASKS, "backbone": name}, (2, 1, 64, 64), SHAPES]
    for name in BACKBONES
]
CASES += [
    [
        {**TINY, "tasks": TASKS, "in_channels": 3, "classes": list("abcde"), "segmentation_classes": ["a", "b"], "skips": False},
        (2, 3, 64, 64),
        {CLASSIFICATION: (2, 5), SEGMENTATION: (2, 2, 64, 64), RECONSTRUCTION: (2, 3, 64, 64)},
    ],
    [
        {**TINY, "tasks": dict.fromkeys(TASKS, 0.5), "decoder_channels": (16, 8)},
        (2, 1, 64, 128),
        {CLASSIFICATION: (2, 3), SEGMENTATION: (2, 1, 64, 128), RECONSTRUCTION: (2, 1, 64, 128)},
    ],
]


def targets(boxes=((10.0, 12.0, 30.0, 28.0),), count=2):
    return [{"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.ones(len(boxes), dtype=torch.int64)}] * count


def case_name(value):
    if isinstance(value, dict) and "tasks" in value:
        return f"{value['backbone']}-{'+'.join(task[:3] for task in value['tasks'])}"
    return ""


@pytest.mark.parametrize(("arguments", "shape", "expected"), CASES, ids=case_name)
def test_every_task_is_answered_in_one_pass(arguments, shape, expected):
    network, image = some_network(**arguments), torch.rand(shape)
    trained = network.train()(image, {DETECTION: targets()})
    with torch.no_grad():
        answered = network.eval()(image)
    assert set(trained) == set(network.heads) == set(arguments["tasks"])
    assert set(answered) == {*trained, EMBEDDING}
    assert tuple(answered[EMBEDDING].shape) == (shape[0], 4 * network.encoder.channels[-1])
    for output in (trained, answered):
        dense = {task: tuple(output[task].shape) for task in trained if task != DETECTION}
        assert dense == {task: expected[task] for task in dense}
    if DETECTION in arguments["tasks"]:
        assert sum(trained[DETECTION].values()).isfinite()
        for found in answered[DETECTION]:
            assert tuple(found["masks"].shape) == (len(found["boxes"]), 1, *shape[2:])
        assert len(answered[DETECTION]) == shape[0]


def test_the_embedding_is_the_mean_of_the_deepest_features_in_each_quarter():
    network, image = some_network(**TINY, tasks=(CLASSIFICATION,)).eval(), torch.rand(2, 1, 64, 128)
    deepest = network.encoder(image)[-1]
    quarters = [deepest[:, :, i : i + 1, j : j + 2].mean((2, 3)) for i in (0, 1) for j in (0, 2)]
    torch.testing.assert_close(network(image)[EMBEDDING], torch.stack(quarters, 2).flatten(1))


@pytest.mark.parametrize("tasks", SUBSETS, ids="+".join)
def test_a_task_that_is_absent_has_no_parameters(tasks):
    names = {name.split(".")[1] for name in some_network(**TINY, tasks=tasks).state_dict() if name.startswith("heads.")}
    assert names == set(tasks)


def test_a_state_dict_describes_the_network_and_changes_hands_by_torch_alone(tmp_path):
    arguments = {**TINY, "tasks": TASKS, "classes": ["healthy", "ill"], "window": (-1000, 300), "cropping": "body"}
    network = some_network(**arguments, sources=["a"], temperature=1.5)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    said = decode(saved["_extra_state"])
    assert said == network.description and (said["format"], said["version"]) == (FORMAT, bundle.__version__)
    assert {name: said[name] for name in ("tasks", "classes", "window", "cropping", "image_size")} == {
        "tasks": list(TASKS), "classes": ["healthy", "ill"], "window": [-1000, 300], "cropping": "body", "image_size": 64
    }
    assert said["detection"]["fpn_channels"] == 8 and said["detection"]["anchor_sizes"][0] == [4, 7], "defaults too"
    other = some_network(**arguments)
    other.load_state_dict({name: value / 1.0 for name, value in saved.items()})  # federated learning makes numbers of bytes
    assert other.description == said
    with pytest.raises(UserError, match=r"classes: found weights for \['healthy', 'ill'\], expected weights for \['ill', 'healthy"):
        some_network(**{**arguments, "classes": ["ill", "healthy"]}).load_state_dict(saved)
    some_network(**arguments).load_state_dict({name: saved[name] for name in saved if name != "_extra_state"})


def scalar(output, task):
    return sum(output[task].values()) if task == DETECTION else output[task].square().sum()


def reached(module):
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("backbone", ["vgg13", "efficientnet_lite0"])
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_of_a_task_reaches_the_encoder_and_its_own_head_alone(task, backbone):
    torch.manual_seed(0)
    arguments = {**TINY, "backbone": backbone}
    network = some_network(**arguments, tasks=TASKS, dropout=0.0)
    scalar(network(torch.rand(2, 1, 64, 64), {DETECTION: targets()}), task).backward()
    assert {name for name, head in network.heads.items() if reached(head)} == {task}
    first = next(network.encoder.parameters())
    assert first.grad is not None and first.grad.any(), "the gradient reaches the first convolution"


def test_images_that_are_not_annotated_leave_a_head_and_its_gradient_alone():
    torch.manual_seed(0)
    network, image = some_network(**{**TINY, "backbone": "test_efficientnet_ln"}, tasks=TASKS), torch.rand(3, 1, 64, 64, requires_grad=True)
    annotated = {
        CLASSIFICATION: torch.tensor([False, False, False]),
        SEGMENTATION: torch.tensor([True, False, True]),
        RECONSTRUCTION: torch.ones(3, dtype=torch.bool),
        DETECTION: torch.tensor([False, True, False]),
    }
    output = network(image, {DETECTION: [None, *targets(count=1), None]}, annotated)
    assert output.keys() == {SEGMENTATION, RECONSTRUCTION, DETECTION}
    assert output[SEGMENTATION][[0, 2]].any() and not output[SEGMENTATION][1].any()
    (gradient,) = torch.autograd.grad(scalar(output, SEGMENTATION), image, retain_graph=True)
    assert gradient.flatten(1).any(1).tolist() == [True, False, True]
    (gradient,) = torch.autograd.grad(scalar(output, DETECTION), image)
    assert gradient.flatten(1).any(1).tolist() == [False, True, False]
    alone = some_network(**{**TINY, "backbone": "test_efficientnet_ln"}, tasks=TASKS)
    alone.load_state_dict(network.state_dict())
    torch.testing.assert_close(alone(image[[0, 2]], {DETECTION: [None, None]})[SEGMENTATION], output[SEGMENTATION][[0, 2]])


def test_a_batch_without_boxes_gives_the_detection_head_no_gradient():
    network = some_network(**TINY, tasks=TASKS)
    output = network(torch.rand(2, 1, 64, 64), {DETECTION: [None, None]})
    assert output[DETECTION] == {}
    scalar(output, CLASSIFICATION).backward()
    assert not reached(network.heads[DETECTION])


def test_evaluation_answers_the_annotated_images_as_it_answers_all():
    torch.manual_seed(0)
    network, image = some_network(**TINY, tasks=TASKS).eval(), torch.rand(3, 1, 64, 64)
    some = {task: torch.tensor([False, True, True]) for task in TASKS}
    with torch.no_grad():
        whole, part = network(image), network(image, annotated=some)
    torch.testing.assert_close(part[SEGMENTATION][1:], whole[SEGMENTATION][1:])
    assert not part[SEGMENTATION][0].any()
    assert part[DETECTION][0] is None
    for a, b in zip(part[DETECTION][1:], whole[DETECTION][1:]):
        torch.testing.assert_close(a["boxes"], b["boxes"])


# [arguments, words of the message]
WRONG_CASES = [
    [{"tasks": []}, "tasks: found no task, expected one or more of classification, segmentation"],
    [{"tasks": ["segmentaton"]}, "tasks: found 'segmentaton', expected one or more of"],
    [{"image_size": 100}, r"image: found 100 x 100 pixels, expected multiples of 32; use 96 x 96 \(image_size\)"],
    [{"image_size": 0}, r"image: found 0 x 0 pixels, expected multiples of 32; use 32 x 32"],
    [{"backbone": "vgg31"}, "backbone: found 'vgg31', expected .*near matches: .*vgg13"],
    [{"decoder_channels": []}, "decoder_channels: found 0"],
    [{"decoder_channels": [8] * 6}, "decoder_channels: found 6"],
    [{"decoder_channels": [8, 0]}, "decoder_channels: found 2 .*each above 0"],
    [{"detection": {"fpn_chanels": 8}}, "detection: found fpn_chanels, expected some of fpn_channels, box_features, "],
    [{"detection": {"anchor_sizes": [[4]]}}, "detection.anchor_sizes: found 1 levels, expected 4"],
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_CASES)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        some_network(**{**TINY, "tasks": TASKS, **arguments})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 60, 64), r"image: found 60 x 64 pixels, expected multiples of 32; use 64 x 64"),
        ((2, 1, 64, 512 + 8), r"use 64 x 512"),
        ((2, 3, 64, 64), r"image: found shape \(2, 3, 64, 64\), expected \(batch, 1, rows, columns\)"),
        ((1, 64, 64), r"image: found shape \(1, 64, 64\), expected"),
    ],
)
def test_an_image_that_does_not_fit_is_refused_with_the_size_to_use(shape, message):
    with pytest.raises(ValueError, match=message):
        some_network(**TINY, tasks=TASKS)(torch.rand(shape))


def test_a_frozen_encoder_keeps_its_weights_and_its_statistics():
    network = freeze_encoder(some_network(TASKS, **TINY))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network.train()
    segmentation = torch.tensor([True] * 2), {task: torch.zeros(2, dtype=torch.bool) for task in network.heads}
    annotated = {**segmentation[1], "segmentation": segmentation[0]}
    output = network(torch.rand(2, 1, 64, 64), targets={DETECTION: [None, None]}, annotated=annotated)
    output["segmentation"].square().sum().backward()
    optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("heads.segmentation.") for name in changed)
