import subprocess
import sys

import pytest

from bundle.errors import exit_in_one_line
from bundle.tasks import check_tasks

REFUSED = """
from bundle.tasks import check_tasks
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
from bundle.tasks import check_tasks
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
        ("from bundle.tasks import check_tasks\ncheck_tasks(1)", "Traceback (most recent call last):"),
    ],
    ids=["refused by us", "refused in a data loader", "refused in a pool", "raised by others", "a programming error"],
)
def test_only_what_the_package_refuses_is_shown_in_one_line(code, shown):
    program = f"from bundle.errors import one_line_errors\none_line_errors()\none_line_errors()\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(shown) and (done.stderr.count("\n") == 1) == shown.startswith("error")


def test_a_command_ends_in_one_line_where_a_file_or_a_knob_is_at_fault(capsys):
    for refused, line in (
        (lambda: check_tasks(["x"]), "error: tasks: found 'x', "),
        (lambda: open("none"), "error: [Errno 2] "),
    ):
        with pytest.raises(SystemExit) as ended, exit_in_one_line():
            refused()
        shown = capsys.readouterr().err
        assert ended.value.code == 1 and shown.startswith(line) and shown.count("\n") == 1
    with pytest.raises(ValueError, match="could not convert"), exit_in_one_line():
        float("x")
