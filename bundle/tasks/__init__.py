"""The tasks, one file each.

A task says what it reads from a record and how that becomes part of a batch; makes its head; computes its loss; measures its
answers, case by case and over cases; draws them; and joins the answers of several views or networks. `Task` in base.py lists
all of it, with defaults. The rest of the package names no task.

To add one, write a subclass of `Task` in a file here, and add it to `TASKS` and its name to `bundle.names.TASKS`; name its
answer in configs/metadata.json. A task outside the package needs none of this: name it in `tasks` of the configuration by its
dotted path, such as "my_package.severity.Severity".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pydoc import ErrorDuringImport, locate

from bundle.errors import UserError
from bundle.networks import MultiTaskNet, load_weights, read_model
from bundle.tasks.base import Figures, Task
from bundle.tasks.classification import Classification
from bundle.tasks.detection import Detection
from bundle.tasks.reconstruction import Reconstruction
from bundle.tasks.segmentation import Segmentation

TASKS = {task.name: task for task in (Classification, Segmentation, Reconstruction, Detection)}

__all__ = [
    "TASKS",
    "Classification",
    "Detection",
    "Figures",
    "Reconstruction",
    "Segmentation",
    "Task",
    "build_network",
    "make_tasks",
    "open_network",
]


def make_tasks(
    tasks: Mapping[str, float] | Iterable[str], draws: Mapping[str, float] | None = None, **options
) -> list[Task]:
    """Make the tasks of a configuration, those of `TASKS` first and in its order.

    Args:
        tasks: names of tasks, or name -> weight in the loss. A task outside the package is named by its dotted path.
        draws: name -> share of the samples that are drawn for the task, in any unit; 1 for a task that is not named.
        **options: knobs and entries of a checkpoint's description, of which each task takes what it names.

    Raises:
        UserError: if there is no task, or a name in `tasks` or `draws` is unknown.
    """
    names = list(tasks)
    found = {name: TASKS[name] if name in TASKS else _outside(name) for name in names}
    if not names:
        raise UserError(f"tasks: found no task, expected one or more of {', '.join(TASKS)}")
    if unknown := (draws or {}).keys() - TASKS.keys() - found.keys():
        raise UserError(f"draws: found {', '.join(sorted(unknown))}, expected names of tasks: {', '.join({**TASKS, **found})}")
    made = []
    for name in [*(name for name in TASKS if name in found), *(name for name in names if name not in TASKS)]:
        task = found[name](**options)
        if isinstance(tasks, Mapping):
            task.weight = float(tasks[name])
        task.share = (draws or {}).get(name, 1.0)
        made.append(task)
    return made


def _outside(path: str) -> type[Task]:
    try:
        found = locate(path) if "." in path else None
    except ErrorDuringImport as error:
        raise UserError(f"tasks: found {path!r}, which cannot be imported ({error.value})") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(
            f"tasks: found {path!r}, expected one or more of {', '.join(TASKS)}, or the dotted path of a subclass of "
            "bundle.tasks.Task"
        )
    return found


def build_network(model: Mapping, **changes) -> MultiTaskNet:
    """Build the network of a description, see `bundle.networks.read_model`, with changes to it."""
    model = {**model, **changes}
    return MultiTaskNet(make_tasks(**model), **{name: value for name, value in model.items() if name != "tasks"})


def open_network(checkpoint, **knobs) -> MultiTaskNet:
    """The network of a checkpoint with its weights, in evaluation mode; `knobs` as in `bundle.networks.read_model`."""
    network = build_network(read_model(checkpoint, knobs)).eval()
    load_weights(network, checkpoint, strict=True)
    return network
