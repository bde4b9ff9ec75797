"""Every tool of MONAI that takes a bundle, unmodified and offline, on this bundle: a table of what passes.

`python -m bundle.verification` does it in the bundle's folder, `scripts/check_bundle.py` from anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bundle.cli import ROOT

SCHEMA = "CHEST_CT_SCHEMA"  # environment variable with the file of the metadata's schema
WEIGHTS = "models/model.pt"
NEEDS = {"verify_metadata": ["jsonschema"], "onnx_export": ["onnx", "onnxscript"]}  # beyond what the bundle requires
CALLS = "python calls"  # of the check that stands for all of them where their process dies
NO_NETWORK = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https")}  # nothing listens there
NO_NETWORK |= {name.upper(): value for name, value in NO_NETWORK.items()}


@dataclass
class Place:
    """A directory to type commands in.

    Args:
        name: as the table has it.
        root: of the bundle, as a path that is right there: "." in the root itself.
        cwd: the directory.
        data: phantom data, with a folder scan/ of one image beside its own.
        out: folder for everything that is written.
        checkpoint: weights instead of models/model.pt; absolute.
        overlays: config files merged after each config; absolute.
        schema: of the metadata; absolute.
        pythonpath: for the commands, if the package is not installed.
    """

    name: str
    root: Path
    cwd: Path
    data: Path
    out: Path
    checkpoint: Path | None = None
    overlays: Sequence[Path] = ()
    schema: Path | None = None
    pythonpath: str | None = None

    def config(self, *names: str) -> list[str]:
        """Paths of configs and of the overlays after the first."""
        files = [self.root / "configs" / f"{name}.json" for name in names]
        return [str(path) for path in (files[0], *self.overlays, *files[1:])]

    @property
    def weights(self) -> Path:
        return self.checkpoint or self.root / WEIGHTS

    def knobs(self, data: Path | None = None) -> dict[str, str]:
        """What has to be said of a run: where the data and the results are, and what is not at its usual place."""
        knobs = {"dataset_dir": data or self.data / "scan", "output_dir": self.out / "predictions"}
        if self.root != Path("."):
            knobs["bundle_root"] = self.root
        if self.checkpoint:
            knobs["checkpoint"] = self.checkpoint
        return {key: str(value) for key, value in knobs.items()}

    def run(self, *command) -> subprocess.CompletedProcess:
        environment = {**os.environ, **NO_NETWORK}
        if self.pythonpath:
            environment["PYTHONPATH"] = self.pythonpath
        command = [sys.executable, *map(str, command)]
        return subprocess.run(command, cwd=self.cwd, env=environment, capture_output=True, text=True)


def commands(place: Place) -> dict[str, list]:
    """The verbs of `python -m monai.bundle` as a user types them, with what follows them."""
    files = place.config("inference")
    config = ["--config_file", files[0] if len(files) == 1 else str(files)]
    meta = ["--meta_file", place.root / "configs/metadata.json"]
    export = ["network_def", "--ckpt_file", place.weights, *meta, *config, "--filepath"]
    knobs = [part for key, value in place.knobs().items() for part in (f"--{key}", value)]
    return {
        "verify_metadata": [*meta, "--filepath", place.schema],
        "verify_net_in_out": ["network_def", *meta, *config],
        "ckpt_export": [*export, place.out / "model.ts"],
        "onnx_export": [*export, place.out / "model.onnx"],
        "run": [*config, *knobs],
        "run_workflow": [*config, *knobs, "--output_dir", place.out / "predictions_2"],
    }


def calls(place: Place) -> dict[str, Callable[[], None]]:
    """MONAI's functions as a program calls them; each raises an error if something is wrong."""
    import monai.bundle
    import torch

    def workflow(*names: str, kind: str, data: Path | None = None, **knobs: str):
        knobs = {**place.knobs(data), **knobs}
        return monai.bundle.create_workflow(config_file=place.config(*names), workflow_type=kind, **knobs)

    def load(**arguments):
        folder = place.cwd.joinpath(place.root).resolve()
        file = {} if place.checkpoint is None else {"model_file": str(place.checkpoint)}
        arguments = {"bundle_dir": folder.parent, "workflow_type": "inference", "device": "cpu", **file, **arguments}
        return monai.bundle.load(folder.name, **arguments)

    def network():
        # load() reads inference.json alone: a network of overlays has to be handed over.
        return load(model=workflow("inference", kind="inference").network_def) if place.overlays else load()

    def check_load() -> None:
        weights = torch.load(place.weights, weights_only=True, map_location="cpu")
        for key, value in network().state_dict().items():
            assert torch.equal(value, weights[key].to(value.dtype)), f"{key} is not as in {place.weights}"

    def check_torchscript() -> None:
        file = place.out / "model.ts"
        assert file.is_file(), f"ckpt_export has made no {file.name}"  # MONAI would try to download it
        script, meta, _ = load(load_ts_module=True, model_file=str(file))
        shape = meta["network_data_format"]["inputs"]["image"]["spatial_shape"]
        image = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(script.eval()(image), network().eval()(image), rtol=1e-4, atol=1e-4)

    def check_create_workflow() -> None:
        results = place.out / "predictions_3"  # a new one, in which no scan is done yet
        created = workflow("inference", kind="inference", output_dir=str(results))
        created.run()
        created.finalize()
        assert list(results.rglob("predictions.json")), f"{results}: no scan has a predictions.json"

    def check_properties(*names: str, kind: str, data: Path | None = None) -> None:
        missing = workflow(*names, kind=kind, data=data).check_properties()
        assert missing == [], f"missing or wrong: {missing}"

    return {
        'load(workflow_type="inference")': check_load,
        "load(load_ts_module=True)": check_torchscript,
        "create_workflow": check_create_workflow,
        "check_properties, train": lambda: check_properties("train", kind="train", data=place.data),
        "check_properties, evaluate": lambda: check_properties("train", "evaluate", kind="inference", data=place.data),
        "check_properties, inference": lambda: check_properties("inference", kind="inference"),
    }


