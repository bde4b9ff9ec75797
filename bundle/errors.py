"""What a user sees when something is wrong with a file or a knob."""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = str(Path(__file__).parent)
RAISED_HERE = re.compile(rf'File "{re.escape(PACKAGE)}.*\n(?: {{4}}.*\n)*(?:ValueError|FileNotFoundError|OSError): (.*)')


def one_line_errors() -> None:
    """From now on, end the process with one line where this package has refused a file or a knob.

    That is a ValueError or an OSError that this package raised and nobody caught; MONAI's runner and its configs bury it in
    a long traceback otherwise, and engines log it on the way. Every other exception is shown and logged as before.
    """
    before = sys.excepthook

    def show(kind, error, trace):
        if said := refusal(error):
            print(f"error: {said}", file=sys.stderr)
            _let_threads_end()
        else:
            before(kind, error, trace)

    sys.excepthook = show
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_news)


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """End the process with one line and status 1 where the block refuses a file or a knob, or a file cannot be used.

    For commands of this package itself; `one_line_errors` is for those that MONAI runs.
    """
    try:
        yield
    except Exception as error:
        said = refusal(error) or (str(error) if isinstance(error, OSError) else None)
        if not said:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(1)


def _let_threads_end(seconds: float = 2.0) -> None:
    """Wait for a pool that is still reading files: the interpreter would take its threads down in the middle and abort."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(seconds)


def refusal(error: BaseException | None) -> str | None:
    """What this package said when it refused a file or a knob, if that is what an error goes back to."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, (ValueError, OSError)):
        frames = traceback.extract_tb(error.__traceback__)
        if frames and frames[-1].filename.startswith(PACKAGE):
            return str(error)
    in_worker = RAISED_HERE.search(str(error))  # a process of a DataLoader sends its traceback as text
    return in_worker[1] if in_worker else None


def _is_news(record: logging.LogRecord) -> bool:
    """False for what an engine logs while a refusal passes through it, which is shown in the end."""
    return record.levelno < logging.ERROR or refusal(sys.exc_info()[1]) is None
