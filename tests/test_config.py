import json
import re
from fnmatch import fnmatch
from inspect import signature
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from monai.bundle import ConfigParser
from some_tasks import open_workflow

from bundle.cli import in_words
from bundle.config import SCHEMA, WORKFLOWS, check_config, components, knobs, running_workflow
from bundle.errors import UserError
from bundle.inference.backends import PACKAGES
from bundle.names import EMBEDDING, TASKS, check_tasks
from bundle.networks.detection import MaskRCNNHead
from bundle.tasks.segmentation import SEGMENTATION_LOSSES

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DOCUMENT = (ROOT / "docs/configuration.md").read_text()
OVERLAYS = sorted(
    path.name
    for path in CONFIGS.glob("*.json")
    if path.stem not in (*WORKFLOWS, "metadata", "scales") and not path.name.startswith("experiment_")
)

def read(name):
    return json.loads((CONFIGS / name).read_text())


def merged(workflow):
    """Configuration of a workflow, as MONAI's runner merges it."""
    names = ["train.json", "evaluate.json"] if workflow == "evaluate" else [f"{workflow}.json"]
    return {id: value for id, value in parser(*names).get().items() if id != "_meta_"}


def parser(*names, **override):
    result = ConfigParser()
    result.read_config([str(CONFIGS / name) for name in names])
    result.update(override)
    return result


def section(title):
    return re.split(r"^## ", DOCUMENT.split(f"\n## {title}\n")[1], flags=re.M)[0]


def in_document(schema, value):
    words = in_words(value, schema)
    return f"`{words}`" if words.startswith(".") else words


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_the_document_lists_every_knob_with_its_default_and_nothing_else(workflow):
    own, config, text = SCHEMA["$defs"][workflow]["properties"], read(f"{workflow}.json"), section(f"configs/{workflow}.json")
    rows = {id: f"| `{id}` | {in_document(own[id], config[id])} | {own[id]['description']} |" for id in own if "description" in own[id]}
    table = "\n".join(["| knob | default | meaning |", "|---|---|---|", *rows.values()])
    assert table in text, f"docs/configuration.md: expected in configs/{workflow}.json\n{table}"
    if shared := own.keys() - rows.keys():  # those of inference.json with the meaning and default of train.json
        (names,) = re.findall(r"((?:`\w+`(?:, |,\n| and\n?)? ?)+)are those of train\.json", text)
        assert set(re.findall(r"`(\w+)`", names)) == shared
        assert {id: config[id] for id in shared} == {id: read("train.json")[id] for id in shared}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_the_schema_has_every_id_of_a_workflow_and_no_other(workflow):
    config = merged(workflow)
    assert set(config) == {*knobs(workflow), *components(workflow)}
    assert not {*knobs(workflow)} & {*components(workflow)}
    check_config(config, workflow)


def test_the_schema_is_one_and_allows_what_the_code_knows():
    Draft202012Validator.check_schema(SCHEMA)
    train, inference = knobs("train"), knobs("inference")
    assert train["segmentation_loss"]["enum"] == list(SEGMENTATION_LOSSES)
    assert inference["backend"]["enum"] == list(PACKAGES)
    assert list(train["detection"]["properties"]) == list(signature(MaskRCNNHead).parameters)[2:]


def test_components_that_the_document_names_are_there():
    names = re.findall(r"`(\w+)`", re.search(r"\n(`augmentation`.*?)components to be replaced", DOCUMENT, re.S)[1])
    config = read("train.json")
    assert len(names) >= 5 and all("_target_" in config[name] for name in names)


def test_every_overlay_is_listed():
    listed = re.findall(r"`([\w*]+\.json)`", re.sub(r"\|[^|]*\|$", "", section("Overlays"), flags=re.M))
    assert [name for name in OVERLAYS if not any(fnmatch(name, pattern) for pattern in listed)] == []
    assert [pattern for pattern in listed if not any(fnmatch(name, pattern) for name in OVERLAYS)] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_sets_ids_that_exist(name):
    known, overlay = {id for workflow in WORKFLOWS for id in (*knobs(workflow), *components(workflow))}, read(name)
    referred = set(re.findall(r"@(\w+)", json.dumps(overlay)))  # an overlay may have ids of its own, for its expressions
    assert overlay and {id.lstrip("+").split("#")[0].split("::")[0] for id in overlay} <= known | referred
    for entries in overlay.get("stages", {}).values():
        assert set(entries) <= known


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name.startswith("preset_")])
def test_every_preset_builds_and_answers(name):
    network = parser("train.json", name, image_size=64).get_parsed_content("network_def").eval()
    with torch.no_grad():
        output = network(torch.rand(1, 1, 64, 64))
    assert output.keys() == {*TASKS, EMBEDDING}
    assert {task: tuple(tensor.shape) for task, tensor in output.items() if task not in ("detection", EMBEDDING)} == {
        "classification": (1, 3),
        "segmentation": (1, 1, 64, 64),
        "reconstruction": (1, 1, 64, 64),
    }


