"""Fixtures of the command line."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def chestct_command(checkpoint):
    """Function that gives the command line of `chestct predict` with the smallest network."""

    def command(source, output_dir, *knobs) -> list[str]:
        chestct = Path(sys.executable).with_name("chestct")
        return list(map(str, [chestct, "predict", source, "-o", output_dir, "--checkpoint", checkpoint, *knobs]))

    return command


@pytest.fixture(scope="session")
def chestct(chestct_command):
    """Function that runs it and returns the finished process."""

    def run(source, output_dir, *knobs, before=()):
        command = [*before, *chestct_command(source, output_dir, *knobs)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run
