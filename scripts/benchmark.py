"""Ratios measured in one run: what sharing one encoder saves, what the engine costs, how fast the data pipeline is.

With --scan instead: how fast the backends of prediction are, and how far their answers agree.
"""

import argparse
import tempfile
from pathlib import Path

from bundle.benchmark import open_config, report, report_backends
from bundle.errors import exit_in_one_line

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overlays", nargs="*", metavar="OVERLAY", help="config files merged into configs/train.json")
    parser.add_argument("--dataset_dir", help="folder with a datalist.json; phantom data without it")
    parser.add_argument("--scan", help="file or folder to predict: overlays are merged into configs/inference.json")
    parser.add_argument("--checkpoint", default="", help="weights to predict with; random ones without it")
    parser.add_argument(
        "--exported", nargs="+", default=[], metavar="FILE", help="with --scan: .ts or .onnx of tensor_net, compared as well"
    )
    parser.add_argument("--quick", action="store_true", help="tiny network and few turns: a trial, no result")
    arguments = parser.parse_args()
    overlays = arguments.overlays + [str(CONFIGS / "preset_smoke.json")] * arguments.quick
    turns = 2 if arguments.quick else 12
    with exit_in_one_line(), tempfile.TemporaryDirectory() as folder:  # for what the handlers of the trainer write
        common = {"bundle_root": str(CONFIGS.parent), "output_dir": folder}
        if arguments.scan:
            files = [str(CONFIGS / "inference.json"), *overlays]
            entries = {"input": arguments.scan, "checkpoint": arguments.checkpoint, "device": "cpu", **common}
            print(report_backends(open_config(files, **entries), turns, arguments.exported), end="")
        else:
            files = [str(CONFIGS / "train.json"), *overlays]
            print(report(open_config(files, dataset_dir=arguments.dataset_dir, **common), turns), end="")


if __name__ == "__main__":
    main()
