import ast
from pathlib import Path

import pytest

import bundle
from bundle import names
from bundle.names import ANNOTATION, TASKS, check_tasks

PACKAGE = Path(bundle.__file__).parent
# Who may import whom: names, errors, files <- config, lungs <- data, networks <- tasks <- training, evaluation, inference <- monailabel, study, cli.
# Training, evaluation and inference never import one another: what one room needs of another is wired in the configs.
FLOOR = {
    **dict.fromkeys(("errors", "names", "files"), 0),
    **dict.fromkeys(("config", "lungs"), 1),
    **dict.fromkeys(("data", "networks"), 2),
    "tasks": 3,
    **dict.fromkeys(("training", "evaluation", "inference"), 4),
    **dict.fromkeys(("monailabel", "study", "cli"), 5),
}


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        (["detection", "classification"], ("classification", "detection")),
        ({"reconstruction": 0.5}, ("reconstruction",)),
        (iter(TASKS), TASKS),
        (["segmentation", "segmentation"], ("segmentation",)),
    ],
)
def test_tasks_come_in_canonical_order(tasks, expected):
    assert check_tasks(tasks) == expected


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "found no task, expected one or more of classification, .*, reconstruction, detection, or dotted paths of others"),
        (["segmentaton", "detection", "x"], "tasks: found 'segmentaton', 'x', expected one or more of"),
        ({"Detection": 1.0}, "tasks: found 'Detection', expected"),
    ],
)
def test_unknown_tasks_and_none_are_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        check_tasks(tasks)


def test_names_and_keys_are_distinct():
    keys = [value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)]
    assert len(keys) == len(set(keys)) and set(TASKS) < set(keys)
    assert set(ANNOTATION) == set(TASKS) - {"reconstruction"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from [f"bundle.{name.name}" for name in node.names] if node.module == "bundle" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_imports_run_one_way():
    """From the ground floor up."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in filter(lambda name: name.startswith("bundle."), imports(path)):
            other = module.split(".")[1]
            same = FLOOR.get(other) == FLOOR.get(own) == FLOOR["training"]
            if own in FLOOR and other != own and (same or FLOOR.get(other, 9) > FLOOR[own]):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert wrong == []
