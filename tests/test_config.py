import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from bundle.config import WORKFLOWS, check_ids, running_workflow
from bundle.names import EMBEDDING, TASKS, check_tasks

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
DOCUMENT = (ROOT / "docs/configuration.md").read_text()
OVERLAYS = sorted(
    path.name
    for path in CONFIGS.glob("*.json")
    if path.name not in (*WORKFLOWS, "metadata.json") and not path.name.startswith(("experiment_", "scale_"))
)

# What the document says of defaults that are computed or long.
IN_WORDS = {
    "$bundle.data.phantom.make_phantom(@bundle_root + '/data/phantom')": "phantom data, made at first use",
    "$bundle.data.phantom.make_phantom(@bundle_root + '/data/phantom') + '/images'": (
        "images of the phantom data, made at first use"
    ),
    "$os.path.join(os.path.dirname(@checkpoint), 'reference.pt')": "reference.pt beside `checkpoint`",
    "$bundle.training.distributed.local_device()": "GPU if there is one",
    '{"classification": 1.0, "segmentation": 1.0, "reconstruction": 1.0, "detection": 1.0}': "all four at 1.0",
    json.dumps(json.loads((CONFIGS / "preset_cpu.json").read_text())["detection"]): "that of preset_cpu.json",
    '{"stage_classification": {}, "stage_segmentation": {}, "stage_detection": {}, "stage_joint": {}}': "the four stages",
}
MADE_OF_COMPONENTS = {"records", "network", "data", "inferer"}  # expressions that are no knobs


def read(name):
    return json.loads((CONFIGS / name).read_text())


def section(title):
    return re.split(r"^## ", DOCUMENT.split(f"\n## {title}\n")[1], flags=re.M)[0]


def table(title):
    """Knob -> default of the table of a section."""
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \| ", section(title).split("| knob | default | meaning |")[1].split("\n\n")[0], re.M
    )
    assert len(rows) == len(dict(rows)), "a knob has one line"
    return dict(rows)


def shared():
    """Knobs that inference.json has with the meaning and default of train.json, by the sentence that says so."""
    (names,) = re.findall(r"((?:`\w+`(?:, |,\n| and\n?)? ?)+)are those of train\.json", section("configs/inference.json"))
    return set(re.findall(r"`(\w+)`", names))


def is_knob(id, value):
    if id in MADE_OF_COMPONENTS or id == "imports":
        return False
    is_run = isinstance(value, list) and any(str(item).startswith("$") for item in value)
    return not is_run and "_target_" not in json.dumps(value)


def in_document(value):
    words = IN_WORDS.get(value if isinstance(value, str) else json.dumps(value))
    if words:
        return words
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if not isinstance(value, str):
        return json.dumps(value)
    path = re.fullmatch(r"\$@(\w+) \+ '/(.*)'", value)
    if path:
        return path[2] if path[1] == "bundle_root" else f"`{path[1]}`/{path[2]}"
    return f"`{value.removeprefix('@')}`" if value.startswith(("@", ".")) else value


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_knob_is_documented_with_its_default_and_nothing_else_is(name):
    documented, config = table(f"configs/{name}"), read(name)
    knobs = {id: in_document(value) for id, value in config.items() if is_knob(id, value)}
    if name == "inference.json":
        same, train = shared(), read("train.json")
        assert {id: config[id] for id in same} == {id: train[id] for id in same}
        knobs = {id: value for id, value in knobs.items() if id not in same}
    assert documented == knobs


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
    known, overlay = {id for workflow in WORKFLOWS for id in read(workflow)}, read(name)
    referred = set(re.findall(r"@(\w+)", json.dumps(overlay)))  # an overlay may have ids of its own, for its expressions
    assert overlay and {id.lstrip("+").split("#")[0].split("::")[0] for id in overlay} <= known | referred
    for entries in overlay.get("stages", {}).values():
        assert set(entries) <= known


def parser(*names, **override):
    result = ConfigParser()
    result.read_config([str(CONFIGS / name) for name in names])
    result.update(override)
    return result


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name.startswith(("backbone_", "preset_"))])
def test_every_backbone_and_preset_builds_and_answers(name):
    network = parser("train.json", name, image_size=64).get_parsed_content("network_def").eval()
    with torch.no_grad():
        output = network(torch.rand(1, 1, 64, 64))
    assert output.keys() == {*TASKS, EMBEDDING}
    assert {task: tuple(tensor.shape) for task, tensor in output.items() if task not in ("detection", EMBEDDING)} == {
        "classification": (1, 3),
        "segmentation": (1, 1, 64, 64),
        "reconstruction": (1, 1, 64, 64),
    }


def test_every_stage_has_an_overlay_that_sets_its_tasks_alone():
    stages = {name.removesuffix(".json"): read(name) for name in OVERLAYS if name.startswith("stage_")}
    assert set(read("train.json")["stages"]) == set(stages)
    for overlay in stages.values():
        assert overlay.keys() == {"tasks"} and check_tasks(overlay["tasks"])
    assert set(read("preset_cpu.json").get("stages", {})) <= set(stages)


