"""Tasks for tests, with the classes of the shipped configuration."""

from bundle.tasks import TASKS, Task, make_tasks

CLASSES = ["other", "COVID-19", "lung cancer"]


def some_tasks(*names, **options) -> list[Task]:
    """The tasks of these names, all four without any; or of one mapping name -> weight."""
    tasks = names[0] if names and isinstance(names[0], dict) else names or list(TASKS)
    return make_tasks(tasks, **{"classes": CLASSES, **options})
