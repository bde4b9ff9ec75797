"""Experiments are run, not run twice, and compare what they say they compare."""

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command
import pytest
import torch
from filelock import FileLock
from monai.bundle import ConfigParser

from bundle.errors import UserError
from bundle.study import Experiment, Study, experiment_names, read_results, write_report
from bundle.study.experiment import ARM, COLUMNS, add_results
from bundle.names import TASKS

CONFIGS = Path(__file__).parents[2] / "configs"
SCALES = list(json.loads((CONFIGS / "scales.json").read_text()))
ONE, TWO = ({"tasks": {task: 1.0}} for task in ("segmentation", "reconstruction"))


def make_study(folder, scale="smoke", **entries):
    return Study(CONFIGS, scale, entries, folder / "runs", folder / "results.csv")


def make(name="x", workflow="run", settings=(), seeds=(0,), **arms):
    return Experiment(name, "Title", "Question?", arms, seeds, ["Dice"], workflow, settings)


def steps(config, workflow):
    """Steps of the optimiser: as many as batches."""
    stages = config["stages"].values() if workflow == "training" else [config]
    epochs = [ConfigParser({**config, **entries}).get_parsed_content("max_epochs") for entries in stages]
    return sum(epochs) * (config["epoch_size"] // config["batch_size"])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", experiment_names(CONFIGS))
def test_the_arms_of_an_experiment_make_the_same_number_of_steps(tmp_path, name, scale):
    experiment, study = Experiment.read(name, CONFIGS), make_study(tmp_path, scale)
    totals, folders = {}, []
    for arm in experiment.arms:
        configs = [study.config(experiment, parts, 0, i) for i, parts in enumerate(experiment.members(arm))]
        totals[arm] = sum(steps(config, experiment.workflow) for config in configs)
        folders += [config["output_dir"] for config in configs]
    assert len(set(totals.values())) == 1 and min(totals.values()) > 0, totals
    assert len(set(folders)) == len(folders), "no two arms are the same run"


def test_a_run_is_known_by_what_it_computes(tmp_path):
    study = make_study(tmp_path, dataset_dir="/a", device="cpu")
    elsewhere = make_study(tmp_path, dataset_dir="/b/a", num_workers=2)
    folder = lambda study, experiment, seed=0, member=0: study.config(  # noqa: E731
        experiment, experiment.members("arm")[0], seed, member
    )["output_dir"]
    one = folder(study, make(arm=[ONE]))
    assert one == folder(elsewhere, make(arm=[ONE])) == folder(study, make("other", settings=[TWO], arm=[ONE]))
    assert one == folder(study, make(arm=[ONE, {"stages": {"stage_joint": {}}}])), "that a single training does not look at"
    different = [make(arm=[TWO]), make(arm=[ONE, {"dropout": 0.1}]), make(workflow="training", arm=[ONE])]
    others = [folder(study, experiment) for experiment in different]
    others += [folder(study, make(arm=[ONE]), seed=1), folder(study, make(arm=[ONE]), member=1)]
    others += [folder(make_study(tmp_path, dataset_dir="/b"), make(arm=[ONE]))]
    others += [folder(study, make(arm=[ONE, {"datalist": "half.json"}])), folder(study, make(arm=[ONE, "preset_cpu.json"]))]
    added = [{"+train#handlers": [{"_target_": f"ignite.handlers.{name}"}]} for name in ("Timer", "TerminateOnNan")]
    others += [folder(study, make(arm=[ONE, *added])), folder(study, make(arm=[ONE, added[1]]))]
    overwritten = [added[0], {"train#handlers": added[1]["+train#handlers"]}]
    others += [folder(study, make(arm=[ONE, *overwritten])), folder(study, make(arm=[ONE, *overwritten[::-1]]))]
    assert len({one, *others}) == 13


def test_overlays_of_an_arm_add_to_what_is_there_as_on_the_command_line(tmp_path):
    experiment = make(plain=[ONE], several=[ONE, "multi_gpu_train.json"])
    plain, several = (make_study(tmp_path).config(experiment, experiment.members(arm)[0], 0) for arm in experiment.arms)
    assert several["initialize"] == [*plain["initialize"][:-1], "$bundle.training.distributed.join()", plain["initialize"][-1]]
    assert several["train"]["dataloader"]["sampler"]["sampler"] == "@train#sampler"


def test_where_things_lie_is_not_for_an_arm_to_say(tmp_path):
    experiment = make(arm=[ONE, {"dataset_dir": "elsewhere"}])
    with pytest.raises(ValueError, match="experiment x: found dataset_dir in its arms, settings or scale, expected it from"):
        make_study(tmp_path).run([experiment])


@pytest.fixture(scope="module")
def first(phantom_dir, tmp_path_factory):
    """A study, and its experiment with two networks, each alone and both as an ensemble, run one by one."""
    study = make_study(tmp_path_factory.mktemp("study"), dataset_dir=str(phantom_dir), device="cpu")
    experiment = make("first", settings=[{"max_epochs": 1}], one=[ONE], both={"members": [[ONE], [TWO]]}, two=[TWO])
    study.run([experiment])
    return study, experiment


def test_experiments_are_run_once_and_share_their_runs(first):
    study, experiment = first
    rows = study.rows(experiment)
    assert [(row["arm"], row["seed"], row["stage"], row["split"], row["steps"]) for row in rows] == [
        ("one", "0", "end", "test", "2"),
        ("both", "0", "end", "test", "4"),
        ("two", "0", "end", "test", "2"),
    ]
    one, both, _ = rows
    assert 0 <= float(one["Dice"]) <= 1 and one["SSIM"] == "" and one["AUROC"] == ""
    # The ensemble's members answer each its own task; its first member is the arm "one" itself.
    assert both["Dice"] == one["Dice"] and both["run"].startswith(one["run"] + "+") and float(both["SSIM"]) > -1
    made = {path: path.stat().st_mtime_ns for path in study.output_dir.rglob("model.pt")}
    assert len(made) == 3
    again = make("second", settings=[{"max_epochs": 1}], again=[ONE])
    study.run([again])
    study.run([experiment])
    assert made == {path: path.stat().st_mtime_ns for path in study.output_dir.rglob("model.pt")}
    assert study.rows(experiment) == rows and len(read_results(study.results)) == 4
    assert [(row["arm"], row["run"]) for row in study.rows(again)] == [("again", one["run"])]


def test_two_runs_at_a_time_lead_to_the_same_figures(first, phantom_dir, tmp_path, monkeypatch):
    """The ensemble shares a network with the first arm: one waits for the other, which trains it."""
    monkeypatch.setattr("bundle.study.study.get_context", lambda _: command.SERVER)  # it has imported everything
    one_by_one, experiment = first
    study = make_study(tmp_path, dataset_dir=str(phantom_dir), device="cpu")
    study.run([experiment], jobs=2)
    assert len(list((tmp_path / "runs").rglob("model.pt"))) == 3
    figures, expected = (
        {(row["arm"], name): float(row[name] or 0) for row in each.rows(experiment) for name in ("Dice", "SSIM", "steps")}
        for each in (study, one_by_one)
    )
    assert figures == pytest.approx(expected, abs=1e-3)  # the number of threads changes the last digits


def test_a_source_is_left_out_and_measured_arm_by_arm(tmp_path, phantom_dir):
    """With the two training patients of class 0 and 1 as sources of their own; the other slices as a third."""
    datalist = json.loads((phantom_dir / "datalist.json").read_text())
    for split in ("training", "validation", "test"):
        for record in datalist[split]:
            record["source"] = {"phantom/p00": "a", "phantom/p01": "b"}.get(record["group"], "c")
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps(datalist))
    entries = {"title": "Out", "question": "Q?", "settings": [{"max_epochs": 1, "datalist": str(path)}]}
    entries |= {"arms": {source: [TWO, {"leave_out": [source]}] for source in "ab"}, "seeds": [0], "figures": ["SSIM"]}
    entries |= {"recipes": {"plain": [], "noisy": [{"denoising": True}]}}
    entries |= {"groups": [{"title": "Pictures", "figure": "SSIM", "arms": ["a", "b"]}]}
    (tmp_path / "experiment_out.json").write_text(json.dumps(entries))
    experiment = Experiment.read(str(tmp_path / "experiment_out.json"), CONFIGS)
    study = make_study(tmp_path, dataset_dir=str(phantom_dir), device="cpu")
    study.run([experiment], arms=["b, *"])
    rows = study.rows(experiment)
    assert [(row["arm"], row["split"]) for row in rows] == [("b, plain", "left_out"), ("b, noisy", "left_out")]
    report = json.loads((tmp_path / "runs/phantom" / rows[0]["run"] / "left_out/metrics.json").read_text())
    assert list(report["reconstruction"]["within_source"]) == ["b"]
    study.run([experiment], arms=["a, plain"])
    table = write_report(experiment, study.rows(experiment), tmp_path).read_text()
    assert re.search(r"\| a \| SSIM \| \S+ \| - \|\n\| b \| SSIM \| \S+ \| \S+ \|\n\| \*\*Pictures\*\*, mean of 2", table)
    with pytest.raises(UserError, match="arms: found c, expected patterns of a, plain; b, plain; a, noisy; b, noisy"):
        study.run([experiment], arms=["c"])


