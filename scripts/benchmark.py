"""Three ratios measured in one run: what sharing one encoder saves, what the engine costs, how fast the data pipeline is."""

import argparse
import tempfile
from pathlib import Path

from bundle.benchmark import open_config, report

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overlays", nargs="*", metavar="OVERLAY", help="config files merged into configs/train.json")
    parser.add_argument("--dataset_dir", help="folder with a datalist.json; phantom data without it")
    parser.add_argument("--quick", action="store_true", help="tiny network and few turns: a trial, no result")
    arguments = parser.parse_args()
    overlays = arguments.overlays + [str(CONFIGS / "preset_smoke.json")] * arguments.quick
    with tempfile.TemporaryDirectory() as folder:  # for what the handlers of the trainer write
        files = [str(CONFIGS / "train.json"), *overlays]
        config = open_config(files, bundle_root=str(CONFIGS.parent), dataset_dir=arguments.dataset_dir, output_dir=folder)
        print(report(config, turns=2 if arguments.quick else 12), end="")


if __name__ == "__main__":
    main()
