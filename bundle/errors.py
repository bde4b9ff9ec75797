"""What a user sees when something is wrong with a file or a knob."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

PACKAGE = str(Path(__file__).parent)


def one_line_errors() -> None:
    """From now on, end the process with one line where this package has refused a file or a knob.

    That is a ValueError or an OSError that this package raised and nobody caught; MONAI's runner and its configs bury it in
    a long traceback otherwise. Every other exception is shown as before.
    """
    before = sys.excepthook

    def show(kind, error, trace):
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        frames = traceback.extract_tb(cause.__traceback__)
        if isinstance(cause, (ValueError, OSError)) and frames and frames[-1].filename.startswith(PACKAGE):
            print(f"error: {cause}", file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = show
