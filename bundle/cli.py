"""The console command `chestct`: MONAI's bundle runner on this package's configs, preparation of data, and `info`."""

import argparse
import gc
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import bundle
from bundle.errors import UserError, exit_in_one_line
from bundle.files import ROOT, file_hash

CONFIGS = ROOT / "configs"
RUNS = {  # config files, what is run by default, description, knobs that --help shows
    "predict": (
        ("inference",),
        "run",
        "predict a scan, or every scan of a folder (DICOM, NIfTI, NRRD, MetaImage, pictures)",
        "checkpoint tasks score_threshold link_iou flips backend batch_size device keep_identifiers reference",
    ),
    "train": (
        ("train",),
        "training",
        "train a network: the stages of the curriculum, or with the id `run` all tasks jointly",
        "dataset_dir classes tasks backbone pretrained init_checkpoint max_epochs batch_size resume device",
    ),
    "evaluate": (
        ("train", "evaluate"),
        "run",
        "measure OUT/model.pt, or with the id calibrate, reference or grad_cam what is made of it",
        "checkpoint split tasks bootstrap regions failures with_images evaluation_dir",
    ),
}
RUNNER_OPTIONS = {"--input": "INPUT", "--config_file": "--config FILE"}  # that the commands set; the runner takes the last
NEEDLESS = ("monai.bundle.workflows", "monai.data.nvimgcodec_pydicom_plugin")  # loggers whose warnings help no user
CHATTY = (*NEEDLESS, "monai.bundle.scripts", "monai.handlers.StatsHandler")  # those that have handlers of their own
OPTIONS = ("--output_dir", "--config", "--verbose", "--help")  # everything else with two dashes is a knob


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line, `sys.argv` by default.

    `predict`, `train` and `evaluate` run configs with MONAI's bundle runner and nothing else; knobs go to it as they are.
    """
    parser = Parser(prog="chestct", description="Multi-task chest CT. Research use only.")
    parser.add_argument("--version", action="version", version=f"chestct {bundle.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in RUNS:
        _add_run(commands, command)
    _add_prepare(commands)
    info = commands.add_parser("info", help="print what a checkpoint says of itself")
    info.add_argument("checkpoint", nargs="?", default=ROOT / "models/model.pt", help="default: the shipped weights")
    info.add_argument("--json", action="store_true", help="as JSON")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars are for terminals
    rest = list(sys.argv[1:] if arguments is None else arguments)
    knobs = _take_knobs(rest) if rest and rest[0] in RUNS else []
    known = parser.parse_args(rest)
    with exit_in_one_line():
        if known.command in RUNS:
            for option in RUNNER_OPTIONS.keys() & {word.split("=")[0] for word in knobs}:
                raise UserError(f"{option}: found an option of MONAI's runner, expected {RUNNER_OPTIONS[option]}")
            sys.argv = ["monai.bundle", *_runner_arguments(known), *knobs]
        else:
            {"prepare": _prepare, "info": _info}[known.command](known)
    if known.command in RUNS:
        start_runner()


def start_runner() -> None:
    """Run MONAI's bundle runner with `sys.argv`. Fire gets `run` alone: to find commands it reads the sources of all modules."""
    import_monai()
    import fire
    from monai.bundle import run

    fire.Fire({"run": run})


def import_monai() -> None:
    """Import MONAI without looking for garbage in what it brings, now or later, which takes a second and a half."""
    gc.disable()
    import monai.bundle  # noqa: F401

    gc.freeze()
    gc.enable()


def _add_run(commands, command: str) -> None:
    files, default, text, main = RUNS[command]
    what = "INPUT" if command == "predict" else "[ID]"
    usage = f"chestct {command} {what} -o OUT [--config FILE …] [--verbose] [--KNOB VALUE …]"
    parser = commands.add_parser(command, help=text, description=f"{text[0].upper()}{text[1:]}.", usage=usage)
    if command == "predict":
        parser.add_argument("input", metavar="INPUT", help="file, folder (with all folders in it) or quoted glob pattern")
    else:
        parser.add_argument("id", metavar="ID", nargs="?", default=default, help=f"what to run; default: {default}")
    parser.add_argument("-o", "--output_dir", metavar="OUT", required=True, help="folder of the results")
    help = f"changes to {files[-1]}.json: a file, or the name of one of the package, such as preset_cpu; may be repeated"
    parser.add_argument("--config", metavar="FILE", action="append", default=[], help=help)
    parser.add_argument("--verbose", action="store_true", help="show everything that MONAI and other libraries report")
    text = f"Any knob of {files[-1]}.json may follow as --knob VALUE. docs/configuration.md lists all; the main ones:"
    group = parser.add_argument_group("knobs", text)
    schemas = json.loads(Path(__file__).with_name("knobs.json").read_text(encoding="utf-8"))["$defs"]
    config = json.loads((CONFIGS / f"{files[-1]}.json").read_text(encoding="utf-8"))
    for knob in main.split():
        schema = schemas[files[-1]]["properties"][knob]
        if schema.get("$ref", "").endswith(f"/train/properties/{knob}"):
            schema = {**schemas["train"]["properties"][knob], **schema}
        words = f"{schema['description']} [{in_words(config[knob], schema)}]".replace("`", "").replace("%", "%%")
        words = words.replace("null", "None").replace("true", "True").replace("false", "False")  # as they are typed
        group.add_argument(f"--{knob}", metavar="VALUE", help=words)


