"""The work is dealt out to several processes once and for all."""

import json

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


def test_older_results_of_a_scan_that_fails_now_are_in_no_table(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / f"in/{name}.png")
    worklist = Worklist(tmp_path / "in", tmp_path / "out", "run")
    for scan in worklist.scans:
        prediction = {"scan": scan.name, "lung": None, "novelty": None, "slices": [], "warnings": []}
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
