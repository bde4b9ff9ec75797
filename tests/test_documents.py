"""What the documents name is there: files, configs, knobs, tests."""

import re
import subprocess
from pathlib import Path

import pytest

from bundle.config import knobs

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
DOCUMENTS = sorted(name for name in LISTED if (ROOT / name).exists())
# These name the files and knobs of earlier versions.
HISTORY = ("CHANGELOG.md", "models/README.md", "docs/results")
CURRENT = [name for name in DOCUMENTS if not name.startswith(HISTORY)]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_leads_to_a_file(name):
    links = re.findall(r"\]\(([^):#]+)[)#]", text_of(name))
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


def test_every_document_is_linked_from_the_index():
    index = (ROOT / "docs/README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == {link for link in re.findall(r"\]\(([\w.]+\.md)\)", index)}


@pytest.mark.parametrize("name", CURRENT)
def test_configs_tests_and_knobs_that_a_document_names_exist(name):
    text = text_of(name)
    files = set(re.findall(r"\b(?:configs|tests|scripts|bundle)/[\w/]+\.(?:json|py|sh)\b", text))
    files -= {"configs/experiment_NAME.json"}
    assert [file for file in sorted(files) if not (ROOT / file).exists()] == []
    commands = re.findall(r"^ *(?:torchrun .*|python) -m monai\.bundle run .*$|^ *(?:torchrun .*)?chestct predict .*$", text, re.M)
    for command in commands:
        workflow = "evaluate" if "evaluate.json" in command else "train" if "train.json" in command else "inference"
        known = {*knobs(workflow), "config_file", "nproc_per_node", "no-python", "tracking", "inferer"}
        assert set(re.findall(r" --([\w-]+)", command)) <= known, command


def test_formats_names_tests_that_exist():
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text_of("docs/formats.md"))
    assert len(named) > 15 and [test for test in named if f"def {test}(" not in sources] == []
