"""Names that the whole project shares: the list of tasks and every dictionary key."""

from bundle.errors import UserError

CLASSIFICATION = "classification"
SEGMENTATION = "segmentation"
RECONSTRUCTION = "reconstruction"
DETECTION = "detection"
# Each is a class in a file of bundle/tasks: Classification in classification.py, and so on.
TASKS = (CLASSIFICATION, SEGMENTATION, RECONSTRUCTION, DETECTION)

# A further answer of the network in evaluation mode: its deepest features, summed up.
EMBEDDING = "embedding"

# Fields of a record in the datalist and of the sample made from it; docs/data.md is their reference.
IMAGE = "image"
CLASS = "class"
MASK = "mask"
BOXES = "boxes"
INSTANCES = "instances"
GROUP = "group"
SOURCE = "source"

# Annotation that makes a record count for a task. Reconstruction needs none: the image is its own target.
ANNOTATION = {CLASSIFICATION: CLASS, SEGMENTATION: MASK, DETECTION: BOXES}

# Keys that exist in batches only.
TARGET = "target"  # clean slice that reconstruction is compared with
ANNOTATED = "annotated"  # task -> bool (batch,): which samples are annotated for it
SLICE = "slice"  # of a prediction: the slice as it was read, before its values and its size are changed
RECORD = "record"  # per sample: {image, group, source}, to name it in results

# Value of `mask` for "annotated, no lesion", which saves a file of zeros.
EMPTY_MASK = "empty"


def check_tasks(tasks) -> tuple[str, ...]:
    """The names in `tasks`, in the order of `TASKS`; dotted paths of tasks outside the package come last."""
    names = list(tasks)
    unknown = [name for name in names if name not in TASKS and "." not in name]
    if unknown or not names:
        found = ", ".join(map(repr, unknown)) or "no task"
        raise UserError(f"tasks: found {found}, expected one or more of {', '.join(TASKS)}, or dotted paths of others")
    return (*(task for task in TASKS if task in names), *(name for name in dict.fromkeys(names) if name not in TASKS))
