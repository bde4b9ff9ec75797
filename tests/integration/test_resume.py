"""Killed at any moment, the same command goes on and ends where an unbroken run ends, bit for bit."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
STAGES = ["stage_classification", "stage_segmentation", "stage_detection", "stage_joint"]


def start(out: Path, phantom_dir: Path) -> subprocess.Popen:
    """Train with all that a resumed run could lose: workers, schedule, learned and mean weights; an epoch has three steps."""
    entries = {
        "config_file": "['configs/train.json','configs/preset_smoke.json']",
        "ema_momentum": 0.002,
        "output_dir": out,
        "dataset_dir": phantom_dir,
        "max_epochs": 2,
        "batch_size": 2,
        "num_workers": 2,
        "uncertainty_weights": True,
        "device": "cpu",
    }
    command = [sys.executable, "-m", "monai.bundle", "run", "training"]
    command += [str(part) for key, value in entries.items() for part in (f"--{key}", value)]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def kill_when(happened, process: subprocess.Popen, log: Path) -> None:
    while not happened():
        assert process.poll() is None, f"ended before it could be killed: {log.read_text()[-3000:]}"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def bytes_logged(stage: Path) -> int:
    """Size of the stage's TensorBoard events, which grow with every step."""
    return sum(path.stat().st_size for path in stage.glob("events.out.tfevents.*"))


def in_second_epoch(stage: Path):
    """A condition that is met one step after the first epoch of a stage was saved."""
    at_save = []

    def happened() -> bool:
        if (stage / "last.pt").exists():
            at_save.append(bytes_logged(stage))
        return bool(at_save) and bytes_logged(stage) > at_save[0]

    return happened


def in_first_epoch(stage: Path):
    return lambda: bytes_logged(stage) > 300 and not (stage / "last.pt").exists()


def exists(path: Path):
    return path.exists


def scalars(stage: Path) -> dict:
    """(tag, step) -> every value that was ever logged."""
    events = EventAccumulator(str(stage), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    values: dict = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            values.setdefault((tag, event.step), set()).add(event.value)
    return values


def assert_equal(a, b, where: str) -> None:
    """Equal content of two checkpoints, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where} {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{where} {index}")
    else:
        assert a == b, where


@pytest.mark.timeout(1800)
def test_killed_and_resumed_it_ends_as_if_unbroken(tmp_path, phantom_dir):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    whole = start(unbroken, phantom_dir)
    moments = [
        in_second_epoch(broken / "stage_classification"),
        exists(broken / "stage_classification/model.pt"),  # trained, not yet evaluated
        exists(broken / "stage_segmentation/last.pt"),
        exists(broken / "stage_segmentation/evaluate.json"),  # in the evaluation
        exists(broken / "stage_detection/best.pt"),  # between the two checkpoints of an epoch, or just after
        in_first_epoch(broken / "stage_joint"),
    ]
    for happened in moments:
        kill_when(happened, start(broken, phantom_dir), broken.with_suffix(".log"))
    for process, out in ((start(broken, phantom_dir), broken), (whole, unbroken)):
        assert process.wait() == 0, out.with_suffix(".log").read_text()[-3000:]

    log = broken.with_suffix(".log").read_text()
    assert "resumed after epoch 1" in log and "finished before" in log, "it did go on, not start anew"
    for stage in STAGES:
        for name in ("model.pt", "best.pt", "last.pt"):
            a, b = (torch.load(out / stage / name, weights_only=True) for out in (unbroken, broken))
            assert_equal(a, b, f"{stage} {name}")
        for name in ("history.json", "metrics.json", "validation/metrics.json", "validation/per_case.csv"):
            assert (unbroken / stage / name).read_text() == (broken / stage / name).read_text(), f"{stage} {name}"
        assert scalars(unbroken / stage) == scalars(broken / stage), "a step that was repeated logged the same values again"
    assert (unbroken / "stage_table.md").read_text() == (broken / "stage_table.md").read_text()
    assert not list(broken.rglob("*.tmp"))


@pytest.mark.timeout(1800)
def test_a_folder_keeps_the_files_of_the_user_one_training_at_a_time_and_a_run_that_means_the_same(tmp_path, phantom_dir):
    """Through the command line; the unit tests are in tests/training/test_run_folder.py."""

    def train(out, data=phantom_dir, *knobs, cwd=ROOT):
        files = str([str(ROOT / f"configs/{name}.json") for name in ("train", "preset_smoke")])
        entries = ["--output_dir", out, "--dataset_dir", data, "--tasks", "{'classification': 1.0}", "--max_epochs", 2]
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, "--bundle_root", ROOT, *entries, *knobs]
        return subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=-1, stderr=subprocess.STDOUT, text=True)

    out = tmp_path / "RUN"
    mine = [out / name for name in ("validation/notes.txt", "evaluation/metrics.json", "notes.md")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    first = train(out)
    while not (out / "last.pt").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    second, _ = train(out).communicate()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    holder = f"error: {out}: in use by process {first.pid} on "
    assert second.splitlines()[-1].startswith(holder) and "Traceback" not in second

    data = tmp_path / "moved"
    shutil.copytree(phantom_dir, data)
    resumed, _ = train("./RUN", data, cwd=tmp_path).communicate()
    assert "resumed after epoch 1" in resumed and (out / "model.pt").exists(), resumed[-3000:]

    anew, _ = train(out, data, "--seed", 1, "--resume", "False").communicate()
    assert (out / "model.pt").exists() and "resumed" not in anew, anew[-3000:]
    assert all(path.read_text() == "mine" for path in mine)
