"""A checkpoint says what its network is; what a user sets besides is held against it."""

import logging

import pytest
import torch
from some_tasks import some_network
from torchvision.models.vgg import cfgs, make_layers

from bundle.errors import UserError
from bundle.networks import load_weights, read_model
from bundle.networks.weights import DEFAULTS, add_heads, describe, redescribe, shipped_checkpoint, trained_tasks
from bundle.tasks import build_network, open_network
from bundle.names import CLASSIFICATION, DETECTION, RECONSTRUCTION, SEGMENTATION, TASKS

TINY = {
    "backbone": "test_efficientnet",
    "image_size": 64,
    "decoder_channels": (16, 8, 8, 8, 8),
    "detection": {"fpn_channels": 8, "box_features": 16, "mask_channels": (8,)},
}
OWN = {"classes": ["healthy", "bacterial pneumonia", "COVID-19"], "window": [-1000, 300], "sources": ["ours"]}


@pytest.fixture
def saved(tmp_path):
    """Weights of classification and reconstruction, and the network that has them."""
    network = some_network(**TINY, tasks=(CLASSIFICATION, RECONSTRUCTION))
    torch.save(network.state_dict(), tmp_path / "model.pt")
    return tmp_path / "model.pt", network


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_of_the_parts_that_both_have_are_loaded(saved, wrapped):
    path, source = saved
    if wrapped:  # last.pt of a run
        torch.save({"network": source.state_dict(), "history": []}, path)
    network = some_network(**TINY, tasks=(SEGMENTATION, RECONSTRUCTION))
    fresh = {key: value.clone() for key, value in network.heads[SEGMENTATION].state_dict().items()}
    assert load_weights(network, path) == ["encoder", RECONSTRUCTION]
    assert equal(network.encoder, source.encoder) and equal(network.heads[RECONSTRUCTION], source.heads[RECONSTRUCTION])
    assert all(torch.equal(value, fresh[key]) for key, value in network.heads[SEGMENTATION].state_dict().items())


def test_strict_loading_wants_every_head(saved):
    path, source = saved
    network = some_network(**TINY, tasks=(CLASSIFICATION, RECONSTRUCTION))
    assert load_weights(network, path, strict=True) == ["encoder", CLASSIFICATION, RECONSTRUCTION]
    assert equal(network, source)
    with pytest.raises(ValueError, match=r"model.pt: found heads.segmentation\.\S+ absent, expected \(.*tasks"):
        load_weights(some_network(**TINY, tasks=(SEGMENTATION,)), path, strict=True)


