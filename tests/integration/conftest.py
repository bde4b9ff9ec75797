"""Fixtures of the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

import command


@pytest.fixture(scope="session")
def chestct_command(checkpoint):
    """Function that gives the command line of `chestct predict` with the smallest network."""

    def words(source, output_dir, *knobs) -> list[str]:
        chestct = Path(sys.executable).with_name("chestct")
        return list(map(str, [chestct, "predict", source, "-o", output_dir, "--checkpoint", checkpoint, *knobs]))

    return words


@pytest.fixture(scope="session")
def chestct(chestct_command):
    """Function that runs it and returns the finished process, a real one if a launcher comes before."""

    def run(source, output_dir, *knobs, before=()):
        words = chestct_command(source, output_dir, *knobs)
        if before:
            return subprocess.run([*before, *words], capture_output=True, text=True, timeout=300)
        return command.run("chestct", *words[1:])

    return run
