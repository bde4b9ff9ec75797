"""The archive holds the bundle and nothing else, the same every time, and weights that fit."""

import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, download_large_files

import bundle
from bundle import packaging
from bundle.files import file_hash
from bundle.packaging import NAME, PARTS, WEIGHTS, bundle_files, main, merge, package_bundle

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs/preset_smoke.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A bundle outside git whose weights are those of the smallest network, and caches and hidden files in it."""
    root = tmp_path_factory.mktemp("packaging") / "source"
    for path in bundle_files(ROOT):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, root / path)
    config = root / "configs/inference.json"
    config.write_text(json.dumps(merge(json.loads(config.read_text()), [SMOKE])))
    parser = ConfigParser()
    parser.read_config(config)
    shutil.rmtree(root / "models", ignore_errors=True)
    (root / "models").mkdir()
    torch.save(parser.get_parsed_content("multitask_net").state_dict(), root / WEIGHTS)
    for junk in ("bundle/__pycache__/tasks.pyc", "docs/.draft.md", "output/mask.nii.gz", "README.md"):
        (root / junk).parent.mkdir(exist_ok=True)
        (root / junk).touch()
    return root


def test_one_folder_with_what_the_model_zoo_expects(source, tmp_path):
    archive = package_bundle(tmp_path / "new", source)
    assert archive == tmp_path / f"new/{NAME}_v{bundle.__version__}.zip"
    assert [path.name for path in archive.parent.iterdir()] == [archive.name], "no temporary file stays"
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
        names = file.namelist()
        assert file.read(f"{NAME}/{WEIGHTS}") == (source / WEIGHTS).read_bytes()
    assert {name.split("/")[1] for name in names} == set(PARTS) and all(name.startswith(f"{NAME}/") for name in names)
    inside = {name.removeprefix(f"{NAME}/") for name in names}
    assert inside == {path for path in bundle_files(ROOT) if not path.startswith("models/")} | {WEIGHTS}
    assert {"LICENSE", "configs/metadata.json", "configs/inference.json", "bundle/inference/report_template.html"} <= inside


def test_the_same_files_give_the_same_bytes(source, tmp_path):
    first = package_bundle(tmp_path / "a", source).read_bytes()
    again = tmp_path / "again"
    shutil.copytree(source, again, copy_function=shutil.copyfile)  # other times, other order
    assert package_bundle(tmp_path / "b", again).read_bytes() == first


def test_of_a_git_checkout_only_what_git_tracks(tmp_path):
    for path in ("LICENSE", "bundle/a.py", "docs/ü.md", "models/model.pt", "tests/test_a.py", "bundle/untracked.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "LICENSE", "bundle/a.py", "docs", "tests"], cwd=tmp_path, check=True)
    assert bundle_files(tmp_path) == ["LICENSE", "bundle/a.py", "docs/ü.md"]


def test_links_of_the_documents_lead_into_the_archive():
    inside = set(bundle_files(ROOT))
    documents = [path for path in inside if path.endswith(".md")]
    links = [(path, link) for path in documents for link in re.findall(r"\]\(([^):#]+)[)#]", (ROOT / path).read_text())]
    assert len(links) > 50
    targets = {(path, os.path.normpath(os.path.join(os.path.dirname(path), link))) for path, link in links}
    folders = {str(parent) for path in inside for parent in Path(path).parents}
    assert [pair for pair in sorted(targets) if pair[1] not in inside | folders] == []


def test_weights_that_lack_or_do_not_fit_are_refused_in_one_line(source, tmp_path, monkeypatch, capsys):
    def refusal(*arguments) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["--output_dir", str(tmp_path / "out"), *map(str, arguments)])
        assert ended.value.code == 1 and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    monkeypatch.setattr(packaging, "ROOT", source)
    missing = refusal("--checkpoint", tmp_path / "none.pt")
    assert missing == f"error: {tmp_path}/none.pt: no such checkpoint; train first, or name another one\n"
    other = refusal("--config", ROOT / "configs/backbone_resnet50.json")
    assert other.startswith(f"error: {source}/models/model.pt: found encoder.") and other.count("\n") == 1
    averaged = refusal("--config", ROOT / "configs/ema.json")
    assert "ema.json: found '+train#handlers', which does not fit inference.json" in averaged and averaged.count("\n") == 1
    assert "frozen_encoder.json is for training alone, leave it out" in refusal("--config", ROOT / "configs/frozen_encoder.json")
    weights = torch.load(source / WEIGHTS, weights_only=True)
    torch.save({key: value for key, value in weights.items() if "detection" not in key}, tmp_path / "three.pt")
    assert "three.pt: found heads.detection." in refusal("--checkpoint", tmp_path / "three.pt")
    bare = shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("model.pt"))
    monkeypatch.setattr(packaging, "ROOT", bare)
    assert refusal().startswith(f"error: {bare}/models/model.pt: found no such file that belongs to the bundle")


def test_other_weights_bring_their_network_and_their_reference(source, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    overlay = tmp_path / "overlay.json"
    overlay.write_text(
        json.dumps({"width": 0.25, "max_epochs": 7, "detection::fpn_channels": 8, "+tasks": {"detection": 0.5}})
    )
    parser = ConfigParser()
    parser.read_config([source / "configs/inference.json", overlay])
    torch.save(parser.get_parsed_content("multitask_net").state_dict(), folder / "model.pt")
    reference = {"mean": torch.zeros(2), "scale": torch.ones(2), "precision": torch.eye(2), "threshold": 3.5}
    torch.save({**reference, "checkpoint": file_hash(folder / "model.pt")}, folder / "reference.pt")
    (folder / "last.pt").write_bytes(b"of the run")
    with zipfile.ZipFile(package_bundle(tmp_path / "out", source, folder / "model.pt", [overlay])) as file:
        models = {name for name in file.namelist() if "/models/" in name}
        inference, train = (json.loads(file.read(f"{NAME}/configs/{name}.json")) for name in ("inference", "train"))
    assert models == {f"{NAME}/models/model.pt", f"{NAME}/models/reference.pt"}
    assert inference["width"] == train["width"] == 0.25 and inference["detection"]["fpn_channels"] == 8
    assert inference["tasks"]["detection"] == 0.5 and inference["tasks"]["segmentation"] == 1.0
    assert train["max_epochs"] == 7 and "max_epochs" not in inference
    before = json.loads((source / "configs/inference.json").read_text())
    assert list(inference) == list(before) and inference["run"] == before["run"]
    torch.save({**reference, "checkpoint": "of others"}, folder / "reference.pt")
    with pytest.raises(ValueError, match="reference.pt: found the reference of other weights than"):
        package_bundle(tmp_path / "again", source, folder / "model.pt", [overlay])
    assert not (tmp_path / "again").exists()


def test_large_files_stay_out_and_monai_finds_them(source, tmp_path, monkeypatch):
    monkeypatch.setattr(packaging, "LIMIT", 1_000_000)
    with pytest.raises(ValueError, match=r"models/model.pt: found 1\.8 MB, expected at most 1;"):
        package_bundle(tmp_path, source)
    with zipfile.ZipFile(package_bundle(tmp_path, source, url=f"{source.as_uri()}/")) as file:
        assert f"{NAME}/{WEIGHTS}" not in file.namelist()
        file.extractall(tmp_path)
    download_large_files(str(tmp_path / NAME))
    assert (tmp_path / NAME / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    (tmp_path / NAME / WEIGHTS).write_bytes(b"something else")
    with pytest.raises(Exception, match="sha256 hash check"):
        download_large_files(str(tmp_path / NAME))
