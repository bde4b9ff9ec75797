"""What a user sees who gives wrong files or knobs: one line and exit status 1, wherever in a command it is found.

The messages themselves are tested where they are made: tests/test_config.py, tests/data, tests/networks.
"""

import json
import re
import shutil
import time
from pathlib import Path

import command
import numpy as np
import pytest
import torch
from PIL import Image

from bundle.data.phantom import make_phantom

TRAIN, EVALUATE = ["train", "preset_smoke"], ["train", "preset_smoke", "evaluate"]


def wrong_class(folder, datalist):
    datalist["training"][0]["class"] = 3


def truncate(folder, datalist):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])  # the header is whole, the pixels are not
    datalist["training"][0]["image"] = "cut.png"


def empty_folder(folder, datalist):
    (folder / "empty").mkdir()


def other_weights(folder, datalist):
    torch.save({"encoder.features.0.weight": torch.zeros(64, 1, 3, 3)}, folder / "other.pt")


OTHER = r"DATA/other.pt: found encoder.model.conv_stem.weight absent, expected \(24, 1, 3, 3\); it was made with another"
# Where it is found: [configs, arguments, what is done to the data, words of the line]; DATA stands for the folder
CASES = {
    "ids": [TRAIN, ["--learning_rat", "0.1"], None, r"found 'learning_rat', .* near matches: learning_rate"],
    "knobs": [["inference"], ["--score_threshold", "0,3"], None, r"score_threshold: found \[0, 3\], expected a number from 0 to 1$"],
    "input": [["inference"], ["--input", "DATA/empty"], empty_folder, "input: DATA/empty: found no "],
    "network": [TRAIN, ["--backbone", "resnet5"], None, r"backbone: found 'resnet5', expected .* near matches: resnet50"],
    "datalist": [TRAIN, [], wrong_class, r"training\[0\] .*: class: found 3, expected a whole number from 0 to 2"],
    "images": [TRAIN, [], truncate, r"DATA/cut.png: cannot be read \(.*truncated.*\)"],
    "checkpoint": [EVALUATE, [], None, r"OUT/model.pt: no such checkpoint; train first, or name another one"],
    "weights": [EVALUATE, ["--checkpoint", "DATA/other.pt"], other_weights, OTHER],
}


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """Phantom data of one slice a patient."""
    return Path(make_phantom(tmp_path_factory.mktemp("bad") / "data", size=64, groups=(3, 3, 3), slices_per_group=1))


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_refused_in_one_line(name, small_data, tmp_path):
    configs, arguments, spoil, expected = CASES[name]
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(small_data, data)
    if spoil:
        datalist = json.loads((data / "datalist.json").read_text())
        spoil(data, datalist)
        (data / "datalist.json").write_text(json.dumps(datalist))
    words = command.bundle(configs=configs, dataset_dir=data, output_dir=out)
    done = command.run(*words, *(argument.replace("DATA", str(data)) for argument in arguments))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and " ERROR " not in done.stdout, done.stdout + done.stderr
    lines = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1 and lines[0] == done.stderr.splitlines()[-1] and not list(out.rglob("*.pt"))
    assert configs != ["inference"] or not out.exists(), "it is refused before any work"
    assert re.search(expected.replace("DATA", str(data)).replace("OUT", str(out)), lines[0]), lines[0]


@pytest.mark.parametrize(("names", "knob"), [(TRAIN, "dataset_dir"), (EVALUATE, "dataset_dir"), (["inference"], "input")])
def test_the_first_line_says_that_the_phantom_data_are_used(names, knob, tmp_path):
    log = tmp_path / "log"
    log.touch()
    process = command.start(*command.bundle(configs=names, output_dir=tmp_path), log=log, errors=tmp_path / "errors")
    while "\n" not in log.read_text() and process.exitcode is None:
        time.sleep(0.01)
    process.kill()
    expected = f"{knob} is not set: using the phantom data, which are artificial; to use your own, set --{knob} PATH\n"
    assert log.read_text().startswith(expected)
