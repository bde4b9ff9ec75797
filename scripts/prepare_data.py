"""One datalist from any of the known data set layouts (docs/data.md): python scripts/prepare_data.py FOLDER… --output DIR"""

import argparse
import logging

from bundle.data.sources import SOURCES, merge, table
from bundle.errors import exit_in_one_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="[LAYOUT=]PATH",
        help=f"a data set's folder, a folder of such folders, or a CSV file; layouts: {', '.join(SOURCES)}",
    )
    parser.add_argument("--output", required=True, help="folder of datalist.json and of what is exported; use it as dataset_dir")
    parser.add_argument("--classes", nargs="+", default=["other", "COVID-19", "lung cancer"], help="names of class 0, 1, 2 …")
    parser.add_argument("--seed", type=int, default=0, help="of the split of layouts that come without one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_in_one_line():
        print(table(merge(arguments.sources, arguments.output, arguments.classes, arguments.seed)), end="")


if __name__ == "__main__":
    main()
