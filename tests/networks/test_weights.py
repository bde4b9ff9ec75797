"""A checkpoint says what its network is; what a user sets besides is held against it."""

import logging

import pytest
import torch
from some_tasks import CLASSES, some_network
from torchvision.models.vgg import cfgs, make_layers

from bundle.errors import UserError
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS
from bundle.networks import load_weights
from bundle.networks.weights import describe, redescribe, shipped_checkpoint
from bundle.tasks import DEFAULTS, add_heads, build_network, open_network, read_model, trained_tasks

OWN = {"classes": ["healthy", "bacterial pneumonia", "COVID-19"], "window": [-1000, 300], "sources": ["ours"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Weights of classification and reconstruction, and the network that has them."""
    path, network = tmp_path_factory.mktemp("saved") / "model.pt", some_network([CLASSIFICATION, RECONSTRUCTION])
    torch.save(network.state_dict(), path)
    return path, network


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Weights of a network with names, window and data of its own."""
    path, network = tmp_path_factory.mktemp("own") / "model.pt", some_network(**OWN, temperature=2.0)
    torch.save(network.state_dict(), path)
    return path, network


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_the_parts_that_both_have_are_loaded(saved, wrapped, tmp_path):
    path, source = saved
    if wrapped:  # last.pt of a run
        path = tmp_path / "last.pt"
        torch.save({"network": source.state_dict(), "history": []}, path)
    network = some_network([SEGMENTATION, RECONSTRUCTION])
    fresh = {key: value.clone() for key, value in network.heads[SEGMENTATION].state_dict().items()}
    assert load_weights(network, path) == ["encoder", RECONSTRUCTION]
    assert equal(network.encoder, source.encoder) and equal(network.heads[RECONSTRUCTION], source.heads[RECONSTRUCTION])
    assert all(torch.equal(value, fresh[key]) for key, value in network.heads[SEGMENTATION].state_dict().items())


def test_strict_loading_needs_every_head(saved):
    path, source = saved
    network = some_network([CLASSIFICATION, RECONSTRUCTION])
    assert load_weights(network, path, strict=True) == ["encoder", CLASSIFICATION, RECONSTRUCTION]
    assert equal(network, source)
    with pytest.raises(UserError, match=r"model.pt: found heads.segmentation\.\S+ absent, expected \(.*tasks"):
        load_weights(some_network([SEGMENTATION]), path, strict=True)


@pytest.mark.parametrize(
    ("task", "change"),
    [
        (CLASSIFICATION, {"classes": ["a", "b"]}),
        (CLASSIFICATION, {"classes": ["COVID-19", "other", "lung cancer"]}),
        (SEGMENTATION, {"segmentation_classes": ["a", "b", "c"]}),
        (SEGMENTATION, {"segmentation_classes": ["consolidation"]}),
    ],
)
def test_a_head_of_other_classes_is_loaded_but_for_its_output_layer(tmp_path, task, change):
    source = some_network([task, RECONSTRUCTION])
    torch.save(source.state_dict(), tmp_path / "model.pt")
    network = some_network([task, RECONSTRUCTION], **change)
    output = list(network.heads[task].state_dict())[-2:]
    fresh = {key: network.heads[task].state_dict()[key].clone() for key in output}
    with pytest.raises(UserError, match=f"{next(iter(change))}: found weights for "):
        load_weights(network, tmp_path / "model.pt", strict=True)
    assert load_weights(network, tmp_path / "model.pt") == ["encoder", f"{task} but its output layer", RECONSTRUCTION]
    before, after = source.heads[task].state_dict(), network.heads[task].state_dict()
    assert all(torch.equal(after[key], fresh.get(key, before[key])) for key in before)
    assert equal(network.encoder, source.encoder) and equal(network.heads[RECONSTRUCTION], source.heads[RECONSTRUCTION])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "test_byobnet"}, r"found encoder\.model\.stem\.conv\.weight absent, expected \(24, 1, 3, 3\); it was"),
        ({"decoder_channels": (16, 8, 8, 8, 4)}, r"found heads.reconstruction\.\S+ \(8, .*\), expected \(4, "),
    ],
)
def test_weights_of_another_architecture_are_refused_and_nothing_is_changed(saved, change, message):
    network = some_network(**change)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_weights(network, saved[0])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model.pt: cannot be read as a checkpoint"),
        (b"no checkpoint", "model.pt: cannot be read as a checkpoint"),
        (b"PK\x03\x04 broken zip", "model.pt: cannot be read as a checkpoint"),
        ({"a": torch.ones(1)}, r"model.pt: found encoder\.\S+ absent, expected"),
        ([1, 2, 3], "model.pt: found something else than tensors with names, expected a state_dict"),
        ({1: torch.ones(1)}, "model.pt: found something else than tensors with names"),
        ({"network": {"a": 3}}, "model.pt: found something else than tensors with names"),
        (None, "model.pt: no such checkpoint; train first, or name another one"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "model.pt").write_bytes(content)
    elif content:
        torch.save(content, tmp_path / "model.pt")
    with pytest.raises(UserError, match=message) as caught:
        load_weights(some_network([CLASSIFICATION]), tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


def test_the_network_of_a_checkpoint_is_made_from_it_alone(own):
    path, network = own
    opened = open_network(path)
    assert equal(opened, network) and opened.description == network.description and not opened.training
    model = read_model(path, dict.fromkeys(DEFAULTS))
    assert {name: model[name] for name in OWN} == OWN and list(model["tasks"]) == list(TASKS)
    assert build_network(read_model(path, {"tasks": [SEGMENTATION]})).description["tasks"] == [SEGMENTATION]


# [knobs, words of the refusal in prediction, None where they are taken]; in training only the backbone must agree
KNOBS = [
    [{"classes": OWN["classes"], "window": (-1000.0, 300)}, None],
    [{"classes": CLASSES}, r"classes: found \['other'.*, expected \['healthy'.*leave classes out"],
    [{"window": [-1350, 150]}, r"window: found \[-1350, 150\], expected \[-1000, 300\], as .*model.pt was trained with"],
    [{"image_size": 128}, "image_size: found 128, expected 64"],
    [{"cropping": "body"}, "cropping: found 'body', expected None"],
    [{"decoder_channels": [8]}, r"decoder_channels: found \[8\], expected \[16, 8, 8, 8, 8\]"],
    [{"backbone": "resnet18"}, "backbone: found 'resnet18', expected 'test_efficientnet'"],
    [{"detection": {"fpn_channels": 16}}, "detection::fpn_channels: found 16, expected 8"],
    [{"detection": {"score_threshold": 0.3}}, None],
    [{"dropout": 0.5}, None],
]


@pytest.mark.parametrize(("knobs", "words"), KNOBS)
def test_a_knob_that_contradicts_the_checkpoint_is_refused_unless_it_is_trained_further(own, knobs, words):
    for training in (False, True):
        if words and ("backbone" in knobs or not training):
            with pytest.raises(UserError, match=words):
                read_model(own[0], knobs, training=training)
        else:
            said = some_network(**read_model(own[0], knobs, training=training)).description
            for name, value in knobs.items():
                expected = {**own[1].description["detection"], **value} if name == "detection" else value
                assert said[name] == (list(expected) if isinstance(expected, tuple) else expected)


def test_a_task_that_the_checkpoint_was_not_trained_for_is_refused_in_prediction(saved):
    path, _ = saved
    with pytest.raises(UserError, match="tasks: found segmentation, expected some of those .* for: classification, reconstr"):
        read_model(path, {"tasks": {SEGMENTATION: 1.0, RECONSTRUCTION: 1.0}})
    assert read_model(path, {"tasks": {SEGMENTATION: 0.5}}, training=True)["tasks"] == {SEGMENTATION: 0.5}


def test_fresh_weights_are_those_of_the_defaults_and_the_knobs():
    model = read_model(None, {"window": None, "image_size": 64, "tasks": {RECONSTRUCTION: 1.0}}, training=True)
    assert (model["window"], model["image_size"], model["backbone"]) == ([-1000, 300], 64, "vgg13_bn")


def test_weights_without_a_description_are_opened_with_one_warning_that_says_what_is_assumed(tmp_path, caplog):
    network = some_network([SEGMENTATION], backbone="regnety_002", decoder_channels=[128, 64, 32, 16])
    weights = network.state_dict()
    del weights["_extra_state"]
    torch.save(weights, tmp_path / "old.pt")
    with caplog.at_level(logging.WARNING):
        opened = open_network(tmp_path / "old.pt", image_size=64)
    assert equal(opened.encoder, network.encoder) and list(opened.heads) == [SEGMENTATION]
    (record,) = caplog.records
    assert "old.pt: does not describe its network; assumed classes ['other', 'COVID-19', 'lung cancer']" in record.message
    assert "backbone 'regnety_002', image_size 64, window [-1350, 150]" in record.message


@pytest.mark.parametrize(("backbone", "described"), [("vgg13", True), ("vgg13_bn", False)])
def test_a_vgg_of_version_0_2_answers_as_it_did(backbone, described, tmp_path, caplog):
    """Its encoder was torchvision's, whose maps were taken before each pooling and after the last."""
    network = some_network([CLASSIFICATION], backbone=backbone).eval()
    theirs = make_layers(cfgs["B"], batch_norm=backbone == "vgg13_bn").eval()
    theirs[0] = torch.nn.Conv2d(1, 64, 3, padding=1)
    weights = {name: value for name, value in network.state_dict().items() if not name.startswith("encoder.")}
    weights |= {f"encoder.features.{name}": value for name, value in theirs.state_dict().items()}
    weights = redescribe(weights, width=1.0)
    if not described:
        del weights["_extra_state"]
    torch.save(weights, tmp_path / "model.pt")
    image, expected = torch.rand(2, 1, 64, 64), []
    with torch.no_grad():
        x = image
        for layer in theirs:
            expected += [x] if isinstance(layer, torch.nn.MaxPool2d) else []
            x = layer(x)
        opened = open_network(tmp_path / "model.pt", **({} if described else {"backbone": backbone, "image_size": 64}))
        network.load_state_dict(weights)  # by torch alone, as MONAI's own loader does
        for found in (opened, network):
            assert all(torch.equal(a, b) for a, b in zip(found.encoder(image), [*expected, x], strict=True))
    assert ("does not describe its network" in caplog.text) != described


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vgg13", "width": 0.25}, "found a vgg13 of width 0.25, expected width 1, .* use version 0.2 for it"),
        ({"format": 99, "version": "9.0"}, "a description of format 99, written by version 9.0, expected at most format 1"),
    ],
)
def test_weights_that_this_version_cannot_open_are_refused(own, tmp_path, changes, message):
    torch.save(redescribe(torch.load(own[0], weights_only=True), **changes), tmp_path / "other.pt")
    with pytest.raises(UserError, match=message):
        read_model(tmp_path / "other.pt", {})


def test_earlier_heads_travel_along_and_count_as_tasks_where_they_answer_as_before(own):
    path, before = own
    others = [SEGMENTATION, RECONSTRUCTION, DETECTION]
    free = {"detection": {**before.description["detection"], "score_threshold": 0.3}}
    for change, tasks in (({}, list(TASKS)), (free, list(TASKS)), ({"classes": ["a"]}, others)):
        weights = some_network([SEGMENTATION], **{**OWN, **change}).state_dict()
        joined = add_heads(weights, path)
        temperature = 2.0 if CLASSIFICATION in tasks else None
        assert (describe(joined)["tasks"], describe(joined)["temperature"]) == (tasks, temperature)
        kept, new = f"heads.{CLASSIFICATION}.0.weight", f"heads.{SEGMENTATION}.output.0.weight"
        assert torch.equal(joined[kept], before.state_dict()[kept]) and torch.equal(joined[new], weights[new])


def test_the_shipped_weights_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trained_tasks(shipped_checkpoint(".")) == TASKS
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model.pt").touch()
    assert shipped_checkpoint(".") == "models/model.pt"
