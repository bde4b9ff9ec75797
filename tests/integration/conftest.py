"""Fixtures of the command line: weights of the smallest network, and the commands that use them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "configs/preset_smoke.json"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Untrained weights of the smallest network."""
    parser = ConfigParser()
    parser.read_config([ROOT / "configs/inference.json", SMOKE])
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(parser.get_parsed_content("multitask_net").state_dict(), path)
    return path


@pytest.fixture(scope="session")
def chestct_command(checkpoint):
    """Function that gives the command line of `chestct predict` with the smallest network."""

    def command(source, output_dir, *knobs) -> list[str]:
        chestct = Path(sys.executable).with_name("chestct")
        network = ["--config", SMOKE, "--checkpoint", checkpoint]
        return list(map(str, [chestct, "predict", source, "-o", output_dir, *network, *knobs]))

    return command


@pytest.fixture(scope="session")
def chestct(chestct_command):
    """Function that runs it and returns the finished process."""

    def run(source, output_dir, *knobs, before=()):
        command = [*before, *chestct_command(source, output_dir, *knobs)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    return run
