"""Fixtures of the training: a run in this process, and a finished one."""

from pathlib import Path

import pytest
from some_tasks import open_workflow


@pytest.fixture(scope="session")
def run(phantom_dir):
    """Run a config workflow in this process, with an epoch of three steps."""

    def run(out, run_id="run", overlays=(), **entries):
        entries = {"dataset_dir": phantom_dir, "batch_size": 2, "output_dir": out, **entries}
        workflow = open_workflow("train", "preset_smoke", *overlays, run_id=run_id, **entries)
        workflow.run()
        workflow.finalize()
        return Path(out)

    return run


@pytest.fixture(scope="session")
def finished(run, tmp_path_factory):
    """Folder of a finished run of classification and reconstruction, only to be read."""
    return run(tmp_path_factory.mktemp("run") / "finished", tasks={"classification": 1.0, "reconstruction": 1.0})
