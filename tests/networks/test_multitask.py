import pytest
import torch
from some_tasks import some_network, some_tasks

import bundle
from bundle.errors import UserError
from bundle.names import CLASSIFICATION, DETECTION, EMBEDDING, RECONSTRUCTION, SEGMENTATION, TASKS
from bundle.networks import EnsembleNet, freeze_encoder
from bundle.networks.multitask import FORMAT, decode

SINGLE = "test_efficientnet_ln"  # without batch normalisation: an image does not touch the answer for another one
OTHER = {"in_channels": 3, "classes": list("abcde"), "segmentation_classes": ["a", "b"], "skips": False}
# [arguments, input shape, classes, channels of the segmentation]
CASES = [[{"tasks": tasks}, (2, 1, 64, 64), 3, 1] for tasks in (*([task] for task in TASKS), TASKS[:2], TASKS[2:])]
CASES += [[{"backbone": backbone}, (2, 1, 64, 64), 3, 1] for backbone in ("vgg13", "vgg13_bn", "efficientnet_lite0")]
CASES += [[OTHER, (2, 3, 64, 64), 5, 2], [{"decoder_channels": (16, 8)}, (2, 1, 64, 128), 3, 1]]


def targets(count=2):
    boxes = torch.tensor([[10.0, 12, 30, 28]])
    return [{"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}] * count


@pytest.mark.parametrize(("arguments", "shape", "classes", "channels"), CASES)
def test_every_task_is_answered_in_one_pass(arguments, shape, classes, channels):
    network, image, tasks = some_network(**arguments), torch.rand(shape), set(arguments.get("tasks", TASKS))
    assert {name.split(".")[1] for name in network.state_dict() if name.startswith("heads.")} == tasks
    trained = network.train()(image, {DETECTION: targets()})
    with torch.no_grad():
        answered = network.eval()(image)
    assert trained.keys() == tasks and answered.keys() == {*tasks, EMBEDDING}
    assert tuple(answered[EMBEDDING].shape) == (shape[0], 4 * network.encoder.channels[-1])
    expected = {CLASSIFICATION: (2, classes), SEGMENTATION: (2, channels, *shape[2:]), RECONSTRUCTION: shape}
    for output in (trained, answered):
        assert all(tuple(output[task].shape) == expected[task] for task in tasks - {DETECTION})
    if DETECTION in tasks:
        assert sum(trained[DETECTION].values()).isfinite()
        assert len(answered[DETECTION]) == shape[0]
        assert all(tuple(found["masks"].shape) == (len(found["boxes"]), 1, *shape[2:]) for found in answered[DETECTION])


def test_the_embedding_is_the_mean_of_the_deepest_features_in_each_quarter():
    network, image = some_network([CLASSIFICATION]).eval(), torch.rand(2, 1, 64, 128)
    deepest = network.encoder(image)[-1]
    quarters = [deepest[:, :, i : i + 1, j : j + 2].mean((2, 3)) for i in (0, 1) for j in (0, 2)]
    torch.testing.assert_close(network(image)[EMBEDDING], torch.stack(quarters, 2).flatten(1))


def test_a_state_dict_describes_the_network_and_changes_hands_by_torch_alone(tmp_path):
    own = {"classes": ["healthy", "ill"], "window": (-1000, 300), "cropping": "body"}
    network = some_network(**own, sources=["a"], temperature=1.5)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    said = decode(saved["_extra_state"])
    assert said == network.description and (said["format"], said["version"]) == (FORMAT, bundle.__version__)
    expected = {"tasks": list(TASKS), **own, "window": [-1000, 300], "image_size": 64}
    assert {name: said[name] for name in expected} == expected
    assert said["detection"]["fpn_channels"] == 8 and said["detection"]["anchor_sizes"][0] == [4, 7], "defaults too"
    other = some_network(**own)
    other.load_state_dict({name: value / 1.0 for name, value in saved.items()})  # federated learning makes numbers of bytes
    assert other.description == said
    with pytest.raises(UserError, match=r"classes: found weights for \['healthy', 'ill'\], expected weights for \['ill', "):
        some_network(**{**own, "classes": ["ill", "healthy"]}).load_state_dict(saved)
    some_network(**own).load_state_dict({name: saved[name] for name in saved if name != "_extra_state"})


def scalar(output, task):
    return sum(output[task].values()) if task == DETECTION else output[task].square().sum()


def reached(module):
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize("backbone", ["vgg13", "efficientnet_lite0"])
def test_the_loss_of_a_task_reaches_the_encoder_and_its_own_head_alone(backbone):
    torch.manual_seed(0)
    network = some_network(backbone=backbone, dropout=0.0)
    for task in TASKS:
        network.zero_grad()
        scalar(network(torch.rand(2, 1, 64, 64), {DETECTION: targets()}), task).backward()
        assert {name for name, head in network.heads.items() if reached(head)} == {task}
        first = next(network.encoder.parameters())
        assert first.grad is not None and first.grad.any(), "the gradient reaches the first convolution"


def test_images_that_are_not_annotated_leave_a_head_and_its_gradient_alone():
    torch.manual_seed(0)
    network, image = some_network(backbone=SINGLE), torch.rand(3, 1, 64, 64, requires_grad=True)
    rows = {CLASSIFICATION: [0, 0, 0], SEGMENTATION: [1, 0, 1], RECONSTRUCTION: [1, 1, 1], DETECTION: [0, 1, 0]}
    annotated = {task: torch.tensor(which, dtype=torch.bool) for task, which in rows.items()}
    output = network(image, {DETECTION: [None, *targets(1), None]}, annotated)
    assert output.keys() == {SEGMENTATION, RECONSTRUCTION, DETECTION}
    assert output[SEGMENTATION][[0, 2]].any() and not output[SEGMENTATION][1].any()
    for task in (SEGMENTATION, DETECTION):
        (gradient,) = torch.autograd.grad(scalar(output, task), image, retain_graph=True)
        assert gradient.flatten(1).any(1).int().tolist() == rows[task]
    alone = some_network(backbone=SINGLE)
    alone.load_state_dict(network.state_dict())
    nothing = alone(image[[0, 2]], {DETECTION: [None, None]})
    torch.testing.assert_close(nothing[SEGMENTATION], output[SEGMENTATION][[0, 2]])
    assert nothing[DETECTION] == {}
    scalar(nothing, CLASSIFICATION).backward()
    assert not reached(alone.heads[DETECTION]), "a batch without boxes gives the detection no gradient"


def test_evaluation_answers_the_annotated_images_as_it_answers_all():
    torch.manual_seed(0)
    network, image = some_network().eval(), torch.rand(3, 1, 64, 64)
    some = {task: torch.tensor([False, True, True]) for task in TASKS}
    with torch.no_grad():
        whole, part = network(image), network(image, annotated=some)
    torch.testing.assert_close(part[SEGMENTATION][1:], whole[SEGMENTATION][1:])
    assert not part[SEGMENTATION][0].any() and part[DETECTION][0] is None
    for a, b in zip(part[DETECTION][1:], whole[DETECTION][1:]):
        torch.testing.assert_close(a["boxes"], b["boxes"])


# [arguments, words of the message]
WRONG_CASES = [
    [{"image_size": 100}, r"image: found 100 x 100 pixels, expected multiples of 32; use 96 x 96 \(image_size\)"],
    [{"image_size": 0}, r"image: found 0 x 0 pixels, expected multiples of 32; use 32 x 32"],
    [{"decoder_channels": [8, 0]}, "decoder_channels: found 2 .*each above 0"],
    [{"detection": {"fpn_chanels": 8}}, "detection: found fpn_chanels, expected some of fpn_channels, box_features, "],
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_CASES)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        some_network(**arguments)


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
    with pytest.raises(UserError, match=message):
        some_network()(torch.rand(shape))


def test_a_frozen_encoder_keeps_its_weights_and_its_statistics():
    network = freeze_encoder(some_network())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    annotated = {task: torch.full((2,), task == SEGMENTATION) for task in TASKS}
    output = network.train()(torch.rand(2, 1, 64, 64), targets={DETECTION: [None, None]}, annotated=annotated)
    output[SEGMENTATION].square().sum().backward()
    optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("heads.segmentation.") for name in changed)


@torch.no_grad()
def test_answers_are_means_of_probabilities():
    members, image = [some_network(), some_network()], torch.rand(2, 1, 64, 64)
    found = EnsembleNet(members)(image)
    answers = [member(image) for member in members]
    assert found.keys() == set(TASKS)
    activations = {CLASSIFICATION: lambda x: x.softmax(1), SEGMENTATION: torch.sigmoid, RECONSTRUCTION: lambda x: x}
    for task, activate in activations.items():
        torch.testing.assert_close(activate(found[task]), sum(activate(answer[task]) for answer in answers) / 2)


@torch.no_grad()
def test_every_task_is_answered_by_those_that_have_it():
    networks = [some_network([CLASSIFICATION, DETECTION]), some_network([SEGMENTATION])]
    image, annotated = torch.rand(2, 1, 64, 64), {task: torch.tensor([True, False]) for task in TASKS}
    found = EnsembleNet(networks)(image, annotated=annotated)
    assert found.keys() == {CLASSIFICATION, SEGMENTATION, DETECTION}
    expected = networks[0](image, annotated=annotated)
    torch.testing.assert_close(found[CLASSIFICATION][:1], expected[CLASSIFICATION][:1].log_softmax(1))
    assert found[DETECTION][1] is None and expected[DETECTION][1] is None
    for name, values in found[DETECTION][0].items():
        assert torch.equal(values, expected[DETECTION][0][name]), "one detector alone is not changed"


def test_of_overlapping_detections_the_surest_is_kept():
    def found(boxes, scores):
        boxes, labels = torch.tensor(boxes, dtype=torch.float32), torch.ones(len(boxes), dtype=torch.int64)
        return {"boxes": boxes, "labels": labels, "scores": torch.tensor(scores), "masks": torch.zeros(len(boxes), 1, 8, 8)}

    (detection,) = some_tasks(DETECTION)
    one, two = found([[0, 0, 4, 4]], [0.6]), found([[0, 0, 4, 5], [5, 5, 8, 8]], [0.7, 0.2])
    pooled, nothing = detection.join_members([[one, None], [two, None]])
    assert nothing is None and pooled["masks"].shape == (2, 1, 8, 8)
    assert pooled["boxes"].tolist() == [[0, 0, 4, 5], [5, 5, 8, 8]]
    assert pooled["scores"].tolist() == pytest.approx([0.7, 0.2])


def test_an_empty_ensemble_is_refused():
    with pytest.raises(UserError, match="members: found none, expected one or more networks"):
        EnsembleNet([])
