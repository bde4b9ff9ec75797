"""MONAI's tools, unmodified and offline, on this bundle; the table of what passes is printed at the end (pytest -s).

Verbs are typed in the folder of the unzipped archive, where the package is not installed, and in an empty folder with the
package on Python's path. Python's functions are called in this process; test_commands.py and test_inference.py check the
properties that MONAI's tools need.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import monai.bundle
import pytest
import torch

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT.parent / "shared/meta_schema_20240725.json"
OFFLINE = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "HTTP", "HTTPS")}  # nothing listens there
# Place -> verbs: elsewhere those that show that all of the bundle is found from there.
VERBS = {
    "archive": ("verify_metadata", "verify_net_in_out", "ckpt_export", "onnx_export", "run", "run_workflow"),
    "elsewhere": ("verify_net_in_out", "ckpt_export", "run"),
}
# Each verb is typed in a process of its own, forked where MONAI and the slowest libraries have been imported.
TYPED = """
import json, os, runpy, sys, time
import monai.bundle, highdicom, timm, torchvision

for verb, words in json.loads(sys.argv[1]).items():
    begin = time.perf_counter()
    if not (child := os.fork()):
        sys.argv = ["monai.bundle", verb, *words]
        runpy.run_module("monai.bundle", run_name="__main__")
        sys.exit()
    status = os.waitpid(child, 0)[1]
    print("typed", verb, status, time.perf_counter() - begin, flush=True)
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """Python with every package that is installed here but ours, which is installed in place through a file of its own."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    packages.joinpath("others.pth").write_text(sysconfig.get_paths()["purelib"])
    return folder / "bin/python"


@pytest.fixture(scope="module")
def archive(tmp_path_factory, checkpoint):
    """What git archive packs, as it lies here, with the weights of the smallest network."""
    folder = tmp_path_factory.mktemp("archive") / "chest_ct_multitask"
    for part in ("bundle", "configs", "docs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "models").mkdir()
    shutil.copy(checkpoint, folder / "models/model.pt")
    return folder


@pytest.fixture(scope="module")
def places(archive, bare_python, checkpoint, phantom_dir, tmp_path_factory):
    """Place -> (Python, directory, root of the bundle as seen from there, folder of results, knobs of a run, environment)."""
    out = tmp_path_factory.mktemp("out")
    (out / "scan").mkdir()
    shutil.copy(sorted((phantom_dir / "images").iterdir())[0], out / "scan")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | OFFLINE
    clean["PYTHONDONTWRITEBYTECODE"] = "1"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    knobs = {name: ["--dataset_dir", out / "scan", "--output_dir", out / name] for name in VERBS}
    away = ["--bundle_root", ROOT]
    return {
        "archive": (bare_python, archive, Path("."), out, knobs["archive"], clean),
        "elsewhere": (sys.executable, elsewhere, ROOT, out, [*knobs["elsewhere"], *away], {**clean, "PYTHONPATH": str(ROOT)}),
    }


def verbs(place: str) -> list[str]:
    return [verb for verb in VERBS[place] if verb != "verify_metadata" or SCHEMA.is_file()]


def words_of(verb: str, place: str, root: Path, out: Path, knobs: list, weights: Path) -> list:
    """A verb of `python -m monai.bundle` as a user types it, with what follows it."""
    meta = ["--meta_file", root / "configs/metadata.json"]
    config = ["--config_file", root / "configs/inference.json"]
    config += ["--checkpoint", weights] if place == "elsewhere" else []
    export = ["network_def", "--ckpt_file", weights, *meta, *config, "--filepath"]
    return {
        "verify_metadata": [*meta, "--filepath", SCHEMA],
        "verify_net_in_out": ["network_def", *meta, *config],
        "ckpt_export": [*export, out / f"{place}.ts"],
        "onnx_export": [*export, out / f"{place}.onnx"],
        "run": [*config, *knobs],
        "run_workflow": [*config, *knobs, "--output_dir", out / f"{place}_2"],
    }[verb]


@pytest.fixture(scope="module")
def typed(places, checkpoint):
    """(verb, place) -> (exit status, seconds), and what was written to stderr in a place; a table of them is printed."""
    found, errors = {}, {}
    for place, (python, cwd, root, out, knobs, environment) in places.items():
        weights = Path("models/model.pt") if place == "archive" else checkpoint
        lines = {verb: list(map(str, words_of(verb, place, root, out, knobs, weights))) for verb in verbs(place)}
        before = {path: path.stat().st_mtime_ns for path in cwd.rglob("*")}
        words = [python, "-c", TYPED, json.dumps(lines)]
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr[-3000:]
        assert before == {path: path.stat().st_mtime_ns for path in cwd.rglob("*")}, "bundle and folder stay as they were"
        for verb, status, seconds in re.findall(r"^typed (\w+) (\d+) (\S+)$", done.stdout, re.M):
            found[verb, place] = int(status), float(seconds)
        errors[place] = done.stderr[-5000:]
    print("\n| check | where | seconds | exit status |\n|---|---|---|---|")
    for (verb, place), (status, seconds) in found.items():
        print(f"| `{verb}` | {place} | {seconds:.1f} | {status} |")
    return found, errors


@pytest.mark.parametrize(("place", "verb"), [(place, verb) for place, verbs in VERBS.items() for verb in verbs])
def test_verb(verb, place, places, typed):
    if verb not in verbs(place):
        pytest.skip(f"no {SCHEMA.name} beside the repository; metadata.json says where it is fetched from")
    found, errors = typed
    assert found[verb, place][0] == 0, errors[place]
    if verb.startswith("run"):
        results = places[place][3] / (place if verb == "run" else f"{place}_2")
        assert len(list(results.rglob("predictions.json"))) == 1


@pytest.fixture
def network(checkpoint, phantom_dir, tmp_path):
    """`network_def` of the workflow that MONAI creates for a checkpoint."""
    knobs = {"dataset_dir": phantom_dir / "images", "output_dir": tmp_path, "checkpoint": checkpoint, "bundle_root": ROOT}
    knobs = {key: str(value) for key, value in knobs.items()}
    return monai.bundle.create_workflow(config_file=str(ROOT / "configs/inference.json"), workflow_type="inference", **knobs).network_def


def load(checkpoint, **arguments):
    """`monai.bundle.load`, which is given the network of another checkpoint than models/model.pt."""
    arguments = {"bundle_dir": ROOT.parent, "workflow_type": "inference", "device": "cpu", **arguments}
    return monai.bundle.load(ROOT.name, model_file=str(checkpoint), **arguments)


def test_load_gives_the_weights_of_the_file(checkpoint, network):
    network, stored = load(checkpoint, model=network), torch.load(checkpoint, weights_only=True)
    assert all(torch.equal(value, stored[key]) for key, value in network.state_dict().items())


def test_torchscript_answers_as_the_network(checkpoint, network, places, typed):
    file = places["elsewhere"][3] / "elsewhere.ts"
    network = load(checkpoint, model=network).eval()
    script, meta, _ = load(file, load_ts_module=True)
    image = torch.rand(1, 1, 64, 64)
    assert meta["network_data_format"]["inputs"]["image"]["spatial_shape"] == [256, 256]
    with torch.no_grad():
        torch.testing.assert_close(script.eval()(image), network(image), rtol=1e-4, atol=1e-4)
