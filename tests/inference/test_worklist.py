"""The work is dealt out to several processes once and for all."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from bundle.inference.worklist import Worklist


def test_processes_agree_on_their_shares_however_late_they_start(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "abcde":
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / f"in/{name}.png")

    def start(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        return Worklist(tmp_path / "in", tmp_path / "out", "run")

    early = start(0)
    done = early.scans[0]
    (early.begin(done.name) / "predictions.json").write_text(json.dumps({"stamp": early.stamp(done)}))
    early.complete(done.name)
    late = start(1)  # after the first process has finished a scan
    names = [[scan.name for scan in worklist.scans] for worklist in (early, late)]
    assert len(names[0]) == 3 and len(names[1]) == 2 and not set(names[0]) & set(names[1])
    again = start(0)
    assert [scan.name for scan in again.scans] == names[0][1:], "what is done is not done again"


def write_results(worklist, scan, **entries):
    prediction = {"scan": scan.name, "stamp": worklist.stamp(scan), "lung": None, "novelty": None, "slices": [], "warnings": []}
    (worklist.begin(scan.name) / "predictions.json").write_text(json.dumps({**prediction, **entries}))
    worklist.complete(scan.name)


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "in/a.png")
    return tmp_path / "in/a.png"


def test_results_take_the_place_of_older_ones_whole(picture, tmp_path, monkeypatch):
    for run in ("one", "two"):
        worklist = Worklist(picture, tmp_path / "out", run)
        write_results(worklist, worklist.scans[0], model=run)
    assert [path.name for path in (tmp_path / "out/a.png").iterdir()] == ["predictions.json"]
    worklist = Worklist(picture, tmp_path / "out", "three")
    with monkeypatch.context() as patch:  # killed between the two steps
        replaced, replace = [], os.replace
        patch.setattr(os, "replace", lambda *paths: replaced.append(replace(*paths)) if not replaced else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_results(worklist, worklist.scans[0])
    worklist = Worklist(picture, tmp_path / "out", "three")
    write_results(worklist, worklist.scans[0], model="three")
    worklist.finish()
    assert json.loads((tmp_path / "out/a.png/predictions.json").read_text())["model"] == "three"
    assert [path.name for path in (tmp_path / "out/a.png").iterdir()] == ["predictions.json"]
    assert not list((tmp_path / "out").rglob(".tmp*"))


@pytest.mark.parametrize("place", ["a.png", "a.png/notes.txt", "a.png/predictions.json"])
def test_what_another_program_has_put_there_is_not_replaced(picture, tmp_path, place):
    strange = tmp_path / "out" / place
    strange.parent.mkdir(parents=True)
    strange.write_text("[1]")
    found = f"the file {strange}" if place == "a.png" else f"{strange.parent} with other content"
    with pytest.raises(ValueError, match=f"^output_dir: found {re.escape(found)}, expected a folder of results there or none"):
        Worklist(picture, tmp_path / "out", "run")
    assert strange.read_text() == "[1]"


def test_tables_hold_hidden_scans_and_nothing_that_another_program_has_written(picture, tmp_path):
    hidden = picture.rename(picture.with_name(".a.png"))
    worklist = Worklist(hidden, tmp_path / "out", "run")
    for number, text in enumerate(('{"a": 1}', "[]", "half")):
        (tmp_path / f"out/{number}").mkdir(parents=True)
        (tmp_path / f"out/{number}/predictions.json").write_text(text)
    write_results(worklist, worklist.scans[0])
    worklist.finish()
    assert [line.split(",")[0] for line in (tmp_path / "out/scans.csv").read_text().splitlines()] == ["scan", ".a.png"]


def test_older_results_of_a_scan_that_fails_now_are_in_no_table(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / f"in/{name}.png")
    worklist = Worklist(tmp_path / "in", tmp_path / "out", "run")
    for scan in worklist.scans:
        prediction = {
            "scan": scan.name,
            "stamp": worklist.stamp(scan),
            "lung": None,
            "novelty": None,
            "slices": [],
            "warnings": [],
        }
        (worklist.begin(scan.name) / "predictions.json").write_text(json.dumps(prediction))
        worklist.complete(scan.name)
    (tmp_path / "in/b.png").write_bytes(b"no picture any more")
    later = Worklist(tmp_path / "in", tmp_path / "out", "other weights")
    later.fail("c.png", "c.png: found nothing")
    later.finish()
    tables = {name: (tmp_path / f"out/{name}.csv").read_text().splitlines()[1:] for name in ("scans", "failures")}
    assert [line.split(",")[0] for line in tables["scans"]] == ["a.png"]
    assert sorted(line.split(",")[0] for line in tables["failures"]) == ["b.png", "c.png"]
    assert (tmp_path / "out/c.png/predictions.json").exists()
    later.fail("a.png", "a.png: found nothing")
    with pytest.raises(ValueError, match="input: nothing could be read"):
        later.finish()
    assert [path.name for path in (tmp_path / "out").glob("*.csv")] == ["failures.csv"]