def check(place: Place) -> Iterator[tuple[str, str]]:
    """Run everything in one place: name and result of each check, as they end."""
    for verb, arguments in commands(place).items():
        lacking = [module for module in NEEDS.get(verb, ()) if importlib.util.find_spec(module) is None]
        if verb == "verify_metadata" and place.schema is None:
            lacking = ["schema"]
        if lacking:
            yield verb, f"skipped: no {lacking[0]}"
            continue
        start = time.perf_counter()
        done = place.run("-m", "monai.bundle", verb, *arguments)
        yield verb, f"ok, {time.perf_counter() - start:.1f} s" if done.returncode == 0 else _failed(done.stderr)
    # Python's functions share a process: most of the time of each would be that of importing.
    report = place.out / "calls.json"
    code = "import sys; from bundle.verification import report_calls; report_calls(*sys.argv[1:])"
    done = place.run("-c", code, json.dumps(vars(place), default=str), report)
    if done.returncode:
        yield CALLS, _failed(done.stderr)
    else:
        yield from json.loads(report.read_text()).items()


def report_calls(place: str, report: str) -> None:
    """Make the `calls` of a place (its fields, as JSON) and write their results as JSON to the file `report`."""
    fields = json.loads(place)
    paths = {key: Path(fields[key]) for key in ("root", "cwd", "data", "out", "checkpoint", "schema") if fields[key]}
    results = {}
    for name, call in calls(Place(**{**fields, **paths})).items():
        start = time.perf_counter()
        try:
            call()
            results[name] = f"ok, {time.perf_counter() - start:.1f} s"
        except Exception as error:  # whatever is wrong belongs into the table
            while error.__cause__ is not None:
                error = error.__cause__
            results[name] = _failed(f"{type(error).__name__}: {error}")
    Path(report).write_text(json.dumps(results))