def test_preset_cpu_parses_with_train_and_evaluate(phantom_dir, tmp_path):
    files = [str(CONFIGS / name) for name in ("train.json", "preset_cpu.json", "evaluate.json")]
    places = {"dataset_dir": str(phantom_dir), "output_dir": str(tmp_path)}
    workflow = ConfigWorkflow(files, logging_file=False, image_size=64, device="cpu", **places)
    workflow.initialize()
    parse = workflow.parser.get_parsed_content
    assert len(parse("evaluator").data_loader.dataset) == len(parse("records")["test"])
    trainer = parse("train#trainer")
    assert trainer.state.max_epochs == parse("max_epochs") and trainer.network is parse("evaluator").network


# [entries added to train.json, near matches in the message]
UNKNOWN = [
    [{"learning_rat": 0.1}, "learning_rate"],
    [{"task": {"segmentation": 1.0}}, "tasks"],
    [{"max_epoch": 3}, "max_epochs"],
    [{"checkpoints": "model.pt"}, "checkpoint"],
    [{"a": 1, "b": "@a"}, None],
    [{"zzzz": 1}, None],
]


@pytest.mark.parametrize(("entries", "near"), UNKNOWN, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_an_id_that_means_nothing_is_refused(entries, near):
    unknown = list(entries)[-1]
    message = f"configuration: found '{unknown}', which no workflow has and nothing refers to as @{unknown}, expected an id of"
    with pytest.raises(ValueError, match=message) as caught:
        check_ids({**read("train.json"), **entries}, CONFIGS)
    assert (f"; near matches: {near}" in str(caught.value)) if near else ("near matches" not in str(caught.value))


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"my_rate": 0.1, "learning_rate": "@my_rate"},
        {"my_sizes": {"small": 64}, "image_size": "$@my_sizes['small']"},
        {"my": {"lr": 1}, "optimizer": {"lr": "@my::lr"}},
        {"checkpoint": "model.pt", "score_threshold": 0.3},
        {"_meta_": {}, "finalize": [], "run_name": "trial"},
    ],
)
def test_an_id_of_ones_own_is_known_where_something_refers_to_it(entries):
    for name in WORKFLOWS:
        check_ids({**read(name), **entries}, CONFIGS)


def test_the_id_that_is_run_is_known():
    with pytest.raises(ValueError, match="found 'predict'"):
        check_ids({**read("train.json"), "predict": ["$1"]}, CONFIGS)
    check_ids({**read("train.json"), "predict": ["$1"]}, CONFIGS, also=("predict",))


def test_a_folder_without_workflows_has_ids_of_its_own(tmp_path):
    check_ids({"anything": 1}, tmp_path)


@pytest.mark.parametrize("files", [["train.json"], ["train.json", "preset_smoke.json", "evaluate.json"], ["inference.json"]])
def test_every_workflow_refuses_unknown_ids_before_any_work(files, tmp_path):
    def workflow(**override):
        paths = [str(CONFIGS / name) for name in files]
        return ConfigWorkflow(paths, logging_file=False, output_dir=str(tmp_path), **override)

    workflow().initialize()
    with pytest.raises(RuntimeError) as caught:
        workflow(batchsize=3).initialize()
    assert str(caught.value.__cause__).startswith("configuration: found 'batchsize'")
    assert not list(tmp_path.iterdir())


def test_outside_of_a_workflow_there_is_none_running():
    with pytest.raises(RuntimeError, match="found no ConfigWorkflow among the callers"):
        running_workflow()


@pytest.mark.parametrize(("id", "word"), [("resume", "false"), ("skips", "False"), ("init_checkpoint", "null")])
def test_words_that_would_count_as_true_are_refused(id, word):
    with pytest.raises(ValueError, match=f"{id}: found the text '{word}', expected True, False or None"):
        check_ids({**read("train.json"), id: word}, CONFIGS)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"amp": "yes"}, "amp: found the text 'yes', expected True or False"),
        ({"batch_size": 0}, "batch_size: found 0, expected at least 1"),
        ({"num_workers": -1}, "num_workers: found -1, expected at least 0"),
        ({"learning_rate": -1}, "learning_rate: found -1, expected at least 0"),
        ({"dropout": 1.5}, "dropout: found 1.5, expected at most 1"),
        ({"image_size": "big"}, "image_size: found the text 'big', expected a number"),
        ({"segmentation_classes": "lesion"}, "segmentation_classes: found the text 'lesion', expected a list"),
        ({"device": "cudda"}, "device: found 'cudda', which PyTorch cannot use here"),
    ],
)
def test_values_that_make_no_sense_are_refused(entries, words):
    with pytest.raises(ValueError) as error:
        check_ids({**read("train.json"), **entries}, CONFIGS)
    assert words in str(error.value) and "\n" not in str(error.value)
    (id,) = entries
    check_ids({**read("train.json"), id: "$1", "device": "cpu"}, CONFIGS)


def test_pretrained_weights_may_be_a_path():
    check_ids({**read("train.json"), "pretrained": "weights.pth", "device": "cpu"}, CONFIGS)


def test_such_words_are_refused_however_deep():
    config = read("train.json")
    config["train"]["handlers"] = [{"_target_": "ValidationHandler", "interval": "null"}]
    with pytest.raises(ValueError, match="train::handlers::0::interval: found the text 'null', expected True, False or None"):
        check_ids(config, CONFIGS)