def in_words(value, schema: Mapping = {}) -> str:
    """A value of a config, such as the default of a knob, for a reader; the words of its schema where there are some."""
    if "default" in schema:
        return schema["default"]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value)


def _take_knobs(arguments: list[str]) -> list[str]:
    """Remove the knobs, `--knob VALUE` or `--knob=VALUE`, from a command line and return them."""
    knobs, rest = [], []
    while arguments:
        word = arguments.pop(0)
        if not word.startswith("--") or word.split("=")[0] in OPTIONS:
            rest.append(word)
            continue
        knobs.append(word)
        if "=" not in word and arguments and not re.match("--|-[a-z]$", arguments[0]):
            knobs.append(arguments.pop(0))
    arguments += rest
    return knobs


def _runner_arguments(known: argparse.Namespace) -> list[str]:
    names, default, *_ = RUNS[known.command]
    files = [CONFIGS / f"{name}.json" for name in names]
    for text in known.config:
        shipped = CONFIGS / f"{text.removesuffix('.json')}.json"
        files.append(Path(text) if Path(text).is_file() else shipped)
        if shipped.stem == "multi_gpu_evaluate" and not files[-1].is_file():
            raise UserError(f"--config: found {text}, which is now part of multi_gpu_train; write multi_gpu_train")
        if not files[-1].is_file():
            raise UserError(f"--config: found no file {text}, expected changes in JSON or YAML, or a name in {CONFIGS}")
    if known.config:
        from bundle.config import merge_overlays  # takes seconds, which --help need not wait for

        merge_overlays(files[0], files[1:])
    if not known.verbose:
        shown = logging.StreamHandler(sys.stdout)
        for place in (shown, *map(logging.getLogger, CHATTY)):
            place.addFilter(_is_for_users)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[shown])
        if all(file.parent == CONFIGS for file in files):  # nobody needs to be warned of the configs of this package
            warnings.filterwarnings("ignore", "parsing config_file")
    arguments = ["run", getattr(known, "id", default), "--config_file", str([str(file) for file in files])]
    arguments += ["--meta_file", str(CONFIGS / "metadata.json")]
    arguments += ["--logging_file", str(CONFIGS / "logging.conf") if known.verbose else "False"]
    if known.command == "predict":
        arguments += ["--bundle_root", str(ROOT), "--input", _as_expression(known.input)]
    return [*arguments, "--output_dir", _as_expression(known.output_dir)]


def _is_for_users(record: logging.LogRecord) -> bool:
    """True for what this package reports and for warnings that help a user."""
    ours = record.name.startswith("bundle.") and not record.name.startswith("bundle.data.")
    least = logging.ERROR if record.name in NEEDLESS else logging.INFO if ours else logging.WARNING
    return record.levelno >= least


def _as_expression(text: str) -> str:
    """A text that reaches the config as it is: in a plain value MONAI takes # for :: and the runner for a comment."""
    return "$" + repr(text).replace("#", r"\x23").replace("@", r"\x40")


def _add_prepare(commands) -> None:
    layouts = "a data set's folder, a folder of such folders, or a CSV file; docs/data.md describes the layouts"
    parser = commands.add_parser("prepare", help="make one datalist from public data sets or your own tables")
    parser.add_argument("sources", nargs="+", metavar="[LAYOUT=]PATH", help=layouts)
    parser.add_argument("-o", "--output", required=True, help="folder of datalist.json, for --dataset_dir")
    parser.add_argument("--classes", nargs="+", default=["other", "COVID-19", "lung cancer"], help="names of class 0, 1, 2 …")
    parser.add_argument("--seed", type=int, default=0, help="of the split of layouts that come without one")
    parser.add_argument("--implied", action="store_true", help="add what annotations imply for other tasks (training split)")
    parser.add_argument("--categories", nargs="+", default=[], help="of COCO files with several: those to be read")


def _prepare(known: argparse.Namespace) -> None:
    from bundle.data.sources import merge, table

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(table(merge(known.sources, known.output, known.classes, known.seed, known.implied, known.categories)), end="")


def _info(known: argparse.Namespace) -> None:
    from bundle.networks.weights import describe, read_weights

    weights = read_weights(known.checkpoint)
    if (description := describe(weights)) is None:
        raise UserError(f"{known.checkpoint}: found no description, expected a checkpoint of version 0.2.0 or later")
    parameters = sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point())
    about = {"checkpoint": str(known.checkpoint), "hash": file_hash(known.checkpoint)[:12], "parameters": parameters}
    about |= description
    if known.json:
        print(json.dumps(about, indent=1))
    else:
        for name, value in about.items():
            print(f"{name:21} {in_words(value)}")


if __name__ == "__main__":
    main()
