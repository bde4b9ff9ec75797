"""The wheel, which predicts anywhere; the archive of the model zoo: its layout, its weights, the links of its documents."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

import bundle
from bundle.files import file_hash
from bundle.networks import load_weights
from bundle.networks.weights import DESCRIPTION, describe

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "models/model.pt"
PREFIX = "chest_ct_multitask/"


def tracked(*parts: str) -> set[str]:
    command = ["git", "ls-tree", "-rz", "--name-only", "HEAD", *parts]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return set(filter(None, listed.stdout.decode().split("\0")))


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the checkout, built in a copy, as a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked("LICENSE", "README.md", "setup.cfg", "pyproject.toml", "bundle", "configs", "models", "docs"):
        (folder / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / "source" / path)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_package_configs_weights_and_licences(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {re.sub("^.*info/licenses/", "", name) for name in file.namelist()}
    names = {name.replace("bundle/_root/", "") for name in names}
    assert {"LICENSE", "docs/data_license.txt"} <= names
    assert {path for path in tracked("bundle", "configs", "models")} <= names


def test_an_installed_package_predicts_without_the_repository(wheel, phantom_dir, tmp_path):
    pip("install", "--no-deps", "--target", tmp_path / "installed", wheel)
    command = [sys.executable, tmp_path / "installed/bin/chestct", "predict", next(phantom_dir.glob("images/*")), "-o", "out"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([*map(str, command), "--flips", "False"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") <= 3, done.stdout + done.stderr
    assert re.search(r"^p\d\d_0\S*: [\w -]+ \(0\.\d\d\), lesion [\d.]+%? .*, \d+ detected", done.stdout, re.M), done.stdout
    (found,) = tmp_path.glob("out/*/predictions.json")
    weights = json.loads(found.read_text())["model"]["checkpoint"]
    assert weights == file_hash(WEIGHTS)[:12] and sorted(path.name for path in tmp_path.iterdir()) == ["installed", "out"]


def test_the_archive_holds_the_bundle_and_nothing_else(tmp_path):
    script = ["bash", str(ROOT / "scripts/package.sh")]
    subprocess.run([*script, "zoo.zip"], cwd=tmp_path, check=True)
    with zipfile.ZipFile(tmp_path / "zoo.zip") as file:
        assert file.testzip() is None
        names = {name for name in file.namelist() if not name.endswith("/")}
        assert file.read(f"{PREFIX}models/model.pt")[:2] == b"PK", "the weights themselves, not a pointer to them"
    assert names == {PREFIX + path for path in tracked("LICENSE", "bundle", "configs", "docs", "models")}
    wrong = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "usage: bash scripts/package.sh FILE.zip\n"


def test_the_weights_fit_inference_json_and_the_model_zoo():
    assert WEIGHTS.stat().st_size <= 25_000_000, "the model zoo takes no larger file"
    parser = ConfigParser()
    parser.read_config(ROOT / "configs/inference.json")
    network = parser.get_parsed_content("multitask_net")
    load_weights(network, WEIGHTS, strict=True)
    stored, loaded = torch.load(WEIGHTS, weights_only=True), network.state_dict()
    assert stored.keys() == loaded.keys()
    said, found = describe(stored), describe(loaded)
    assert {key: found[key] for key in said} == {**said, "version": bundle.__version__}
    assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in stored.items() if key != DESCRIPTION)


def test_links_of_the_documents_lead_into_the_archive():
    inside = tracked("LICENSE", "bundle", "configs", "docs", "models")
    documents = [path for path in inside if path.endswith(".md")]
    links = [(path, link) for path in documents for link in re.findall(r"\]\(([^):#]+)[)#]", (ROOT / path).read_text())]
    assert len(links) > 50
    targets = {(path, os.path.normpath(os.path.join(os.path.dirname(path), link))) for path, link in links}
    folders = {str(parent) for path in inside for parent in Path(path).parents}
    assert [pair for pair in sorted(targets) if pair[1] not in inside | folders] == []
