"""What a user sees when something is wrong with a file or a knob."""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


class UserError(ValueError):
    """A mistake of the user, shown in one line; every other exception is a bug and keeps its traceback."""


# A process of a DataLoader sends its traceback as text.
IN_WORKER = re.compile(rf"^{__name__}\.{UserError.__name__}: (.*)", re.MULTILINE)


def one_line_errors() -> None:
    """From now on, end the process with one line where a `UserError` ends it, in place of MONAI's long traceback."""
    before = sys.excepthook

    def show(kind, error, trace):
        if message := user_message(error):
            print(f"error: {message}", file=sys.stderr)
            # A pool may still be reading files: the interpreter would take its threads down in the middle and abort.
            for thread in set(threading.enumerate()) - {threading.current_thread()}:
                thread.join(timeout=2.0)
        else:
            before(kind, error, trace)

    sys.excepthook = show
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_news)


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """End the process with one line and status 1 where the block raises a `UserError`."""
    try:
        yield
    except Exception as error:
        message = user_message(error)
        if not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


_lock, _blocks, _filters = threading.Lock(), [], ExitStack()
if hasattr(os, "fork"):  # so that a process of a DataLoader does not begin with a lock that nobody will release
    os.register_at_fork(before=_lock.acquire, after_in_child=_lock.release, after_in_parent=_lock.release)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Ignore warnings of libraries, which may quote the patient, in all threads until the last such block ends.

    Blocks of `warnings.catch_warnings` that overlap in two threads would restore each other's filters.
    """
    with _lock:
        if not _blocks:
            _filters.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _blocks.append(None)
    try:
        yield
    finally:
        with _lock:
            _blocks.pop()
            if not _blocks:
                _filters.close()


def user_message(error: BaseException | None) -> str | None:
    """Message of the `UserError` that caused an exception; None if there is none."""
    message = None
    while error is not None:
        if in_worker := IN_WORKER.search(str(error)):
            message = in_worker[1]
        elif isinstance(error, UserError):
            message = str(error)
        error = error.__cause__
    return message


def _is_news(record: logging.LogRecord) -> bool:
    """False for what an engine logs while a `UserError` passes through it."""
    return record.levelno < logging.ERROR or user_message(sys.exc_info()[1]) is None
