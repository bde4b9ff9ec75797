"""The folder of a training run: who writes to it, whether the run in it may go on, and what starting anew removes."""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import ignite.distributed as idist
import torch

from bundle.config import leaves
from bundle.errors import UserError
from bundle.files import file_hash, list_files, listed_files, locked, remove_listed_files, stop_listing, text_hash, write_json

# What MONAI adds where an experiment is tracked, and a curriculum hands on to its stages.
TRACKING = {"tracking_uri", "experiment_name", "run_name", "save_execute_config"}
# Entries that may differ when a run is resumed: they say where and how fast it is computed, not what (workers of a data loader
# have random numbers of their own). The datalist and init_checkpoint are compared by content; a stage has its entries of
# stages itself.
CHANGEABLE = {"resume", "device", "cache_rate", "stages", *TRACKING}
CHANGEABLE |= {"bundle_root", "dataset_dir", "output_dir", "datalist", "init_checkpoint"}
RESULTS = ("last.pt", "best.pt", "model.pt", "history.json", "metrics.json", "curves.png", "config.json", "environment.json")
_locks: dict[str, ExitStack] = {}  # that this process holds, by absolute folder


def open_run(output_dir, config: Mapping, resume: bool = True, init_checkpoint=None, datalist=None) -> None:
    """Open the folder of a run: lock it, check that it can be resumed, keep its raw configuration, and list its files.

    The first of several processes does all this, and the others wait. Without `resume` the files of the manifest are removed
    first. `close_run` ends it.
    """
    folder = Path(output_dir)
    if idist.get_rank() == 0:
        lock_folder(folder)
        try:
            inputs = hash_inputs(datalist, init_checkpoint)
            check_resumable(folder, config, inputs) if resume else check_kept(init_checkpoint, [folder])
            check_own_files(folder, RESULTS)
            if not resume:
                remove_listed_files(folder)
            list_files(folder)
            write_json(config, folder / "config.json")
            write_json({**environment(), "inputs": inputs}, folder / "environment.json")
        except BaseException:
            close_run(folder)
            raise
    idist.barrier()


def close_run(output_dir) -> None:
    """End the listing of a run's files and let others train in its folder."""
    stop_listing(output_dir)
    if lock := _locks.pop(os.path.abspath(output_dir), None):
        lock.close()


def lock_folder(folder: Path) -> None:
    """Lock a folder until `close_run` (see `bundle.files.locked`), and remove temporary files of killed processes."""
    key = os.path.abspath(folder)
    if key not in _locks:
        lock = ExitStack()
        lock.enter_context(locked(folder))
        _locks[key] = lock
    for place in {folder, *((folder / name).parent for name in listed_files(folder))}:
        for path in place.glob(".*.tmp"):
            if re.fullmatch(r"\.[0-9a-f]{32}\.tmp", path.name):
                path.unlink(missing_ok=True)


def hash_inputs(datalist, init_checkpoint) -> dict[str, str]:
    """SHA-256 of the files that a run starts from, if they are there; the datalist by its content."""
    hashes = {"init_checkpoint": file_hash(init_checkpoint)} if init_checkpoint else {}
    if datalist and Path(datalist).is_file():
        content = json.loads(Path(datalist).read_text(encoding="utf-8-sig"))
        hashes["datalist"] = text_hash(json.dumps(content, sort_keys=True))
    return {name: digest for name, digest in hashes.items() if digest}


def check_resumable(folder: Path, config: Mapping, inputs: Mapping[str, str]) -> None:
    """Check that a run goes on with the same configuration and `hash_inputs`; `CHANGEABLE` may differ."""
    if not {"last.pt", "config.json"} <= set(listed_files(folder)) or not (folder / "last.pt").exists():
        return
    before, now = dict(leaves(json.loads((folder / "config.json").read_text()))), dict(leaves(config))
    keys = [key for key in sorted(before.keys() | now.keys()) if key.split("::")[0] not in CHANGEABLE]
    differ = [f"{key} {before.get(key)!r}, found {now.get(key)!r}" for key in keys if not _same(before.get(key), now.get(key))]
    known = json.loads((folder / "environment.json").read_text()).get("inputs", {})
    changed = [name for name in sorted(known.keys() & inputs.keys()) if known[name] != inputs[name]]
    differ += [f"another content of {name}" for name in changed]
    if differ:
        raise UserError(f"{folder}: holds a run with {differ[0]}; {_another(folder)}, or resume false to start anew")


def _same(before, now) -> bool:
    texts = isinstance(before, str) and isinstance(now, str)
    return before == now or (texts and os.path.abspath(before) == os.path.abspath(now))


def check_own_files(folder: Path, names: Iterable[str]) -> None:
    """Check that none of these files would be overwritten without being listed in the manifest."""
    if foreign := [name for name in names if name not in listed_files(folder) and (folder / name).exists()]:
        found = f"found {', '.join(foreign)}, which its manifest does not list (yours, or of a version before 0.2.0)"
        raise UserError(f"{folder}: {found}, expected a folder without; {_another(folder)}")


def _another(folder: Path) -> str:
    return f"set another output_dir (with init_checkpoint {folder / 'model.pt'} to train on from its weights)"


def check_kept(init_checkpoint, folders: Iterable[Path]) -> None:
    """Check that starting anew in these folders does not remove the weights to start from."""
    removed = {(folder / name).resolve() for folder in folders for name in listed_files(folder)}
    if init_checkpoint and Path(init_checkpoint).resolve() in removed:
        found = f"found {init_checkpoint}, which resume false would remove"
        raise UserError(f"init_checkpoint: {found}, expected it elsewhere; set another output_dir")


def environment() -> dict:
    """Versions of Python and of the packages that decide a result, and the machine, without its name."""
    names = ("monai", "torch", "torchvision", "pytorch-ignite", "timm", "numpy", "nibabel", "SimpleITK")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "system": platform.platform(),
        "cpu": f"{os.cpu_count()} x {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
