"""The folder of a run: what is kept in it, whether a run in it may be resumed, and what is removed to start anew."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import ignite.distributed as idist
import torch

from bundle.config import leaves, running_config
from bundle.errors import UserError
from bundle.files import write_json

# What MONAI adds where an experiment is tracked, and a curriculum hands on to its stages.
TRACKING = {"tracking_uri", "experiment_name", "run_name", "save_execute_config"}
# Entries that say where and how fast a run is computed, not what: they may differ when it is resumed.
CHANGEABLE = {"resume", "device", "num_workers", "cache_rate", "stages", *TRACKING}  # a stage has its entries of stages itself


def environment() -> dict:
    """Versions of Python and of the packages that decide a result, and the machine, without its name."""
    names = ("monai", "torch", "torchvision", "pytorch-ignite", "timm", "numpy", "nibabel", "itk")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "system": platform.platform(),
        "cpu": f"{os.cpu_count()} x {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def start_run(output_dir: str, resume: bool = True, init_checkpoint=None) -> None:
    """Open the folder of a run: keep its configuration, versions and machine, and decide whether it is resumed.

    Args:
        output_dir: folder of the run, made if missing.
        resume: go on from the folder's last checkpoint if there is one; False starts anew.
        init_checkpoint: weights that the run starts from.

    Raises:
        UserError: if there is a checkpoint made with another configuration, naming the first key that differs, or if to
            start anew would remove `init_checkpoint`.
    """
    folder, config = Path(output_dir), running_config()
    if idist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            check_resumable(folder, config)
        else:
            check_kept(init_checkpoint, [folder])
            remove_run(folder)
        write_json(config, folder / "config.json")
        write_json(environment(), folder / "environment.json")
    idist.barrier()


def check_resumable(folder: Path, config: Mapping) -> None:
    """Refuse to go on with a run under another configuration; `CHANGEABLE` may differ.

    Raises:
        UserError: naming the first key that differs.
    """
    kept = folder / "config.json"
    if not (folder / "last.pt").exists() or not kept.exists():
        return
    before, now = dict(leaves(json.loads(kept.read_text()))), dict(leaves(config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key.split("::")[0] not in CHANGEABLE:
            raise UserError(
                f"{folder}: holds a run with {key} {before.get(key)!r}, found {now.get(key)!r}; set another output_dir "
                f"(with init_checkpoint {folder / 'model.pt'} to train on from its weights), or resume false to start anew"
            )


def check_kept(init_checkpoint, folders: Iterable[Path]) -> None:
    """Refuse to start anew, in these folders, from weights that lie in one of them.

    Raises:
        UserError: naming them.
    """
    if init_checkpoint and Path(init_checkpoint).resolve().parent in {folder.resolve() for folder in folders}:
        raise UserError(
            f"init_checkpoint: found {init_checkpoint} in a folder that resume false would clear, expected it elsewhere; "
            "set another output_dir"
        )


def remove_run(folder: Path) -> None:
    """Remove what a run left in its folder, so that nothing old passes for a result of the next one."""
    results = ("last.pt", "best.pt", "model.pt", "history.json", "metrics.json", "curves.png")
    made_of_model = ("calibrated.pt", "reference.pt")  # by configs/calibrate.json and configs/reference.json
    for path in [*(folder / name for name in (*results, *made_of_model)), *folder.glob("events.out.tfevents.*")]:
        path.unlink(missing_ok=True)
    for evaluation in ("evaluation", "validation", "lungs_only", "lungs_removed"):
        shutil.rmtree(folder / evaluation, ignore_errors=True)
