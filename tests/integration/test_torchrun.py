"""Two processes on the CPU, as torchrun starts them, do what one does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import command
import numpy as np
import pytest
import torch
from PIL import Image

TORCHRUN = Path(sys.executable).with_name("torchrun")


def run(words: list[str], log: Path) -> str:
    """Run it to its end in two processes, with the environment that torchrun gives to each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [command.start(*words, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0, log.read_text()[-3000:]
    return log.read_text()


def run_alone(words: list[str]) -> str:
    done = command.run(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def learned(folder: Path) -> tuple[list, dict]:
    history = json.loads((folder / "history.json").read_text())
    return history, torch.load(folder / "model.pt", weights_only=True)


MULTI_TRAIN = ("train", "preset_smoke", "multi_gpu_train")
# All that may differ between processes is off: what is drawn for each image, and the statistics of a batch.
SAME = {
    "tasks": {"classification": 1.0},
    "backbone": "test_efficientnet_ln",
    "augmentation": "{'_target_': 'Compose', 'transforms': []}",
    "max_epochs": 3,
    "device": "cpu",
}


def test_two_processes_learn_as_one_with_twice_the_batch(tmp_path, phantom_dir):
    data = {"dataset_dir": phantom_dir, **SAME}
    run_alone(command.bundle(output_dir=tmp_path / "one", batch_size=4, **data))
    run(command.bundle(configs=MULTI_TRAIN, output_dir=tmp_path / "two", batch_size=2, **data), tmp_path / "log")
    (one, weights), (two, weights_of_two) = learned(tmp_path / "one"), learned(tmp_path / "two")
    assert len(one) == len(two) == 3
    for epoch, epoch_of_two in zip(one, two):
        assert epoch_of_two == pytest.approx(epoch, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(weights_of_two[name], value, rtol=1e-3, atol=1e-5, msg=name)


def of_rank(rank: int, launcher: int) -> int | None:
    """Process of a rank among the children of torchrun."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in path.joinpath("environ").read_bytes().split(b"\0"):
                return int(path.name)
        except OSError:  # it has ended
            pass
    return None


def test_a_killed_rank_ends_the_job_and_the_run_resumes(tmp_path, phantom_dir):
    """With all four tasks: most batches of a process have no mask or no box, and nobody waits for its head."""
    knobs = {"dataset_dir": phantom_dir, "batch_size": 2, "max_epochs": 4, "configs": MULTI_TRAIN, "device": "cpu"}
    run(command.bundle(output_dir=tmp_path / "unbroken", **knobs), tmp_path / "unbroken.log")
    log, broken = tmp_path / "broken.log", tmp_path / "broken"
    line = [TORCHRUN, "--nproc_per_node=2", "-m", *command.bundle(output_dir=broken, **knobs)]
    with log.open("w") as file:
        process = subprocess.Popen(line, cwd=command.ROOT, stdout=file, stderr=subprocess.STDOUT)
    while not (broken / "last.pt").exists():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.002)
    os.kill(of_rank(1, process.pid), signal.SIGKILL)
    assert process.wait(timeout=120) != 0
    assert not (broken / "model.pt").exists()
    assert "resumed after epoch" in run(command.bundle(output_dir=broken, **knobs), log)
    (history, weights), (history_again, weights_again) = learned(tmp_path / "unbroken"), learned(broken)
    assert history == history_again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)

    one = run_alone(evaluation(tmp_path, phantom_dir, "one"))
    two = run(evaluation(tmp_path, phantom_dir, "two", "multi_gpu_train"), tmp_path / "two.log")
    assert one.count("metrics.json: ") == two.count("metrics.json: ") == 1, "one process writes"
    reports = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    numbers, numbers_of_two = (dict(leaves(report)) for report in reports)
    assert len(numbers) > 50
    assert numbers_of_two == pytest.approx(numbers, abs=1e-6, nan_ok=True)
    names = [[line.split(",")[0] for line in (tmp_path / name / "per_case.csv").open()] for name in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 7
    galleries = [np.asarray(Image.open(tmp_path / name / "failures.png"), int) for name in ("one", "two")]
    assert galleries[0].shape == galleries[1].shape and np.ptp(galleries[0]) > 200
    assert (abs(galleries[0] - galleries[1]) > 8).mean() < 0.001, "the same cases in the same order"

    chosen_by = json.loads((tmp_path / "unbroken/metrics.json").read_text())
    for name in ("mse", "ssim"):  # both processes have validated the network that is kept, with its running statistics
        again = reports[0]["reconstruction"][name]["value"]
        assert chosen_by[f"reconstruction_{name}"] == pytest.approx(again, rel=1e-6), name


def evaluation(folder: Path, phantom_dir: Path, name: str, *configs: str) -> list[str]:
    knobs = {"dataset_dir": phantom_dir, "output_dir": folder / "unbroken", "evaluation_dir": folder / name}
    knobs |= {"split": "validation", "bootstrap": 20, "failures": True, "device": "cpu"}
    return command.bundle(configs=("train", "preset_smoke", "evaluate", *configs), **knobs)


def leaves(item, path: str = ""):
    """(path, number) of every number in a report."""
    if isinstance(item, (int, float)):
        yield path, item
    elif isinstance(item, (dict, list)):
        for key, value in item.items() if isinstance(item, dict) else enumerate(item):
            yield from leaves(value, f"{path}/{key}")


def test_the_curriculum_runs_in_two_processes_and_one_of_them_writes(tmp_path, phantom_dir):
    out = tmp_path / "run"
    knobs = {"configs": MULTI_TRAIN, "output_dir": out, "dataset_dir": phantom_dir, "batch_size": 2, "device": "cpu"}
    log = run(command.bundle("training", **knobs), tmp_path / "log")
    stages = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert stages == ["stage_classification", "stage_detection", "stage_joint", "stage_segmentation"]
    for stage in stages:
        assert log.count(f"{stage}: epoch 1 of 1") == 1
        assert len(list((out / stage).glob("events.out.tfevents.*"))) == 2, "losses and metrics of one process"
    assert log.count((out / "stage_table.md").read_text()) == 1
    assert (out / "model.pt").exists() and not list(out.rglob("*.tmp"))


def test_torchrun_without_the_overlay_is_refused_in_one_line(tmp_path, phantom_dir):
    """One of two processes, as torchrun starts them."""
    words = command.bundle(output_dir=tmp_path / "run", dataset_dir=phantom_dir, device="cpu")
    done = command.run(*words, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    refusal = "error: torchrun: found 2 processes that do not know of one another, expected configs/multi_gpu_train.json"
    assert done.returncode != 0 and done.stderr.splitlines()[-1].startswith(refusal)
    assert not list((tmp_path / "run").glob("*.pt"))