def test_every_stage_has_tasks():
    stages = read("train.json")["stages"]
    assert all(entries.keys() == {"tasks"} and check_tasks(entries["tasks"]) for entries in stages.values())
    assert all(check_tasks(entries["tasks"]) for entries in read("preset_cpu.json")["stages"].values())


def test_train_and_evaluate_parse_together(phantom_dir, checkpoint, tmp_path):
    places = {"dataset_dir": phantom_dir, "output_dir": tmp_path, "checkpoint": checkpoint}
    parse = open_workflow("train", "evaluate", **places).parser.get_parsed_content
    assert len(parse("evaluator").data_loader.dataset) == len(parse("records")["test"])
    trainer = parse("train#trainer")
    assert trainer.state.max_epochs == parse("max_epochs") and trainer.network is parse("evaluator").network


# [workflow, entries, words of the error]
UNKNOWN = [
    ["train", {"learning_rat": 0.1}, "which no workflow has and nothing refers to, expected .*; near matches: learning_rate"],
    ["train", {"optimizr": 0.1}, "near matches: optimizer$"],
    ["train", {"a": 1, "b": "@a"}, "docs/configuration.md$"],
    ["train", {"checkpoint": "x.pt"}, "a knob of evaluate and inference that train does not use, .*: init_checkpoint"],
    ["train", {"score_threshold": 0.3}, "a knob of inference that .* near matches: detection::score_threshold"],
    ["train", {"split": "test"}, "a knob of evaluate that train does not use"],
    ["evaluate", {"input": "scan"}, "a knob of inference that evaluate does not use"],
    ["inference", {"epoch_size": 3}, "a knob of train and evaluate that inference does not use"],
    ["inference", {"init_checkpoint": "x.pt"}, "a knob of train and evaluate .* near matches: checkpoint"],
]


@pytest.mark.parametrize(("workflow", "entries", "words"), UNKNOWN)
def test_an_id_that_means_nothing_in_a_workflow_is_refused(workflow, entries, words):
    unknown = list(entries)[-1]
    with pytest.raises(UserError, match=words) as caught:
        check_config({**merged(workflow), **entries}, workflow)
    assert str(caught.value).startswith(f"configuration: found '{unknown}', ")


def test_an_unknown_id_of_a_stage_is_refused():
    with pytest.raises(UserError, match="^stages::stage_joint: found 'batchsize', .*near matches: batch_size"):
        check_config({**merged("train"), "stages": {"stage_joint": {"batchsize": 3}}}, "train")
    deeper = {"optimizer::lr": 1, "train#trainer#amp": True, "+imports": []}
    check_config({**merged("train"), "stages": {"stage_joint": deeper}}, "train")


@pytest.mark.parametrize(
    "entries",
    [
        {"my_rate": 0.1, "learning_rate": "@my_rate"},
        {"my_sizes": {"small": 64}, "image_size": "$@my_sizes['small']"},
        {"my": {"lr": 1}, "optimizer": {"lr": "@my::lr"}},
        {"_meta_": {}, "finalize": [], "run_name": "trial"},
        {"window": ["$-1000 + 1", "@top"], "top": 3, "tasks": {"segmentation": "$1 / 3"}},
    ],
)
def test_an_id_of_ones_own_is_known_where_something_refers_to_it_and_expressions_pass(entries):
    for workflow in ("train", "evaluate"):
        check_config({**merged(workflow), **entries}, workflow)


def test_the_id_that_is_run_is_known():
    with pytest.raises(UserError, match="found 'predict'"):
        check_config({**merged("train"), "predict": ["$1"]}, "train")
    check_config({**merged("train"), "predict": ["$1"]}, "train", also=("predict",))


@pytest.mark.parametrize(
    ("files", "foreign"),
    [
        (["train"], "checkpoint"),
        (["train", "preset_smoke", "evaluate"], "score_threshold"),
        (["inference"], "epoch_size"),
    ],
)
def test_every_workflow_is_checked_as_what_it_is_before_any_work(files, foreign, tmp_path):
    open_workflow(*files, output_dir=tmp_path)
    for entries, words in (({foreign: 1}, f"configuration: found '{foreign}', a knob of"), ({"amp": 2}, "amp: found 2, exp")):
        with pytest.raises(RuntimeError) as caught:
            open_workflow(*files, output_dir=tmp_path, **entries)
        assert str(caught.value.__cause__).startswith(words)
    assert not list(tmp_path.iterdir())


