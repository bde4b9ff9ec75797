"""The work is dealt out to several processes once and for all."""

import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from PIL import Image
from some_tasks import some_tasks

from bundle.errors import UserError
from bundle.inference.worklist import Worklist, fingerprint


def test_processes_agree_on_their_shares_however_late_they_start(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in "abcde":
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / f"in/{name}.png")

    def start(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        return Worklist(tmp_path / "in", tmp_path / "out")

    early = start(0)
    write_results(early, early.scans[0])
    late = start(1)  # after the first process has finished a scan
    names = [[scan.name for scan in worklist.scans] for worklist in (early, late)]
    assert len(names[0]) == 3 and len(names[1]) == 2 and not set(names[0]) & set(names[1])
    assert [scan.name for scan in start(0).pending(stamp)] == names[0][1:], "what is done is not done again"


def stamp(scan):
    return f"{scan.stamp} by these weights"


def write_results(worklist, scan, **entries):
    prediction = {"scan": scan.name, "stamp": stamp(scan), "lung": None, "novelty": None}
    prediction |= {"slices": [], "warnings": []}
    text = json.dumps({**prediction, **entries})
    worklist.publish(scan, SimpleNamespace(write=lambda folder: (folder / "predictions.json").write_text(text)))


@pytest.fixture
def picture(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "in/a.png")
    return tmp_path / "in/a.png"


def test_older_results_come_back_if_new_ones_cannot_take_their_place(picture, tmp_path, monkeypatch):
    worklist, calls, replace = Worklist(picture, tmp_path / "out"), [], os.replace
    write_results(worklist, worklist.scans[0], model="older")

    def refuse_the_second(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise PermissionError(13, "Permission denied")
        replace(*paths)

    monkeypatch.setattr(os, "replace", refuse_the_second)
    write_results(worklist, worklist.scans[0], model="newer")
    assert "cannot be written (Permission denied)" in worklist.failures[0]["reason"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
    assert json.loads((tmp_path / "out/a.png/predictions.json").read_text())["model"] == "older"


@pytest.mark.parametrize(
    ("file", "writing", "reason"),
    [
        ("in/a.png", False, "in/a.png: cannot be read (Input/output error), expected an intact "),
        (None, False, "in/a.png: cannot be read (Input/output error), expected an intact "),
        ("in/a.png", True, "in/a.png: cannot be read (Input/output error), expected an intact "),
        ("out/.tmp.1/mask.png", True, "out/a.png: cannot be written (Input/output error); check the disk"),
        ("out", True, "out/a.png: cannot be written (Input/output error); check the disk"),
        (None, True, "out/a.png: cannot be written (Input/output error); check the disk"),
    ],
)
def test_an_error_of_a_disk_names_what_cannot_be_read_or_written(picture, tmp_path, file, writing, reason):
    worklist = Worklist(picture, tmp_path / "out")
    with worklist.attempt(worklist.scans[0], writing):
        raise OSError(5, "Input/output error", file and str(tmp_path / file))
    (failure,) = worklist.failures
    assert failure["reason"].startswith(f"{tmp_path}/{reason}") and "log" not in failure


def test_results_take_the_place_of_older_ones_whole(picture, tmp_path, monkeypatch):
    for run in ("one", "two"):
        worklist = Worklist(picture, tmp_path / "out")
        write_results(worklist, worklist.scans[0], model=run)
    assert [path.name for path in (tmp_path / "out/a.png").iterdir()] == ["predictions.json"]
    worklist = Worklist(picture, tmp_path / "out")
    with monkeypatch.context() as patch:  # killed between the two steps
        replaced, replace = [], os.replace
        patch.setattr(os, "replace", lambda *paths: replaced.append(replace(*paths)) if not replaced else os.kill())
        patch.setattr(os, "kill", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_results(worklist, worklist.scans[0])
    worklist = Worklist(picture, tmp_path / "out")
    with worklist.locked():
        write_results(worklist, *worklist.pending(lambda scan: "another stamp"), model="three")
        worklist.finish(some_tasks())
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
        Worklist(picture, tmp_path / "out").pending(stamp)
    assert strange.read_text() == "[1]"


def test_tables_hold_hidden_scans_and_nothing_that_another_program_has_written(picture, tmp_path):
    hidden = picture.rename(picture.with_name(".a.png"))
    worklist = Worklist(hidden, tmp_path / "out")
    for number, text in enumerate(('{"a": 1}', "[]", "half")):
        (tmp_path / f"out/{number}").mkdir(parents=True)
        (tmp_path / f"out/{number}/predictions.json").write_text(text)
    write_results(worklist, worklist.scans[0])
    worklist.finish(some_tasks())
    assert [line.split(",")[0] for line in (tmp_path / "out/scans.csv").read_text().splitlines()] == ["scan", ".a.png"]


def test_older_results_of_a_scan_that_fails_now_are_in_no_table(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / f"in/{name}.png")
    worklist = Worklist(tmp_path / "in", tmp_path / "out")
    for scan in worklist.scans:
        write_results(worklist, scan)
    (tmp_path / "in/b.png").write_bytes(b"no picture any more")
    later = Worklist(tmp_path / "in", tmp_path / "out")
    later.fail(later.scans[1], UserError("c.png: found nothing"))
    later.finish(some_tasks())
    tables = {name: (tmp_path / f"out/{name}.csv").read_text().splitlines()[1:] for name in ("scans", "failures")}
    assert [line.split(",")[0] for line in tables["scans"]] == ["a.png"]
    assert sorted(line.split(",")[0] for line in tables["failures"]) == ["b.png", "c.png"]
    assert (tmp_path / "out/c.png/predictions.json").exists()
    later.fail(later.scans[0], UserError("a.png: found nothing"))
    with pytest.raises(ValueError, match="input: nothing could be read"):
        later.finish(some_tasks())
    assert [path.name for path in (tmp_path / "out").glob("*.csv")] == ["failures.csv"]


def test_a_slice_that_was_replaced_makes_another_scan_whatever_its_size_and_date(tmp_path, write_ct):
    write_ct(tmp_path / "in", [np.full((64, 64), 40 * index) for index in range(3)])
    for index in range(3):
        os.utime(tmp_path / f"in/{index}", (1000 + index, 1000 + index))
    worklist = Worklist(tmp_path / "in", tmp_path / "out")
    (scan,) = worklist.pending(stamp)
    write_results(worklist, scan)
    assert not Worklist(tmp_path / "in", tmp_path / "out").pending(stamp)
    dataset = pydicom.dcmread(tmp_path / "in/1")
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(tmp_path / "in/1")
    os.utime(tmp_path / "in/1", (1000, 1000))
    assert len(Worklist(tmp_path / "in", tmp_path / "out").pending(stamp)) == 1
    for index in range(3):
        os.utime(tmp_path / f"in/{index}", (1000 + index, 1000 + index))
    (tmp_path / "in").rename(tmp_path / "moved")
    assert not Worklist(tmp_path / "moved", tmp_path / "out").pending(stamp), "names of files count, their folder does not"


def test_what_killed_runs_leave_behind_is_removed_and_nothing_else(picture, tmp_path):
    mine, killed = ("out/.tmp.mine/x", "out/a/.hidden.tmp"), (f"out/a/.tmp.{'0a' * 16}/x/y", f"out/.{'0a' * 16}.tmp")
    for name in (*mine, *killed):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    worklist = Worklist(picture, tmp_path / "out")
    assert all((tmp_path / name).exists() for name in killed), "another run may be using them: nobody has the lock yet"
    with worklist.locked():
        pass
    assert all((tmp_path / name).exists() for name in mine)
    assert not any((tmp_path / name).parent.is_dir() for name in killed[:1]) and not (tmp_path / killed[1]).exists()


def test_the_fingerprint_is_of_the_content_of_the_weights_and_of_the_knobs(tmp_path):
    """Neither where the weights lie nor on which device they are used changes a prediction."""

    def of(content, name="w.pt", **knobs):
        (tmp_path / name).write_bytes(content)
        config = {"checkpoint": name, "device": "cpu", "flips": True, **knobs}
        return fingerprint(SimpleNamespace(parser=SimpleNamespace(get=lambda: config)), tmp_path / name)

    assert of(b"one") == of(b"one", "moved.pt", device="cuda")
    assert len({of(b"one"), of(b"two"), of(b"one", flips=False)}) == 3
