"""Fixtures of the training: a run in this process, and a finished one."""

import logging
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigWorkflow

ROOT = Path(__file__).parents[2]
CONFIGS = [str(ROOT / f"configs/{name}.json") for name in ("train", "preset_smoke")]


@pytest.fixture(autouse=True)
def logging_as_before():
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level, sys.excepthook = handlers, level, hook


@pytest.fixture(scope="session")
def run(phantom_dir):
    """Run a config workflow in this process, on the CPU, with an epoch of three steps."""

    def run(out, run_id="run", overlays=(), **entries):
        entries = {"dataset_dir": str(phantom_dir), "batch_size": 2, "device": "cpu", **entries}
        files = CONFIGS + [str(ROOT / f"configs/{name}.json") for name in overlays]
        workflow = ConfigWorkflow(files, run_id=run_id, bundle_root=str(ROOT), output_dir=str(out), **entries)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        return Path(out)

    return run


@pytest.fixture(scope="session")
def finished(run, tmp_path_factory):
    """Folder of a finished run of classification and reconstruction, only to be read."""
    return run(tmp_path_factory.mktemp("run") / "finished", tasks={"classification": 1.0, "reconstruction": 1.0})
