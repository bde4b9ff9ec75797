"""The bundle as an archive for MONAI's model zoo (docs/bundle.md): python scripts/package_bundle.py --output_dir DIR"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package need not be installed

from bundle.packaging import main  # noqa: E402

if __name__ == "__main__":
    main()
