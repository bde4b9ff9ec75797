"""A file is the old one or the new one, never half of one."""

import json
import os

import pytest
import torch

from bundle.files import replacing, write_checkpoint, write_json, write_table, write_text


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    write_text("old – ü", path)
    with pytest.raises(RuntimeError, match="in between"), replacing(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("in between")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text(encoding="utf-8") == "old – ü"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text(encoding="utf-8") == "old – ü", "until the block ends"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json({"a": 1}, tmp_path / "x.json")
    with pytest.raises(TypeError):
        write_json({"a": {1}}, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_a_table_has_the_columns_of_all_rows(tmp_path):
    rows = ({"b": 1}, {"b": None, "a": "x,y"})
    write_table(iter(rows), tmp_path / "x.csv", ["first"])
    assert (tmp_path / "x.csv").read_bytes() == b'first,b,a\n,1,\n,,"x,y"\n'
    write_table([], tmp_path / "x.csv", ["first"])
    assert (tmp_path / "x.csv").read_bytes() == b"first\n"


def test_a_name_that_is_no_utf_8_is_written_as_an_escape(tmp_path):
    name = os.fsdecode(b"M\xfcller.png")
    write_table([{"file": name}], tmp_path / "x.csv")
    write_text(name, tmp_path / "x.txt")
    assert (tmp_path / "x.csv").read_text() == "file\nM\\udcfcller.png\n"
    assert (tmp_path / "x.txt").read_text() == "M\\udcfcller.png"


def test_a_checkpoint_is_what_torch_reads(tmp_path):
    write_checkpoint({"weight": torch.arange(3)}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["weight"].tolist() == [0, 1, 2]
