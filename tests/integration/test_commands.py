"""The commands of the README, typed as a user would, on phantom data."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STAGES = ["stage_classification", "stage_segmentation", "stage_detection", "stage_joint"]


def bundle(*arguments, log: Path, terminal: bool = False) -> str:
    """Run the command to its end and return what it writes to stderr; stdout goes to `log`.

    With `terminal` stderr is one, otherwise a pipe.
    """
    command = [sys.executable, "-m", "monai.bundle", "run", *map(str, arguments)]
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:  # a new one has no columns, and a bar no room
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with log.open("w") as stdout, subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=writer) as process:
        os.close(writer)
        written = b""
        try:
            while part := os.read(reader, 65536):
                written += part
        except OSError:  # how a terminal on Linux says that its last writer is gone
            pass
        os.close(reader)
        assert process.wait() == 0, log.read_text()[-3000:] + written.decode()[-3000:]
    return written.decode()


def shows_bar(name: str, stderr: str) -> bool:
    """Whether a progress bar of this name was drawn."""
    return re.search(rf"\r{name}[^\r]*\d%", stderr) is not None


def configs(*names):
    return str([f"configs/{name}.json" for name in names])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, phantom_dir):
    """Folder of a trained curriculum, what it printed and what it wrote to stderr."""
    out = tmp_path_factory.mktemp("commands") / "run"
    arguments = ["--config_file", configs("train", "preset_smoke"), "--output_dir", out, "--dataset_dir", phantom_dir]
    stderr = bundle("training", *arguments, log=out.with_suffix(".log"))
    return out, out.with_suffix(".log").read_text(), stderr


def test_curriculum_prints_a_line_an_epoch_and_the_stage_table(trained):
    out, printed, stderr = trained
    assert (out / "stage_table.md").read_text() in printed
    for stage in STAGES:
        assert re.search(rf"{stage}: epoch 1 of 1: loss [\d.]+, .*score [\d.]+", printed)
    for noise in ("nvImageCodec", "COCO", "Engine run", "Logging file"):
        assert noise not in printed + stderr
    assert printed.count("\n") < 40, printed
    assert not any(shows_bar(name, stderr) for name in ("train", "validate", "evaluate")), "bars are for terminals"


def test_a_stage_can_be_repeated_by_itself_from_its_resolved_config(trained, tmp_path):
    stage, again = trained[0] / "stage_detection", tmp_path / "again"
    arguments = ["--config_file", stage / "train.json", "--output_dir", again]
    stderr = bundle(*arguments, log=tmp_path / "log", terminal=True)
    assert shows_bar("train", stderr) and shows_bar("validate", stderr)
    before, after = (torch.load(folder / "model.pt", weights_only=True) for folder in (stage, again))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert any(key.startswith("heads.classification") for key in after), "earlier heads travel along"


def test_evaluation_writes_metrics_with_intervals_and_a_row_a_case(trained, tmp_path, phantom_dir):
    out = trained[0]
    arguments = ["--config_file", configs("train", "preset_smoke", "evaluate"), "--output_dir", out, "--bootstrap", 20]
    stderr = bundle(*arguments, "--dataset_dir", phantom_dir, log=tmp_path / "log", terminal=True)
    assert shows_bar("evaluate", stderr)
    report = json.loads((out / "evaluation/metrics.json").read_text())
    assert report.keys() == {"classification", "segmentation", "reconstruction", "detection"}
    low, high = report["segmentation"]["dice"]["ci95"]
    assert 0 <= low <= report["segmentation"]["dice"]["value"] <= high <= 1
    assert (out / "evaluation/per_case.csv").read_text().count("\n") == 7