def test_what_an_arm_once_was_is_not_reported(tmp_path, caplog):
    study, before = make_study(tmp_path), make(one=[ONE], two=[TWO], renamed=[TWO])
    runs = {arm: Path(study.config(before, parts, 0)["output_dir"]).name for arm, parts in before.arms.items()}
    row = {**dict.fromkeys(COLUMNS, ""), "experiment": "x", "scale": "smoke", "data": "phantom", "seed": "0"}
    add_results(study.results, [{**row, "arm": arm, "run": run} for arm, run in runs.items()])
    add_results(study.results, [{**row, "arm": "one", "scale": "full", "run": runs["one"]}])
    assert [row["arm"] for row in study.rows(before)] == ["one", "two", "renamed"] and not caplog.records
    changed = make(one=[ONE], two=[TWO, {"dropout": 0.1}])
    assert [(row["arm"], row["scale"]) for row in study.rows(changed)] == [("one", "smoke")]
    assert "results.csv: left out renamed with seed 0, two with seed 0: not what x would run now" in caplog.text


def test_what_is_run_and_in_which_order(tmp_path, monkeypatch):
    """The first seed of all experiments comes before the second of any; another data set's results count for nothing."""
    started = []
    facts = {"stage": "end", "split": "test"}
    monkeypatch.setattr(Study, "_measure", lambda self, run: started.append(run.arm) or [{**facts, "run": run.name}])
    experiments = [make("one", seeds=(0, 1), arm=[ONE]), make("two", arm=[TWO])]
    for data in ("/a", "/b"):
        make_study(tmp_path, dataset_dir=data).run(experiments)
    expected = [(name, "smoke", data, "arm", seed) for data in "ab" for name, seed in (("one", "0"), ("two", "0"), ("one", "1"))]
    assert started == expected
    assert [tuple(row[name] for name in ARM) for row in read_results(tmp_path / "results.csv")] == expected


