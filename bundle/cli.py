"""The console command `chestct`."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from bundle.files import ROOT


def main(arguments: Sequence[str] | None = None) -> None:
    """`chestct predict INPUT -o OUT`: run configs/inference.json with MONAI's bundle runner, and nothing else.

    Options that are not known here are knobs of the config and go to the runner as they are.
    """
    parser = argparse.ArgumentParser(prog="chestct", description="Multi-task chest CT. Research use only.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    predict = commands.add_parser(
        "predict",
        help="any scan to masks, tables, DICOM objects and a report",
        description="Predict a scan, or every scan of a folder: DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG, BMP or TIFF. Any "
        "knob of configs/inference.json may follow, as --knob VALUE: docs/configuration.md has them all.",
    )
    predict.add_argument("input", metavar="INPUT", help="file, folder (searched with all folders in it) or quoted glob pattern")
    predict.add_argument("-o", "--output_dir", metavar="OUT", required=True, help="folder of the results; not inside INPUT")
    predict.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="overlay on configs/inference.json"
    )
    known, knobs = parser.parse_known_args(arguments)
    config = ROOT / "configs/inference.json"
    if not config.is_file():
        parser.error(f"found no {config}, expected the configs of the bundle: install the package again")
    for overlay in known.config:
        if not Path(overlay).is_file():
            parser.error(f"--config: found no file {overlay}, expected an overlay in JSON or YAML")
    if known.config:
        from bundle.config import merge_overlays  # takes seconds, which --help need not wait for

        try:
            merge_overlays(config, known.config)
        except ValueError as error:
            parser.error(f"--config: {error}")
    files = str([str(config), *known.config])
    sys.argv = ["monai.bundle", "run", "--config_file", files, "--bundle_root", str(ROOT)]
    sys.argv += ["--input", _as_expression(known.input), "--output_dir", _as_expression(known.output_dir), *knobs]
    runpy.run_module("monai.bundle", run_name="__main__")


def _as_expression(text: str) -> str:
    """A text that reaches the config as it is: in a plain value MONAI takes # for :: and the runner for a comment."""
    return "$" + repr(text).replace("#", r"\x23").replace("@", r"\x40")
