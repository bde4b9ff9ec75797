"""The command line without its work: what reaches MONAI's runner, help, mistakes, and `info`."""

import gc
import json
import logging
import re
import sys

import pytest
from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser

import bundle
from bundle.cli import CONFIGS, _is_for_users, import_monai, main
from bundle.files import file_hash

NAMES = ["scan", "scan#1", "1001", "1_2", "DOE,JOHN", "[CT]", "it's", 'a "b"', "None", "a@input", "$x", "%y", "a\\#b", "a::b"]


@pytest.fixture
def runner(monkeypatch):
    """Function that runs a command line and returns the id, the options and the config files that MONAI's runner gets."""
    monkeypatch.setattr("bundle.cli.start_runner", lambda: None)
    monkeypatch.setattr("sys.argv", [])

    def run(*arguments):
        main(list(arguments))
        assert sys.argv[:2] == ["monai.bundle", "run"]
        options = sys.argv[3:]
        return sys.argv[2], options, [path.split("/")[-1] for path in eval(options[options.index("--config_file") + 1])]

    return run


def output_of(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code, "".join(capsys.readouterr())


@pytest.mark.parametrize("name", NAMES)
def test_the_config_has_the_names_of_folders_as_they_are_typed(name, runner):
    _, options, _ = runner("predict", name, "-o", name)
    for knob in ("--input", "--output_dir"):
        parser = ConfigParser({"knob": DefaultParseValue(options[options.index(knob) + 1])})
        assert parser.get_parsed_content("knob") == name


@pytest.mark.parametrize(
    ("arguments", "id", "files"),
    [
        (["predict", "SCAN"], "run", ["inference.json"]),
        (["train"], "training", ["train.json"]),
        (["train", "run", "--config", "preset_smoke"], "run", ["train.json", "preset_smoke.json"]),
        (["evaluate", "calibrate"], "calibrate", ["train.json", "evaluate.json"]),
    ],
)
def test_a_command_runs_an_id_of_configs_with_knobs_anywhere_among_its_words(arguments, id, files, runner):
    knobs = ["--batch_size", "-1", "--optimizer::lr=3", "--amp"]
    for words in ([*arguments, "-o", "OUT", *knobs], [arguments[0], *knobs, "-o", "OUT", *arguments[1:]]):
        ran, options, names = runner(*words)
        assert (ran, names, options[-4:]) == (id, files, knobs)
        assert options[options.index("--logging_file") + 1] == "False"
    assert str(CONFIGS / "logging.conf") in runner(*arguments, "-o", "OUT", "--verbose")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND; see chestct --help"),
        (["predict", "x"], "the following arguments are required: -o/--output_dir; see chestct predict --help"),
        (["train"], "the following arguments are required: -o/--output_dir; see chestct train --help"),
        (["predict", "x", "y", "-o", "z"], "unrecognized arguments: y; see chestct --help"),
        (["evaluate", "-o", "y", "--config", "multi_gpu_evaluate"], "--config: found multi_gpu_evaluate, which is now part of "),
        (["predict", "x", "-o", "y", "--config", "my.json"], "--config: found no file my.json, expected changes "),
        (["predict", "x", "-o", "y", "--input=z"], "--input: found an option of MONAI's runner, expected INPUT"),
        (["train", "-o", "y", "--config_file", "my.json"], "--config_file: found an option of MONAI's runner, "),
        (["predict", "x", "-o", "y", "--config", "BROKEN"], "BROKEN: cannot be read ("),
        (
            ["predict", "x", "-o", "y", "--config", "multi_gpu_train"],
            f"{CONFIGS}/multi_gpu_train.json: found 'train#dataloader#sampler', which does not fit inference.json, expected ",
        ),
        (["prepare", "nowhere", "-o", "y"], "nowhere: "),
        (["info", "nowhere.pt"], "nowhere.pt: no such checkpoint"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BROKEN").write_text('{"flips": false,}')
    status, shown = output_of(capsys, *arguments)
    assert status and shown.startswith(f"error: {message}") and shown.count("\n") == 1, shown


@pytest.mark.parametrize(
    ("name", "level", "shown"),
    [
        ("bundle.training.trainer", "INFO", True),
        ("bundle.data.datalist", "INFO", False),
        ("monai.bundle.scripts", "INFO", False),
        ("monai.bundle.workflows", "WARNING", False),
        ("monai.transforms", "WARNING", True),
    ],
)
def test_the_console_shows_what_this_package_reports_and_warnings(name, level, shown):
    assert _is_for_users(logging.makeLogRecord({"name": name, "levelno": getattr(logging, level)})) == shown


def test_help_shows_the_main_knobs_with_the_defaults_of_the_configs(capsys):
    status, shown = output_of(capsys, "predict", "--help")
    shown = " ".join(shown.split())
    config = json.loads((CONFIGS / "inference.json").read_text())
    assert status == 0 and len(re.findall(r"--\w+ VALUE \w", shown)) == 10 and "docs/configuration.md lists all" in shown
    defaults = {"score_threshold": config["score_threshold"], "flips": "True", "checkpoint": "models/model.pt"}
    for knob, default in defaults.items():
        assert re.search(rf"--{knob} VALUE [^\[]*\[{default}\]", shown), knob
    for command in ("train", "evaluate", "prepare", "info"):
        assert output_of(capsys, command, "--help")[0] == 0
    assert output_of(capsys, "--version") == (0, f"chestct {bundle.__version__}\n")


def test_info_prints_what_a_checkpoint_says_of_itself(checkpoint, capsys):
    main(["info", str(checkpoint), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["hash"] == file_hash(checkpoint)[:12] and said["classes"] == ["other", "COVID-19", "lung cancer"]
    assert said["parameters"] > 1000 and said["tasks"] == ["classification", "segmentation", "reconstruction", "detection"]
    main(["info", str(checkpoint)])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["classes"] == "other, COVID-19, lung cancer" and lines.keys() == said.keys()


def test_what_is_imported_is_never_searched_for_garbage():
    import_monai()
    assert gc.get_freeze_count() > 10**5 and gc.isenabled()
    gc.unfreeze()