def test_a_run_waits_where_another_command_trains_its_network(tmp_path, phantom_dir):
    study = make_study(tmp_path, dataset_dir=str(phantom_dir), device="cpu")
    experiment = make(settings=[{"max_epochs": 1}], arm=[ONE])
    folder = Path(study.config(experiment, [ONE], 0)["output_dir"])
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(folder / ".study.lock"):
            done = pool.submit(study.run, [experiment])
            with pytest.raises(TimeoutError):
                done.result(timeout=1)
            assert {path.name for path in folder.iterdir()} == {".study.lock"}
        done.result(timeout=300)
    assert len(read_results(tmp_path / "results.csv")) == 1


KILLED = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from bundle.study.study import _start_job

pool = ProcessPoolExecutor(1, get_context("fork"), _start_job, (1,))
print("job", pool.submit(os.getpid).result(), flush=True)
pool.submit(time.sleep, 600)
os.kill(os.getpid(), 9)
"""


def test_no_job_outlives_a_killed_study(tmp_path):
    study = command.start("-c", KILLED, log=tmp_path / "log")
    study.join()
    assert study.exitcode == -signal.SIGKILL
    job, deadline = int((tmp_path / "log").read_text().split()[1]), time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(job, 0)
            time.sleep(0.01)


def test_a_curriculum_is_measured_after_every_stage_and_at_its_end(tmp_path, phantom_dir):
    study = make_study(tmp_path, dataset_dir=str(phantom_dir), device="cpu")
    quarter, number = {"max_epochs": "$@budget // 4"}, {"max_epochs": 1}
    # An expression of a stage is evaluated in the stage: here its encoder is not trained.
    frozen = {**quarter, "optimizer::params": "$[*@network.heads.parameters(), *@loss.to(@device).parameters()]"}
    stages = {"stages": {"stage_segmentation": frozen, "stage_joint": number}}
    study.run([make(workflow="training", arm=[stages])])
    rows = read_results(tmp_path / "results.csv")
    assert [(row["stage"], row["split"], row["steps"]) for row in rows] == [
        ("end", "test", "4"),
        ("stage_segmentation", "validation", "4"),
        ("stage_joint", "validation", "4"),
    ]
    assert rows[1]["AUROC"] == "" and all(rows[stage][column] != "" for stage in (0, 2) for column in ("AUROC", "Dice"))
    (folder,) = (tmp_path / "runs/phantom").iterdir()
    trained = [
        len(torch.load(folder / stage / "last.pt", weights_only=True)["optimizer"]["state"]) for stage in stages["stages"]
    ]
    assert 0 < trained[0] < trained[1], "parameters of the heads, then all of them"
    assert set(json.loads((folder / "test/metrics.json").read_text())) == set(TASKS)


def test_nothing_is_run_before_every_configuration_was_checked(tmp_path, phantom_dir):
    study = make_study(tmp_path, dataset_dir=str(phantom_dir))
    with pytest.raises(ValueError, match="configuration: found 'learning_rat'.*near matches: learning_rate"):
        study.run([make(one=[ONE], two=[{"learning_rat": 1}])])
    with pytest.raises(UserError, match="experiment: found no overlay .*backbone_x.json"):
        study.run([make(one=[ONE], two=["backbone_x.json"])])
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results.csv").exists()
    with pytest.raises(UserError, match="scale: found 'x', expected one of reduced, full, screening, smoke, the entries"):
        make_study(tmp_path, "x")


def test_the_document_names_every_experiment_and_the_budget_of_every_scale(tmp_path):
    document = (CONFIGS.parent / "docs/experiments.md").read_text()
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in document.splitlines() if line.startswith("| `")]
    listed = {name for names in rows for name in names}
    assert {*experiment_names(CONFIGS), *SCALES} <= listed
    for scale in SCALES:
        budget, slices = re.search(rf"^\| `{scale}` \|.*\| ([\d,]+) steps of (\d+) slices \|$", document, re.M).groups()
        config = make_study(tmp_path, scale).config(make(arm=[]), [], 0)
        assert (steps(config, "run"), config["batch_size"]) == (int(budget.replace(",", "")), int(slices)), scale
