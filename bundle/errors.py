"""What a user sees when something is wrong with a file or a knob. This module imports nothing of ours."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user, shown in one line: which file, record or knob, what was found, what was expected.

    Every other exception is a mistake of this package and keeps its traceback.
    """


IN_WORKER = re.compile(rf"^{__name__}\.{UserError.__name__}: (.*)", re.MULTILINE)


def one_line_errors() -> None:
    """From now on, end the process with one line where a `UserError` ends it.

    MONAI's runner and its configs bury it in a long traceback otherwise, and engines log it on the way.
    """
    before = sys.excepthook

    def show(kind, error, trace):
        if message := user_message(error):
            print(f"error: {message}", file=sys.stderr)
            _join_threads()
        else:
            before(kind, error, trace)

    sys.excepthook = show
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_news)


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """End the process with one line and status 1 where the block raises a `UserError`.

    For commands of this package itself; `one_line_errors` is for those that MONAI runs.
    """
    try:
        yield
    except Exception as error:
        message = user_message(error)
        if not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def _join_threads(seconds: float = 2.0) -> None:
    """Wait for a pool that is still reading files: the interpreter would take its threads down in the middle and abort."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(seconds)


def user_message(error: BaseException | None) -> str | None:
    """Message of the `UserError` that caused an exception; None if there is none.

    A process of a DataLoader sends its traceback as text, in which the message is looked up.
    """
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__
    for error in reversed(chain):
        if in_worker := IN_WORKER.search(str(error)):
            return in_worker[1]
        if isinstance(error, UserError):
            return str(error)
    return None


def _is_news(record: logging.LogRecord) -> bool:
    """False for what an engine logs while a `UserError` passes through it, which is shown in the end."""
    return record.levelno < logging.ERROR or user_message(sys.exc_info()[1]) is None
