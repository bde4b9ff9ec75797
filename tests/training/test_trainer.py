"""A run: what it leaves, that it is repeatable and resumable, and that the knobs reach what is trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from bundle.names import TASKS
from bundle.tasks import trained_tasks
from bundle.training.trainer import RunRecorder

ROOT = Path(__file__).parents[2]
CONFIGS = [str(ROOT / f"configs/{name}.json") for name in ("train", "preset_smoke")]
FAST = {"classification": 1.0, "reconstruction": 1.0}


def weights(folder, name="model.pt"):
    return torch.load(folder / name, weights_only=True)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refusal(error) -> str:
    """The line that a user sees: the first cause."""
    error = error.value
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def test_two_runs_end_with_equal_weights_and_another_seed_with_others(run, tmp_path):
    runs = (("a", 0), ("b", 0), ("c", 1))
    first, again, other = (run(tmp_path / name, seed=seed, uncertainty_weights=True) for name, seed in runs)
    assert trained_tasks(first / "model.pt") == TASKS, "all by default"
    assert set(weights(first, "last.pt")["loss"]) == {f"log_variance.{task}" for task in TASKS}
    assert equal(weights(first), weights(again))
    assert (first / "history.json").read_text() == (again / "history.json").read_text()
    assert not equal(weights(first), weights(other))


def test_a_run_keeps_what_is_needed_to_read_and_repeat_it(run, tmp_path):
    out = run(tmp_path / "run", tasks=FAST, max_epochs=2, seed=5)
    files = {"best.pt", "last.pt", "model.pt", "metrics.json", "history.json", "curves.png", "config.json", "environment.json"}
    assert files <= {path.name for path in out.iterdir()}
    assert not list(out.rglob("*.tmp"))
    config, history = json.loads((out / "config.json").read_text()), json.loads((out / "history.json").read_text())
    assert (config["seed"], config["backbone"]) == (5, "test_efficientnet"), "overlay and override merged in"
    assert json.loads((out / "environment.json").read_text())["torch"] == torch.__version__.split("+")[0]
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert history[0]["learning_rate"] < history[1]["learning_rate"], "rate of the epoch itself, warm-up first"
    assert {"loss", "loss_classification", "loss_reconstruction", "classification_auroc", "score"} <= history[0].keys()
    assert json.loads((out / "metrics.json").read_text()) == max(history, key=lambda entry: entry["score"])
    assert list(out.glob("events.out.tfevents.*"))


def test_the_last_epoch_is_validated_whatever_the_interval(run, tmp_path):
    out = run(tmp_path / "run", tasks=FAST, max_epochs=3, val_interval=2, batch_size=100)
    assert all(entry["loss"] > 0 for entry in json.loads((out / "history.json").read_text())), "one smaller batch"
    assert ["score" in entry for entry in json.loads((out / "history.json").read_text())] == [False, True, True]


def test_averaged_weights_start_from_the_checkpoint_and_are_what_is_validated_and_kept(run, finished, tmp_path):
    entries = {"tasks": FAST, "init_checkpoint": str(finished / "model.pt"), "ema_momentum": 0.5}
    still = run(tmp_path / "still", learning_rate=0.0, **entries)
    parameters = {key for key in weights(still) if not key.endswith(("mean", "var", "tracked"))}
    assert all(torch.equal(weights(still)[key], weights(finished)[key]) for key in parameters)
    moved = run(tmp_path / "moved", **entries)
    assert equal(weights(moved), weights(moved, "last.pt")["average"])
    assert not equal(weights(moved), weights(moved, "last.pt")["network"])
    assert not equal(weights(moved), weights(still))


def test_with_a_frozen_encoder_the_heads_of_the_tasks_are_trained_alone(run, finished, tmp_path):
    entries = {"tasks": {"reconstruction": 1.0}, "init_checkpoint": str(finished / "model.pt")}
    out = run(tmp_path / "run", frozen_encoder=True, **entries)
    before, after = weights(finished), weights(out)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys() and changed and all(key.startswith("heads.reconstruction.") for key in changed)


@pytest.mark.parametrize(
    "scores, expected",
    [([0.1, 0.3, 0.3], 2), ([0.3, 0.1], 1), ([np.nan, 0.2, np.nan], 2), ([None, 0.2], 2), ([None, np.nan], None)],
)
def test_the_best_epoch_is_the_earliest_of_the_highest_finite_scores(scores, expected, tmp_path):
    recorder = RunRecorder(tmp_path, {}, None, None)
    recorder.history = [{"epoch": n, **({} if s is None else {"score": s})} for n, s in enumerate(scores, 1)]
    assert (recorder.best() or {}).get("epoch") == expected
    if expected is None:
        with pytest.raises(ValueError, match="no epoch with a validation score"):
            recorder.finish(None)


def test_a_loss_that_is_not_finite_names_the_images_and_leaves_no_checkpoint(run, tmp_path):
    with pytest.raises(RuntimeError) as error:
        run(tmp_path / "run", tasks=FAST, learning_rate=1e30)
    assert "lower learning_rate" in refusal(error) and ".nii.gz" in refusal(error)
    assert not (tmp_path / "run/last.pt").exists()


def test_a_finished_run_is_resumed_without_training_and_may_move_to_another_device(run, tmp_path):
    out = run(tmp_path / "run", tasks=FAST)
    before, last = weights(out), (out / "last.pt").stat().st_mtime_ns
    (out / "model.pt").unlink()  # as if killed before the end
    run(out, tasks=FAST, cache_rate=0.5, device="$torch.device('cpu')")
    assert equal(before, weights(out)) and (out / "last.pt").stat().st_mtime_ns == last


def test_a_run_is_not_resumed_under_another_configuration(run, finished):
    before = (finished / "config.json").read_text()
    with pytest.raises(RuntimeError) as error:
        run(finished, tasks=FAST, augmentation={"_target_": "Compose", "transforms": []})
    assert "holds a run with augmentation::transforms" in refusal(error)
    assert (finished / "config.json").read_text() == before


def test_resume_false_starts_anew_and_leaves_nothing_old(run, tmp_path):
    out = run(tmp_path / "run", tasks=FAST)
    events = set(out.glob("events.out.tfevents.*"))
    run(out, tasks=FAST, seed=1, resume=False)
    assert json.loads((out / "config.json").read_text())["seed"] == 1
    assert not events & set(out.glob("events.out.tfevents.*"))


def test_a_task_that_no_record_is_annotated_for_is_refused_unless_the_checkpoint_answers_it(run, finished, tmp_path):
    select = "bundle.data.datalist.select(@records, 'training', @task_list, @dataset_dir)"

    def without_classes(**entries):
        data = f"$[{{key: value for key, value in record.items() if key != 'class'}} for record in {select}]"
        return run(tmp_path / "run", tasks=FAST, **{"train::data": data, **entries})

    with pytest.raises(RuntimeError) as error:
        without_classes()
    assert refusal(error).startswith("split training: found no record annotated for classification, expected one for each")
    assert not (tmp_path / "run").exists()
    out = without_classes(init_checkpoint=str(finished / "model.pt"))
    assert trained_tasks(out / "model.pt") == ("classification", "reconstruction")


@pytest.mark.parametrize("name", ["model.pt", "last.pt"])
def test_heads_of_the_first_checkpoint_travel_along(run, finished, tmp_path, name):
    tasks = {"segmentation": 1.0, "reconstruction": 1.0}
    second = run(tmp_path / "second", tasks=tasks, init_checkpoint=str(finished / name))
    assert trained_tasks(second / "model.pt") == ("classification", "segmentation", "reconstruction")
    key = "heads.classification.0.weight"
    assert torch.equal(weights(finished)[key], weights(second)[key])


def test_everything_is_trained_and_the_rate_is_highest_after_the_warm_up(phantom_dir):
    parser = ConfigParser()
    parser.read_config(CONFIGS)
    parser.update({"dataset_dir": str(phantom_dir), "uncertainty_weights": True, "warmup_epochs": 3, "max_epochs": 10})
    network, loss, optimizer, schedule = map(parser.get_parsed_content, ("network", "loss", "optimizer", "lr_scheduler"))
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {*network.parameters(), *loss.parameters()} and len(list(loss.parameters())) == len(TASKS)
    factors = [schedule.lr_lambda(epoch) for epoch in range(11)]
    assert factors[0] == 0.1 and max(factors) == factors[3] == 1

