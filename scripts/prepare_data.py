"""One datalist from any of the layouts of docs/data.md: python scripts/prepare_data.py FOLDER… --output DIR"""

import sys

from bundle.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
