"""The shipped training learns: 65 steps of a tiny network on six slices of the phantom, without augmentation."""

import json

import torch
from monai.metrics import compute_dice
from some_tasks import open_workflow

from bundle.names import TASKS


def test_the_loss_of_every_task_halves_and_lesions_are_found(tmp_path, phantom_dir):
    """From the first to the last five steps; the lesions are those of the training."""
    entries = {"dataset_dir": phantom_dir, "output_dir": tmp_path / "out", "seed": 0, "epoch_size": 40, "batch_size": 8, "max_epochs": 13, "val_interval": 13, "draws": {"segmentation": 4.0}}
    entries |= {"learning_rate": 0.005, "segmentation_loss": "dice_ce", "augmentation::transforms": []}
    workflow = open_workflow("train", "preset_smoke", decoder_channels=[64, 64, 32, 32, 16], **entries)
    workflow.run()
    history = json.loads((tmp_path / "out/history.json").read_text())
    for task in TASKS:
        assert history[-1][f"loss_{task}"] < history[0][f"loss_{task}"] / 2, task
    network, slices = map(workflow.parser.get_parsed_content, ("network", "train#dataset"))
    slices = [sample for sample in slices if "mask" in sample and sample["mask"].any()]
    image, mask = (torch.stack([sample[key].as_tensor() for sample in slices]) for key in ("image", "mask"))
    with torch.no_grad():
        found = network.eval()(image)["segmentation"] > 0
    assert slices and compute_dice(found.float(), mask.float()).mean() > 0.3
