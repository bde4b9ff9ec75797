"""Commands of this project in processes forked from one that has imported everything, which takes ten seconds.

test_commands.py, test_packaging.py and test_bundle_verbs.py start real ones. It stays alive for all tests of a pytest process.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from bundle.cli import main

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["monai.bundle", *(f"bundle.{room}" for room in ("cli", "training.trainer", "evaluation", "inference"))])


def start(*words, log: Path, errors: Path | None = None, cwd=ROOT, **environment: str) -> ForkServerProcess:
    """Start `chestct …`, `monai.bundle …`, a script or `-c CODE`; the log is appended to, and gets errors that have no file."""
    method = multiprocessing.get_start_method()  # of its data loaders, else the fork server
    arguments = [list(map(str, words)), log, errors or log, cwd, {"TQDM_DISABLE": "1", **environment}, method]
    process = SERVER.Process(target=_become, args=arguments)
    process.start()
    return process


def run(*words, timeout: float = 600, **options) -> subprocess.CompletedProcess:
    """Run it to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "out", Path(folder) / "errors"
        process = start(*words, log=out, errors=errors, **options)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words} ran longer than {timeout} s: {errors.read_text()[-3000:]}")
        # A line may name a file whose name is no UTF-8.
        printed = (path.read_text(errors="backslashreplace") for path in (out, errors))
        return subprocess.CompletedProcess(words, process.exitcode, *printed)


def bundle(*arguments, configs=("train", "preset_smoke"), **knobs) -> list[str]:
    """Words of `python -m monai.bundle run` with shipped configs."""
    files = str([str(ROOT / f"configs/{name}.json") for name in configs])
    pairs = [word for name, value in knobs.items() for word in (f"--{name}", value)]
    return list(map(str, ["monai.bundle", "run", *arguments, "--config_file", files, *pairs]))


def _become(words: list[str], log: Path, errors: Path, cwd: Path, environment: dict, method: str) -> None:
    multiprocessing.set_start_method(method, force=True)
    for path, stream in ((log, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = words
    try:
        if words[0] == "chestct":
            main()
        elif words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        else:
            (runpy.run_path if words[0].endswith(".py") else runpy.run_module)(words[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