def test_an_id_to_run_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RuntimeError) as caught:
        open_workflow("train", run_id="calibrate", output_dir=tmp_path)
    assert str(caught.value.__cause__) == (
        "run: found 'calibrate', expected run or training; calibrate, reference and grad_cam need configs/evaluate.json"
    )


def test_outside_of_a_workflow_there_is_none_running():
    with pytest.raises(RuntimeError, match="found no ConfigWorkflow among the callers"):
        running_workflow()


WORDS = "expected True, False or None, as Python writes them"
WINDOW = "expected two numbers in HU, the lower one first, such as [-1000, 300]"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"batch_size": 0}, "batch_size: found 0, expected a whole number of at least 1"),
        ({"batch_size": 2.0}, "batch_size: found 2.0, expected a whole number of at least 1"),
        ({"batch_size": True}, "batch_size: found True, expected a whole number of at least 1"),
        ({"learning_rate": "fast"}, "learning_rate: found 'fast', expected a number of at least 0"),
        ({"learning_rate": (0, 1)}, "learning_rate: found [0, 1], expected a number of at least 0"),  # Fire makes this of 0,1
        ({"dropout": 1.5}, "dropout: found 1.5, expected a number from 0 to 1"),
        ({"image_size": 100}, "image_size: found 100, expected a whole number of at least 32, a multiple of 32"),
        ({"window": [100, -100]}, f"window: found [100, -100], {WINDOW}"),
        ({"window": [1, 2, 3]}, f"window: found [1, 2, 3], {WINDOW}"),
        ({"tasks": "segmentation"}, "tasks: found 'segmentation', expected task names with weights, such as {'segmentat"),
        ({"tasks": {"segmentation": "much"}}, "tasks::segmentation: found 'much', expected a number"),
        ({"classes": ["a", "a"]}, "classes: found ['a', 'a'], expected a list of different names"),
        ({"amp": "yes"}, "amp: found 'yes', expected True or False"),
        ({"amp": "false"}, f"amp: found the text 'false', {WORDS}"),
        ({"init_checkpoint": "null"}, f"init_checkpoint: found the text 'null', {WORDS}"),
        ({"train": {"handlers": [{"interval": "null"}]}}, f"train::handlers::0::interval: found the text 'null', {WORDS}"),
        ({"init_checkpoint": 3}, "init_checkpoint: found 3, expected a text or None"),
        ({"batch_size": None}, "batch_size: found None, expected a whole number of at least 1"),
        ({"pretrained": None}, "pretrained: found None, expected True, False or the path of a file of weights"),
        ({"segmentation_loss": "l1"}, "segmentation_loss: found 'l1', expected one of generalized_dice, gen"),
        ({"decoder_channels": [8, 0]}, "decoder_channels::1: found 0, expected a whole number of at least 1"),
        ({"detection": {"fpn": 3}}, "detection: found 'fpn', expected one or more of fpn_channels, box_features"),
        ({"detection": {"nms_threshold": 3}}, "detection::nms_threshold: found 3, expected a number from 0 to 1"),
        ({"stages": {"x": {"batch_size": 0}}}, "stages::x::batch_size: found 0, expected a whole number of at least 1"),
        ({"stages": {"x": 3}}, "stages::x: found 3, expected knobs with values, such as {'max_epochs': 20}"),
        ({"device": "cudda"}, "device: found 'cudda', expected one that PyTorch can use here, such as cpu (Expected one of"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_in_one_line(entries, words):
    with pytest.raises(UserError) as error:
        check_config({**merged("train"), **entries}, "train")
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


@pytest.mark.parametrize("workflow", ["evaluate", "inference"])
def test_tasks_to_answer_are_names_with_or_without_weights(workflow):
    for tasks in (["segmentation"], {"segmentation": 1}, None):
        check_config({**merged(workflow), "tasks": tasks}, workflow)
    with pytest.raises(UserError, match=r"^tasks: found 'segmentation', expected names of tasks, such as \['segmentation'\]$"):
        check_config({**merged(workflow), "tasks": "segmentation"}, workflow)


def test_pretrained_weights_may_be_a_path():
    check_config({**merged("train"), "pretrained": "weights.pth"}, "train")
