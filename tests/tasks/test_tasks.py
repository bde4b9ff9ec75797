"""The list of tasks, and how a configuration's tasks are made from it."""

import pytest
from some_tasks import CLASSES, some_tasks

from bundle import names
from bundle.errors import UserError
from bundle.tasks import TASKS, Task, make_tasks


class Severity(Task):
    name, field = "severity", "severity"


def test_tasks_come_in_the_order_of_the_list_and_those_from_outside_last():
    tasks = {f"{__name__}.Severity": 0.5, "detection": 2, "classification": 1.0}
    made = make_tasks(tasks, draws={"detection": 3.0}, classes=CLASSES, label_smoothing=0.1)
    assert [(task.name, task.weight, task.share) for task in made] == [
        ("classification", 1.0, 1.0),
        ("detection", 2.0, 3.0),
        ("severity", 0.5, 1.0),
    ]
    assert made[0].classes == CLASSES and made[0].label_smoothing == 0.1 and type(made[2]) is Severity


def test_every_name_has_its_task_with_the_field_that_annotates_it():
    assert {task.name: task.field for task in TASKS.values()} == {name: names.ANNOTATION.get(name) for name in names.TASKS}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["no_package.Task"], "tasks: found 'no_package.Task', expected"),
        (["bundle.tasks.make_tasks"], "tasks: found 'bundle.tasks.make_tasks', expected"),
    ],
)
def test_a_path_that_is_no_task_is_refused(tasks, message):
    with pytest.raises(UserError, match=message):
        make_tasks(tasks, classes=CLASSES)


def test_a_share_of_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="draws: found segment, expected names of tasks: classification"):
        some_tasks("classification", draws={"segment": 1.0})


def test_what_a_task_does_not_provide_is_said():
    task = Severity()
    assert task.is_annotated({"severity": 0.1}) and not task.is_annotated({}) and Task().is_annotated({})
    for call in (lambda: task.head([8], [2], 1), lambda: task.loss(None, {}, None), lambda: task.cases(None, {}, False)):
        with pytest.raises(NotImplementedError, match="Severity has no"):
            call()
