"""The life of a curriculum: what it measures, skips, resumes and starts anew."""

import json
import shutil

import pytest
import torch
from test_trainer import FAST, equal, refusal, weights

from bundle.files import list_files, stop_listing, write_json
from bundle.tasks import trained_tasks

STAGES = ["stage_classification", "stage_segmentation", "stage_detection", "stage_joint"]


@pytest.fixture
def curriculum(run, tmp_path):
    def curriculum(**entries):
        return run(tmp_path / "curriculum", run_id="training", **entries)

    return curriculum


def test_curriculum_measures_every_trained_task_after_every_stage_and_skips_what_is_finished(curriculum):
    out = curriculum()
    trained = {"classification", "reconstruction"}
    for stage in STAGES:
        trained |= {"segmentation"} if stage == "stage_segmentation" else set()
        trained |= {"detection"} if stage in ("stage_detection", "stage_joint") else set()
        assert set(trained_tasks(out / stage / "model.pt")) == trained
        assert json.loads((out / stage / "validation/metrics.json").read_text()).keys() == trained
        assert json.loads((out / stage / "train.json").read_text())["output_dir"] == str(out / stage)
    table = (out / "stage_table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == STAGES
    assert "-" not in table.splitlines()[-1].split("|")[2:], "after the last stage every task has a figure"
    assert equal(weights(out), weights(out / "stage_joint"))

    files = [path for path in out.rglob("*") if path.is_file() and path.parent != out]
    before = {path: path.stat().st_mtime_ns for path in files}
    curriculum()
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert (out / "stage_table.md").read_text() == table

    with pytest.raises(RuntimeError) as error:
        curriculum(learning_rate=0.1)
    assert "stage_classification: holds a run with learning_rate 0.0003, found 0.1" in refusal(error)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_a_head_for_other_classes_waits_for_the_stage_that_trains_it(curriculum, run, tmp_path):
    scar = {"tasks": {"segmentation": 1.0, "reconstruction": 1.0}, "segmentation_classes": ["scar"]}
    first = weights(run(tmp_path / "first", **scar))
    lesion = {"init_checkpoint": str(tmp_path / "first/model.pt"), "segmentation_classes": ["lesion"]}
    out = curriculum(stages=dict.fromkeys(STAGES[:2], {}), **lesion)
    measured = [json.loads((out / stage / "validation/metrics.json").read_text()).keys() for stage in STAGES[:2]]
    assert measured[0] == {"classification", "reconstruction"}, "the head of scars is not that of lesions"
    assert measured[1] == {"classification", "segmentation", "reconstruction"}
    block = "heads.segmentation.blocks.0.convs.conv_0.conv.weight"
    assert torch.equal(weights(out / "stage_classification")[block], first[block]), "but is handed on"


def test_stages_without_transfer_stand_alone(curriculum, tmp_path, run):
    stages = {"stage_classification": {}, "stage_segmentation": {"transfer": False}}
    out = curriculum(stages=stages)
    assert trained_tasks(out / "stage_segmentation/model.pt") == ("segmentation", "reconstruction")
    assert json.loads((out / "stage_segmentation/config.json").read_text())["init_checkpoint"] is None
    rows = (out / "stage_table.md").read_text().splitlines()[2:]
    assert rows[0].split("|")[2].strip() != "-" and rows[1].split("|")[2].strip() == "-"
    alone = run(tmp_path / "alone", tasks={"segmentation": 1.0, "reconstruction": 1.0}, stages=stages)
    assert equal(weights(alone), weights(out / "stage_segmentation")), "as trained by itself"


def test_a_stage_starts_anew_alone_and_the_curriculum_as_a_whole(curriculum, run):
    stages = {"stage_classification": {}, "stage_segmentation": {}}
    out = curriculum(stages=stages)
    made = {stage: (out / stage / "model.pt").stat().st_mtime_ns for stage in stages}
    row = (out / "stage_table.md").read_text().splitlines()[2]
    run(out / "stage_classification", overlays=["evaluate"], tasks=FAST, bootstrap=0)
    assert (out / "stage_classification/evaluation/metrics.json").exists()
    curriculum(stages={**stages, "stage_segmentation": {"learning_rate": 0.001, "resume": False}})
    assert (out / "stage_table.md").read_text().splitlines()[2] == row, "not what a user measures of the stage"
    newer = [(out / stage / "model.pt").stat().st_mtime_ns > made[stage] for stage in stages]
    assert newer == [False, True]
    assert json.loads((out / "stage_segmentation/config.json").read_text())["learning_rate"] == 0.001

    before = weights(out / "stage_segmentation")
    list_files(out)
    write_json({}, out / "evaluation/metrics.json")
    stop_listing(out)
    (out / "stage_segmentation/notes.txt").touch()
    curriculum(stages=stages, seed=1, resume=False)
    assert not (out / "evaluation").exists(), "it measured the weights that were removed"
    assert (out / "stage_segmentation/notes.txt").exists()
    assert not equal(before, weights(out / "stage_segmentation"))


def test_weights_that_starting_anew_would_remove_are_kept(run, curriculum, finished, tmp_path):
    origin = tmp_path / "run/model.pt"
    shutil.copytree(finished, origin.parent)
    with pytest.raises(RuntimeError) as error:
        run(origin.parent, tasks=FAST, init_checkpoint=str(origin), resume=False)
    assert refusal(error).startswith(f"init_checkpoint: found {origin}, which resume false would remove")
    assert origin.exists()
    stages = {"stage_classification": {}, "stage_segmentation": {}}
    for folder in (tmp_path / "curriculum", tmp_path / "curriculum/stage_segmentation"):
        shutil.copytree(finished, folder)
        with pytest.raises(RuntimeError) as error:
            curriculum(stages=stages, init_checkpoint=str(folder / "model.pt"), resume=False)
        assert "which resume false would remove" in refusal(error) and (folder / "model.pt").exists()


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"stages": {"stage_x": {}}}, "stages::stage_x: found no tasks, expected some"),
        ({"stages": {"stage_joint": {"learning_rat": 1}}}, "learning_rate"),
        ({"tasks": FAST}, "set stages::NAME::tasks instead"),
    ],
)
def test_curriculum_refuses_stages_it_cannot_run(curriculum, entries, words):
    with pytest.raises(RuntimeError) as error:
        curriculum(**entries)
    assert words in refusal(error)
