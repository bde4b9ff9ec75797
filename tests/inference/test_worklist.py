"""The work is dealt out to several processes once and for all."""

import json

import numpy as np
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
