"""What the check finds wrong, it says; tests/integration/test_bundle_verbs.py runs all of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from bundle import verification
from bundle.verification import Place, _failed, check, commands, is_installed, main, report_calls, table

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs/preset_smoke.json"


@pytest.fixture
def place(phantom_dir, tmp_path):
    """In an empty directory, with the weights of the smallest network."""
    parser = ConfigParser()
    parser.read_config([ROOT / "configs/inference.json", SMOKE])
    weights = parser.get_parsed_content("multitask_net").state_dict()
    torch.save(
        {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}, tmp_path / "w.pt"
    )
    (tmp_path / "out").mkdir()
    data = Path(shutil.copytree(phantom_dir, tmp_path / "data"))
    (data / "scan").mkdir()
    return Place("here", ROOT, tmp_path, data, tmp_path / "out", tmp_path / "w.pt", [str(SMOKE)])


def results_of_calls(place) -> dict[str, str]:
    report_calls(json.dumps(vars(place), default=str), str(place.out / "calls.json"))
    return json.loads((place.out / "calls.json").read_text())


def test_commands_say_only_what_is_not_at_its_usual_place(place):
    root = Place("from the root", Path("."), ROOT, Path("/data"), Path("/out"), schema=Path("/schema.json"))
    assert commands(root)["run"] == [
        *("--config_file", "configs/inference.json"),
        *("--dataset_dir", "/data/scan", "--output_dir", "/out/predictions"),
    ]
    assert list(map(str, commands(root)["ckpt_export"])) == [
        *("network_def", "--ckpt_file", "models/model.pt", "--meta_file", "configs/metadata.json"),
        *("--config_file", "configs/inference.json", "--filepath", "/out/model.ts"),
    ]
    words = commands(place)["run"]
    assert words[1] == str([str(ROOT / "configs/inference.json"), str(SMOKE)])
    assert words[-4:] == ["--bundle_root", str(ROOT), "--checkpoint", str(place.checkpoint)]


def test_calls_tell_what_is_wrong_from_what_is_right(place):
    results = results_of_calls(place)
    assert results.pop("load(load_ts_module=True)") == "FAILED: AssertionError: ckpt_export has made no model.ts"
    empty = results.pop("create_workflow"), results.pop("check_properties, inference")
    assert all(result.startswith("FAILED: ValueError: input: ") for result in empty), "scan/ is empty"
    assert len(results) == 3 and all(result.startswith("ok, ") for result in results.values()), results
    weights = torch.load(place.checkpoint, weights_only=True)
    key = next(key for key in weights if key.startswith("encoder."))
    torch.save({**weights, key: torch.zeros(3)}, place.checkpoint)
    assert results_of_calls(place)['load(workflow_type="inference")'].startswith(
        f"FAILED: AssertionError: {key} is not as in"
    )


def test_a_command_that_fails_or_cannot_run_is_a_result(place, monkeypatch):
    monkeypatch.setitem(verification.NEEDS, "onnx_export", ["no_such_module"])

    def run(self, *command):
        failed = "run_workflow" in command or "-c" in command
        return verification.subprocess.CompletedProcess(
            command, int(failed), "", "log\nerror: a | b\n\n" if failed else "log"
        )

    monkeypatch.setattr(Place, "run", run)
    results = dict(check(place))
    assert results["verify_metadata"] == "skipped: no schema"
    assert results["onnx_export"] == "skipped: no no_such_module"
    assert results["run"].startswith("ok, ") and results["run"].endswith(" s")
    assert results["run_workflow"] == results["python calls"] == r"FAILED: error: a \| b"
    assert _failed("") == "FAILED: without a word"


def test_the_table_is_markdown_and_failure_the_exit_status(monkeypatch, capsys, place):
    results = {"from the root": {"run": "ok, 1.0 s", "load": "ok, 2.0 s"}, "from elsewhere": {"run": "skipped: no schema"}}
    assert table(results) == (
        "| check | from the root | from elsewhere |\n| --- | --- | --- |\n"
        "| `run` | ok, 1.0 s | skipped: no schema |\n| `load` | ok, 2.0 s |  |\n"
    )
    monkeypatch.setattr(verification, "check_bundle", lambda *_, **__: results)
    for result, status in (("skipped: no schema", 0), ("FAILED: error", 1)):
        results["from elsewhere"]["run"] = result
        with pytest.raises(SystemExit) as ended:
            main(["--checkpoint", str(place.checkpoint)])
        assert int(ended.value.code) == status
        assert capsys.readouterr().out == table(results)


def test_files_that_are_not_there_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(tmp_path / "none.pt")])
    assert f"{tmp_path}/none.pt: found no such file, expected weights (--checkpoint)" in capsys.readouterr().err


def test_a_package_of_another_root_is_not_this_one_installed(tmp_path):
    assert not is_installed(tmp_path, tmp_path)