@pytest.mark.parametrize(
    ("task", "change"), [
        (CLASSIFICATION, {"classes": ["a", "b"]}),
        (CLASSIFICATION, {"classes": ["COVID-19", "other", "lung cancer"]}),
        (SEGMENTATION, {"segmentation_classes": ["a", "b", "c"]}),
        (SEGMENTATION, {"segmentation_classes": ["consolidation"]}),
    ]
)
def test_a_head_of_other_classes_is_loaded_but_for_its_output_layer(tmp_path, task, change):
    source = some_network(**TINY, tasks=(task, RECONSTRUCTION))
    torch.save(source.state_dict(), tmp_path / "model.pt")
    network = some_network(**{**TINY, **change}, tasks=(task, RECONSTRUCTION))
    output = list(network.heads[task].state_dict())[-2:]
    fresh = {key: network.heads[task].state_dict()[key].clone() for key in output}
    with pytest.raises(ValueError, match=f"{next(iter(change))}: found weights for "):
        load_weights(network, tmp_path / "model.pt", strict=True)
    assert load_weights(network, tmp_path / "model.pt") == ["encoder", f"{task} but its output layer", RECONSTRUCTION]
    before, after = source.heads[task].state_dict(), network.heads[task].state_dict()
    assert all(torch.equal(after[key], fresh.get(key, before[key])) for key in before)
    assert equal(network.encoder, source.encoder) and equal(network.heads[RECONSTRUCTION], source.heads[RECONSTRUCTION])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backbone": "test_byobnet"},
            r"found encoder.model.stem.conv.weight absent, expected \(24, 1, 3, 3\); it was made with another",
        ),
        ({"decoder_channels": (16, 8, 8, 8, 4)}, r"found heads.reconstruction\.\S+ \(8, .*\), expected \(4, "),
    ],
)
def test_weights_of_another_architecture_are_refused_and_nothing_is_changed(saved, change, message):
    path, _ = saved
    network = some_network(**{**TINY, **change}, tasks=TASKS)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(network, path)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 broken zip"], ids=["empty", "text", "broken"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.pt: cannot be read as a checkpoint") as caught:
        load_weights(some_network(**TINY, tasks=TASKS), tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save([1, 2, 3], tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt: found encoder\.\S+ absent, expected"):
        load_weights(some_network(**TINY, tasks=TASKS), tmp_path / "model.pt")


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.pt: no such checkpoint; train first, or name another one"):
        load_weights(some_network(**TINY, tasks=TASKS), tmp_path / "none.pt")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Weights of a network with names, window and data of its own."""
    path = tmp_path_factory.mktemp("own") / "model.pt"
    network = some_network(**TINY, **OWN, tasks=TASKS, temperature=2.0)
    torch.save(network.state_dict(), path)
    return path, network


def test_the_network_of_a_checkpoint_is_made_from_it_alone(own):
    path, network = own
    opened = open_network(path)
    assert equal(opened, network) and opened.description == network.description and not opened.training
    model = read_model(path, dict.fromkeys(DEFAULTS))
    assert {name: model[name] for name in OWN} == OWN and list(model["tasks"]) == list(TASKS)
    assert build_network(read_model(path, {"tasks": [SEGMENTATION]})).description["tasks"] == [SEGMENTATION]


# [knobs, words of the refusal, None where they are taken], for prediction and for training
KNOBS = [
    [{"classes": OWN["classes"], "window": (-1000.0, 300)}, None, None],
    [{"classes": ["other", "COVID-19", "lung cancer"]}, r"classes: found \['other'.*, expected \['healthy'.*leave classes out", None],
    [{"window": [-1350, 150]}, r"window: found \[-1350, 150\], expected \[-1000, 300\], as .*model.pt was trained with", None],
    [{"image_size": 128}, "image_size: found 128, expected 64", None],
    [{"cropping": "body"}, "cropping: found 'body', expected None", None],
    [{"decoder_channels": [8]}, r"decoder_channels: found \[8\], expected \[16, 8, 8, 8, 8\]", None],
    [{"backbone": "resnet18"}, "backbone: found 'resnet18', expected 'test_efficientnet'", "backbone: found 'resnet18', expected 'test_efficientnet'"],
    [{"detection": {"fpn_channels": 16}}, "detection::fpn_channels: found 16, expected 8", None],
    [{"detection": {"score_threshold": 0.3}}, None, None],
    [{"dropout": 0.5}, None, None],
]


@pytest.mark.parametrize(("knobs", "predicting", "training"), KNOBS)
def test_a_knob_that_contradicts_the_checkpoint_is_refused_unless_it_is_trained_further(own, knobs, predicting, training):
    for further, words in ((False, predicting), (True, training)):
        if words:
            with pytest.raises(UserError, match=words):
                read_model(own[0], knobs, training=further)
        else:
            model = read_model(own[0], knobs, training=further)
            said = some_network(**model).description
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
    assert (model["window"], model["image_size"], model["backbone"]) == ((-1350, 150), 64, "vgg13_bn")


def test_weights_without_a_description_are_opened_with_one_warning_that_says_what_is_assumed(tmp_path, caplog):
    network = some_network([SEGMENTATION], "regnety_002", decoder_channels=[128, 64, 32, 16], image_size=64)
    weights = network.state_dict()
    del weights["_extra_state"]
    torch.save(weights, tmp_path / "old.pt")
    with caplog.at_level(logging.WARNING):
        opened = open_network(tmp_path / "old.pt", image_size=64)
    assert equal(opened.encoder, network.encoder) and list(opened.heads) == [SEGMENTATION]
    (record,) = caplog.records
    assert "old.pt: does not describe its network; assumed classes ('other', 'COVID-19', 'lung cancer')" in record.message
    assert "backbone 'regnety_002', image_size 64, window (-1350, 150)" in record.message


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("backbone", ["vgg13", "vgg13_bn"])
def test_a_vgg_of_version_0_2_answers_as_it_did(backbone, described, tmp_path, caplog):
    """Its encoder was torchvision's, whose maps were taken before each pooling and after the last."""
    network = some_network([CLASSIFICATION], backbone, image_size=64).eval()
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


def test_a_vgg_of_another_width_is_refused(own, tmp_path):
    torch.save(redescribe(torch.load(own[0], weights_only=True), backbone="vgg13", width=0.25), tmp_path / "old.pt")
    with pytest.raises(UserError, match="found a vgg13 of width 0.25, expected width 1, .* use version 0.2 for it, or train"):
        read_model(tmp_path / "old.pt", {})


def test_weights_of_a_later_version_are_refused(own, tmp_path):
    torch.save(redescribe(torch.load(own[0], weights_only=True), format=99, version="9.0"), tmp_path / "new.pt")
    with pytest.raises(UserError, match="found a description of format 99, written by version 9.0, expected at most format 1"):
        read_model(tmp_path / "new.pt", {})


def test_earlier_heads_travel_along_and_count_as_tasks_where_they_answer_as_before(own):
    path, before = own
    same, other = (some_network([SEGMENTATION], **{**TINY, **OWN, **change}).state_dict() for change in ({}, {"classes": ["a"]}))
    for weights, tasks in ((same, list(TASKS)), (other, [SEGMENTATION, RECONSTRUCTION, DETECTION])):
        joined = add_heads(weights, path)
        assert describe(joined)["tasks"] == tasks and describe(joined)["temperature"] == 2.0
        kept = f"heads.{CLASSIFICATION}.0.weight"
        assert torch.equal(joined[kept], before.state_dict()[kept])
        new = f"heads.{SEGMENTATION}.output.0.weight"
        assert torch.equal(joined[new], weights[new])


def test_the_shipped_weights_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trained_tasks(shipped_checkpoint(".")) == TASKS
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model.pt").touch()
    assert shipped_checkpoint(".") == "models/model.pt"
