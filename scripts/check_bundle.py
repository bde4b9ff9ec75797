"""MONAI's bundle tools, unmodified and offline, on this bundle (docs/bundle.md): python scripts/check_bundle.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package need not be installed

from bundle.verification import main  # noqa: E402

if __name__ == "__main__":
    main()
