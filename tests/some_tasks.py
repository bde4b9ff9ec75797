"""Tasks and networks for tests, with the classes of the shipped configuration."""

from bundle.networks import MultiTaskNet
from bundle.tasks import TASKS, Task, build_network, make_tasks

CLASSES = ["other", "COVID-19", "lung cancer"]


def some_tasks(*names, **options) -> list[Task]:
    """The tasks of these names, all four without any; or of one mapping name -> weight."""
    tasks = names[0] if names and isinstance(names[0], dict) else names or list(TASKS)
    return make_tasks(tasks, **{"classes": CLASSES, **options})


def some_network(tasks=tuple(TASKS), backbone="test_efficientnet", **options) -> MultiTaskNet:
    """A network with fresh weights: see `MultiTaskNet` for the options."""
    return build_network({"tasks": tasks, "backbone": backbone, **options})
