"""A run's folder: one training at a time, nothing of the user removed, and a resumed run means what it meant before."""

import json
import os
import shutil
from pathlib import Path

import command
import pytest

from bundle.errors import UserError
from bundle.files import list_files, listed_files, remove_listed_files, stop_listing, write_json
from bundle.training.run_folder import RESULTS, close_run, open_run

CONFIG = {"seed": 0, "num_workers": 0, "dataset_dir": "data", "output_dir": "run", "train": {"pretrained": "weights/rgb.pth"}}


@pytest.fixture
def datalist(tmp_path):
    (tmp_path / "data").mkdir()
    write_json({"training": [{"image": "a.png"}]}, tmp_path / "data/datalist.json")
    return tmp_path / "data/datalist.json"


@pytest.fixture
def begun(tmp_path, datalist):
    """A folder with the last checkpoint of a run that was killed, and weights that it started from."""
    folder, weights = tmp_path / "run", tmp_path / "weights.pt"
    weights.write_bytes(b"weights")
    open_run(folder, CONFIG, True, weights, datalist)
    write_json({}, folder / "last.pt")
    close_run(folder)
    return folder


def test_starting_anew_removes_what_the_run_has_written_and_nothing_else(begun, tmp_path, datalist):
    mine = [begun / name for name in ("validation/notes.txt", "evaluation/metrics.json", "thesis.md")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    open_run(begun, CONFIG)
    write_json({}, begun / "validation/metrics.json")
    write_json({}, begun / "lungs/deep/metrics.json")
    write_json({}, tmp_path / "elsewhere.json")
    close_run(begun)
    write_json({}, begun / "later.json")
    made = {"config.json", "environment.json", "last.pt", "validation/metrics.json", "lungs/deep/metrics.json"}
    assert set(listed_files(begun)) == made
    open_run(begun, CONFIG, resume=False)
    close_run(begun)
    assert all(path.read_text() == "mine" for path in mine) and (begun / "later.json").exists()
    assert not {"last.pt", "lungs"} & {path.name for path in begun.iterdir()}
    assert [path.name for path in (begun / "validation").iterdir()] == ["notes.txt"]
    assert listed_files(begun) == ["config.json", "environment.json"] and (tmp_path / "elsewhere.json").exists()


def test_a_folder_knows_the_files_of_the_runs_below_it(tmp_path):
    list_files(tmp_path)
    open_run(tmp_path / "stage", CONFIG)
    write_json({}, tmp_path / "stage/last.pt")
    close_run(tmp_path / "stage")
    stop_listing(tmp_path)
    remove_listed_files(tmp_path)
    assert [path.name for path in (tmp_path / "stage").iterdir()] == [".lock"]


@pytest.mark.parametrize("resume", [True, False])
def test_files_that_no_run_has_written_are_not_overwritten(tmp_path, resume):
    for name in RESULTS[:3]:  # a run of a version without manifests, say
        (tmp_path / name).write_text("old")
    with pytest.raises(UserError) as error:
        open_run(tmp_path, CONFIG, resume)
    assert "found last.pt, best.pt, model.pt, which its manifest does not list" in str(error.value)
    assert f"init_checkpoint {tmp_path / 'model.pt'} to train on" in str(error.value) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == set(RESULTS[:3])


def test_weights_that_would_be_removed_are_refused_as_a_start(begun):
    with pytest.raises(UserError, match="last.pt, which resume false would remove, expected it elsewhere"):
        open_run(begun, CONFIG, False, begun / "last.pt")
    assert (begun / "last.pt").exists()


def test_what_means_the_same_is_the_same_run(begun, tmp_path, datalist, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = Path(shutil.move(tmp_path / "data", tmp_path / "moved"))
    content = json.loads((moved / "datalist.json").read_text())
    (moved / "datalist.json").write_text(json.dumps(content, indent=4), encoding="utf-8-sig")
    weights = Path(shutil.move(tmp_path / "weights.pt", tmp_path / "other.pt"))
    config = {**CONFIG, "dataset_dir": str(moved), "output_dir": "./run", "train": {"pretrained": "./weights/rgb.pth"}}
    open_run("./run", config, True, weights, moved / "datalist.json")
    close_run("run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config, data, weights: config.update(seed=1), "a run with seed 0, found 1"),
        (lambda config, data, weights: config.update(num_workers=2), "a run with num_workers 0, found 2"),
        (lambda config, data, weights: config["train"].update(pretrained=True), "train::pretrained 'weights/rgb.pth', found True"),
        (lambda config, data, weights: write_json({"training": []}, data), "a run with another content of datalist"),
        (lambda config, data, weights: weights.write_bytes(b"others"), "a run with another content of init_checkpoint"),
    ],
    ids=["seed", "num_workers", "pretrained", "datalist", "init_checkpoint"],
)
def test_what_means_something_else_is_another_run(begun, tmp_path, datalist, change, words):
    config, weights = json.loads(json.dumps(CONFIG)), tmp_path / "weights.pt"
    change(config, datalist, weights)
    before = (begun / "config.json").read_text()
    with pytest.raises(UserError) as error:
        open_run(begun, config, True, weights, datalist)
    assert words in str(error.value) and "resume false" in str(error.value) and "\n" not in str(error.value)
    assert (begun / "config.json").read_text() == before


def test_one_training_at_a_time(begun, tmp_path):
    code = f"import time; from bundle.training.run_folder import open_run; open_run({str(begun)!r}, {CONFIG!r}); time.sleep(600)"
    other = command.start("-c", code, log=tmp_path / "log")
    while not (begun / ".lock.holder").exists():
        assert other.exitcode is None, (tmp_path / "log").read_text()
    for _ in range(2):  # to have tried changes nothing
        with pytest.raises(UserError) as error:
            open_run(begun, CONFIG)
        assert str(error.value).startswith(f"{begun}: in use by process {other.pid} on ")
    other.kill()
    other.join()
    open_run(begun, CONFIG)
    assert (begun / ".lock.holder").read_text().startswith(f"process {os.getpid()} on ")
    close_run(begun)


def test_temporary_files_of_killed_runs_are_removed(begun):
    (begun / "validation").mkdir()
    open_run(begun, CONFIG)
    write_json({}, begun / "validation/metrics.json")
    close_run(begun)
    strays = [begun / f".{'0a' * 16}.tmp", begun / f"validation/.{'b1' * 16}.tmp"]
    mine = begun / ".notes.tmp"
    for path in (*strays, mine):
        path.touch()
    open_run(begun, CONFIG)
    close_run(begun)
    assert mine.exists() and not any(path.exists() for path in strays)
