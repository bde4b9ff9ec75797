"""MONAI's tools on the repository and on its archive, unzipped where the package is not installed."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT.parent / "shared/meta_schema_20240725.json"
SMOKE = ["--config", ROOT / "configs/preset_smoke.json"]
WITH_SCHEMA = ["--schema", SCHEMA] if SCHEMA.is_file() else []


def run(*command, cwd):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CHEST_CT_SCHEMA")}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """Python with every package that is installed here but ours, which is installed in place through a file of its own."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    packages.joinpath("others.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin/python"


@pytest.fixture(scope="module")
def unzipped(tmp_path_factory, checkpoint):
    """The archive of the bundle with the smallest network, unzipped in an empty folder."""
    folder = tmp_path_factory.mktemp("unzipped")
    script = ROOT / "scripts/package_bundle.py"
    done = run(sys.executable, script, "--output_dir", folder / "zip", "--checkpoint", checkpoint, *SMOKE, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    archive = Path(done.stdout.splitlines()[-1])
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder / "empty")
    return folder / "empty" / archive.name.split("_v")[0]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def check(*command, cwd):
    """Rows of the table that the check prints, each from its name to the results of the places, which the head names."""
    done = run(*command, *WITH_SCHEMA, cwd=cwd)
    rows = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in done.stdout.splitlines() if "|" in line]
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return {name: results for name, *results in rows}


def assert_passed(table):
    head, _, *rows = table.items()
    assert len(rows) == 12
    skipped = {"verify_metadata"} if not WITH_SCHEMA else set()
    for name, results in rows:
        expected = "skipped: no schema" if name in skipped else "ok, "
        assert len(results) == 2 and all(result.startswith(expected) for result in results), (name, results)
    return head[1]


def test_the_repository_passes_from_its_root_and_from_elsewhere(checkpoint, tmp_path):
    shipped = (ROOT / "models/model.pt").is_file()
    weights = [] if shipped else ["--checkpoint", checkpoint, *SMOKE]
    table = check(sys.executable, ROOT / "scripts/check_bundle.py", *weights, cwd=tmp_path)
    assert assert_passed(table) == ["from the root", "from elsewhere"], "installed, it needs no PYTHONPATH"
    assert list(tmp_path.iterdir()) == []


def test_the_archive_passes_where_the_package_is_not_installed(unzipped, bare_python, tmp_path):
    missing = run(bare_python, "-c", "import monai, bundle", cwd=tmp_path)
    assert missing.stderr.endswith("ModuleNotFoundError: No module named 'bundle'\n")
    before = files(unzipped)
    table = check(bare_python, "-m", "bundle.verification", cwd=unzipped)
    assert assert_passed(table) == ["from the root", "from elsewhere, PYTHONPATH"]
    assert files(unzipped) == before, "the check leaves the bundle as it was"


def test_the_archive_predicts_with_the_shortest_command(unzipped, bare_python, phantom_dir):
    scan = sorted((phantom_dir / "images").iterdir())[0]
    command = ["-m", "monai.bundle", "run", "--config_file", "configs/inference.json", "--input", scan]
    done = run(bare_python, *command, cwd=unzipped)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((unzipped / "output/predictions").rglob("predictions.json"))) == 1
