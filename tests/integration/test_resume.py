"""Killed at any moment, the same command goes on and ends where an unbroken run ends, bit for bit.

CHEST_CT_KILLS is how often it is killed at random moments, beside the chosen ones; 0 by default.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import command

STAGES = ["stage_classification", "stage_segmentation", "stage_detection", "stage_joint"]


def start(out: Path, phantom_dir: Path):
    """Train with all that a resumed run could lose: workers, schedule, learned and mean weights; an epoch has three steps."""
    knobs = {"ema_momentum": 0.002, "uncertainty_weights": True, "max_epochs": 2, "batch_size": 2, "num_workers": 2}
    words = command.bundle("training", output_dir=out, dataset_dir=phantom_dir, device="cpu", **knobs)
    return command.start(*words, log=out.with_suffix(".log"))


def wait_until(happened, process, log: Path) -> None:
    while not happened():
        assert process.exitcode is None, f"ended before it happened: {log.read_text()[-3000:]}"
        time.sleep(0.002)


def kill(process, out: Path) -> None:
    """Kill a training; every file that has its final name must be whole."""
    process.kill()
    process.join()
    for path in out.rglob("*.pt"):
        torch.load(path, weights_only=True)
    for path in out.rglob("*.json"):
        json.loads(path.read_text())


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
        (broken / "stage_classification/model.pt").exists,  # trained, not yet evaluated
        (broken / "stage_segmentation/last.pt").exists,
        (broken / "stage_segmentation/evaluate.json").exists,  # in the evaluation
        (broken / "stage_detection/best.pt").exists,  # between the two checkpoints of an epoch, or just after
        in_first_epoch(broken / "stage_joint"),
    ]
    for happened in moments:
        process = start(broken, phantom_dir)
        wait_until(happened, process, broken.with_suffix(".log"))
        kill(process, broken)
        assert process.exitcode == -signal.SIGKILL
    at_random = random.Random(0)
    for _ in range(int(os.environ.get("CHEST_CT_KILLS", 0))):
        process = start(broken, phantom_dir)
        process.join(at_random.uniform(0, 60))
        kill(process, broken)
        assert process.exitcode in (0, -signal.SIGKILL), broken.with_suffix(".log").read_text()[-3000:]
    for process, out in ((start(broken, phantom_dir), broken), (whole, unbroken)):
        process.join()
        assert process.exitcode == 0, out.with_suffix(".log").read_text()[-3000:]

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

    def words(out, data=phantom_dir, **knobs):
        knobs |= {"bundle_root": command.ROOT, "tasks": {"classification": 1.0}, "max_epochs": 2}
        return command.bundle(output_dir=out, dataset_dir=data, **knobs)

    out = tmp_path / "RUN"
    mine = [out / name for name in ("validation/notes.txt", "evaluation/metrics.json", "notes.md")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    log = tmp_path / "log"
    first = command.start(*words(out), log=log)
    wait_until((out / "last.pt").exists, first, log)
    os.kill(first.pid, signal.SIGSTOP)
    second = command.run(*words(out)).stderr
    first.kill()
    first.join()
    holder = f"error: {out}: in use by process {first.pid} on "
    assert second.splitlines()[-1].startswith(holder) and "Traceback" not in second

    data = tmp_path / "moved"
    shutil.copytree(phantom_dir, data)
    resumed = command.run(*words("./RUN", data), cwd=tmp_path)
    assert "resumed after epoch 1" in resumed.stdout and (out / "model.pt").exists(), resumed.stderr[-3000:]

    anew = command.run(*words(out, data, seed=1, resume=False))
    assert (out / "model.pt").exists() and "resumed" not in anew.stdout, anew.stderr[-3000:]
    assert all(path.read_text() == "mine" for path in mine)
