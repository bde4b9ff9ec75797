"""metadata.json says of the package, its requirements and its network what is so."""

import configparser
import json
from pathlib import Path

import jsonschema
import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out
from packaging.requirements import Requirement

import bundle
from bundle.names import DETECTION, SEGMENTATION, TASKS

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT.parent / "shared/meta_schema_20240725.json"
META = json.loads((ROOT / "configs/metadata.json").read_text())
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def data_format(task):
    return META["network_data_format" if task == SEGMENTATION else f"{task}_data_format"]


def test_it_follows_the_schema_that_it_names():
    assert META["schema"].endswith(f"/{SCHEMA.name}")
    if not SCHEMA.is_file():
        pytest.skip(f"no schema: {SCHEMA.name} is not beside the repository, in shared")
    jsonschema.validate(META, json.loads(SCHEMA.read_text()))


def test_the_version_is_one_in_metadata_changelog_and_package():
    assert SETUP["metadata"]["version"] == "attr: bundle.__version__"
    assert META["version"] == bundle.__version__
    assert next(iter(META["changelog"])) == bundle.__version__, "the newest version stands first"


def test_required_packages_are_those_of_the_package_in_versions_that_it_takes():
    requirements = [Requirement(line) for line in SETUP["options"]["install_requires"].strip().splitlines()]
    base = {"monai": META["monai_version"], "torch": META["pytorch_version"], "numpy": META["numpy_version"]}
    versions = {name.lower(): version for name, version in {**base, **META["required_packages_version"]}.items()}
    assert versions.keys() == {requirement.name.lower() for requirement in requirements}
    for requirement in requirements:
        assert requirement.specifier.contains(versions[requirement.name.lower()]), requirement


def test_every_head_has_a_format_of_its_own():
    formats = {key for key in META if key.endswith("_data_format")}
    assert formats == {"network_data_format", *(f"{task}_data_format" for task in TASKS if task != SEGMENTATION)}
    for task in TASKS:
        assert data_format(task)["inputs"] == META["network_data_format"]["inputs"]
        assert "post_processed_outputs" in data_format(task)


@pytest.mark.parametrize("task", [task for task in TASKS if task != DETECTION])
def test_the_view_of_a_task_answers_in_its_format(task):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(ROOT / "configs/metadata.json"),
        config_file=str(ROOT / "configs/inference.json"),
        device="cpu",
        bundle_root=str(ROOT),
        export_task=task,
        **{"_meta_::network_data_format": data_format(task)},
    )


def test_detections_have_the_fields_of_their_format():
    parser = ConfigParser()
    parser.read_config(ROOT / "configs/inference.json")
    parser.update({"bundle_root": str(ROOT), "detection": {"score_threshold": 0.0}})
    network = parser.get_parsed_content("multitask_net").eval()
    with torch.no_grad():
        found = network(torch.rand(1, 1, 256, 256))[DETECTION][0]
    outputs = data_format(DETECTION)["outputs"]
    assert found.keys() == outputs.keys() and len(found["boxes"]) > 0
    for name, expected in outputs.items():
        assert str(found[name].dtype) == f"torch.{expected['dtype']}"
        low, high = expected["value_range"]
        assert low <= found[name].min() and found[name].max() <= high
    assert found["boxes"].shape[1] == outputs["boxes"]["num_channels"]
    assert list(found["masks"].shape[2:]) == outputs["masks"]["spatial_shape"]
