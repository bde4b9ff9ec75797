"""Tasks and networks for tests, with the classes of the shipped configuration, and workflows of the shipped configs."""

from pathlib import Path

from monai.bundle import ConfigWorkflow

from bundle.networks import MultiTaskNet
from bundle.tasks import TASKS, Task, build_network, make_tasks

CLASSES = ["other", "COVID-19", "lung cancer"]
HEAD = {"fpn_channels": 8, "box_features": 16, "mask_channels": [8], "score_threshold": 0.0, "detections_per_image": 5}
TINY = {"backbone": "test_efficientnet", "image_size": 64, "decoder_channels": [16, 8, 8, 8, 8], "detection": HEAD}


def some_tasks(*names, **options) -> list[Task]:
    """The tasks of these names, all four without any; or of one mapping name -> weight."""
    tasks = names[0] if names and isinstance(names[0], dict) else names or list(TASKS)
    return make_tasks(tasks, **{"classes": CLASSES, **options})


def some_network(tasks=tuple(TASKS), **options) -> MultiTaskNet:
    """A tiny network with fresh weights: see `bundle.tasks.read_model` for the options."""
    return build_network({"tasks": tasks, **TINY, **options})


def open_workflow(*configs, **entries) -> ConfigWorkflow:
    """An initialised workflow of configs, named without ".json", on the CPU."""
    files = [str(Path(__file__).parents[1] / f"configs/{name}.json") for name in configs]
    entries = {id: str(value) if isinstance(value, Path) else value for id, value in entries.items()}
    workflow = ConfigWorkflow(files, logging_file=False, **{"device": "cpu", **entries})
    workflow.initialize()
    return workflow
