"""What a user sees who gives wrong files or knobs: one line, and exit status 1."""

import json
import re
import shutil
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import command

from bundle.data.phantom import make_phantom

TRAIN, EVALUATE = ["train", "preset_smoke"], ["train", "preset_smoke", "evaluate"]


def change(**entries):
    """Change entries of the first training record."""

    def apply(folder, datalist):
        datalist["training"][0].update(entries)

    return apply


def empty(folder, datalist):
    datalist.update(training=[], validation=[], test=[])


def missing(folder, datalist):
    datalist.clear()  # the file is not written


def same_group(folder, datalist):
    datalist["test"][0]["group"] = datalist["training"][0]["group"]


def truncate(folder, datalist):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])  # the header is whole, the pixels are not
    datalist["training"][0]["image"] = "cut.png"


def nan_pixels(folder, datalist):
    nibabel.save(nibabel.Nifti1Image(np.full((64, 64, 1), np.nan, np.float32), np.eye(4)), folder / "nan.nii.gz")
    datalist["training"][0]["image"] = "nan.nii.gz"


def small_mask(folder, datalist):
    Image.new("L", (32, 48)).save(folder / "small.png")
    datalist["training"][0]["mask"] = "small.png"


def other_weights(folder, datalist):
    torch.save({"encoder.features.0.weight": torch.zeros(64, 1, 3, 3)}, folder / "other.pt")


# [configs, arguments, what is done to the data, words of the line]; DATA stands for the folder
CASES = {
    "unknown config key": [TRAIN, ["--learning_rat", "0.1"], None, r"found 'learning_rat', .* near matches: learning_rate"],
    "value that is no whole number": [
        TRAIN,
        ["--batch_size", "2.5"],
        None,
        r"error: batch_size: found 2.5, expected a whole number of at least 1$",
    ],
    "text for a mapping": [
        TRAIN,
        ["--tasks", "segmentation"],
        None,
        r"error: tasks: found 'segmentation', expected task names with weights, such as {'segmentation': 1.0}$",
    ],
    "decimal comma": [
        ["inference"],
        ["--score_threshold", "0,3"],
        None,
        r"error: score_threshold: found \[0, 3\], expected a number from 0 to 1$",
    ],
    "knob of another workflow": [
        TRAIN,
        ["--checkpoint", "DATA/model.pt"],
        None,
        r"found 'checkpoint', a knob of evaluate and inference that train does not use, .*; near matches: init_checkpoint$",
    ],
    "unknown backbone": [
        TRAIN,
        ["--backbone", "resnet5"],
        None,
        r"backbone: found 'resnet5', expected .* near matches: resnet50",
    ],
    "unknown task": [
        TRAIN,
        ["--tasks", "{'segmentaton': 1.0}"],
        None,
        r"tasks: found 'segmentaton', expected one or more of",
    ],
    "missing datalist": [TRAIN, [], missing, r"DATA/datalist.json: no such datalist; make one with scripts/prepare_data.py"],
    "empty datalist": [TRAIN, [], empty, r"DATA/datalist.json: found no record, expected a non-empty list"],
    "class out of range": [
        TRAIN,
        [],
        change(**{"class": 3}),
        r"training\[0\] .*: class: found 3, expected a whole number from 0 to 2",
    ],
    "group in two splits": [
        TRAIN,
        [],
        same_group,
        r"test\[0\] .*: group: found '.*' in test and in training, expected it in one",
    ],
    "box outside": [
        TRAIN,
        [],
        change(boxes=[[40, 8, 70, 20]]),
        r"boxes: found \[40, 8, 70, 20\] outside the image, expected x from 0 to 64",
    ],
    "box turned round": [
        TRAIN,
        [],
        change(boxes=[[40, 8, 30, 20]]),
        r"boxes: found \[40, 8, 30, 20\], expected x1 < x2 and y1 < y2",
    ],
    "missing image": [
        TRAIN,
        [],
        change(image="none.png"),
        r"image: found no file .*none.png, expected it there; check dataset_dir",
    ],
    "truncated image": [TRAIN, [], truncate, r"DATA/cut.png: cannot be read \(.*truncated.*\)"],
    "NaN pixels": [TRAIN, [], nan_pixels, r"DATA/nan.nii.gz: found NaN or infinite pixels, expected finite values"],
    "mask of another size": [TRAIN, [], small_mask, r"mask: found \(columns, rows\) = \(32, 48\), expected \(64, 64\)"],
    "missing checkpoint": [EVALUATE, [], None, r"OUT/model.pt: no such checkpoint; train first, or name another one"],
    "other architecture": [
        EVALUATE,
        ["--checkpoint", "DATA/other.pt"],
        other_weights,
        r"DATA/other.pt: found encoder.model.conv_stem.weight absent, expected \(24, 1, 3, 3\); it was made with another",
    ],
}


def refusal(case, small_data, folder):
    """Run the command of a case on a copy of the data, spoilt; returns it, data and output folder."""
    configs, arguments, spoil, _ = case
    data, out = folder / "data", folder / "out"
    shutil.copytree(small_data, data)
    if spoil:
        datalist = json.loads((data / "datalist.json").read_text())
        spoil(data, datalist)
        if datalist:
            (data / "datalist.json").write_text(json.dumps(datalist))
        else:
            (data / "datalist.json").unlink()
    words = command.bundle(configs=configs, dataset_dir=data, output_dir=out)
    return command.run(*words, *(argument.replace("DATA", str(data)) for argument in arguments)), data, out


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    """Phantom data of one slice a patient."""
    return Path(make_phantom(tmp_path_factory.mktemp("bad") / "data", size=64, groups=(3, 3, 3), slices_per_group=1))


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_refused_in_one_line(name, small_data, tmp_path):
    done, data, out = refusal(CASES[name], small_data, tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr and " ERROR " not in done.stdout, done.stdout + done.stderr
    lines = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1 and lines[0] == done.stderr.splitlines()[-1]
    expected = CASES[name][-1].replace("DATA", str(data)).replace("OUT", str(out))
    assert re.search(expected, lines[0]), lines[0]


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
