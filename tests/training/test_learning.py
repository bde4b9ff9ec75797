"""The shipped training learns: 65 steps of a tiny network on six slices of the phantom, without augmentation."""

import json
from pathlib import Path

from monai.bundle import ConfigWorkflow

from bundle.names import TASKS

ROOT = Path(__file__).parents[2]


def test_the_loss_of_every_task_halves(tmp_path, phantom_dir):
    """From the first to the last five steps; too few for the lesions to be found."""
    entries = {"dataset_dir": str(phantom_dir), "output_dir": str(tmp_path / "out"), "device": "cpu", "seed": 0}
    entries |= {"epoch_size": 40, "batch_size": 8, "max_epochs": 13, "val_interval": 13}
    entries |= {"learning_rate": 0.005, "segmentation_loss": "dice_ce", "augmentation::transforms": []}
    entries |= {"backbone": "test_resnet.r160_in1k"}
    files = [str(ROOT / f"configs/{name}.json") for name in ("train", "preset_smoke")]
    workflow = ConfigWorkflow(files, logging_file=False, **entries)
    workflow.initialize()
    workflow.run()
    history = json.loads((tmp_path / "out/history.json").read_text())
    for task in TASKS:
        assert history[-1][f"loss_{task}"] < history[0][f"loss_{task}"] / 2, task