def _failed(stderr: str) -> str:
    """Result of what ended with an error: the last line that it wrote."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return f"FAILED: {lines[-1] if lines else 'without a word'}"[:300].replace("|", r"\|")


def check_bundle(root, checkpoint=None, overlays: Sequence = (), schema=None, show=print) -> dict[str, dict[str, str]]:
    """Check a bundle from its root and from an empty directory, both at once, on phantom data made for it.

    Nothing is written into the bundle, and nothing is fetched.

    Args:
        root: of the bundle whose package this is.
        checkpoint: weights instead of models/model.pt.
        overlays: config files merged after each config.
        schema: file of the metadata's schema; without it verify_metadata is skipped.
        show: called with one line when a check has ended.

    Returns:
        Name of the place -> name of the check -> "ok, 1.2 s", "skipped: why" or "FAILED: why".
    """
    from bundle.data.phantom import make_phantom

    root = Path(root).resolve()
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Path(folder) / "elsewhere"
        elsewhere.mkdir()
        data = Path(make_phantom(Path(folder) / "phantom", size=64, groups=(3, 3, 3), slices_per_group=1))
        (data / "scan").mkdir()
        shutil.copy(next(data.joinpath("images").iterdir()), data / "scan")
        common = {
            "data": data,
            "checkpoint": checkpoint and Path(checkpoint).resolve(),
            "overlays": [str(Path(overlay).resolve()) for overlay in overlays],
            "schema": schema and Path(schema).resolve(),
        }
        places = [
            Place("from the root", Path("."), root, out=Path(folder) / "out_1", **common),
            Place("from elsewhere", root, elsewhere, out=Path(folder) / "out_2", **common),
        ]
        if not is_installed(root, elsewhere):
            places[1].name += ", PYTHONPATH"
            places[1].pythonpath = str(root)

        def run(place: Place) -> dict[str, str]:
            place.out.mkdir()
            results = {}
            for name, result in check(place):
                results[name] = result
                show(f"{place.name}: {name}: {result}")
            return results

        with ThreadPoolExecutor(len(places)) as pool:
            return dict(zip([place.name for place in places], pool.map(run, places)))


def is_installed(root: Path, cwd: Path) -> bool:
    """Whether Python finds the package of this root in another directory."""
    command = [sys.executable, "-c", "import bundle; print(bundle.__file__)"]
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return found.returncode == 0 and Path(found.stdout.strip()).resolve() == root / "bundle/__init__.py"


def table(results: Mapping[str, Mapping[str, str]]) -> str:
    """Results of `check_bundle` as a table in Markdown: a row for each check, a column for each place."""
    names = list(dict.fromkeys(name for column in results.values() for name in column))
    rows = [["check", *results], ["---", *["---"] * len(results)]]
    rows += [[f"`{name}`", *(column.get(name, "") for column in results.values())] for name in names]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of scripts/check_bundle.py; exit status 1 if a check has failed."""
    parser = argparse.ArgumentParser(description="Run MONAI's bundle tools on this bundle, offline: a table of what passes.")
    parser.add_argument("--checkpoint", metavar="FILE", help=f"weights to use; default: {WEIGHTS} of the bundle")
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="overlay, such as configs/preset_cpu.json"
    )
    parser.add_argument(
        "--schema",
        metavar="FILE",
        default=os.environ.get(SCHEMA),
        help=f"of metadata.json, which names it; default: ${SCHEMA}; verify_metadata is skipped without it",
    )
    known = parser.parse_args(arguments)
    for file in (known.checkpoint or ROOT / WEIGHTS, *known.config, *filter(None, [known.schema])):
        if not Path(file).is_file():
            parser.error(f"{file}: found no such file, expected weights (--checkpoint), a config or a schema")
    start = time.perf_counter()
    results = check_bundle(
        ROOT, known.checkpoint, known.config, known.schema, show=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(table(results), end="")
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)
    sys.exit(any(result.startswith("FAILED") for column in results.values() for result in column.values()))


if __name__ == "__main__":
    main()
