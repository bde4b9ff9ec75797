import warnings

import command
import pytest

from bundle.errors import UserError, exit_in_one_line, no_warnings, user_message
from bundle.names import check_tasks

REFUSED = """
from bundle.names import check_tasks
try:
    check_tasks(["x"])
except ValueError as error:
    raise RuntimeError("as MONAI does") from error
"""


WORKER = """
from torch.utils.data import DataLoader, Dataset
from bundle.data.transforms import LoadSlice
class Files(Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        try:
            return LoadSlice()("none.png")
        except Exception as error:
            raise RuntimeError("applying transform") from error
next(iter(DataLoader(Files(), num_workers=1)))
"""


POOL = """
from concurrent.futures import ProcessPoolExecutor
from bundle.names import check_tasks
with ProcessPoolExecutor(1) as pool:
    pool.submit(check_tasks, ["x"]).result()
"""


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        (REFUSED, "error: tasks: found 'x', expected one or more of classification, "),
        (WORKER, "error: none.png: no such file"),
        (POOL, "error: tasks: found 'x', expected one or more of classification, "),
        ("float('x')", "Traceback (most recent call last):"),
        ("from bundle.names import check_tasks\ncheck_tasks(1)", "Traceback (most recent call last):"),
        ("from bundle.data.transforms import move_boxes\nmove_boxes(1, 2)", "Traceback (most recent call last):"),
    ],
    ids=["a user error", "in a data loader", "in a pool", "raised by others", "a bug", "a bug far inside"],
)
def test_only_a_user_error_is_shown_in_one_line(code, shown):
    program = f"from bundle.errors import one_line_errors\none_line_errors()\none_line_errors()\n{code}"
    done = command.run("-c", program)
    assert done.returncode == 1
    assert done.stderr.startswith(shown) and (done.stderr.count("\n") == 1) == shown.startswith("error")


def test_a_command_ends_in_one_line_at_a_user_error_alone(capsys):
    with pytest.raises(SystemExit) as ended, exit_in_one_line():
        check_tasks(["x"])
    shown = capsys.readouterr().err
    assert ended.value.code == 1 and shown.startswith("error: tasks: found 'x', ") and shown.count("\n") == 1
    for bug, kind in ((lambda: open("none"), FileNotFoundError), (lambda: float("x"), ValueError)):
        with pytest.raises(kind), exit_in_one_line():
            bug()


def test_warnings_of_threads_that_overlap_are_all_ignored_and_then_shown_again():
    """One thread begins, a second begins, the first ends, the second goes on."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        one, other = no_warnings(), no_warnings()
        one.__enter__(), other.__enter__()
        one.__exit__(None, None, None)
        warnings.warn("Invalid value DOE^JOHN")
        other.__exit__(None, None, None)
        warnings.warn("news")
    assert [str(warning.message) for warning in shown] == ["news"]


def test_the_message_is_the_innermost_user_error():
    first, second = UserError("what the user did"), RuntimeError("applying transform")
    second.__cause__ = first
    assert user_message(second) == "what the user did"
    assert user_message(ValueError("operands could not be broadcast")) is None and user_message(None) is None
