"""Fixtures that every test may use: the real data where they are, and a small phantom data set."""

import os
from pathlib import Path

import pytest

from bundle.data.phantom import make_phantom


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the public data sets: CHEST_CT_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("CHEST_CT_DATA") or Path(__file__).parents[2] / "shared/data")
    if not folder.is_dir():
        pytest.skip("real data not found: set CHEST_CT_DATA")
    return folder


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory) -> Path:
    """Phantom data of 64 x 64 pixels, only to be read: three patients a split (one a class), two slices each."""
    folder = tmp_path_factory.mktemp("data") / "phantom"
    return Path(make_phantom(folder, size=64, groups=(3, 3, 3), slices_per_group=2))
