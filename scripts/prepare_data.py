"""One datalist from any of the layouts of docs/data.md: python scripts/prepare_data.py FOLDER… --output DIR"""

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
    parser.add_argument("--output", required=True, help="folder of datalist.json and exported files; use it as dataset_dir")
    parser.add_argument("--classes", nargs="+", default=["other", "COVID-19", "lung cancer"], help="names of class 0, 1, 2 …")
    parser.add_argument("--seed", type=int, default=0, help="of the split of layouts that come without one")
    parser.add_argument("--implied", action="store_true", help="add what annotations imply for other tasks (training split)")
    parser.add_argument("--categories", nargs="+", default=[], help="of COCO files with several: those to be read")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_in_one_line():
        datalist = merge(
            arguments.sources, arguments.output, arguments.classes, arguments.seed, arguments.implied, arguments.categories
        )
        print(table(datalist), end="")


if __name__ == "__main__":
    main()
